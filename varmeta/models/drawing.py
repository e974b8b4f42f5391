"""Draws of the observed sites, for all tasks and draws at once where that can be."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from varmeta.models.apart import NotApart
from varmeta.models.blame import is_own, is_unbatched
from varmeta.models.observed import every_row
from varmeta.models.over_tasks import over_tasks
from varmeta.models.sites import reason
from varmeta.seeds import OwnDraws

if TYPE_CHECKING:
    from varmeta.models.density import Density

_log = logging.getLogger("varmeta")


class CannotPredict(NotImplementedError, ValueError):
    """A model of which no targets can be drawn; the message says why."""


def draw_observed(
    density: Density, theta: Tensor, shared: Tensor, inputs: Tensor, own: OwnDraws
) -> dict[str, Tensor]:
    """`{site: [..., T, N, *event]}` given θ `[..., T, D]` and φ, with the random numbers of `own`.

    Raises:
        CannotPredict: the model fails without y, or a law cannot be drawn from.
    """
    how: Any = {"draws": theta.dim() - 2, "per_draw": shared.dim() > 1, "data": 1}
    if density._how != "one by one":
        try:
            together = over_tasks(partial(_simulate, density, own), **how, random=True)
            return dict(together(theta, shared, inputs))
        except CannotPredict:
            raise
        except NotImplementedError:
            pass
        except RuntimeError as error:
            if is_own(error):
                raise
            if not (isinstance(error, NotApart) or is_unbatched(error)):
                raise _failed(error) from error
            if not density._drawn_singly:
                _log.warning("predictions are drawn one by one, which is slow: %s", _why(error))
            density._drawn_singly = True
    try:
        loop = over_tasks(partial(_simulate, density, None), **how, loop=True)
        return dict(loop(theta, shared, inputs))
    except CannotPredict:
        raise
    except NotImplementedError as error:
        raise CannotPredict(f"model cannot predict: {str(error).splitlines()[0]}") from error
    except RuntimeError as error:
        if is_own(error):
            raise
        raise _failed(error) from error


def _failed(error: Exception) -> CannotPredict:
    return CannotPredict(
        f"model failed with y=None: {reason(error).splitlines()[0]}. To predict it is called as "
        "model(x, None); take the number of rows from x, and make of y what needs it where it is "
        "given: obs=None if y is None else y.log()"
    )


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
    if not density.drawn:
        raise CannotPredict(
            "model cannot predict: what pyro.factor adds cannot be drawn. Write it as the log_prob "
            "of a law of your own, a TorchDistribution with sample"
        )
    try:
        trace = density._trace(theta, shared, x, None, together=together)
    except Exception as error:
        if is_own(error) or isinstance(error, RuntimeError):  # of vmap, perhaps
            raise
        raise _failed(error) from error
    missing = [name for name in density.drawn if name not in trace.nodes]
    if missing:
        raise CannotPredict(
            f"model has no site {missing[0]!r} when y is None; sample it there too, obs=None"
        )
    given = [name for name in density.drawn if trace.nodes[name]["is_observed"]]
    if len(given) == len(density.drawn):
        raise CannotPredict(
            f"model gives observed site {given[0]!r} a value when y is None; pass obs=None there, "
            "so that it is drawn"
        )
    for name in given:
        trace.nodes[name]["value"] = every_row(trace.nodes[name])
    return {name: trace.nodes[name]["value"] for name in density.drawn}
