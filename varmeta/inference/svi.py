"""Any of Pyro's own variational guides, on the same hierarchy and through the same protocol.

Objective: −ELBO = −E_q[log p(y, θ_1..T, θ0, scales, φ) − log q] (Hoffman et al., 2013, Stochastic
Variational Inference; Kucukelbir et al., 2017, Automatic Differentiation Variational Inference),
estimated by Pyro's `Trace_ELBO` (Bingham et al., 2019). q is whatever the guide is: a full or
low-rank Gaussian over everything at once, a flow, or one written by hand. With `point_globals` θ0,
the scales and φ are points and only the θ_i have a guide: Σ_i KL[q_i ‖ N(θ0, Σ)] + E_{q_i} f_i
− log p(θ0, scales, φ), which for `AutoNormal` is what `JointVariational` minimises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from functools import partial
from typing import Annotated, Any, ClassVar

import pyro
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoGuide, AutoNormal
from pyro.infer.autoguide.initialization import InitMessenger, init_to_feasible
from pyro.params.param_store import ParamStoreDict
from torch import Tensor

from varmeta.checked import Count, Positive, Within
from varmeta.inference.base import (
    Batch,
    Meta,
    NonFiniteLoss,
    State,
    StepInfo,
    Strategy,
    check_finite,
    decayed,
    non_finite_gradient,
    update,
)
from varmeta.inference.iterate_test import IterateTest
from varmeta.inference.learned import NOISY, flat
from varmeta.inference.svi_model import global_sites, model_in_units
from varmeta.models.blame import is_own
from varmeta.models.density import Density
from varmeta.models.prior import GaussianPrior
from varmeta.models.sites import reason
from varmeta.posterior import Draws, TaskPosterior
from varmeta.process import ignoring, pyro_untouched, validation_off
from varmeta.seeds import global_rng
from varmeta.tasks import Tasks, TaskSource

Guide = Callable[..., Any]
_UNIT = 0.5  # prior standard deviations, to which the tolerance of the guide's parameters refers


@dataclass(frozen=True, repr=False)
class PyroSVI(Strategy):
    """Pyro's stochastic variational inference on the hierarchical model.

    The guide sees the model of `varmeta.hierarchy` with every site real, in units of the prior that
    the user wrote and 0 at its start, so that one learning rate and Pyro's own initial scales fit
    a reaction time of 250 ms and a slope of 0.1 alike:

    - `loc_units` `[D]`: θ0 = start + unit · loc_units;
    - `scale_units` `[M]`: log scale = start + scale_units;
    - `shared_<name>_units`, shaped as the unconstrained value: φ = start + unit · value;
    - in `pyro.plate("tasks", T, dim=-1)` `z` `[T, D]`: θ_i = θ0 + scale · z_i, or, if `centred`,
      `theta_units` `[T, D]`: θ_i = start + unit · theta_units_i.

    A guide is started there (`init_loc_fn` has no say). One written by hand is a function of the
    model that returns a function without arguments, which samples these sites. The posterior is
    draws of the guide, each with its own φ. A task that was not in the run is adapted to by a fresh
    guide of the same kind over its θ_i alone, at the means of θ0, log scales and φ (not averaged
    over them, as NUTS does). Every row of a training task is used, support and query alike.

    Attributes:
        guide: an autoguide's class, or any function from a Pyro model to a guide of it, such as
            `lambda model: AutoNormal(model, init_scale=0.01)`.
        point_globals: θ0, scales and φ are points at their mode (`AutoDelta`; densities as in the
            other strategies, over scales and φ themselves), and the guide is for the θ_i.
        centred: θ_i itself is a site, and not z_i. Better where tasks have much data each; with few
            rows a task, scales and θ_i then depend on each other and diagonal guides suffer.
        steps: optimiser steps on the training tasks at most; a run ends before where its iterates
            have come to rest, at their average.
        tolerance: how far the guide's parameters may be from where they lead, in halves of the
            prior's standard deviations.
        learning_rate: of Adam; halved where the iterates are stationary, and in the last quarter of
            `steps` it falls to 0 on a cosine.
        samples: draws of the guide per step.
        adapt_steps: optimiser steps for the guide of new tasks.
        draws: of the guide, kept in a posterior.
        vectorise: make all draws of the guide at once, in a plate at `dim=-2`, and not one after
            another. Unset, Pyro's autoguides do and a guide written by hand does not: it must not
            count dimensions from the left, and have no other plate there. Where a shared latent's
            prior depends on another one, draws are made one after another.

    Raises:
        ValueError: a guide that is not callable; fewer than one sample, or than two draws.
    """

    keeps_posteriors: ClassVar[bool] = True

    guide: Guide = AutoNormal
    point_globals: bool = False
    centred: bool = False
    steps: Count = 2000
    tolerance: Positive = NOISY
    learning_rate: Positive = 0.03
    samples: Count = 1
    adapt_steps: Annotated[int, Within(0)] = 500
    draws: Annotated[int, Within(2)] = 500
    vectorise: bool | None = None

    def __post_init__(self) -> None:
        if not callable(self.guide):
            raise ValueError(
                "guide must be an autoguide's class or a function from a model to a guide, got "
                f"{self.guide!r}"
            )
        super().__post_init__()

    def __repr__(self) -> str:
        """Without addresses: checkpoints know their strategy by it, in another process too."""
        rest = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self)[1:])
        return f"PyroSVI(guide={_label(self.guide)}, {rest})"

    @property
    def name(self) -> str:
        """`PyroSVI`, with the guide's name and what is a point."""
        return f"PyroSVI ({_label(self.guide)}{', point globals' * self.point_globals})"

    @property
    def num_steps(self) -> int:
        """`steps`."""
        return self.steps

    def check_shared(self, density: Density) -> None:
        """φ has a guide, unless it is a point."""
        if self.point_globals:
            super().check_shared(density)
        elif self.vectorise and any(site.depends for site in density.shared_sites):
            raise ValueError(
                "vectorise=True: the prior of a shared latent depends on another one, and is made "
                "for one draw at a time; leave vectorise unset"
            )

    @property
    def point_scales(self) -> bool:
        """As `point_globals`."""
        return self.point_globals

    def prepare(self, tasks: Tasks | TaskSource, seed: int) -> Tasks:
        """All rows of the tasks; a stream's tasks never come back to their part of the guide."""
        if isinstance(tasks, TaskSource):
            raise ValueError("PyroSVI needs Tasks, not an endless TaskSource")
        return tasks.unsplit

    def init(
        self,
        density: Density,
        prior: GaussianPrior,
        tasks: Tasks | TaskSource,
        generator: torch.Generator,
    ) -> State:
        """A guide at its start.

        Raises:
            ValueError: no hyperprior, a low-rank prior, a model with params (as in `hierarchy`); a
                guide that is none, misses a site or samples one that is not there, or that cannot
                make its draws at once where it should.
        """
        assert isinstance(tasks, Tasks)
        state = self._state(Meta.start(density, prior), tasks, {}, generator)
        state.tensors |= self._test.begin(flat(_guide(state)))
        return state

    def is_tested(self, state: State) -> bool:
        """Always: see `IterateTest`."""
        return True

    def step(
        self, density: Density, state: State, batch: Batch, generator: torch.Generator
    ) -> StepInfo:
        """One gradient step on the guide; the last one writes θ0, scales and φ down in `meta`."""
        batch.require_all("PyroSVI")
        last = state.step + 1 == self.num_steps
        # Elsewhere the guide has been run for the last time when the state is changed.
        with state.unless_it_fails() if last or self._test.judges_next(state) else nullcontext():
            rate = self._test.rate(state, self.learning_rate)
            loss = self._descend(density, state, batch.tasks, generator, rate)
            leaves = _guide(state)
            average, arrived = self._test.add(state, flat(leaves), _UNIT)
            if average is not None:
                parts = average.split([t.numel() for t in leaves])
                with torch.no_grad():
                    for leaf, part in zip(leaves, parts, strict=True):
                        leaf.copy_(part.reshape(leaf.shape))
            if arrived:
                state.arrived = "the average of the guide's parameters stays where it is"
            if arrived or last:
                for name, value in self._means(state, generator).raw.items():
                    state.meta.raw[name].detach().copy_(value)
        return StepInfo(loss, self.samples * len(batch.tasks))

    def adapt(
        self, density: Density, state: State, tasks: Tasks, generator: torch.Generator
    ) -> TaskPosterior:
        """A fresh guide over θ_i, with θ0, scales and φ fixed at their means (or points)."""
        meta = self._now(state, generator)
        fresh = self._state(meta, tasks, global_sites(meta), generator)
        for _ in range(self.adapt_steps):
            rate = decayed(self.learning_rate, fresh.step, self.adapt_steps)
            self._descend(density, fresh, tasks, generator, rate)
            fresh.step += 1
        return self.posterior(density, fresh, tasks, generator)

    def posterior(
        self, density: Density, state: State, tasks: Tasks, generator: torch.Generator
    ) -> TaskPosterior:
        """Draws of the guide as it was optimised."""
        theta, raw = self._draw(state, self.draws, generator)
        shared = density.shared_init + density.shared_scale * raw["shared"]
        return Draws(density, tasks.names, shared[:, None].expand(-1, len(tasks), -1), theta)

    def unseen(
        self, density: Density, state: State, names: Sequence[str], generator: torch.Generator
    ) -> TaskPosterior:
        """θ ~ N(θ0, Σ) at the means of θ0, the scales and φ, as `adapt` has them."""
        now = State(self._now(state, generator))
        return super().unseen(density, now, names, generator)

    # -- private ----------------------------------------------------------------------------------

    def _now(self, state: State, generator: torch.Generator) -> Meta:
        """θ0, scales and φ as they stand; while a run goes on `state.meta` does not say it."""
        running = 0 < state.step < self.num_steps and not state.arrived
        return self._means(state, generator) if running else state.meta

    @property
    def _test(self) -> IterateTest:
        return IterateTest(self.tolerance, self.steps)

    def _state(
        self, meta: Meta, tasks: Tasks, fixed: dict[str, Tensor], generator: torch.Generator
    ) -> State:
        """A new guide of the model, whose sites `fixed` are given, and its optimiser."""
        like, names = meta.origin.loc, list(global_sites(meta))
        kind = {"centred": self.centred, "point_globals": self.point_globals}
        model, latents = (
            poutine.condition(
                model_in_units(meta.density, meta.origin, tasks, **kind, likelihood=with_data),
                data=fixed,
            )
            for with_data in (True, False)
        )
        start = InitMessenger(init_to_feasible)(model)  # 0, whatever the guide's own idea of it
        store = vars(ParamStoreDict())
        with _pyro(store), global_rng(generator):
            points = self.point_globals and not fixed
            part = self.guide(poutine.block(start, hide=names) if points else start)
            if not callable(part):
                raise ValueError(
                    f"guide {_label(self.guide)} must return a guide, a function without "
                    f"arguments; got {part!r}"
                )
            guide: Any = part
            if fixed:  # a guide written by hand may know all sites
                guide = poutine.block(poutine.condition(part, data=fixed), hide=names)
            elif points:
                guide = _both(AutoDelta(poutine.block(start, expose=names)), part)
            at_once = isinstance(part, AutoGuide) if self.vectorise is None else self.vectorise
            at_once &= not any(site.depends for site in meta.density.shared_sites)
            self._check_sites(latents, guide, at_once)
            if isinstance(part, torch.nn.Module):  # a flow is made in PyTorch's default data type
                part.to(device=like.device, dtype=like.dtype)
            params: dict[str, Any] = poutine.trace(guide, param_only=True).get_trace().nodes
        # By leaf: a flow's parameters have more than one name.
        once = {node["value"].unconstrained(): name for name, node in params.items()}
        leaves = {f"guide {name}": leaf for leaf, name in once.items()}
        optimiser = torch.optim.Adam([*leaves.values()], lr=self.learning_rate)
        cache = {"model": model, "latents": latents, "guide": guide, "store": store}
        cache["at_once"] = at_once
        return State(meta, {"guide": optimiser}, leaves, cache=cache)

    def _check_sites(self, model: Guide, guide: Guide, at_once: bool) -> None:
        """Raise a ValueError unless the guide samples what the model does."""
        wanted, found = _sites(model), _sites(guide)
        if wanted != found:
            raise ValueError(
                f"guide {_label(self.guide)} has the sites {found}, the model {wanted}; it must "
                "sample each of them, at these shapes (the docstring of PyroSVI says what they are)"
            )
        if not at_once:
            return
        wanted = _sites(_particles(model, 2))
        try:
            found = _sites(_particles(guide, 2))
        except (RuntimeError, ValueError) as error:
            if is_own(error):
                raise
            problem = f"fails: {reason(error)}"
        else:
            problem = f"has the sites {found}, the model {wanted}"
        if wanted != found:
            raise ValueError(
                f"guide {_label(self.guide)}, for two draws at once, {problem}. Write it so that "
                "leading dimensions pass through, or set vectorise=False"
            )

    def _descend(
        self, density: Density, state: State, tasks: Tasks, generator: torch.Generator, rate: float
    ) -> float:
        """One step on the guide; the loss before it, nats per task."""
        model, guide, store = (state.cache[name] for name in ("model", "guide", "store"))
        elbo = Trace_ELBO(
            num_particles=self.samples,
            max_plate_nesting=1,
            vectorize_particles=state.cache["at_once"],
        )
        leaves = _guide(state)
        noise = generator.get_state()
        draws = global_rng(generator)

        def drawn() -> Any:  # only a guide draws; noticing what a model does takes time
            with draws:
                return guide()

        # NaN is said below, with the task's name.
        with _pyro(store), ignoring("Encountered NaN"):
            loss = elbo.differentiable_loss(model, drawn) / len(tasks)
            if bool(loss.isfinite()):
                grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        if not bool(loss.isfinite()):
            theta, raw = self._draw(state, self.samples, generator.set_state(noise))
            shared = density.shared_init + density.shared_scale * raw["shared"]
            every = shared[:, None].expand(-1, len(tasks), -1)
            with torch.no_grad():
                losses = density.negative_log_likelihood(theta, tasks, every)
            check_finite(losses.mean(0), tasks, state.step)
            raise NonFiniteLoss(
                f"step {state.step}: every task's loss is finite, the guide's density or the "
                "prior's is not. Lower the learning rate or the guide's initial scale"
            )
        if not all(bool(g.isfinite().all()) for g in grads):
            raise NonFiniteLoss(non_finite_gradient(state.step))
        update(state.optimisers["guide"], leaves, grads, rate)
        return float(loss.detach())

    def _draw(
        self, state: State, count: int, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """θ `[count, T, D]`, and θ0, log scales and φ in the units of `meta.raw`."""
        model, guide, store = (state.cache[name] for name in ("latents", "guide", "store"))
        raw, names = state.meta.raw, global_sites(state.meta)
        draws = count if state.cache["at_once"] else 1
        theta, flat = [], []
        with _pyro(store), global_rng(generator), torch.no_grad():
            for _ in range(count // draws):
                drawn = poutine.trace(_particles(guide, draws)).get_trace()
                again: Guide = poutine.replay(_particles(model, draws), drawn)
                nodes: dict[str, Any] = poutine.trace(again).get_trace().nodes
                theta.append(nodes["_RETURN"]["value"].reshape(draws, -1, len(raw["loc"])))
                # A value that is given has no particles.
                parts = (nodes[n]["value"].reshape(-1, v.numel()) for n, v in names.items())
                flat.append(torch.cat([part.expand(draws, -1) for part in parts], dim=-1))
        split = torch.cat(flat).split([len(t) for t in raw.values()], dim=-1)
        return torch.cat(theta), dict(zip(raw, split, strict=True))

    def _means(self, state: State, generator: torch.Generator) -> Meta:
        """θ0, scales and φ at the means (or points) of the guide as it stands."""
        _, raw = self._draw(state, 1 if self.point_globals else self.draws, generator)
        means = {name: value.mean(0) for name, value in raw.items()}
        return Meta(state.meta.origin, state.meta.density, means)


def _guide(state: State) -> list[Tensor]:
    """The guide's parameters, which are learned."""
    return [t for name, t in state.tensors.items() if name.startswith("guide ")]


@contextmanager
def _pyro(store: dict[str, Any]) -> Iterator[None]:
    """Run Pyro code with this parameter store and checks off."""
    with pyro_untouched(), validation_off():
        vars(pyro.get_param_store()).update(store)
        yield


def _particles(part: Guide, count: int) -> Guide:
    """`count` runs of a model or guide at once, as `Trace_ELBO` does it."""
    if count == 1:
        return part
    plated: Guide = pyro.plate("num_particles_vectorized", count, dim=-2)(part)
    return plated


def _both(one: Guide, other: Guide) -> Guide:
    """The sites of both; an `AutoGuideList` would insist on making the other's plates."""
    return lambda: (one(), other())


def _sites(part: Guide) -> dict[str, tuple[int, ...]]:
    """The latent sites of a model or guide, with their shapes."""
    trace: Any = poutine.trace(part).get_trace()
    return {
        name: tuple(node["value"].shape)
        for name, node in sorted(trace.iter_stochastic_nodes())
        if not node["infer"].get("is_auxiliary")
    }


def _label(guide: Guide) -> str:
    """A guide's name, without an address."""
    if isinstance(guide, partial):
        options = ", ".join(f"{name}={value!r}" for name, value in guide.keywords.items())
        return f"{_label(guide.func)}, {options}"
    name: str = getattr(guide, "__qualname__", None) or type(guide).__qualname__
    return name
