"""The reachability gap: is what was learned jointly also found by a fresh adaptation from θ0?

Strategies that keep parameters for every training task optimise them together with θ0, along a path
that no new task can follow. Per task the gap is F_i(Alg(f_i, θ0)) − F_i(q_i), with F_i the task's
share of the objective: the free energy KL[q_i ‖ N(θ0, Σ)] + E_{q_i} f_i of a Gaussian, or
E_i(θ_i) = f_i(θ_i) + ½‖θ_i−θ0‖²_Λ of a point. It is the doubt that Huszár (inference.vc, 2019) has
about joint optimisation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from varmeta import parts
from varmeta.inference.families import GaussianQ
from varmeta.inference.fitted import Fit
from varmeta.inference.free_energy import free_energy
from varmeta.posterior import Gaussian, TaskPosterior
from varmeta.seeds import generator
from varmeta.tasks import TaskSource


def reachability_gap(fit: Fit, *, draws: int = 256, seed: int = 0) -> Tensor:
    """How much worse a fresh adaptation is than what the run kept for each task, nats, `[T]`.

    0: θ0 leads every task to where joint optimisation took it. Positive: it does not, by so much;
    negative: the adaptation, which has its own budget, does better than the run.

    Args:
        fit: a run on `Tasks` whose strategy keeps posteriors (`JointVariational`, `PyroSVI`).
        draws: antithetic draws, the same for both posteriors, at which a Gaussian's E f is
            averaged. Draws (`PyroSVI`) are compared at their means.
        seed: of these draws.

    Raises:
        ValueError: the strategy keeps nothing of a task, so that there is no gap.
    """
    if not fit.strategy.keeps_posteriors or isinstance(fit.tasks, TaskSource):
        raise ValueError(
            f"{fit.strategy.name} keeps nothing of a task but the prior it learned: every "
            "posterior is a fresh adaptation, and the gap is 0 by definition"
        )
    fresh, kept = fit.adapt(fit.tasks.unsplit), fit.posterior()
    with torch.no_grad():
        return _objective(fit, fresh, draws, seed) - _objective(fit, kept, draws, seed)


def _objective(fit: Fit, posterior: TaskPosterior, draws: int, seed: int) -> Tensor:
    """F_i `[T]`, nats."""
    assert not isinstance(fit.tasks, TaskSource)
    tasks, density, phi = fit.tasks.unsplit, fit.density, fit.shared
    if not isinstance(posterior, Gaussian):
        return free_energy(density, fit.prior, phi, tasks, GaussianQ(posterior.mean), None)
    noise, expected = generator(seed, device=posterior.mean.device), []
    dim = GaussianQ.of(posterior).noise_dim
    for some in parts.slices(len(tasks), draws * dim, parts.LARGEST):
        q = GaussianQ.of(posterior.select(range(some.start, some.stop)))
        shape = (draws // 2, len(q.mean), dim)
        half = torch.randn(shape, generator=noise, dtype=q.mean.dtype, device=q.mean.device)
        theta, rows = q.draws(torch.cat([half, -half])), parts.tasks_at(tasks, some)
        expected.append(-parts.total_log_likelihood(density, theta, rows, phi).mean(0))
    return GaussianQ.of(posterior).kl(fit.prior) + torch.cat(expected)
