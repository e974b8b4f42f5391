"""Draws of the observed sites, for all tasks and draws at once where that can be."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from varmeta.models.apart import NotApart
from varmeta.models.blame import is_unbatched
from varmeta.models.over_tasks import over_tasks
from varmeta.models.sites import reason
from varmeta.seeds import OwnDraws

if TYPE_CHECKING:
    from varmeta.models.density import Density

_log = logging.getLogger("varmeta")


def draw_observed(
    density: Density, theta: Tensor, shared: Tensor, inputs: Tensor, own: OwnDraws
) -> dict[str, Tensor]:
    """`{site: [..., T, N, *event]}` given θ `[..., T, D]` and φ, with the random numbers of `own`.

    Raises:
        ValueError: the model needs y.
        NotImplementedError: a law that cannot be drawn from.
    """
    how: Any = {"draws": theta.dim() - 2, "per_draw": shared.dim() > 1, "data": 1}
    if density._how != "one by one":
        try:
            together = over_tasks(partial(_simulate, density, own), **how, random=True)
            return dict(together(theta, shared, inputs))
        except NotImplementedError:
            pass
        except RuntimeError as error:
            if not (isinstance(error, NotApart) or is_unbatched(error)):
                raise
            if not density._drawn_singly:
                _log.warning("predictions are drawn one by one, which is slow: %s", _why(error))
            density._drawn_singly = True
    try:
        loop = over_tasks(partial(_simulate, density, None), **how, loop=True)
        return dict(loop(theta, shared, inputs))
    except NotImplementedError as error:
        raise NotImplementedError(
            f"model cannot predict: {str(error).splitlines()[0]}; fits and densities work without"
        ) from error


def _why(error: RuntimeError) -> str:
    """What keeps draws apart; of random numbers in place PyTorch does not say what mends it."""
    if "inplace randomness" in str(error):
        return (
            "a law's sample fills a tensor in place, such as torch.empty(shape).exponential_(); "
            "make it from torch.rand(shape) or torch.randn(shape)"
        )
    return reason(error)


def _simulate(
    density: Density, together: OwnDraws | None, theta: Tensor, shared: Tensor, x: Tensor
) -> dict[str, Tensor]:
    """One task; `together` within `vmap`."""
    try:
        trace = density._trace(theta, shared, x, None, together=together)
    except (AttributeError, TypeError) as error:
        raise ValueError(
            f"model failed with y=None: {reason(error)}. To predict it is "
            "called as model(x, None); take the number of rows from x"
        ) from error
    missing = [name for name in density.observed if name not in trace.nodes]
    if missing:
        raise ValueError(
            f"model has no site {missing[0]!r} when y is None; sample it there too, obs=None. What "
            "pyro.factor adds cannot be drawn: write it as the log_prob of a law of your own, a "
            "TorchDistribution with sample"
        )
    return {name: trace.nodes[name]["value"] for name in density.observed}
