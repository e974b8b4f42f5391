"""Pyro's own NUTS on the hierarchy: the reference that the fast strategies are held against.

The full posterior of θ0, the scales, φ and every θ_i (Hoffman & Gelman, 2014), in the non-centred
form of `varmeta.models.hierarchy`. A task that was not in the run is adapted to by importance
resampling: for each draw of (θ0, Σ, φ), proposals from Student's t around the task's mode, weighted
by p(y|θ, φ) p(θ|θ0, Σ) / q(θ); this includes what the new task itself says of the prior.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pyro import poutine
from pyro.ops.stats import split_gelman_rubin
from torch import Tensor

from varmeta.checked import Count, Within
from varmeta.inference.amortised import LaplaceEvidence
from varmeta.inference.base import Batch, Meta, State, StepInfo, Strategy, check_finite
from varmeta.inference.fit import fit
from varmeta.inference.joint import JointVariational
from varmeta.inference.laplace import laplace_scale
from varmeta.inference.newton import NewtonCG
from varmeta.inference.nuts_kernel import Kernel
from varmeta.models.density import Density
from varmeta.models.prior import GaussianPrior
from varmeta.posterior import Draws, TaskPosterior
from varmeta.process import pyro_untouched, validation_off
from varmeta.seeds import global_rng
from varmeta.tasks import Tasks, TaskSource

_QUICK_STEPS = 400
_FEW_STEPS = 10  # of a quasi-Newton method
_FAR = 3.0  # no chain starts farther out, in log scales and in standard deviations of φ's prior
_CHAIN = ("position", "slope", "energy", "adaptation", "count")  # see `Kernel`
_JUDGED = 100  # draws per chain from which R-hat is worth reading
_MIXED = 1.05
_FREEDOM = 5  # degrees of freedom of the proposals: tails heavier than any posterior met here


@dataclass(frozen=True)
class PyroNUTS(Strategy):
    """NUTS on the hierarchical model, one chain after the other, one transition a step.

    A split R-hat above 1.05 (Gelman et al., 2013, Bayesian Data Analysis) of θ0, a scale or φ is
    warned of, where there are two chains of 100 draws or more.

    Attributes:
        draws: kept per chain.
        warmup: transitions per chain in which the step size adapts.
        chains: number of chains.
        target_accept: acceptance probability that the step size aims at. The mass matrix is dense
            and fixed: the inverse curvature at a quick Gaussian fit. Each chain starts at a draw
            of the Gaussian with that mean and covariance.
        proposals: per hyperparameter draw and new task.
    """

    loss_falls: ClassVar[bool] = False

    draws: Count = 300
    warmup: Annotated[int, Within(0)] = 100
    chains: Count = 2
    target_accept: Annotated[float, Within(0, 1, above=True, below=True)] = 0.8
    proposals: Count = 10

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

    def check_shared(self, density: Density) -> None:
        """All of φ is drawn."""

    @property
    def point_scales(self) -> bool:
        """False: they have a posterior of their own."""
        return False

    def shared_draws(self, state: State) -> dict[str, Tensor] | None:
        """See `Strategy.shared_draws`."""
        return {name: state.tensors[name] for name in ("loc", "log_scale", "shared")}

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
        row, position = divmod(state.step, self.warmup + self.draws)
        row = row * self.draws + position - self.warmup
        kept, kernel = state.tensors, state.cache.get("kernel")
        with pyro_untouched(), validation_off(), global_rng(generator):
            spent = 0 if kernel is None else kernel.count
            kernel = kernel or self._kernel(density, state, batch.tasks)
            if position == 0:
                chain = kernel.begin()
            else:
                chain = {name: kept[f"chain_{name}"] for name in _CHAIN}
            chain, diverged = kernel.transition(chain)
            drawn = self._drawn(density, kernel, chain) if position >= self.warmup else None
        # Nothing before this line changes the state: the model may have failed.
        last = state.step + 1 == self.num_steps
        with state.unless_it_fails() if last else nullcontext():  # a warning may be an error
            state.cache["kernel"] = kernel
            kept |= {"start": kernel.middle, "inverse_mass": kernel.inverse_mass}
            kept |= {f"chain_{name}": value for name, value in chain.items()}
            if drawn is not None:
                for name, value in drawn.items():
                    kept[name][row] = value
                kept["diverging"][row] = diverged
            if last:
                self._finish(state)
        count = len(batch.tasks)
        return StepInfo(float(chain["energy"]) / count, (kernel.count - spent) * count)

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

    def unseen(
        self, density: Density, state: State, names: Sequence[str], generator: torch.Generator
    ) -> TaskPosterior:
        """θ ~ N(θ0, Σ) for each draw of θ0, Σ and φ."""
        kept, count = state.tensors, len(names)
        loc, scale = kept["loc"], kept["log_scale"].exp()[:, state.meta.origin.groups]
        noise = torch.randn(
            len(loc), count, density.dim, generator=generator, dtype=loc.dtype, device=loc.device
        )
        shared = kept["shared"][:, None].expand(-1, count, -1)
        theta = loc[:, None] + scale[:, None] * noise
        return Draws(density, tuple(names), shared, theta, self.chains)

    # -- private ----------------------------------------------------------------------------------

    def _kernel(self, density: Density, state: State, tasks: Tasks) -> Kernel:
        """The sampler, as it was when the run began."""
        origin, kept = state.meta.origin, state.tensors
        centre = origin.loc.expand(len(tasks), -1)
        with torch.no_grad():
            losses = density.negative_log_likelihood(centre, tasks)
        check_finite(losses, tasks, state.step)
        kernel = Kernel(density, origin, tasks)
        resumed = "start" in kept
        middle = kept["start"] if resumed else self._middle(density, origin, tasks, kernel)
        belief = origin.hyperprior
        assert belief is not None  # `hierarchy` insists on it
        units = {f"shared_{site.name}": site.scale for site in density.shared_sites}
        kernel.ready(
            middle,
            units | {"loc": belief.width},
            kept.get("inverse_mass"),
            warmup=self.warmup,
            target_accept=self.target_accept,
        )
        if resumed:
            kernel.count = 0  # the run before has counted what making the sampler took
        return kernel

    def _middle(
        self, density: Density, prior: GaussianPrior, tasks: Tasks, kernel: Kernel
    ) -> Tensor:
        """Where chains start: the middle of a quick Gaussian fit of the same hierarchy.

        The joint mode would not do: in these coordinates it lies at huge scales, without pooling.
        """
        # As many noisy steps as lead away from the prior, and not to scales of 0: no chain should
        # begin there. What such a fit says of itself does not concern the user.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            strategy: Strategy = JointVariational(q="diagonal", steps=_QUICK_STEPS)
            if len(density.effects):  # whose spread that would take to 0
                strategy = LaplaceEvidence(steps=_FEW_STEPS)
            quick = fit(strategy, density, tasks, prior=prior, progress=False)
        kernel.count += quick.gradients // len(tasks)
        learned, shared = quick.state.meta.fixed()
        if len(density.effects):
            low = prior.log_scale.detach() - _FAR
            learned = learned.moved(learned.loc, learned.log_scale.clamp(min=low), None)
            width = _FAR * density.shared_scale
            start = density.shared_init
            shared = shared.clamp(start - width, start + width)
        z = (quick.posterior().mean - learned.loc) / learned.scale
        values = {"loc": learned.loc, "scale": learned.log_scale.exp(), "z": z}
        for name, value in density.constrain_shared(shared).items():
            values[f"shared_{name}"] = value
        return kernel.flat(values)

    def _drawn(
        self, density: Density, kernel: Kernel, chain: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """A draw as it is kept: every θ_i, θ0, the log scales and φ."""
        values = kernel.constrained(chain)
        conditioned = poutine.condition(kernel.model, data=values)
        with torch.no_grad():
            theta: Any = poutine.trace(conditioned).get_trace().nodes["theta"]["value"]
        shared = [s.unconstrain(values[f"shared_{s.name}"]) for s in density.shared_sites]
        none = theta.new_zeros(0)
        return {
            "theta": theta,
            "loc": values["loc"],
            "log_scale": values["scale"].log(),
            "shared": torch.cat([none, *(s.reshape(-1) for s in shared)]),
        }

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
