"""to_arviz: a fit and its tasks as ArviZ data, an `InferenceData` (0.x) or a `DataTree` (1.x)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from importlib.metadata import version
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from varmeta import parts
from varmeta.checked import require_kind
from varmeta.export_rows import by_row, counted, derived, log_likelihoods
from varmeta.files import BrokenFile, why
from varmeta.inference.diagnostics import by_task
from varmeta.inference.fitted import Fit
from varmeta.inference.nuts import PyroNUTS
from varmeta.inference.soundness import check_posterior
from varmeta.models.density import Density
from varmeta.models.observed import observed_data
from varmeta.models.trial import taken_name
from varmeta.posterior import Draws, Gaussian, TaskPosterior, thinned
from varmeta.seeds import generator
from varmeta.shrinkage import MOST_MODULES
from varmeta.tasks import Tasks, TaskSource

if TYPE_CHECKING:  # imported where it is used, so that `import varmeta` does not wait for it
    import xarray as xr

Variable = tuple[tuple[str, ...], np.ndarray]  # dimensions, values
Variables = dict[str, Variable]

_SAMPLE, _PRIOR, _PREDICT, _PRIOR_PREDICT = range(4)  # streams of the export's seed
_DRAW = ("chain", "draw")
_HDF5 = b"\x89HDF\r\n\x1a\n"
_DRAWS, _FEWEST_DRAWS = 500, 100
_NUMBERS = 50_000_000  # of a default export: 200 MB in single precision


def to_arviz(
    fit: Fit,
    tasks: Tasks | None = None,
    *,
    posterior: TaskPosterior | None = None,
    draws: int | None = None,
    seed: int = 0,
    predictive: bool = True,
    log_likelihood: bool = True,
    single: bool = False,
) -> Any:
    """A fit and its tasks as ArviZ data, for `az.summary`, `az.plot_forest`, `az.loo` and so on.

    Groups:

    - `posterior`: every adapted site by name on the model's own scale, `(chain, draw, task, ...)`;
      every shared site and param, `(chain, draw, ...)`, constant where the strategy has a point
      estimate of it. (New tasks adapted to by NUTS or nested Laplace have draws of φ of their own,
      and `task` among the dimensions.) `pyro.deterministic` sites of the model:
      `(chain, draw, row, ...)` where they have a value for each row, else
      `(chain, draw, task, ...)`. With the draws of NUTS and of nested Laplace come θ0 and Σ's
      standard deviations, as `<site>_loc` and `<site>_scale` on the unconstrained scale.
    - `prior`: what is known of each task before its data are seen: θ_i ~ N(θ0, Σ) on the model's
      own scale, and the shared sites, with the dimensions that they have in `posterior`, as
      `az.plot_dist_comparison` wants it. For NUTS and nested Laplace θ0, Σ and φ are drawn from
      their posterior, and `<site>_loc` and `<site>_scale` are there too.
    - `posterior_predictive`, `prior_predictive`, `log_likelihood`, `observed_data`:
      `(..., row, ...)`, the rows that exist, task after task. Coordinates `task_of_row` and
      `row_id` (`tasks.row_ids`) of `observed_data` and `constant_data` say which they are (in a
      group with draws they would be columns of `idata.to_dataframe()`). The variable is the
      observed site. If there are several, `log_likelihood` has each and, as `tasks.target_name`
      (`total` if a site is called so), their sum: tell `az.loo` by `var_name` which. What was
      observed is what the model made of the targets: the log of them with `obs=y.log()`; NaN where
      a mask of the model leaves it out, as of a censored time. A draw of `prior_predictive` has
      each task's θ_i of `prior`. Where the model cannot predict both are left out, with a warning.
      Where all rows of a task are one draw, `log_likelihood` is `(..., task)`.
    - `constant_data`: `inputs` `(row, input)`, `num_rows` `(task)`; and, save for NUTS and nested
      Laplace, `<site>_loc` and `<site>_scale`. They are point estimates then: repeated over draws
      they would have no ESS or R-hat, and `az.summary` and the trace plots would warn of that.
    - `sample_stats`: for NUTS `diverging` `(chain, draw)`; for a posterior with a density `log_p`,
      which is log p(y_i | θ_i, φ) + log N(θ_i; θ0, Σ), and `log_q`, log q_i(θ_i), `(chain, draw,
      task)`, in nats, of each draw: both are densities of the unconstrained θ_i. ArviZ 1.x's
      `az.loo_approximate_posterior` takes them for the rows of one task, `loo` for all tasks.
      Left out where there are none.
    - `adaptation_data`: diagnostics of the adaptation, `(task)`; for the training tasks also those
      of the last training step on each that the adaptation does not have (the worst over a task's
      folds). A group of varmeta's own, as the next; those with "data" in their name are left out of
      `idata.to_dataframe()`, which has one row per draw.
    - `shrinkage_data`: the columns of `fit.shrinkage()` for these tasks, `(module)`: `size`,
      `scale`, `start`, `movement`, `relative`, `cost`, `cost_se`, `optimism` (nats per task; on the
      query rows of `tasks`, if it has some) and, for its verdict, `adapted`. Left out for a prior
      of more than 1,000 modules.

    With a `"delta"` posterior all draws are alike, which leaves PSIS (`az.loo`, `az.compare`)
    nothing to go by: ArviZ 0.x warns of every row, ArviZ 1.x raises.

    Args:
        fit: the result of `fit`.
        tasks: tasks to adapt to; the rows are those of their support parts. None: the training
            tasks with all of their rows.
        posterior: the posterior of these tasks, if you have it already: `fit.posterior()`, or
            `fit.adapt(tasks.support)`.
        draws: how many, in one chain; None for 500, or where there are so many tasks and rows that
            these were more than 50 million numbers for as many as are, but at least 100. Draws that
            the strategy made itself are all kept, chain by chain, for `PyroNUTS`; there are no more
            of them than it made for others. (ArviZ 1.x leaves a fit with fewer draws per chain than
            another out of their common plot.)
        seed: of the draws; the same seed gives the same values.
        predictive: whether to have the groups `posterior_predictive` and `prior_predictive`, a
            number per row and draw each.
        log_likelihood: whether to have the group `log_likelihood`, as many.
        single: store draws in single precision, half as large, save for those of a variable whose
            spread is less than a thousand times the rounding, and for `log_p` and `log_q`, of which
            the difference counts. So `compare` does in its files.

    Returns:
        `arviz.InferenceData` with ArviZ 0.x, `xarray.DataTree` with ArviZ 1.x. A `/` in a name,
        which neither allows, becomes a `.`.

    Raises:
        ValueError: a posterior of other tasks, no tasks for a fit on a stream, no draws, a site
            with the name of a dimension or of another variable.
        NonFinitePosterior: naming the task.
    """
    require_kind("fit", fit, Fit, "vm.fit(strategy, density, tasks) returns one")
    if draws is not None and draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    if tasks is None and isinstance(fit.tasks, TaskSource):
        raise ValueError("a stream's tasks are not kept; give to_arviz the tasks to adapt to")
    check_names(fit.density)
    rows = fit.tasks.unsplit if tasks is None else tasks.support  # type: ignore[union-attr]
    if posterior is None:
        posterior = fit.posterior() if tasks is None else fit.adapt(rows)
    elif posterior.names != rows.names:
        raise ValueError(
            f"posterior is of {_some(posterior.names)}, the tasks are {_some(rows.names)}; pass "
            "the posterior of these tasks, or leave it out"
        )
    check_posterior(fit.strategy.name, posterior)
    trained = tasks is None or tasks is fit.tasks
    wanted = {"posterior_predictive": predictive, "log_likelihood": log_likelihood}
    if draws is None:
        draws = _default_draws(posterior, rows, 2 * predictive + log_likelihood)
    with torch.no_grad():
        groups = _groups(fit, rows, posterior, trained, draws, seed, wanted)
        if single:
            for name in {"posterior", "prior", "prior_predictive", *wanted} & set(groups):
                groups[name] = {n: (dims, _single(v)) for n, (dims, v) in groups[name].items()}
        query = tasks.query if tasks is not None and bool(tasks.is_query.any()) else None
        groups["shrinkage_data"] = _shrinkage(fit, rows, posterior, query)
    names = np.array(rows.names)
    coords = {
        "module": ("module", np.array([n.replace("/", ".") for n in fit.prior.modules.names])),
        "task": ("task", names),
        "task_of_row": ("row", names.repeat(rows.num_rows.cpu().numpy())),
        "row_id": ("row", _numpy(rows.row_ids[rows.mask])),  # type: ignore[index]
        "input": ("input", np.array(rows.input_names)),
    }
    attrs = {
        "creation_library": "varmeta",
        "inference_library": "varmeta",
        "inference_library_version": version("varmeta-ppl"),
        "strategy": fit.strategy.name,
        "strategy_repr": repr(fit.strategy),
        "posterior_kind": posterior.kind,
        "task_name": rows.task_name,
        "seed": fit.seed,
        "draws_seed": seed,
    }
    # Of rows, `to_dataframe` would take them for variables of a group with draws.
    indices = {name: coord for name, coord in coords.items() if name == coord[0]}
    made = {
        name: _dataset(values, coords if "data" in name else indices)
        for name, values in groups.items()
        if values
    }
    return _container(made, attrs)


def netcdf(data: Any) -> memoryview:
    """The bytes of a netCDF file with what `to_arviz` returned; `from_netcdf` reads it.

    Numbers are compressed, which gives them check sums. Made in memory: HDF5 ends the process if
    it is writing when the disk is full.
    """
    import xarray as xr

    if not isinstance(data, xr.DataTree):
        groups = {name: data[name] for name in data.groups()}
        data = xr.DataTree.from_dict({"/": xr.Dataset(attrs=data.attrs), **groups})
    packed = {"zlib": True}
    encoding = {
        node.path: {
            n: packed for n, v in node.variables.items() if v.ndim and v.dtype.kind in "iuf"
        }
        for node in data.subtree
    }
    made: memoryview = data.to_netcdf(None, engine="h5netcdf", encoding=encoding)
    return made


def from_netcdf(path: str | PathLike[str]) -> Any:
    """Read a file that `compare` wrote, or ArviZ: what `to_arviz` returned, wholly in memory.

    Raises:
        BrokenFile: it cannot be read, or is empty, cut short, damaged or no netCDF file.
    """
    import arviz

    try:
        with open(path, "rb") as file:
            start = file.read(len(_HDF5))
        if start != _HDF5:
            reason = "it is no netCDF file" if start else "it is empty"
        else:
            return arviz.from_netcdf(path).load()  # whole: or damage would be found later
    except MemoryError:
        raise
    except OSError as error:
        reason = why(error) if error.filename else "it is cut short or damaged"
    except Exception:
        reason = "it is cut short or damaged"
    raise BrokenFile(f"{path} cannot be read: {reason}; run the comparison again to write it anew")


def _groups(
    fit: Fit,
    rows: Tasks,
    posterior: TaskPosterior,
    trained: bool,
    draws: int,
    seed: int,
    wanted: Mapping[str, bool],
) -> dict[str, Variables]:
    density, device = fit.density, fit.prior.loc.device
    chains = 1
    if isinstance(posterior, Draws):
        chains, total = posterior.num_chains, len(posterior.draws)
        nuts = isinstance(fit.strategy, PyroNUTS)
        draws = total if nuts or chains > 1 else min(draws, total)
    theta, shared = posterior.sample(draws, generator(seed, _SAMPLE, device=device))
    drawn = _drawn(density.constrain(theta), "task", chains=chains)
    drawn |= _shared(density, shared, draws, chains)
    more = derived(density, theta, rows, shared)
    drawn |= {n: _variable(n, v, *_DRAW, d, chains=chains) for n, (d, v) in more.items()}
    hyper, learned, fresh, of_prior = _prior(
        fit, theta, chains, generator(seed, _PRIOR, device=device)
    )
    # What has no dimensions of draws would be in the way of `to_dataframe` in `sample_stats`.
    stats, adaptation = Variables(), _stats(fit, posterior, trained)
    constant = {"num_rows": _variable("num_rows", rows.num_rows, "task")}
    if rows.inputs[0, 0].numel():
        named = rows.inputs.dim() == 3 and len(rows.input_names) == rows.inputs.shape[-1]
        lead = ("row", "input") if named else ("row",)
        constant["inputs"] = _variable("inputs", rows.inputs[rows.mask], *lead)
    if not of_prior:
        constant |= hyper
    elif isinstance(posterior, Draws) and _of_one_draw(fit, posterior):
        drawn |= hyper
        if "diverging" in fit.state.tensors:
            stats = _drawn({"diverging": fit.state.tensors["diverging"]}, chains=chains)

    predicted, before, nats = dict[str, Tensor](), dict[str, Tensor](), dict[str, Tensor]()
    if wanted["posterior_predictive"] and density.cannot_predict is not None:
        warnings.warn(
            f"posterior_predictive is left out: {density.cannot_predict}",
            RuntimeWarning,
            stacklevel=3,
        )
    elif wanted["posterior_predictive"]:
        noise, other = (generator(seed, k, device=device) for k in (_PREDICT, _PRIOR_PREDICT))
        predicted = by_row(parts.predict(density, theta, rows, noise, shared), rows)
        before = by_row(parts.predict(density, fresh[0], rows, other, fresh[1]), rows)
    if wanted["log_likelihood"]:
        nats = log_likelihoods(density, theta, rows, shared)
    if isinstance(posterior, Gaussian):
        summed = parts.total_log_likelihood(density, theta, rows, shared)
        log_p = summed + fit.prior.log_prob(theta)
        weights = {"log_p": log_p, "log_q": posterior.log_prob(theta)}
        stats = _drawn(weights, "task", chains=chains)
    return {
        "posterior": drawn,
        "prior": {name: _as_in(drawn, name, variable) for name, variable in learned.items()},
        "posterior_predictive": _drawn(predicted, "row", chains=chains),
        "prior_predictive": _drawn(before, "row", chains=chains),
        "log_likelihood": _drawn(nats, "task" if density.joint else "row", chains=chains),
        "observed_data": {
            name: _variable(name, counted(site)[rows.mask], "row")
            for name, site in observed_data(density, rows).items()
        },
        "constant_data": constant,
        "sample_stats": stats,
        "adaptation_data": adaptation,
    }


def _default_draws(posterior: TaskPosterior, rows: Tasks, by_row: int) -> int:
    """500, or fewer where the file would be large."""
    targets = rows.targets[0, 0].numel()
    numbers = 2 * len(rows) * (posterior.density.dim + 1) + by_row * int(rows.mask.sum()) * targets
    return min(_DRAWS, max(_FEWEST_DRAWS, _NUMBERS // numbers))


def _single(values: np.ndarray) -> np.ndarray:
    """`[chain, draw, ...]` in single precision, unless rounding would show in its spread."""
    if values.dtype != np.float64:
        return values
    low, high = values.min((0, 1)), values.max((0, 1))
    size = np.maximum(np.abs(low), np.abs(high))
    seen = size * np.finfo(np.float32).eps > 1e-3 * values.std((0, 1))
    seen &= low < high  # the spread of a constant is rounding
    return values if seen.any() or not np.isfinite(size).all() else values.astype(np.float32)


def _of_one_draw(fit: Fit, posterior: Draws) -> bool:
    """Whether each draw of θ belongs to one of θ0 and Σ; those of new tasks were resampled."""
    theta = fit.state.tensors.get("theta")
    if theta is not None:  # of NUTS
        return torch.equal(posterior.draws, theta)
    return "importance_ess" not in posterior.stats


def _prior(
    fit: Fit, like: Tensor, chains: int, noise: torch.Generator
) -> tuple[Variables, Variables, tuple[Tensor, Tensor], bool]:
    """θ0 and the standard deviations of Σ; θ_i ~ N(θ0, Σ), with φ; these two, as `sample` has them.

    And whether θ0 and Σ are draws, and no points. As many draws as `like` `[S, T, D]` has; of NUTS
    as many as were kept.
    """
    density, prior, draws = fit.density, fit.prior, len(like)
    kept = (fit.settled or fit.strategy).shared_draws(fit.state)
    if kept is None:
        variance = prior.scale**2 + (0 if prior.factor is None else prior.factor.square().sum(-1))
        hyper = _hyper(density, prior.loc, variance.sqrt())
        theta = prior.sample(like.shape[:-1], noise)
        new = _drawn(density.constrain(theta), "task", chains=chains)
        return hyper, new | _shared(density, fit.shared, draws, chains), (theta, fit.shared), False
    chains = fit.strategy.chains if isinstance(fit.strategy, PyroNUTS) else 1
    if not isinstance(fit.strategy, PyroNUTS) and draws < len(kept["loc"]):  # as those of tasks are
        index = thinned(len(kept["loc"]), draws, prior.loc.device)
        kept = {name: value[index] for name, value in kept.items()}
    loc, scale = kept["loc"], kept["log_scale"].exp()[:, prior.groups]
    shape = (len(loc), *like.shape[1:])
    standard = torch.randn(shape, generator=noise, dtype=loc.dtype, device=loc.device)
    theta = loc[:, None] + scale[:, None] * standard
    hyper = _hyper(density, loc, scale, *_DRAW, chains=chains)
    new = _drawn(density.constrain(theta), "task", chains=chains)
    new |= _shared(density, kept["shared"][:, None], len(loc), chains)
    return hyper, new | hyper, (theta, kept["shared"][:, None].expand(-1, like.shape[1], -1)), True


def _as_in(posterior: Variables, name: str, variable: Variable) -> Variable:
    """With the dimension `task` where it has it in the posterior: φ of new tasks under NUTS."""
    dims, values = variable
    wanted, there = posterior.get(name, variable)
    if "task" not in wanted or "task" in dims:
        return variable
    shape = (*values.shape[:2], *there.shape[2:])
    return wanted, np.broadcast_to(values[:, :, None], shape)


def _variable(stem: str, value: Tensor | np.ndarray, *lead: str, chains: int = 1) -> Variable:
    """Leading dimensions by name, the others as `<stem>_dim_k`; draws are split into chains."""
    array = _numpy(value)
    if lead[:2] == _DRAW:
        array = array.reshape(chains, len(array) // chains, *array.shape[1:])
    return (*lead, *(f"{stem}_dim_{k}" for k in range(array.ndim - len(lead)))), array


def _drawn(values: Mapping[str, Tensor], *lead: str, chains: int) -> Variables:
    return {name: _variable(name, v, *_DRAW, *lead, chains=chains) for name, v in values.items()}


def _shared(density: Density, shared: Tensor, draws: int, chains: int) -> Variables:
    """φ `[P]`, one value for all draws, or `[S, T, P]`, most often the same for all tasks."""
    lead = ["task"]
    if shared.dim() == 1:
        shared, lead = shared.expand(draws, -1), []
    elif torch.equal(shared, shared[:, :1].expand_as(shared)):
        shared, lead = shared[:, 0], []
    return _drawn(density.constrain_shared(shared), *lead, chains=chains)


def _hyper(density: Density, loc: Tensor, scale: Tensor, *lead: str, chains: int = 1) -> Variables:
    """`<site>_loc` and `<site>_scale` from flat `[..., D]`, in the sites' unconstrained shapes."""
    out = {}
    for kind, flat in (("loc", loc), ("scale", scale)):
        parts = flat.split([site.size for site in density.sites], dim=-1)
        for site, part in zip(density.sites, parts, strict=True):
            same = site.unconstrained_shape == site.shape  # not so for a simplex
            stem = site.name if same else f"{site.name}_unconstrained"
            value = part.reshape(flat.shape[:-1] + site.unconstrained_shape)
            out[f"{site.name}_{kind}"] = _variable(stem, value, *lead, chains=chains)
    return out


