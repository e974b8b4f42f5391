"""predict_file: predictions for the rows of a CSV file, as a CSV file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from varmeta.csv_files import read_csv
from varmeta.files import require_writable, write
from varmeta.inference.fitted import Fit
from varmeta.posterior import DRAWS
from varmeta.prediction import QUANTILES, predict


def predict_file(
    fit: Fit,
    data: Path,
    out: Path,
    *,
    quantiles: Sequence[float] = QUANTILES,
    keep: int = 0,
    seed: int = 0,
    overwrite: bool = False,
) -> str:
    """Write what `fit.predict` says of the rows of `data` to `out`, and say so in a sentence.

    Args:
        fit: whose task, inputs and target are columns of `data`.
        data: a CSV file.
        out: the file to write.
        quantiles: of the predictions.
        keep: draws to write for each row, as columns.
        seed: of the draws.
        overwrite: replace `out`.

    Raises:
        FileNotFoundError: no such file.
        FileExistsError: `out` is there.
        NotWritten: it cannot be written.
        ValueError: as `Fit.predict` does, with the line of the file.
    """
    if out.exists() and (not overwrite or out.samefile(data)):
        raise FileExistsError(
            f"out: {str(out)!r} is there; name another file"
            + ("" if out.samefile(data) else ", or give overwrite=True (--overwrite) to replace it")
        )
    require_writable(out, "out")
    found = predict(fit, read_csv(data), max(DRAWS, keep), quantiles, keep, seed)
    write(out, found.with_draws().to_csv(index=False))
    known_by = found.table["known_by"].value_counts()
    counts = ", ".join(f"{count} by {what}" for what, count in known_by.items())
    return (
        f"{len(found.table)} rows predicted by {fit.strategy.name} ({counts}: what their task is "
        f"known by), in {out}"
    )
