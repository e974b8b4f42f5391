"""Pyro's NUTS on a potential, a chain being nothing but tensors between two transitions.

Pyro's kernel keeps a chain in private attributes: where it stands, the step size and the averages
from which that is adapted (dual averaging: Hoffman & Gelman, 2014, The No-U-Turn Sampler). Each
transition here puts them in and takes them out again, so that a chain which is read from a file
goes on as one that was never stopped, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from pyro.infer import NUTS
from pyro.infer.mcmc.util import initialize_model
from pyro.ops.integrator import potential_grad
from pyro.poutine import Trace
from torch import Tensor

from varmeta.inference.base import NonFiniteLoss
from varmeta.models.capture import CapturedGradient
from varmeta.models.density import Density
from varmeta.models.hierarchy import hierarchy
from varmeta.models.prior import GaussianPrior
from varmeta.seeds import generator, global_rng
from varmeta.tasks import Tasks

MAX_DIM = 3000
_FIRST_STEP = 0.1  # from which a step size of about the right order is looked for
_SHARES = (1.0, 0.5, 0.25, 0.0)  # of the way from the middle to where a chain would begin


class Sampler:
    """Pyro's NUTS on a potential of real numbers, transition by transition.

    A chain is a dictionary of tensors: `position` `[n]`, `slope` `[n]` (of the potential there),
    `energy` (the potential, nats), `adaptation` `[5]` (step size, and the numbers of the dual
    averaging) and `count` `[3]` (transitions, window, updates of the averages).

    Args:
        potential: tensors by name to −log p in nats, differentiable once.
        shapes: of these tensors, in the order of a flat position.

    Attributes:
        count: evaluations of the potential's gradient so far.
    """

    def __init__(
        self,
        potential: Callable[[Mapping[str, Tensor]], Tensor],
        shapes: Mapping[str, torch.Size],
    ) -> None:
        self.potential, self.shapes = potential, dict(shapes)
        self.count = 0

    def energy(self, z: Mapping[str, Tensor]) -> Tensor:
        """The potential, counted."""
        self.count += 1
        return self.potential(z)

    def start(
        self, middle: Tensor, inverse_mass: Tensor, *, warmup: int, target_accept: float
    ) -> None:
        """Make the sampler.

        Args:
            middle: `[n]`, around which chains begin.
            inverse_mass: `[n, n]`.
            warmup: transitions in which the step size adapts.
            target_accept: the acceptance probability that it aims at.
        """
        self.middle, self.inverse_mass = middle, inverse_mass
        self._nuts = NUTS(
            potential_fn=self.energy,
            step_size=_FIRST_STEP,
            adapt_mass_matrix=False,
            full_mass=True,
            target_accept_prob=target_accept,
        )
        spent, self._nuts.initial_params = self.count, self.split(middle)
        with global_rng(generator(0)):
            self._nuts.setup(warmup)
        self.count = spent
        self._nuts.mass_matrix_adapter.inverse_mass_matrix = {
            sites: inverse_mass for sites in self._nuts.inverse_mass_matrix
        }

    def begin(self) -> dict[str, Tensor]:
        """A chain at its start: a draw of the Gaussian with the middle's curvature.

        The draw is taken back towards the middle where the potential is not finite.

        Raises:
            NonFiniteLoss: it is not finite at the middle either.
        """
        nuts, adapter = self._nuts, self._nuts._adapter
        move = torch.linalg.cholesky(self.inverse_mass) @ torch.randn_like(self.middle)
        for share in _SHARES:
            z = self.split(self.middle + share * move)
            slopes, energy = potential_grad(self.energy, z)
            if bool(torch.stack([energy, *(s.sum() for s in slopes.values())]).isfinite().all()):
                break
        else:
            raise NonFiniteLoss(
                "the hierarchy's density or its gradient is not finite at the quick Gaussian fit "
                "where NUTS would start; tighten the model's priors"
            )
        nuts._cache(z, energy, slopes)
        nuts._t = adapter._current_window = 0
        adapter.step_size = _FIRST_STEP
        adapter.reset_step_size_adaptation(z)
        return self._chain()

    def transition(self, chain: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
        """The chain after one more transition, and whether that diverged after the warm-up."""
        nuts, adapter = self._nuts, self._nuts._adapter
        scheme = adapter._step_size_adapt_scheme
        z = self.split(chain["position"])
        nuts._cache(z, chain["energy"], self.split(chain["slope"]))
        nuts._t, adapter._current_window, scheme._t = chain["count"].tolist()
        numbers = chain["adaptation"].tolist()
        adapter.step_size, scheme.prox_center, scheme._x_t, scheme._x_avg, scheme._g_avg = numbers
        diverged = len(nuts._divergences)
        nuts.sample(z)
        return self._chain(), len(nuts._divergences) > diverged

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """A flat position by sites."""
        parts = flat.split([shape.numel() for shape in self.shapes.values()])
        return {n: p.reshape(self.shapes[n]) for n, p in zip(self.shapes, parts, strict=True)}

    def _chain(self) -> dict[str, Tensor]:
        nuts, adapter = self._nuts, self._nuts._adapter
        scheme = adapter._step_size_adapt_scheme
        z, energy, slopes = nuts._fetch_from_cache()
        latest = getattr(scheme, "_x_t", 0.0)  # Pyro makes it with the first update
        numbers = [adapter.step_size, scheme.prox_center, latest, scheme._x_avg, scheme._g_avg]
        return {
            "position": torch.cat([z[name].detach().reshape(-1) for name in self.shapes]),
            "slope": torch.cat([slopes[name].detach().reshape(-1) for name in self.shapes]),
            "energy": energy.detach().clone(),
            "adaptation": torch.tensor(numbers, dtype=torch.float64),
            "count": torch.tensor([nuts._t, adapter._current_window, scheme._t]),
        }


class Kernel(Sampler):
    """The hierarchy's potential, and transitions on it.

    Attributes:
        model: the hierarchy, a Pyro model without arguments.
        shapes: of the sites in the order of a flat position.
        transforms: by site, from its own scale to the real line.
    """

    def __init__(self, density: Density, prior: GaussianPrior, tasks: Tasks) -> None:
        self.model = hierarchy(density, prior, tasks)
        trace: Trace
        with global_rng(generator(0)):  # what is drawn here gives the shapes alone
            # No first point: Pyro would look for one at random, and begin there.
            _, potential, self.transforms, trace = initialize_model(self.model, initial_params={})
        # In the order that Pyro's mass matrix has.
        shapes: dict[str, torch.Size] = {
            name: self.transforms[name](trace.nodes[name]["value"]).shape
            for name in sorted(self.transforms)
        }
        super().__init__(potential, shapes)
        size = sum(shape.numel() for shape in self.shapes.values())
        if size > MAX_DIM:
            raise ValueError(
                f"the hierarchy has {size} coordinates; PyroNUTS is a reference for problems of up "
                f"to {MAX_DIM} (it keeps a dense mass matrix). Leave tasks out, or leave PyroNUTS "
                "out"
            )

    def ready(
        self,
        middle: Tensor,
        units: Mapping[str, Tensor],
        inverse_mass: Tensor | None,
        *,
        warmup: int,
        target_accept: float,
    ) -> None:
        """Make the sampler.

        Args:
            middle: `[n]`, around which chains begin.
            units: the prior's standard deviation of a site's coordinates; 1 where it is left out.
            inverse_mass: `[n, n]`; the inverse curvature at the middle if None.
            warmup: transitions in which the step size adapts.
            target_accept: the acceptance probability that it aims at.
        """
        whole = self.potential
        program = CapturedGradient(
            lambda *values: whole(dict(zip(self.shapes, values, strict=True))),
            [*self.split(middle).values()],
        )
        self.potential = lambda z: program(*(z[name] for name in self.shapes))
        if inverse_mass is None:
            one = torch.ones_like(middle[:1])
            each = [units.get(n, one.expand(s.numel())) for n, s in self.shapes.items()]
            inverse_mass = _inverse_curvature(
                lambda flat: self.energy(self.split(flat)), middle, torch.cat(each)
            )
        self.start(middle, inverse_mass, warmup=warmup, target_accept=target_accept)

    def constrained(self, chain: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The value of each site, on its own scale, where a chain stands."""
        values = self.split(chain["position"])
        return {name: self.transforms[name].inv(value) for name, value in values.items()}

    def flat(self, values: Mapping[str, Tensor]) -> Tensor:
        """`[n]`: where each site has these values on its own scale."""
        parts = [self.transforms[name](values[name]).reshape(-1) for name in self.shapes]
        return torch.cat(parts)


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
