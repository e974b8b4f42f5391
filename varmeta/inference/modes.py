"""The mode of each task's posterior under a given prior, also where Newton-CG does not find it."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from varmeta.checked import require_kind
from varmeta.inference.base import NonFinitePosterior, NotConverged
from varmeta.inference.energy import TaskEnergy
from varmeta.inference.laplace import MAX_DIM
from varmeta.inference.minimise import Minimiser
from varmeta.inference.newton import NewtonCG
from varmeta.inference.pilot import curvature_at_rest
from varmeta.inference.prox import Adjoint, ProxInfo, Unrolled, prox
from varmeta.models.density import Density
from varmeta.models.prior import GaussianPrior
from varmeta.tasks import HOW_TASKS, Tasks


def map_estimate(
    density: Density,
    tasks: Tasks,
    prior: GaussianPrior,
    shared: Tensor | None = None,
    *,
    start: Tensor | None = None,
    minimiser: Minimiser | None = None,
    adjoint: Adjoint | None = None,
) -> tuple[Tensor, ProxInfo]:
    """θ_i* = argmin f_i(θ) + ½(θ−θ0)ᵀΛ(θ−θ0) of each task, differentiable in the prior and in φ.

    This is `prox` of a task's energy. The result has the derivative of the minimum in θ0, the log
    scales, the low-rank factor and φ, whichever of them require a gradient: dθ*/dθ0 is (H+Λ)⁻¹Λ,
    for one dimension and λ = 1 the 1/(1+f″) of the implicit function theorem (Rajeswaran, Finn,
    Kakade & Levine, 2019, eq. 6). Use ordinary autograd, and first derivatives only.

    Args:
        density: the model.
        tasks: T tasks, all of whose rows count.
        prior: N(θ0, Σ).
        shared: φ `[P]`, unconstrained; `density.shared_init` if None.
        start: where the minimiser begins, `[T, D]`; θ0 if None. It has a derivative of its own with
            `Unrolled` alone.
        minimiser: default `NewtonCG()`.
        adjoint: how θ* is differentiated; default `Implicit()`.

    Returns:
        θ* `[T, D]`, unconstrained (`density.constrain(theta)` has it by site), and how far it and
        its derivative can be trusted.

    Raises:
        TypeError: a density, tasks or prior that are none.
        ValueError: tasks with query rows, without rows, or that do not fit the model; a prior,
            φ or start of another shape.
        NonFinitePosterior: a θ_i* that is no number, naming the task.

    A `NotConverged` warning names tasks where the minimiser has not reached its tolerance: the
    implicit derivative is that of a minimum, and θ_i is none.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def school(x, y=None):
        ...     effect = pyro.sample("effect", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("rows", x.shape[0]):
        ...         return pyro.sample("y", dist.Normal(effect, x[:, 0]), obs=y)
        >>> tasks = Tasks.from_list([(torch.tensor([[2.0]]), torch.tensor([5.0]))])  # f″ = 1/2²
        >>> loc = torch.zeros(1, requires_grad=True)
        >>> prior = GaussianPrior.create(loc, 1.0)
        >>> theta, info = map_estimate(Density(school, tasks), tasks, prior)
        >>> theta
        tensor([[1.]], grad_fn=<AddBackward0>)
        >>> torch.autograd.grad(theta.sum(), loc)  # 1 / (1 + 1/4)
        (tensor([0.8000]),)
    """
    require_kind("density", density, Density, "make one by vm.Density(model, tasks)")
    require_kind("tasks", tasks, Tasks, HOW_TASKS)
    require_kind("prior", prior, GaussianPrior, "GaussianPrior.from_density(density) is one")
    tasks.require_no_query("tasks", "to adapt to them too")
    tasks.require_rows("tasks")
    density.check_tasks(tasks)
    if prior.dim != density.dim:
        raise ValueError(f"prior has {prior.dim} coordinates, the density {density.dim}")
    shared = density.shared_init if shared is None else shared
    energy = TaskEnergy(density, tasks.unsplit, shared, prior)
    minimiser = minimiser or NewtonCG()
    if start is not None and tuple(start.shape) != (len(tasks), density.dim):
        wanted = (len(tasks), density.dim)
        raise ValueError(f"start has shape {tuple(start.shape)}, wanted {wanted}")
    if start is None and isinstance(adjoint, Unrolled):
        start = prior.loc.expand(len(tasks), -1)
    elif start is None:  # from the mode on, which the minimiser leaves where it is
        start = find_modes(density, prior, shared, tasks.unsplit, minimiser)[0]
    theta, info = prox(energy, start, minimiser=minimiser, adjoint=adjoint)
    bad = ~theta.detach().isfinite().all(-1)
    if bool(bad.any()):
        name = tasks.names[int(bad.nonzero()[0])]
        raise NonFinitePosterior(
            f"θ* of task {name!r} is not finite: lower the minimiser's step size, tighten the "
            "prior, or check this task's data"
        )
    if info.converged is not None and not bool(info.converged.all()):
        left = (~info.converged).nonzero()[:, 0].tolist()
        named = ", ".join(repr(tasks.names[i]) for i in left[:5])
        warnings.warn(
            f"{len(left)} of {len(tasks)} tasks ({named}) are not at a minimum, of which the "
            "derivative is: raise the minimiser's max_iterations, or start nearer",
            NotConverged,
            stacklevel=2,
        )
    return theta, info


def find_modes(
    density: Density,
    prior: GaussianPrior,
    shared: Tensor,
    tasks: Tasks,
    minimiser: Minimiser,
) -> tuple[Tensor, ProxInfo]:
    """θ_i* `[T, D]` from θ0, and its diagnostics; nothing is differentiated.

    Where `NewtonCG` has not reached its tolerance, as far from a mode of a model that bends (a
    noise of each task's own), saddle-free Newton steps go down from θ0 and it goes on from where
    they come to rest (up to 200 coordinates).
    """
    with torch.no_grad():
        energy = TaskEnergy(density, tasks, shared, prior)
        start = prior.loc.expand(len(tasks), -1)
        theta, info = prox(energy, start, minimiser=minimiser)
        if not isinstance(minimiser, NewtonCG) or density.dim > MAX_DIM:
            return theta, info
        assert info.converged is not None
        if bool(info.converged.all()):
            return theta, info
        rest = (~info.converged).nonzero()[:, 0]
        some = TaskEnergy(density, tasks.select(rest.cpu()), shared, prior)
        way = curvature_at_rest(some, start[rest], prior.scale)
        again, second = prox(some, way.theta, minimiser=minimiser)
        lower = some.value_and_gradient(again)[0] <= some.value_and_gradient(theta[rest])[0]
        assert second.converged is not None
        better = lower | second.converged
        index = rest[better]
        theta = theta.clone()
        theta[index] = again[better]
        for name in ("grad_norm", "reduction", "converged", "negative_curvature"):
            getattr(info, name)[index] = getattr(second, name)[better]
        info.iterations[rest] += second.iterations
        info.gradients += (way.gradients + second.gradients + 2) * len(rest) // len(tasks)
        info.minimum = theta
        return theta, info
