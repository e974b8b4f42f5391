"""Pyro's own NUTS on the hierarchy: the reference that the fast strategies are held against.

The full posterior of θ0, the scales, φ and every θ_i (Hoffman & Gelman, 2014), in the non-centred
form of `varmeta.models.hierarchy`. A task that was not in the run is adapted to by importance
resampling: for each draw of (θ0, Σ, φ), proposals from Student's t around the task's mode, weighted
by p(y|θ, φ) p(θ|θ0, Σ) / q(θ); this includes what the new task itself says of the prior.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.infer import NUTS
from pyro.ops.stats import split_gelman_rubin
from torch import Tensor

from varmeta.inference.base import Batch, Meta, State, StepInfo, Strategy, check_finite
from varmeta.inference.fit import fit
from varmeta.inference.joint import JointVariational
from varmeta.inference.laplace import laplace_scale
from varmeta.inference.newton import NewtonCG
from varmeta.models.capture import CapturedGradient
from varmeta.models.density import Density
from varmeta.models.hierarchy import hierarchy
from varmeta.models.prior import GaussianPrior
from varmeta.models.sites import pyro_untouched, validation_off
from varmeta.posterior import Draws, TaskPosterior
from varmeta.seeds import global_rng
from varmeta.tasks import Tasks, TaskSource

_QUICK_STEPS = 400
_MAX_DIM = 3000
_JUDGED = 100  # draws per chain from which R-hat is worth reading
_MIXED = 1.05
_FREEDOM = 5  # degrees of freedom of the proposals: tails heavier than any posterior met here


@dataclass(frozen=True)
class PyroNUTS(Strategy):
    """NUTS on the hierarchical model, one chain after the other, one transition a step.

    Interrupted runs keep their draws; a chain resumed from a checkpoint goes on from its last
    position with the step size that it had, or warms up again if it had not finished doing so.
    A split R-hat above 1.05 (Gelman et al., 2013, Bayesian Data Analysis) of θ0, a scale or φ is
    warned of, where there are two chains of 100 draws or more.

    Attributes:
        draws: kept per chain.
        warmup: transitions per chain in which the step size adapts.
        chains: number of chains.
        target_accept: acceptance probability that the step size aims at. The mass matrix is dense
            and fixed: the inverse curvature at a quick Gaussian fit, where each chain starts.
        proposals: per hyperparameter draw and new task.
    """

    draws: int = 300
    warmup: int = 100
    chains: int = 2
    target_accept: float = 0.8
    proposals: int = 10

    @property
    def num_steps(self) -> int:
        """Transitions of all chains, warm-up included."""
        return self.chains * (self.warmup + self.draws)

    def is_tested(self, state: State) -> bool:
        """By R-hat, where there are chains and draws enough for it."""
        return self.chains > 1 and self.draws >= _JUDGED

    def shortfall(self, state: State) -> str:
        """The R-hat that is too large."""
        worst = float(state.tensors["rhat"])
        return "" if worst <= _MIXED else f"the chains disagree: worst R-hat {worst:.3f}"

    @property
    def point_scales(self) -> bool:
        """False: they have a posterior of their own."""
        return False

    def prepare(self, tasks: Tasks | TaskSource, seed: int) -> Tasks:
        """All rows of the tasks; a stream has no end to condition on."""
        if isinstance(tasks, TaskSource):
            raise ValueError("PyroNUTS needs Tasks, not an endless TaskSource")
        return tasks.unsplit

    def init(
        self,
        density: Density,
        prior: GaussianPrior,
        tasks: Tasks | TaskSource,
        generator: torch.Generator,
    ) -> State:
        """No draws yet."""
        meta = Meta.start(density, prior)
        like = prior.loc.detach()
        total = self.chains * self.draws
        tensors = {
            "theta": like.new_zeros(total, len(tasks.names), density.dim),  # type: ignore[union-attr]
            "loc": like.new_zeros(total, density.dim),
            "log_scale": like.new_zeros(total, len(prior.log_scale)),
            "shared": like.new_zeros(total, density.shared_dim),
            "diverging": torch.zeros(total, dtype=torch.bool, device=like.device),
            "rhat": torch.tensor(torch.nan, dtype=torch.float64),
        }
        return State(meta, tensors=tensors)

    def step(
        self, density: Density, state: State, batch: Batch, generator: torch.Generator
    ) -> StepInfo:
        """One transition of the current chain."""
        batch.require_all("PyroNUTS")
        chain, position = divmod(state.step, self.warmup + self.draws)
        counter = state.cache.setdefault("counter", [0])  # batched gradients
        before = counter[0]
        with pyro_untouched(), validation_off(), global_rng(generator):
            if position == 0 or "kernel" not in state.cache:
                self._start(density, state, batch.tasks, position)
            kernel = state.cache["kernel"]
            divergences = len(kernel._divergences)
            z = kernel.sample(state.cache["z"])
            state.cache["z"] = z
            state.tensors["position"] = torch.cat([v.detach().reshape(-1) for v in z.values()])
            state.tensors["step_size"] = torch.tensor(float(kernel.step_size), dtype=torch.float64)
            if position >= self.warmup:
                row = chain * self.draws + position - self.warmup
                diverged = len(kernel._divergences) > divergences
                self._keep(density, state, z, row, diverged)
        if state.step + 1 == self.num_steps:
            self._finish(state)
        loss = float(kernel._potential_energy_last) / len(batch.tasks)
        return StepInfo(loss, (counter[0] - before) * len(batch.tasks))

    def adapt(
        self, density: Density, state: State, tasks: Tasks, generator: torch.Generator
    ) -> TaskPosterior:
        """Importance resampling over the draws of θ0, Σ and φ."""
        loc, scale = state.tensors["loc"], state.tensors["log_scale"].exp()
        scale = scale[:, state.meta.origin.groups]
        count, dim, total = len(tasks), density.dim, len(loc)
        shared = state.tensors["shared"][:, None].expand(-1, count, -1)

        def energy(theta: Tensor) -> Tensor:  # [..., S, T, D] to [..., S, T]
            offset = (theta - loc[:, None]) / scale[:, None]
            phi = shared.expand(*theta.shape[:-1], -1)
            fit = density.negative_log_likelihood(theta, tasks, phi)
            return fit + 0.5 * (offset**2).sum(-1) + scale.log().sum(-1)[:, None]

        def flat(theta: Tensor) -> Tensor:  # one task per (draw, task)
            return energy(theta.reshape(total, count, dim)).reshape(-1)

        start = loc[:, None].expand(-1, count, -1).reshape(-1, dim)
        minimum = NewtonCG().minimise(flat, start)
        names = tuple(f"{name}, draw {s}" for s in range(total) for name in tasks.names)
        tril = laplace_scale(flat, minimum.theta, names)
        like: dict[str, Any] = {"generator": generator, "dtype": loc.dtype, "device": loc.device}
        noise = torch.randn(self.proposals, total * count, dim, **like)
        chi2 = torch.randn(self.proposals, total * count, _FREEDOM, **like).square().sum(-1)
        noise = noise / (chi2 / _FREEDOM).sqrt()[..., None]
        theta = minimum.theta + (tril @ noise[..., None])[..., 0]
        log_q = -0.5 * (_FREEDOM + dim) * torch.log1p(noise.square().sum(-1) / _FREEDOM)
        log_q = log_q - tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        theta = theta.reshape(self.proposals, total, count, dim)
        with torch.no_grad():
            log_w = -energy(theta) - log_q.reshape(self.proposals, total, count)
        weights = log_w.flatten(0, 1).softmax(0)  # [K·S, T]
        pick = torch.multinomial(weights.T, total, replacement=True, generator=generator).T
        drawn = theta.flatten(0, 1).gather(0, pick[..., None].expand(-1, -1, dim))
        columns = torch.arange(count, device=pick.device)
        phi = shared[pick % total, columns]
        ess = 1 / weights.square().sum(0)
        stats = {"importance_ess": ess, "iterations": minimum.iterations.reshape(total, -1).amax(0)}
        if bool((ess < 100).any()):
            worst = int(ess.argmin())
            warnings.warn(
                f"task {tasks.names[worst]!r} is adapted to by only {float(ess[worst]):.0f} "
                "effective draws: raise proposals or draws, or include the task in the NUTS run",
                RuntimeWarning,
                stacklevel=2,
            )
        return Draws(density, tasks.names, phi, drawn, stats=stats)

    def posterior(
        self, density: Density, state: State, tasks: Tasks, generator: torch.Generator
    ) -> TaskPosterior:
        """The draws of the training tasks."""
        count = len(tasks)
        return Draws(
            density,
            tasks.names,
            state.tensors["shared"][:, None].expand(-1, count, -1),
            state.tensors["theta"],
            self.chains,
        )

    # -- private ----------------------------------------------------------------------------------

    def _start(self, density: Density, state: State, tasks: Tasks, position: int) -> None:
        """A kernel at the start of a chain, or where a saved chain left off."""
        centre = state.meta.origin.loc.expand(len(tasks), -1)
        with torch.no_grad():  # Pyro would only say that it found no place to start
            losses = density.negative_log_likelihood(centre, tasks)
        check_finite(losses, tasks, state.step)
        model = hierarchy(density, state.meta.origin, tasks)
        kept = state.tensors
        resumed = position >= max(self.warmup, 1)
        kernel = NUTS(
            model,
            step_size=float(kept["step_size"]) if resumed else 0.1,
            adapt_step_size=not resumed,
            adapt_mass_matrix=False,
            full_mass=True,
            target_accept_prob=self.target_accept,
        )
        kernel.setup(0 if resumed else self.warmup - position)
        potential = kernel.potential_fn
        shapes = {n: v.shape for n, v in kernel.initial_params.items()}
        flat = torch.cat([v.reshape(-1) for v in kernel.initial_params.values()])
        flat = flat.to(state.meta.origin.loc)
        if len(flat) > _MAX_DIM:
            raise ValueError(
                f"the hierarchy has {len(flat)} coordinates; PyroNUTS is a reference for problems "
                f"of up to {_MAX_DIM} (it keeps a dense mass matrix). Leave tasks out, or leave "
                "PyroNUTS out"
            )
        counter = state.cache["counter"]
        program = state.cache.get("program") or CapturedGradient(
            lambda *v: potential(dict(zip(shapes, v, strict=True))),
            [*_split(flat, shapes).values()],
        )

        def counted(z: dict[str, Tensor]) -> Tensor:
            counter[0] += 1
            return program(*(z[name] for name in shapes))

        if resumed:
            flat, inverse_mass = kept["position"], kept["inverse_mass"]
        else:
            flat = self._approximate(density, state, tasks, kernel)
            units = self._units(density, state, shapes)
            inverse_mass = _inverse_curvature(lambda v: counted(_split(v, shapes)), flat, units)
            flat = flat + torch.linalg.cholesky(inverse_mass) @ torch.randn_like(flat)
            kept["inverse_mass"] = inverse_mass
        kernel.mass_matrix_adapter.inverse_mass_matrix = {
            key: inverse_mass for key in kernel.inverse_mass_matrix
        }
        kernel.potential_fn = counted
        z = _split(flat, shapes)
        if not resumed:  # Pyro chose its first step size before it was given the mass matrix
            kernel._adapter.reset_step_size_adaptation(z)
        state.cache |= {"kernel": kernel, "z": z, "model": model, "program": program}

    def _approximate(self, density: Density, state: State, tasks: Tasks, kernel: NUTS) -> Tensor:
        """Where a chain starts: the middle of a quick Gaussian fit of the same hierarchy.

        The joint mode would not do: in these coordinates it lies at huge scales, without pooling.
        """
        if "start" not in state.tensors:
            # As many noisy steps as lead away from the prior, and not to scales of 0: no chain
            # should begin there. What such a fit says of itself does not concern the user.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                quick = fit(
                    JointVariational(q="diagonal", steps=_QUICK_STEPS),
                    density,
                    tasks,
                    prior=state.meta.origin,
                    progress=False,
                )
            state.cache["counter"][0] += quick.gradients // len(tasks)
            prior, shared = quick.state.meta.fixed()
            z = (quick.posterior().mean - prior.loc) / prior.scale
            values = {"loc": prior.loc, "scale": prior.log_scale.exp(), "z": z}
            for name, value in density.constrain_shared(shared).items():
                values[f"shared_{name}"] = value
            parts = [
                kernel.transforms[n](values[n]) if n in kernel.transforms else values[n]
                for n in kernel.initial_params
            ]
            state.tensors["start"] = torch.cat([p.reshape(-1) for p in parts])
        return state.tensors["start"]

    def _units(self, density: Density, state: State, shapes: dict[str, torch.Size]) -> Tensor:
        """`[n]`: the prior's standard deviation of each of the kernel's coordinates."""
        belief = state.meta.origin.hyperprior
        assert belief is not None  # `hierarchy` insists on it
        known = {f"shared_{site.name}": site.scale for site in density.shared_sites}
        known["loc"] = belief.width
        one = torch.ones_like(belief.width[:1])  # z, and about right for a log scale
        return torch.cat([known.get(n, one.expand(s.numel())) for n, s in shapes.items()])

    def _keep(
        self, density: Density, state: State, z: dict[str, Tensor], row: int, diverged: bool
    ) -> None:
        kernel = state.cache["kernel"]
        values = {
            n: kernel.transforms[n].inv(v) if n in kernel.transforms else v for n, v in z.items()
        }
        conditioned = poutine.condition(state.cache["model"], data=values)
        with torch.no_grad():
            theta: Any = poutine.trace(conditioned).get_trace().nodes["theta"]["value"]
        shared = [s.unconstrain(values[f"shared_{s.name}"]) for s in density.shared_sites]
        kept = state.tensors
        kept["theta"][row] = theta
        kept["loc"][row] = values["loc"]
        kept["log_scale"][row] = values["scale"].log()
        if shared:
            kept["shared"][row] = torch.cat([s.reshape(-1) for s in shared])
        kept["diverging"][row] = diverged

    def _finish(self, state: State) -> None:
        """θ0, scales and φ of the state: their posterior means."""
        meta, kept = state.meta, state.tensors
        with torch.no_grad():
            meta.raw["loc"].copy_((kept["loc"].mean(0) - meta.origin.loc) / meta.origin.scale)
            meta.raw["log_scale"].copy_(kept["log_scale"].mean(0) - meta.origin.log_scale)
            offset = kept["shared"].mean(0) - meta.density.shared_init
            meta.raw["shared"].copy_(offset / meta.density.shared_scale)
        bad = int(kept["diverging"].sum())
        if bad:
            warnings.warn(
                f"{bad} of {len(kept['diverging'])} NUTS transitions diverged: the posterior has a "
                "region that the sampler cannot enter; raise target_accept (0.95, 0.99)",
                RuntimeWarning,
                stacklevel=3,
            )
        if self.chains > 1 and self.draws >= _JUDGED:
            self._check_mixing(
                state, torch.cat([kept["loc"], kept["log_scale"], kept["shared"]], -1)
            )

    def _check_mixing(self, state: State, draws: Tensor) -> None:
        """Warn if the chains `[chains · draws, n]` disagree about θ0, a scale or φ."""
        by_chain = draws.unflatten(0, (self.chains, self.draws))
        worst = float(split_gelman_rubin(by_chain, 0, 1).nan_to_num(1.0).max())
        state.tensors["rhat"].fill_(worst)
        if worst <= _MIXED:
            state.arrived = f"the chains agree: worst R-hat {worst:.3f}"
        else:
            warnings.warn(
                f"the NUTS chains disagree about θ0, the scales or φ: worst R-hat {worst:.3f}, "
                f"wanted at most {_MIXED}. Its means and widths are as uncertain as that; raise "
                f"draws (now {self.draws}) or warmup (now {self.warmup})",
                RuntimeWarning,
                stacklevel=4,
            )


def _split(flat: Tensor, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """A flat vector to the kernel's dictionary, in the kernel's order."""
    parts = flat.split([shape.numel() for shape in shapes.values()])
    return {n: p.reshape(shapes[n]) for n, p in zip(shapes, parts, strict=True)}


def _inverse_curvature(
    potential: Callable[[Tensor], Tensor], position: Tensor, units: Tensor
) -> Tensor:
    """|∇²U|⁻¹ `[n, n]` at the start, by central differences of the recorded gradient.

    In units of the prior's standard deviations `[n]` no curvature counts as less than 1: where the
    likelihood happens to be flat or folded the posterior is still no wider than the prior.
    """
    width = 1e-4 if position.dtype == torch.float64 else 1e-2
    rows = []
    for step in torch.diag(width * units):
        slopes = []
        for moved in (position + step, position - step):
            moved.requires_grad_()
            slopes.append(torch.autograd.grad(potential(moved), moved)[0])
        rows.append((slopes[0] - slopes[1]) * units / (2 * width))
    dense = torch.stack(rows)
    values, vectors = torch.linalg.eigh(0.5 * (dense + dense.T))
    root = units[:, None] * vectors / values.abs().clamp(min=1.0).sqrt()
    return root @ root.T
