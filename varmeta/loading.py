"""load: a fit from the file that `Fit.save` wrote, or from the folder of a comparison."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from varmeta import files
from varmeta.files import BrokenFile
from varmeta.inference.base import Strategy
from varmeta.inference.fitted import INIT, Fit, noise_of
from varmeta.models.sites import Model
from varmeta.runs import DATA_FILE
from varmeta.saved import density_from, prior_from, strategy_from, tasks_from
from varmeta.tasks import Tasks, TaskSource

_LEARNED = {"state": dict, "seed": int, "strategy": str, "history": dict, "stats": dict}


def load(
    path: str | PathLike[str],
    model: Model,
    *,
    strategy: Strategy | str | None = None,
    tasks: Tasks | TaskSource | None = None,
    map_location: torch.device | str | None = None,
) -> Fit:
    """A fit that was saved, without training again.

    Files are read with `weights_only`: they hold tensors, numbers and texts, and nothing in them is
    run on loading. The model is yours to give, which is code. A formula is code too: that of the
    run is evaluated when a new table is predicted, so take such files from people you trust.

    Args:
        path: a file that `Fit.save` wrote, or the folder of a `compare`.
        model: the Pyro model that it learned with.
        strategy: of a folder the name of one in it, the best on known tasks if None. Else the
            strategy itself, needed where its settings hold functions of your own.
        tasks: the stream that it learned from; tasks themselves are in the file.
        map_location: the device to bring it to, such as `"cpu"`; None for where it was.

    Raises:
        BrokenFile: it cannot be read, or is not what was saved.
        ValueError: another model than that which it learned with, settings or a stream that were
            not saved, or a strategy that the folder does not have.

    Example:
        >>> import tempfile, pyro, pyro.distributions as dist, torch
        >>> import varmeta as vm
        >>> def level(x, y=None):
        ...     a = pyro.sample("a", dist.Normal(0.0, 3.0))
        ...     with pyro.plate("rows", len(x)):
        ...         return pyro.sample("y", dist.Normal(a + 0 * x[:, 0], 1.0), obs=y)
        >>> x = torch.zeros(3, 1, dtype=torch.float64)
        >>> tasks = vm.Tasks.from_list([(x, x[:, 0] + k) for k in range(4)])
        >>> fit = vm.fit(vm.LaplaceEvidence(), vm.Density(level, tasks), tasks)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     fit.save(f"{folder}/level.pt")
        ...     again = vm.load(f"{folder}/level.pt", level)
        >>> bool(torch.equal(again.prior.loc, fit.prior.loc))
        True
    """
    where = Path(path)
    if where.is_dir():
        saved, settings, data = _from_folder(where, strategy, map_location)
    else:
        saved = files.load(where, _LEARNED, map_location)
        if not isinstance(saved.get("data"), dict):
            raise BrokenFile(
                f"{where} is a checkpoint, which holds no data: call fit(checkpoint=...) with the "
                "arguments that it belongs to, and fit.save(path) to write a file for vm.load"
            )
        settings, data = saved.get("settings"), saved["data"]
    called = saved["strategy"].partition("(")[0]
    chosen = strategy if isinstance(strategy, Strategy) else strategy_from(settings, called)
    given = tasks_from(data, tasks)
    density = density_from(data, model, given, saved.get("fingerprint"))
    training = chosen.prepare(given, saved["seed"])
    size = data["batch_size"]
    whole = isinstance(training, Tasks) and size in (None, len(training))
    settled = chosen.settled(density, whole=whole)
    noise = noise_of(density, saved["seed"], INIT)
    state = settled.init(density, prior_from(data), training, noise)
    try:
        state.load_state_dict(saved["state"])
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise BrokenFile(f"{where} does not fit the model and strategy: {error}") from None
    return Fit(
        chosen,
        density,
        given,
        state,
        saved["seed"],
        pd.DataFrame(saved["history"]),
        saved["stats"],
        list(saved.get("moved", [])),
        settled,
        size,
        saved.get("fingerprint"),
    )


def strategies_in(folder: Path) -> list[str]:
    """Those of a comparison's folder that were scored, the best on known tasks first.

    Raises:
        BrokenFile: the folder holds no comparison.
    """
    try:
        table = pd.read_csv(folder / "table.csv")
        scored = table[table["failed"].isna()].drop_duplicates("strategy", keep="first")
        return [str(n) for n in scored.sort_values("elpd", ascending=False)["strategy"]]
    except (OSError, KeyError, ValueError):
        raise BrokenFile(
            f"{folder} holds no finished comparison; give a folder that compare wrote"
        ) from None


def _from_folder(
    folder: Path, name: Strategy | str | None, device: torch.device | str | None
) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    """What one strategy learned, its settings, and the data."""
    if isinstance(name, Strategy):
        raise ValueError(
            f"strategy: {folder} holds several; name one of them, such as {name.name!r}"
        )
    have = strategies_in(folder)
    both = files.load(folder / DATA_FILE, {"data": dict, "strategies": dict}, device)
    known = [n for n in have if n in both["strategies"]]
    if name is None and known:
        name = known[0]
    if name not in both["strategies"]:
        raise ValueError(f"strategy: {folder} has no {name!r}; it has: {', '.join(known)}")
    found = both["strategies"][name]
    return files.load(folder / found["file"], _LEARNED, device), found["settings"], both["data"]
