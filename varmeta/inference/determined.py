"""What the data determine: degrees of freedom of a module, and the evidence over a decade of scale.

Both from a task's curvature H = ∇²f at one point, in units of the prior's standard deviations S.
With Σ = S K⁻¹ S (K = I unless the prior has a low-rank part) and G = SHS,

- a module's effective number of parameters, Σ_j [(H + Λ)⁻¹H]_jj = Σ_j [(G + K)⁻¹G]_jj over its
  coordinates j: from 0, held by the prior, to their number, held by the data (MacKay, 1992,
  Bayesian Interpolation). It is also how much of the optimism of f at θ̄ is due to this module, for
  a linear-Gaussian task and any true θ: at θ0 + M(θ̄ − θ0), M a matrix, f is lower on the rows
  fitted to than on others with the same inputs by tr(cov(fitted values, y))/s² = tr(M(H + Λ)⁻¹H)
  on average (Efron, 2004, The Estimation of Prediction Error: Covariance Penalties and
  Cross-Validation); and M = I less the M that puts the module back to θ0 leaves this sum;
- the evidence of a task whose f is the parabola with that gradient and curvature: exact for
  linear-Gaussian tasks, with a value at any scale, 0 included.

Where f bends down its negative curvatures (in these units) count as 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from varmeta import parts
from varmeta.inference.energy import TaskEnergy
from varmeta.inference.lanczos import eigen, probes
from varmeta.inference.laplace import MAX_DIM, hessian
from varmeta.inference.linear import CG
from varmeta.inference.newton import NewtonCG
from varmeta.models.density import Density
from varmeta.models.derivatives import NotTwiceDifferentiable
from varmeta.models.prior import GaussianPrior
from varmeta.seeds import generator
from varmeta.tasks import Tasks

DECADE = 10.0
HARDLY = 0.5  # nats over all tasks: at a tenth the data are at least 0.6 times as likely
_BETTER = 0.1  # nats: where a tenth is better by this, the scale is large rather than small
MAX_MODULES, MAX_TASKS = 20, 1000  # whose scales are asked for, and tasks that are asked
_WORK = 5e9  # modules × tasks × coordinates³: some seconds; beyond, fewer tasks are asked
_PROBES = 16


@dataclass(frozen=True)
class Undetermined:
    """A scale that the data hardly tell from a tenth of it, and so from 0.

    Attributes:
        module: its name.
        scale: the module's standard deviation.
        down: nats, the change of the log evidence of all tasks at a tenth of the scale.
        up: the same at ten times the scale.
    """

    module: str
    scale: float
    down: float
    up: float


def undetermined(
    density: Density,
    prior: GaussianPrior,
    shared: Tensor,
    tasks: Tasks,
    theta: Tensor | None = None,
) -> list[Undetermined] | None:
    """The modules whose scale has collapsed: at a tenth of it the log evidence is hardly lower.

    By less than half a nat over all tasks together. Where it is higher by more than 0.1 the scale
    is large rather than small, and a task's standard deviations do not suffer. Units and size of
    the scale play no part: what is small and needed is not among them.

    Of more than 1,000 tasks (fewer where there are hundreds of coordinates and many modules) as
    many are asked, evenly chosen, and stand for all. One Hessian for each task, and for each module
    two determinants of its size.

    Args:
        density: the model.
        prior: N(θ0, Σ); scales of 0 are stated and not asked for.
        shared: φ `[P]`.
        tasks: T tasks; all of their rows count.
        theta: `[T, D]`, where each f is taken for a parabola; the modes if None.

    Returns:
        None where it is not looked for: more than 20 modules or 200 coordinates, a model without
        second derivatives.
    """
    names, scales = prior.modules.names, prior.log_scale.exp().tolist()
    if density.dim > MAX_DIM or len(names) > MAX_MODULES:
        return None
    share, most = 1.0, min(MAX_TASKS, max(20, int(_WORK / len(names) / density.dim**3)))
    if len(tasks) > most:
        chosen = torch.linspace(0, len(tasks) - 1, most).round().long()
        share = len(tasks) / most
        tasks, theta = tasks.select(chosen), None if theta is None else theta[chosen]
    try:
        if theta is None:
            energy = TaskEnergy(density, tasks, shared, prior)
            theta = NewtonCG().minimise(energy, prior.loc.expand(len(tasks), -1)).theta
        down, up = (share * over_a_decade(density, prior, shared, tasks, theta)).tolist()
    except NotTwiceDifferentiable:
        return None
    rows = zip(names, scales, down, up, strict=True)
    return [Undetermined(*row) for row in rows if row[1] > 0 and -HARDLY < row[2] < _BETTER]


def degrees_of_freedom(
    density: Density, prior: GaussianPrior, shared: Tensor, tasks: Tasks, theta: Tensor
) -> Tensor:
    """`[T, M]`, each module's effective number of parameters in each task.

    Up to 200 coordinates exactly. Above by 16 random directions (Hutchinson, 1990), each a solve by
    conjugate gradients, with negative curvature left in.

    Args:
        density: the model; f is the sum over all rows of `tasks`.
        prior: N(θ0, Σ).
        shared: φ `[P]`.
        tasks: T tasks.
        theta: `[T, D]`, where the curvature is taken.

    Raises:
        ValueError: the model is not twice differentiable.
    """
    if density.dim <= MAX_DIM:
        weight = _weight(prior)
        parts = []
        for _, _, curved in _curvatures(density, prior, shared, tasks, theta):
            root = torch.linalg.cholesky_ex(curved + weight).L
            parts.append(torch.cholesky_solve(curved, root).diagonal(dim1=-2, dim2=-1))
        each = torch.cat(parts)
    else:
        each = _by_probes(density, prior, shared, tasks, theta)
    out = each.new_zeros(len(tasks), prior.log_scale.shape[-1])
    return out.index_add(1, prior.groups, each)


def over_a_decade(
    density: Density, prior: GaussianPrior, shared: Tensor, tasks: Tasks, theta: Tensor
) -> Tensor:
    """`[2, M]`: by how much Σ_i log p(D_i | θ0, Σ, φ) rises if one module's scale is a tenth; ten.

    Nats, over all tasks together. A low-rank part is made smaller and larger with the scale.

    Args and errors are those of `degrees_of_freedom`, for up to 200 coordinates.
    """
    count = prior.log_scale.shape[-1]
    eye = torch.eye(density.dim, dtype=theta.dtype, device=theta.device)
    root = eye if prior.factor is None else torch.linalg.cholesky_ex(_spread(prior)).L
    total = theta.new_zeros(2, count)
    for some, gradient, curved in _curvatures(density, prior, shared, tasks, theta):
        offset = _divided(prior.loc - theta[some], prior.scale)
        pull = gradient + (curved @ offset[..., None])[..., 0]  # S∇f at θ0, of the parabola

        def evidence(factors: Tensor, pull: Tensor = pull, curved: Tensor = curved) -> Tensor:
            left = factors[:, None] * root
            matrix = torch.linalg.cholesky_ex(eye + left.mT @ curved @ left).L
            along = (pull @ left)[..., None]
            half = torch.linalg.solve_triangular(matrix, along, upper=False)
            volume = matrix.diagonal(dim1=-2, dim2=-1).log().sum(-1)
            return (0.5 * half.square().sum((-2, -1)) - volume).sum()

        now = evidence(torch.ones_like(prior.scale))
        for m in range(count):
            for k, factor in enumerate((1 / DECADE, DECADE)):
                factors = torch.ones_like(prior.scale).masked_fill(prior.groups == m, factor)
                total[k, m] += evidence(factors) - now
    return total


def _curvatures(
    density: Density, prior: GaussianPrior, shared: Tensor, tasks: Tasks, theta: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Of some tasks at once: which, S∇f `[t, D]` and SHS `[t, D, D]`, no curvature below 0."""
    scale, numbers = prior.scale.detach(), max(density.dim**2, tasks.padded_rows // len(tasks))
    for some in parts.slices(len(tasks), numbers, parts.LARGEST // 2):  # matrices come in pairs
        whole = some.stop - some.start == len(tasks)
        part = tasks if whole else tasks.select(range(some.start, some.stop))
        energy, at = TaskEnergy(density, part, shared), theta[some].detach()
        curved = scale[:, None] * hessian(energy, at).detach() * scale
        # In units of the posterior's widths: a wide prior must not round a narrow one's part away.
        unit = (1 + curved.diagonal(dim1=-2, dim2=-1).abs()).sqrt()
        widths = unit[:, :, None] * unit[:, None, :]
        values, vectors, finite = eigen(curved / widths)
        values = torch.where(finite[:, None], values, float("nan"))
        positive = widths * (vectors * values.clamp(min=0)[:, None] @ vectors.mT)
        curved = torch.where((values >= 0).all(-1)[:, None, None], curved, positive)
        yield some, scale * energy.value_and_gradient(at)[1], curved


def _by_probes(
    density: Density, prior: GaussianPrior, shared: Tensor, tasks: Tasks, theta: Tensor
) -> Tensor:
    """`[T, D]`: z ∘ (G + K)⁻¹Gz, the mean over directions z."""
    scale = prior.scale.detach()
    product = TaskEnergy(density, tasks, shared).linearise(theta.detach()).product
    directions = probes(min(_PROBES, density.dim), theta, generator(0, device=theta.device))

    def curved(v: Tensor) -> Tensor:
        return scale * product(scale * v)

    def matvec(v: Tensor) -> Tensor:
        held = v if prior.factor is None else scale * prior.precision_mv(scale * v)
        return curved(v) + held

    total = torch.zeros_like(theta)
    for z in directions:
        total = total + z * CG().solve(matvec, curved(z)).x
    return total / len(directions)


def _spread(prior: GaussianPrior) -> Tensor:
    """K⁻¹ = S⁻¹ΣS⁻¹ `[D, D]`."""
    assert prior.factor is not None
    left = prior.factor / prior.scale[:, None]
    return torch.eye(prior.dim, dtype=left.dtype, device=left.device) + left @ left.mT


def _weight(prior: GaussianPrior) -> Tensor:
    """K `[D, D]`."""
    if prior.factor is None:
        return torch.eye(prior.dim, dtype=prior.loc.dtype, device=prior.loc.device)
    return torch.linalg.inv(_spread(prior))


def _divided(offset: Tensor, scale: Tensor) -> Tensor:
    """offset / scale, 0 where the scale is 0 and no task can be elsewhere."""
    return torch.where(scale > 0, offset / scale, 0.0)
