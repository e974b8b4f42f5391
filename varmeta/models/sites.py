"""Reading a Pyro model: which latents and parameters it has, their shapes, supports and priors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to, constraints

from varmeta.checked import nearest
from varmeta.models.apart import draw_here
from varmeta.models.laws import law_in
from varmeta.models.likelihood import SIZE, Likelihood, read_likelihood
from varmeta.models.moments import unconstrained_moments, unconstrained_range
from varmeta.process import ignoring, pyro_untouched
from varmeta.seeds import generator, global_rng

Model = Callable[..., Any]
_PRIOR_DRAWS = 4001
_COARSE = 1e-4  # relative width of a prior below which single precision does not resolve it


@dataclass(frozen=True, eq=False)
class Site:
    """One latent or parameter of the model.

    Attributes:
        name: the site's name in the model.
        role: `"adapted"` (one value per task), `"shared"` (a latent with one value for all tasks)
            or `"param"` (a `pyro.param` or module parameter, one value for all tasks).
        shape: shape of its value.
        unconstrained_shape: shape of its unconstrained value.
        support: the constraint on its value.
        transform: unconstrained to constrained (`torch.distributions.biject_to`).
        prior: the distribution that the user wrote, None for a param.
        loc: flat location of that prior on the unconstrained scale, or a param's initial value: its
            mean, or its median where `scale` is a range.
        scale: its standard deviation there, 1 for a param. Where that is infinite or not known in
            closed form (a Cauchy, a Wishart), half the central 68% range, which for a normal law is
            the same: from the law's quantiles, or from 4,001 draws.
        parameter: for a plain `nn.Parameter` of the model (itself a module), its name in there.
        depends: for a shared latent, what of its prior changes with other shared latents: nothing,
            its `"location"` alone, or its `"spread"` too. `prior`, `loc` and `scale` are then those
            where the others are at their own locations.
    """

    name: str
    role: Literal["adapted", "shared", "param"]
    shape: torch.Size
    unconstrained_shape: torch.Size
    support: Any
    transform: Any
    prior: Any
    loc: Tensor
    scale: Tensor
    parameter: str | None = None
    depends: Literal["", "location", "spread"] = ""

    @property
    def size(self) -> int:
        """Number of unconstrained coordinates."""
        return self.unconstrained_shape.numel()

    def constrain(self, flat: Tensor) -> Tensor:
        """`[..., size]` unconstrained to `[..., *shape]`."""
        return self.transform(flat.reshape(flat.shape[:-1] + self.unconstrained_shape))

    def unconstrain(self, value: Tensor) -> Tensor:
        """`[..., *shape]` to `[..., size]` unconstrained."""
        batch = value.shape[: value.dim() - len(self.shape)]
        return self.transform.inv(value).reshape((*batch, self.size))

    def description(self) -> dict[str, Any]:
        """What there is to know about the site, its location and scale averaged."""
        return {
            "site": self.name,
            "role": self.role,
            "shape": tuple(self.shape),
            "size": self.size,
            "support": _support(self.support),
            "prior": "flat" if self.prior is None else _describe(self.prior),
            "loc": float(self.loc.mean()),
            "scale": float(self.scale.mean()),
        }


def run(model: Model, x: Tensor, y: Tensor | None, inside: dict[str, Tensor] | None = None) -> Any:
    """The model on one task, with the tensors `inside` in place of a module's own parameters."""
    if not isinstance(model, torch.nn.Module):
        return model(x, y)
    # Pyro would thaw the parameters that need no gradient, and warns of them.
    frozen = {n: p.detach() for n, p in model.named_parameters() if not p.requires_grad}
    with ignoring(".* was not registered in the param store"):
        return torch.func.functional_call(model, frozen | (inside or {}), (x, y))


