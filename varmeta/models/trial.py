"""All that comes after a fit, tried before it: a score, what was observed, a prediction."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from varmeta.models.drawing import CannotPredict
from varmeta.models.observed import observed_data
from varmeta.models.sites import reason
from varmeta.process import ignoring
from varmeta.seeds import generator
from varmeta.tasks import Tasks

if TYPE_CHECKING:
    from varmeta.models.density import Density

_TASKS, _DRAWS = 2, 2
_RESERVED = {"chain", "draw", "module", "task", "row", "input", "task_of_row", "row_id"}
_log = logging.getLogger("varmeta")


def try_all(density: Density, tasks: Tasks) -> str | None:
    """Try on the shortest tasks, at two draws of the prior, what is done with draws of a fit.

    Returns:
        Why targets cannot be drawn, which is said in the log too; None if they can.

    Raises:
        ValueError: draws cannot be scored together, or an observed site's values are none of rows.
    """
    rows = tasks.num_rows
    few = tasks.select(rows.where(rows > 0, rows.max()).argsort(stable=True)[:_TASKS].sort().values)
    loc = density.prior_loc
    noise = generator(0, device=loc.device)
    like: Any = {"generator": noise, "dtype": loc.dtype, "device": loc.device}
    theta = loc + density.prior_scale * torch.randn(_DRAWS, len(few), len(loc), **like)
    _score(density, theta, few)
    wanted = {name: site.value for name, site in observed_data(density, few).items()}
    for name, value in wanted.items():
        if value.shape[:2] != few.mask.shape:
            raise ValueError(
                f"observed site {name!r} is given values of shape {tuple(value.shape[1:])} for "
                f"{few.mask.shape[1]} rows; their first dimension must be that of the rows"
            )
    taken = taken_name(density)
    if taken is not None:
        _log.warning("to_arviz will not export this model: %s", taken)
    why = _why_not(density, theta, few, wanted)
    if why is not None:  # a law may be none there
        why = _why_not(density, loc.expand_as(theta), few, wanted)
    if why is not None:
        _log.warning(
            "%s. Fits and log densities work without predictions: scores have no RMSE and no "
            "coverage, and to_arviz leaves out posterior_predictive",
            why,
        )
    elif density.likelihood.factors:
        _log.warning(
            "pyro.factor %r counts in every log density; predictions are drawn without it",
            density.likelihood.factors[0],
        )
    return why


def taken_name(density: Density) -> str | None:
    """That a site has a name that the exported data need for something else; None if none has."""
    latents = [site.name for site in (*density.sites, *density.shared_sites)]
    derived = {f"{site.name}_{kind}" for site in density.sites for kind in ("loc", "scale")}
    taken = [n for n in latents if n in derived]
    taken += [n for n in (*latents, *density.observed) if n in _RESERVED]
    if not taken:
        return None
    return (
        f"site {taken[0]!r} has the name of something else in the exported data (a dimension, "
        "a coordinate, or <site>_loc or <site>_scale); rename it in the model"
    )


def _score(density: Density, theta: Tensor, few: Tasks) -> None:
    """Draws are scored together, and as each is scored alone."""
    try:
        with torch.no_grad():
            together = density.log_likelihood(theta, few)
            alone = torch.stack([density.log_likelihood(draw, few) for draw in theta])
    except Exception as error:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            raise
        raise ValueError(
            f"model runs on a batch of tasks, and fails on several draws of it: {reason(error)}"
        ) from error
    if not torch.allclose(together, alone, rtol=1e-3, atol=1e-3, equal_nan=True):
        raise ValueError(
            "model gives a row another log-likelihood when several draws are scored together; let "
            "its operations act on the last dimensions, as x[..., 0] and .sum(-1) do"
        )


def _why_not(density: Density, theta: Tensor, few: Tasks, wanted: dict[str, Tensor]) -> str | None:
    """Why these draws of these tasks cannot be predicted."""
    noise = generator(0, device=few.mask.device)
    try:
        with ignoring():  # of singular draws, say: the prior's are no one's
            found = density.predict(theta, few, noise)
    except CannotPredict as error:
        return str(error)
    except Exception as error:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            raise
        return f"model cannot predict: {reason(error)}"
    for name, drawn in found.items():
        if drawn.shape[1:] != wanted[name].shape:
            return (
                f"model cannot predict: observed site {name!r} draws values of shape "
                f"{tuple(drawn.shape[2:])}, and is given some of shape "
                f"{tuple(wanted[name].shape[1:])}"
            )
    return None
