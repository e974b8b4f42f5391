"""Density: an ordinary Pyro model of one task, as a batched log-likelihood of flat parameters."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial, reduce
from operator import add
from typing import Any

import pandas as pd
import torch
from pyro import poutine
from torch import Tensor

from varmeta.checked import require_kind
from varmeta.digest import digests_of
from varmeta.models.apart import draw
from varmeta.models.capture import Captured
from varmeta.models.check_model import check_model
from varmeta.models.derivatives import EnergyFunction
from varmeta.models.drawing import CannotPredict, draw_observed
from varmeta.models.gaps import PartlyObserved, has_gaps
from varmeta.models.laws import law_in, law_parameters, law_with
from varmeta.models.layers import mixed
from varmeta.models.operations import BatchedOperations
from varmeta.models.over_tasks import How, by_row, one_by_one, over_tasks, rows_apart
from varmeta.models.programs import Product, Programs
from varmeta.models.sites import (
    Answer,
    Model,
    read_sites,
    run,
)
from varmeta.models.support import check_targets, finite_tasks
from varmeta.models.trial import try_all
from varmeta.pickling import require_picklable
from varmeta.process import ignoring, pyro_untouched, validation_off
from varmeta.seeds import OwnDraws, global_rng
from varmeta.tasks import HOW_TASKS, Tasks, TaskSource


class Density:
    """The likelihood of a Pyro model of one task, for all tasks at once.

    The model is called as `model(x, y)` with one task's `x` `[N, *input_shape]` and `y`
    `[N, *target_shape]`, and as `model(x, None)` to predict. Its latent sites become the columns of
    flat unconstrained parameters θ `[T, D]`; the prior that the user wrote at each of them is
    replaced by the learned N(θ0, Σ), which starts from it (`GaussianPrior.from_density`). Latents
    named in `shared`, and every `pyro.param` or module parameter, have one value φ `[P]` for all
    tasks: shared latents keep the user's own prior, which may depend on other shared latents
    (crossed effects: `tau`, and a vector `item ~ Normal(0, tau)`; see `LaplaceEvidence`), params
    have a flat one. Given these, a row's
    likelihood must depend on that row alone, and on no Python state that changes. Or all rows of a
    task are one draw (a Gaussian process, a time series): all tasks must then have the same number
    of rows, a task is the unit of scoring, and each row is given an equal part of its task's nats.
    Held-out rows are then a draw of their own, which is told nothing by the task's other rows but
    the latents.

    When it is made, all that comes later is tried on two small tasks: a score, what was observed, a
    prediction. A model that fits and cannot predict is said to be so once, in the log; scores then
    go without draws, and `to_arviz` without `posterior_predictive`.

    Attributes:
        likelihood: what is observed.
        cannot_predict: why targets cannot be drawn; None if they can.
        gaps: whether targets of several entries may be NaN in some of them: a row then counts by
            the others, as long as its law gives each entry a density of its own.

    Args:
        model: a Pyro model (a function or a `PyroModule`) of one task.
        tasks: any tasks of the kind that it will see, to find the sites and to try the model on.
        shared: latent sites with one value for all tasks.

    Raises:
        ValueError: the model cannot be a model of one task; the message says why and what to do.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def school(x, y=None):
        ...     effect = pyro.sample("effect", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("rows", x.shape[0]):
        ...         return pyro.sample("y", dist.Normal(effect, x[:, 0]), obs=y)
        >>> tasks = Tasks.from_list(
        ...     [
        ...         (torch.tensor([[15.0]]), torch.tensor([28.0])),
        ...         (torch.tensor([[10.0]]), torch.tensor([8.0])),
        ...     ]
        ... )
        >>> density = Density(school, tasks)
        >>> density.negative_log_likelihood(torch.zeros(2, 1), tasks)
        tensor([5.3692, 3.5415])
    """

    def __init__(
        self, model: Model, tasks: Tasks | TaskSource, *, shared: Sequence[str] = ()
    ) -> None:
        if isinstance(shared, str):
            raise ValueError(f"shared must be a list of site names, got the string {shared!r}")
        require_kind("tasks", tasks, (Tasks, TaskSource), HOW_TASKS)
        self.digests = digests_of(model)  # now, since it may change what it reads when it runs
        tasks = finite_tasks(tasks.batch(0)) if isinstance(tasks, TaskSource) else tasks
        first = tasks.select([0])
        x, y = first.inputs[0], first.targets[0]
        _check_precision(tasks)
        self.model, self._example = model, (x, y)
        self.target_shape = y.shape[1:]
        self.input_shape = x.shape[1:]
        sites, self.likelihood = read_sites(model, x, y, shared)
        self.gaps = has_gaps(tasks.targets, tasks.mask)
        self.sites = tuple(s for s in sites if s.role == "adapted")
        self.shared_sites = tuple(  # in the data's type, so that their densities are too
            s if s.prior is None else replace(s, prior=law_in(s.loc.dtype, s.prior))
            for s in sites
            if s.role != "adapted"
        )
        self._batched: dict[tuple[int, bool, str | None], Callable[..., Tensor]] = {}
        self._programs: dict[str, Programs] = {}
        self._compiled = False
        self._how: How = "together"
        self._drawn_singly = False  # has been said
        self._step: int | None = None
        self.cannot_predict: str | None = None
        check_model(self, tasks)
        self.cannot_predict = try_all(self, tasks)

    # -- what there is ----------------------------------------------------------------------------

    @property
    def observed(self) -> tuple[str, ...]:
        """Names of the observed sites, `pyro.factor` among them; their log densities add up."""
        return self.likelihood.sites

    @property
    def drawn(self) -> tuple[str, ...]:
        """Names of the observed sites that have values, which can be predicted."""
        return self.likelihood.drawn

    @property
    def joint(self) -> bool:
        """Whether the rows of a task are one draw."""
        return self.likelihood.joint is not None

    @property
    def dim(self) -> int:
        """D, the number of unconstrained coordinates that adapt to a task."""
        return sum(site.size for site in self.sites)

    @property
    def shared_dim(self) -> int:
        """P, the number of unconstrained coordinates with one value for all tasks."""
        return sum(site.size for site in self.shared_sites)

    @property
    def prior_loc(self) -> Tensor:
        """`[D]`, location of the user's own prior on the unconstrained scale."""
        return torch.cat([site.loc for site in self.sites])

    @property
    def prior_scale(self) -> Tensor:
        """`[D]`, standard deviation of the user's own prior on the unconstrained scale."""
        return torch.cat([site.scale for site in self.sites])

    @property
    def shared_init(self) -> Tensor:
        """`[P]`, where the shared values start: their prior's location, or the param's value."""
        return torch.cat([self.prior_loc.new_zeros(0), *(s.loc for s in self.shared_sites)])

    @property
    def shared_scale(self) -> Tensor:
        """`[P]`, standard deviation of the shared latents' prior, 1 for a param."""
        return torch.cat([self.prior_loc.new_zeros(0), *(s.scale for s in self.shared_sites)])

    @property
    def site_index(self) -> Tensor:
        """`[D]` int, the number of the adapted site that each coordinate belongs to."""
        return torch.cat([torch.full((s.size,), k) for k, s in enumerate(self.sites)])

    def site_table(self) -> pd.DataFrame:
        """One row per site: role, shape, unconstrained size, support and the user's prior.

        The prior's location and scale are those on the unconstrained scale, averaged over the site.
        """
        return pd.DataFrame([site.description() for site in (*self.sites, *self.shared_sites)])

    def __getstate__(self) -> dict[str, Any]:
        """Without what was recorded of it, which is made again where it is used."""
        require_picklable("the density's model", self.model)
        return {**vars(self), "_batched": {}, "_programs": {}}

    def __repr__(self) -> str:
        return (
            f"Density({self.dim} adapted, {self.shared_dim} shared)\n"
            + self.site_table().to_string()
        )

    # -- evaluating -------------------------------------------------------------------------------

    def log_likelihood(
        self,
        theta: Tensor,
        tasks: Tasks,
        shared: Tensor | None = None,
        *,
        site: str | None = None,
    ) -> Tensor:
        """log p(y_n | θ, φ) of every row, nats; 0 where a row is padding.

        Args:
            theta: `[..., T, D]`; leading dimensions are draws or particles.
            tasks: T tasks of N rows.
            shared: `[P]`, or `[..., T, P]` when it differs between draws; `shared_init` if None.
            site: one of `observed`, for what it alone says; the sum of all if None.

        Returns:
            `[..., T, N]`.

        Raises:
            ValueError: theta or shared of another shape.
        """
        shared = self.shared_init if shared is None else shared
        self._check_shapes(theta, tasks, shared)
        # What was recorded views its arguments as they lay in memory then.
        data = self.data(tasks)
        key = (theta.dim() - 2, shared.dim() > 1, site)
        if key not in self._batched:
            rows = self._over_tasks(*key[:2], len(data), self.observed if site is None else [site])
            rows = rows if self._how == "one by one" else Captured(rows)
            self._batched.setdefault(key, rows)
        out = self._batched[key](theta.contiguous(), shared.contiguous(), *data)
        return torch.where(tasks.mask, out, 0.0)

    def negative_log_likelihood(
        self, theta: Tensor, tasks: Tasks, shared: Tensor | None = None
    ) -> Tensor:
        """f_i(θ_i): −log p(y_n | θ_i, φ) summed over rows, nats; `[..., T, D]` to `[..., T]`.

        Where most of the tasks' rows are padding, tasks of like length at a time.
        """
        buckets = tasks.buckets
        if buckets is None:
            return -self.log_likelihood(theta, tasks, shared).sum(-1)
        shared = self.shared_init if shared is None else shared
        self._check_shapes(theta, tasks, shared)
        phis = [shared] * len(buckets.groups) if shared.dim() == 1 else buckets.split(shared)
        each = zip(buckets.split(theta), buckets.groups, phis, strict=True)
        return -buckets.join([self.log_likelihood(*given).sum(-1) for given in each])

    def shared_log_prior(self, shared: Tensor) -> Tensor:
        """log p(φ) under the user's own priors of the shared latents, nats; `[P]` to a scalar.

        The density is that of the constrained values (no Jacobian), so that its mode does not
        depend on the transform.
        """
        total, laws = shared.new_zeros(()), self.shared_laws(shared)
        for site, flat in zip(self.shared_sites, self._split(shared, "shared"), strict=True):
            if site.prior is not None:
                with validation_off():
                    total = total + laws[site.name].log_prob(site.constrain(flat)).sum()
        return total

    def shared_laws(self, shared: Tensor) -> dict[str, Any]:
        """The prior of each shared latent by name, given the values φ `[P]` of those before it."""
        laws = {site.name: site.prior for site in self.shared_sites if site.prior is not None}
        depending = [site.name for site in self.shared_sites if site.depends]
        if depending:
            nodes = self._trace(self.prior_loc, shared, *self._example).nodes
            laws |= {name: law_in(shared.dtype, nodes[name]["fn"]) for name in depending}
        return laws

    @property
    def effects(self) -> Tensor:
        """Coordinates of φ whose prior's spread is that of another shared latent, `[M]` int.

        As points they have no answer: the most likely spread of a vector of points is 0, or, where
        they are written as a spread times standard normal ones, much too large.
        """
        wanted = [s.depends == "spread" for s in self.shared_sites for _ in range(s.size)]
        return torch.tensor(wanted, dtype=torch.bool).nonzero()[:, 0].to(self.prior_loc.device)

    def constrain(self, theta: Tensor) -> dict[str, Tensor]:
        """Flat `[..., D]` to `{site: [..., *shape]}` on the model's own scale."""
        parts = self._split(theta, "adapted")
        return {s.name: s.constrain(p) for s, p in zip(self.sites, parts, strict=True)}

    def constrain_shared(self, shared: Tensor) -> dict[str, Tensor]:
        """Flat `[..., P]` to `{site: [..., *shape]}` on the model's own scale."""
        parts = self._split(shared, "shared")
        return {s.name: s.constrain(p) for s, p in zip(self.shared_sites, parts, strict=True)}

    def unconstrain(self, values: dict[str, Tensor]) -> Tensor:
        """`{site: [..., *shape]}` to flat `[..., D]`; the inverse of `constrain`."""
        return torch.cat([s.unconstrain(values[s.name]) for s in self.sites], dim=-1)

    def predict(
        self,
        theta: Tensor,
        tasks: Tasks,
        generator: torch.Generator,
        shared: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Draws of the observed sites given parameters: `{site: [..., T, N, *target_shape]}`.

        Rows of padding hold draws too; mask them with `tasks.mask`. The laws of Pyro and PyTorch
        are drawn for all tasks and draws at once (`varmeta.models.apart`). A law of your own that
        `vmap` cannot draw from is drawn one by one, which is slow and said in the log.

        Raises:
            ValueError: theta or shared of another shape.
            CannotPredict: a law that cannot be drawn from, a model that fails without y, or one
                whose observed sites are `pyro.factor`.
        """
        if self.cannot_predict is not None:
            raise CannotPredict(self.cannot_predict)
        shared = self.shared_init if shared is None else shared
        self._check_shapes(theta, tasks, shared)
        # vmap's remarks on some distributions (binomial, gamma)
        remarks = ignoring("(An output with one|There is a performance drop)")
        with torch.no_grad(), global_rng(generator) as own, remarks:
            return draw_observed(self, theta, shared, tasks.inputs, own)

    # -- running ----------------------------------------------------------------------------------

    @property
    def noisy(self) -> bool:
        """Whether each step of a fit sees another likelihood, as with dropout (`in_step`)."""
        return bool(getattr(self.model, "takes_keys", False))

    def in_step(self, source: torch.Generator) -> Density:
        """A `noisy` density as a step of a fit sees it, with the dropout of that step.

        Recordings are shared, since keys are among their arguments.
        """
        other = object.__new__(type(self))
        vars(other).update(vars(self))
        other._step = int(torch.randint(2**62, (), generator=source))
        return other

    def data(self, tasks: Tasks) -> tuple[Tensor, ...]:
        """What the model is given of each task: inputs, targets, and keys if it is `noisy`.

        Keys are int64 `[T]` within a step of a fit, each from step, task and the first of its rows
        (support and query differ), and `[T, 0]` elsewhere.
        """
        if not self.noisy:
            return tasks.inputs, tasks.targets
        keys = torch.empty(len(tasks), 0, dtype=torch.long, device=tasks.inputs.device)
        if self._step is not None:
            assert tasks.row_ids is not None
            names = torch.tensor([zlib.crc32(name.encode()) for name in tasks.names])
            keys = mixed(mixed(names.to(keys.device) + self._step) + tasks.row_ids[:, 0])
        return tasks.inputs, tasks.targets, keys

    def rows(self, theta: Tensor, shared: Tensor, *data: Tensor) -> Tensor:
        """log p(y_n | θ_i, φ), nats, from bare tensors, padding included; nothing is checked.

        `[T, D]`, `[P]` and `data(tasks)`, `[T, ...]` each, to `[T, N]`.
        """
        out: Tensor = self._over_tasks(0, False, len(data))(theta, shared, *data)
        return out

    def outputs(self, theta: Tensor, shared: Tensor, *data: Tensor) -> list[Tensor]:
        """Parameters z of each row's law (means, logits, …), `[T, ...]` each; as for `rows`."""
        dims = (0, None, *[0] * len(data))
        out: list[Tensor] = self._mapped(self._outputs, dims)(theta, shared, *data)
        return out

    def rows_given(
        self, outputs: list[Tensor], theta: Tensor, shared: Tensor, *data: Tensor
    ) -> Tensor:
        """log p(y_n | z), nats, `[T, N]`: `rows` with other parameters z of the rows' laws."""
        dims = (0, 0, None, *[0] * len(data))
        given = self._mapped(self._given_outputs, dims)
        out: Tensor = given(outputs, theta, shared, *data)
        return out

    def programs(
        self,
        name: str,
        energy: Callable[[Density], EnergyFunction],
        gauss_newton: Callable[[Density], Callable[..., Product]],
    ) -> Programs:
        """The derivatives of an energy built on this density, recorded once for all its users."""
        if name not in self._programs:
            looped = self._how == "one by one"
            made = Programs(energy(self), name, gauss_newton(self), self._compiled, looped)
            self._programs.setdefault(name, made)  # another thread may have been first
        return self._programs[name]

    def compiled(self) -> Density:
        """The same density with its derivatives compiled by inductor.

        Of gradient descent and of CG with a tolerance of 0, a fixed budget, several steps are
        compiled together; keep the minimiser and the solver, since others are compiled anew. The
        first call of each program (about five, once for each shape of a batch) takes several
        seconds (of four convolutions, half a minute), later ones a fraction: worth it for runs of
        minutes. The results differ from the uncompiled ones by rounding. Where compiling fails, or
        gives another result, the derivative is run as it was written, with a warning; `execution`
        says which.
        """
        other = copy.copy(self)  # without recordings
        other._compiled = True
        return other

    def execution(self) -> dict[str, str]:
        """How each derivative is run: `"recorded"`, `"compiled"`, or as written and why."""
        return {
            f"{name}: {derivative}": how
            for name, programs in self._programs.items()
            for derivative, how in programs.report.items()
        }

    # -- private ----------------------------------------------------------------------------------

    def _run_as(self, how: How) -> None:
        """From now on: tasks together, with their laws apart from `vmap`, or one by one."""
        self._how = how
        self._batched, self._programs = {}, {}

    def _over_tasks(
        self, draws: int, per_draw: bool, data: int, sites: Sequence[str] | None = None
    ) -> Callable[..., Tensor]:
        """`_pointwise` for all tasks, with θ `[..., T, D]` of so many dimensions of draws."""
        sites = self.observed if sites is None else sites
        if self._how == "apart":
            observed = partial(self._observed_sites, sites)
            return rows_apart(observed, draws, per_draw, data=data)
        pointwise, loop = partial(self._pointwise, sites), self._how == "one by one"
        return over_tasks(pointwise, draws, per_draw, data=data, loop=loop)

    def _mapped(self, function: Callable[..., Any], dims: Sequence[int | None]) -> Any:
        """`function` over tasks; one by one where `vmap` cannot ask the law for its density."""
        if self._how == "together":
            return torch.vmap(function, tuple(dims))
        return one_by_one(function, dims)

    def _observed_sites(
        self, sites: Sequence[str], theta: Tensor, shared: Tensor, *data: Tensor
    ) -> list[Any]:
        """One task: these observed nodes of the model's trace."""
        nodes = self._trace(theta, shared, *data).nodes
        return [nodes[name] for name in sites]

    def _pointwise(
        self, sites: Sequence[str], theta: Tensor, shared: Tensor, *data: Tensor
    ) -> Tensor:
        """One task: `[D]`, `[P]` and its data to `[N]` nats."""
        return self._row_nats(self._trace(theta, shared, *data), len(data[1]), sites)

    def _outputs(self, theta: Tensor, shared: Tensor, *data: Tensor) -> list[Tensor]:
        """One task: the parameters of each row's law, whatever their shapes."""
        nodes = self._trace(theta, shared, *data).nodes
        return [t for name in self.observed for t in law_parameters(nodes[name]["fn"])]

    def _given_outputs(
        self, outputs: list[Tensor], theta: Tensor, shared: Tensor, *data: Tensor
    ) -> Tensor:
        """One task: `[N]` nats with these parameters of the rows' laws in place of the model's."""
        trace, rest = self._trace(theta, shared, *data), iter(outputs)
        for name in self.observed:
            trace.nodes[name]["fn"] = law_with(trace.nodes[name]["fn"], rest)
        return self._row_nats(trace, len(data[1]), self.observed)

    def _row_nats(self, trace: Any, rows: int, sites: Sequence[str]) -> Tensor:
        with validation_off(), BatchedOperations(self._compiled):
            trace.compute_log_prob(lambda name, site: name in sites)
        return reduce(add, [by_row(trace.nodes[n]["log_prob"], 0, rows) for n in sites])

    def _trace(
        self,
        theta: Tensor,
        shared: Tensor,
        x: Tensor,
        y: Tensor | None,
        key: Tensor | None = None,
        *,
        together: OwnDraws | None = None,
    ) -> Any:
        """The model's trace on one task; with `together` laws are drawn for all tasks at once."""
        task_model: Any = self.model
        if key is not None and key.numel():
            task_model = task_model.keyed(key)
        values = self.constrain(theta)
        shared_values = self.constrain_shared(shared)
        params = {s.name: shared_values[s.name] for s in self.shared_sites if s.role == "param"}
        values |= {name: v for name, v in shared_values.items() if name not in params}
        inside = {s.parameter: params[s.name] for s in self.shared_sites if s.parameter}
        # block: when Pyro itself runs the hierarchy, its handlers must not see this task's sites.
        with (
            pyro_untouched(),  # first: the others change what threads share
            validation_off(),
            poutine.block(),
            PartlyObserved() if self.gaps else nullcontext(),
            Answer(params, None if together is None else partial(draw, theta, together)),
            BatchedOperations(self._compiled, theta if self._how == "apart" else None),
        ):
            model = poutine.trace(poutine.condition(run, data=values))
            return model.get_trace(task_model, x, y, inside)

    def _split(self, flat: Tensor, which: str) -> tuple[Tensor, ...]:
        sites = self.sites if which == "adapted" else self.shared_sites
        return torch.split(flat, [site.size for site in sites], dim=-1) if sites else ()

    def check_tasks(self, tasks: Tasks) -> None:
        """Raise a ValueError unless these tasks fit this density, every row's targets included.

        Shapes, device and data type are those that the density was built for, inputs and targets
        are finite, and each target lies in the support of its law; the error says where not.
        """
        self.check_data(tasks, self.shared_init)
        if not self.gaps and has_gaps(tasks.targets, tasks.mask):
            raise ValueError(
                "tasks: some targets are NaN in a part of their entries, and the density was built "
                "from tasks without such gaps; build it from tasks that have some"
            )
        check_targets(self, tasks)

    def check_data(self, tasks: Tasks, shared: Tensor, lead: Sequence[int] = ()) -> None:
        """Raise a ValueError unless tasks and φ fit this density and each other.

        `lead` is the shape of θ without its last dimension, where φ differs between draws.
        """
        _check_precision(tasks)
        wanted = (self.shared_dim,) if shared.dim() == 1 else (*lead, self.shared_dim)
        if tuple(shared.shape) != wanted:
            raise ValueError(f"shared has shape {tuple(shared.shape)}, wanted {wanted}")
        if self.joint and not bool(tasks.mask.all()):
            count = tasks.num_rows
            raise ValueError(
                f"{self.likelihood.together()}, and tasks "
                f"have {int(count.min())} to {int(count.max())} rows; wanted the same number in "
                "each (that leaves out cross-validation, as of iMAML). "
                + self.likelihood.taken_apart()
            )
        got = (tuple(tasks.inputs.shape[2:]), tuple(tasks.targets.shape[2:]))
        if got != (tuple(self.input_shape), tuple(self.target_shape)):
            raise ValueError(
                f"tasks has rows of x and y of shapes {got}, the density was built for "
                f"{(tuple(self.input_shape), tuple(self.target_shape))}"
            )
        if tasks.inputs.device != shared.device:
            raise ValueError(
                f"tasks is on {tasks.inputs.device}, the density on {shared.device}; move the "
                "tasks with tasks.to(device) and build the density from them"
            )
        if tasks.inputs.is_floating_point() and tasks.inputs.dtype != shared.dtype:
            raise ValueError(
                f"tasks holds {tasks.inputs.dtype}, the density {shared.dtype}; build it from "
                "tasks of the same data type"
            )

    def _check_shapes(self, theta: Tensor, tasks: Tasks, shared: Tensor) -> None:
        if theta.dim() < 2 or tuple(theta.shape[-2:]) != (len(tasks), self.dim):
            raise ValueError(
                f"theta has shape {tuple(theta.shape)}, wanted [..., {len(tasks)}, {self.dim}]: "
                "the last two dimensions are tasks and coordinates"
            )
        self.check_data(tasks, shared, theta.shape[:-1])


def _check_precision(tasks: Tasks) -> None:
    for name, values in (("inputs", tasks.inputs), ("targets", tasks.targets)):
        if values.is_floating_point() and values.dtype.itemsize < 4:
            raise ValueError(
                f"tasks holds {name} of {values.dtype}, in which curvature and scales cannot be "
                "computed; give tasks.to(dtype=torch.float32): a network in half precision runs "
                "in the data type of its inputs"
            )