def probe(model: Model, x: Tensor, y: Tensor, seed: int = 0, located: Sequence[str] = ()) -> Any:
    """One trace of the model on one task, global random state and parameter store left alone.

    The latents `located` are at the location of their prior, the others are drawn.
    """
    with (
        pyro_untouched(),
        global_rng(generator(seed)),
        _AtLocation(located),
        _DataType(_float_type(model, x)),
    ):
        try:
            return poutine.trace(run).get_trace(model, x, y)
        except Exception as error:
            if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
                raise
            said = reason(error)
            raise ValueError(
                f"model failed on one task with x of shape {tuple(x.shape)} ({x.dtype}) and y of "
                f"shape {tuple(y.shape)} ({y.dtype}): {said}" + f". {SIZE}" * ("plate(" in said)
            ) from error


def reason(error: Exception) -> str:
    """What a model raised, without the table of shapes that Pyro appends."""
    original = error.__cause__ or error
    return f"{type(original).__name__}: {original}".rstrip(". ")


class Answer(Messenger):
    """Answer params with their values, and draw with `draw`, one by one unless told otherwise.

    `poutine.substitute` does not know the params of `pyro.module`.
    """

    def __init__(
        self, params: dict[str, Tensor], draw: Callable[[Any], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.params, self.draw = params, draw or draw_here

    def _pyro_param(self, msg: Any) -> None:
        if msg["name"] in self.params:
            msg["value"] = self.params[msg["name"]]
            msg["done"] = True

    def _pyro_sample(self, msg: Any) -> None:
        if msg["value"] is None and not msg["is_observed"]:
            msg["value"] = self.draw(msg["fn"])
            msg["done"] = True


class _AtLocation(Messenger):
    """Answer these latents with the location of their prior, given those before them."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = set(names)

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.names and msg["value"] is None:
            fn = msg["fn"]
            transform, drawn = biject_to(fn.support), fn()
            loc, _ = _location_and_scale(fn, transform, drawn)
            msg["value"] = transform(loc.reshape(transform.inv(drawn).shape)).to(drawn.dtype)
            msg["done"] = True


class _DataType(Messenger):
    """Latents and params take the data's floating type, as they do in every later evaluation."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def _pyro_post_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and msg["value"].is_floating_point():
            msg["value"] = msg["value"].to(self.dtype)

    def _pyro_post_param(self, msg: Any) -> None:
        msg["value"] = msg["value"].to(self.dtype)
        # A PyroParam tells its constraint to Pyro's store alone.
        stored = pyro.get_param_store()._constraints
        msg["kwargs"]["constraint"] = stored.get(msg["name"], msg["kwargs"]["constraint"])


def _float_type(model: Model, x: Tensor) -> torch.dtype:
    """That of the inputs; where these are whole numbers, the model's own if it has one."""
    if x.is_floating_point():
        return x.dtype
    own = getattr(model, "dtype", None)
    return own if isinstance(own, torch.dtype) else torch.get_default_dtype()


def read_sites(
    model: Model, x: Tensor, y: Tensor, shared: Sequence[str]
) -> tuple[list[Site], Likelihood]:
    """The model's sites, and what is observed.

    Raises:
        ValueError: whatever cannot be a task model: no observed or no latent site, a discrete
            latent, a latent whose shape follows the data or whose prior depends on another latent
            (where not both are shared),
            sites that change from run to run, a likelihood without a value for each row or for all.
    """
    trace, again = probe(model, x, y, 0), probe(model, x, y, 1)
    nameless = next((name for name in trace.nodes if not name.strip()), None)
    if nameless is not None:
        raise ValueError(f"model has a site with the name {nameless!r}; give it one that is shown")
    try:
        longer = probe(model, torch.cat([x, x[:1]]), torch.cat([y, y[:1]]), 0)
    except ValueError as error:
        raise ValueError(
            f"model runs on a task of {len(y)} rows and not on one of {len(y) + 1}: "
            f"{reason(error.__cause__)}. {SIZE}"  # type: ignore[arg-type]
        ) from error.__cause__
    observed = [
        name
        for name in trace.observation_nodes
        if not (_is_plate(trace.nodes[name]) or "_deterministic" in trace.nodes[name]["infer"])
    ]
    if not observed:
        raise ValueError(
            "model has no observed site; pass the targets with pyro.sample(..., obs=y)"
        )
    # Pyro announces a module's plain nn.Parameters (if it is a PyroModule) but ignores what its
    # handlers answer: these are swapped inside the module instead. They are recognised by identity.
    owners = dict(model.named_parameters()) if isinstance(model, torch.nn.Module) else {}
    owners = {name: p for name, p in owners.items() if p.requires_grad}
    names = {n for n in trace.stochastic_nodes if not _is_plate(trace.nodes[n])}
    if names != {n for n in again.stochastic_nodes if not _is_plate(again.nodes[n])}:
        raise ValueError("model has latent sites that change from run to run; wanted a fixed set")
    for name in shared:
        if name not in names:
            raise ValueError(
                f"shared: no latent site {name!r}; the model has: {', '.join(sorted(names))}"
                f"{nearest(name, sorted(names))}"
            )
    likelihood = read_likelihood(trace, observed, y)
    more = read_likelihood(longer, observed, torch.cat([y, y[:1]]))
    if likelihood.joint is None:  # of one row, which tells nothing
        likelihood = more
    like = torch.empty((), dtype=_float_type(model, x), device=x.device)
    sites: list[Site] = []
    for name, node in trace.nodes.items():
        if node["type"] == "param":
            owned = next((k for k, p in owners.items() if any(p is a for a in node["args"])), None)
            sites.append(
                _param_site(name, node["value"], like, node["kwargs"]["constraint"], owned)
            )
        elif name in names:
            _check_latent(name, node, longer, len(y))
            site = _latent_site(name, node, "shared" if name in shared else "adapted", like)
            other = _latent_site(name, again.nodes[name], site.role, like)
            if not _same_law(site, other):
                if site.role == "adapted":
                    raise ValueError(
                        f"the prior of latent {name!r} changes with another latent; varmeta puts a "
                        "learned Gaussian prior over each latent that adapts to a task, so write "
                        "plain priors for these and leave the hierarchy to it"
                    )
                site = _dependent_site(model, x, y, shared, site, other)
            sites.append(site)
    known = {site.parameter for site in sites} | {f"{n}_unconstrained" for n in trace.nodes}
    for name, parameter in owners.items():  # those that Pyro did not announce
        if name not in known:
            sites.append(_param_site(name, parameter, like, constraints.real, name))
    if not any(site.role == "adapted" for site in sites):
        raise ValueError(
            "model has no latent site that adapts to a task; write at least one "
            "pyro.sample(name, prior) that is not listed in shared"
        )
    return sites, likelihood


def _same_law(one: Site, other: Site) -> bool:
    middle = one.constrain(one.loc), other.constrain(one.loc)
    pairs = (middle, (one.loc, other.loc), (one.scale, other.scale))
    return all(torch.allclose(a, b) for a, b in pairs)


def _dependent_site(
    model: Model, x: Tensor, y: Tensor, shared: Sequence[str], site: Site, other: Site
) -> Site:
    """A shared latent whose prior changes with other shared ones, and with nothing else.

    Raises:
        ValueError: it changes with a latent that adapts to a task, or its support changes.
    """
    name, like = site.name, torch.empty((), dtype=_float_type(model, x), device=x.device)
    here, there = (
        _latent_site(name, probe(model, x, y, seed, located=shared).nodes[name], "shared", like)
        for seed in (0, 1)
    )
    if not _same_law(here, there):
        raise ValueError(
            f"the prior of shared latent {name!r} changes with a latent that adapts to a task, "
            "and there is one of these for each task: list that one in shared too, or write a "
            f"prior for {name!r} that does not depend on it"
        )
    if not torch.allclose(site.constrain(here.loc), other.constrain(here.loc)):
        raise ValueError(
            f"the support of shared latent {name!r} changes with another latent; write a law of "
            "fixed support, and scale or shift its value in the model"
        )
    same = torch.allclose(site.scale, other.scale)
    return replace(here, depends="location" if same else "spread")


def _check_latent(name: str, node: Any, longer: Any, rows: int) -> None:
    if node["fn"].support.is_discrete:
        raise ValueError(
            f"latent {name!r} is discrete; varmeta adapts by gradients: sum it out in the model "
            "(a mixture distribution), or make it continuous"
        )
    shape = tuple(node["value"].shape)
    if name not in longer.nodes or tuple(longer.nodes[name]["value"].shape) != shape:
        got = tuple(longer.nodes[name]["value"].shape) if name in longer.nodes else "no site"
        raise ValueError(
            f"latent {name!r} has shape {shape} with {rows} rows and {got} with {rows + 1}: its "
            "shape follows the data. Sample it outside the plate over rows (a PyroSample must be "
            "read before the plate is entered)"
        )


def _latent_site(name: str, node: Any, role: Any, like: Tensor) -> Site:
    fn = node["fn"]
    transform = biject_to(fn.support)
    value = node["value"].detach()
    loc, scale = _location_and_scale(fn, transform, value)
    if not bool((loc.isfinite() & scale.isfinite() & (scale > 0)).all()):
        raise ValueError(
            f"the prior of latent {name!r} has no finite location and positive, finite spread (on "
            f"the unconstrained scale {_extreme(loc)} and {_extreme(scale)}); learning starts "
            "there, so write a proper prior, such as Normal(0, 10)"
        )
    return Site(
        name,
        role,
        value.shape,
        transform.inv(value).shape,
        fn.support,
        transform,
        fn,
        loc.to(dtype=like.dtype, device=like.device).flatten(),
        scale.to(dtype=like.dtype, device=like.device).flatten(),
    )


def _extreme(values: Tensor) -> float:
    """The entry that is no finite positive number, or else the first."""
    flat = values.flatten()
    bad = ~flat.isfinite() | (flat <= 0)
    return float(flat[bad][0] if bool(bad.any()) else flat[0])


def _param_site(name: str, value: Tensor, like: Tensor, support: Any, owned: str | None) -> Site:
    transform = biject_to(support)
    loc = transform.inv(value.detach())
    flat = loc.to(dtype=like.dtype, device=like.device).flatten()
    one = torch.ones_like(flat)
    return Site(name, "param", value.shape, loc.shape, support, transform, None, flat, one, owned)


def _location_and_scale(fn: Any, transform: Any, value: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation on the unconstrained scale where they are known in closed form.

    Else, or where there is none (heavy tails), the median and half the central 68% range there,
    which a normal law's standard deviation is too: from the law's quantiles, or from draws.
    """
    known = unconstrained_moments(fn, transform) or unconstrained_range(fn, transform)
    if known is not None:
        shape = transform.inv(value).shape
        return known[0].expand(shape), known[1].expand(shape)
    for dtype in (torch.float32, torch.float64):  # whatever the default is
        with global_rng(generator(0)):
            draws = transform.inv(law_in(dtype, fn).sample((_PRIOR_DRAWS,))).sort(dim=0).values
        low, mid, high = draws[[round(q * (_PRIOR_DRAWS - 1)) for q in (0.1587, 0.5, 0.8413)]]
        width = high - low
        if bool((width > _COARSE * mid.abs()).all() and width.isfinite().all()):
            break
    return mid, 0.5 * width


def _is_plate(node: Any) -> bool:
    return type(node["fn"]).__name__ == "_Subsample"


def _support(constraint: Any) -> str:
    while hasattr(constraint, "base_constraint"):
        constraint = constraint.base_constraint
    return str(constraint).removesuffix("()")


def _describe(prior: Any) -> str:
    base = prior
    while hasattr(base, "base_dist") and type(base).__name__ in (
        "Independent",
        "ExpandedDistribution",
    ):
        base = base.base_dist
    names = list(base.arg_constraints)
    values = [torch.as_tensor(getattr(base, n)).float().mean().item() for n in names]
    return f"{type(base).__name__}({', '.join(f'{v:g}' for v in values)})"