def _stats(fit: Fit, posterior: TaskPosterior, trained: bool) -> Variables:
    values = {name: _numpy(value) for name, value in posterior.stats.items()}
    if trained:
        values = _training_stats(fit) | values
    return {
        {"grad_norm": "gradient_norm"}.get(name, name): _variable(name, value, "task")
        for name, value in values.items()
    }


def _training_stats(fit: Fit) -> dict[str, np.ndarray]:
    """`fit.stats` per task; the strategy may have seen each task as several, one for each fold."""
    assert isinstance(fit.tasks, Tasks)
    seen = fit.strategy.prepare(fit.tasks, fit.seed)
    assert isinstance(seen, Tasks)
    worst = by_task(fit.stats, seen.names, fit.tasks.names)
    return {name: _numpy(value) for name, value in worst.items()}


def _shrinkage(fit: Fit, rows: Tasks, posterior: TaskPosterior, query: Tasks | None) -> Variables:
    if len(fit.prior.log_scale) > MOST_MODULES:
        return {}
    table = fit.shrinkage(rows, posterior=posterior, query=query).table.set_index("module")
    table["adapted"] = table.pop("verdict") == "adapted"
    return {str(n): _variable(str(n), v.to_numpy(), "module") for n, v in table.items()}


def _dataset(variables: Variables, coords: Mapping[str, tuple[str, np.ndarray]]) -> xr.Dataset:
    """With a coordinate for every dimension, without which some plots of ArviZ 1.x fail."""
    import xarray as xr

    dataset = xr.Dataset(
        {
            name.replace("/", "."): (tuple(dim.replace("/", ".") for dim in dims), values)
            for name, (dims, values) in variables.items()
        }
    )
    index: dict[str, Any] = {str(d): np.arange(size) for d, size in dataset.sizes.items()}
    index |= {name: coord for name, coord in coords.items() if coord[0] in dataset.sizes}
    return dataset.assign_coords(index)


def _container(groups: dict[str, xr.Dataset], attrs: Mapping[str, Any]) -> Any:
    import xarray as xr

    if int(version("arviz").split(".")[0]) >= 1:
        return xr.DataTree.from_dict({"/": xr.Dataset(attrs=attrs), **groups})
    import arviz

    arguments: dict[str, Any] = {"attrs": dict(attrs), **groups}
    return arviz.InferenceData(**arguments)


def check_names(density: Density) -> None:
    """Raise a ValueError if a site has a name that the exported data need for something else."""
    why = taken_name(density)
    if why is not None:
        raise ValueError(why)


def _numpy(value: Tensor | np.ndarray) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else value


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(map(repr, names[:3])) + (f", ... ({len(names)})" if len(names) > 3 else "")
