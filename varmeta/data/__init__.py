"""Three classic hierarchical data sets, small enough to ship; README.md here says where from."""

from __future__ import annotations

from importlib.resources import files

import pandas as pd

NAMES = ("eight_schools", "radon", "sleepstudy")


def load(name: str) -> pd.DataFrame:
    """One of the data sets in `NAMES`, as a new data frame with one row per observation.

    | name            | rows | groups      | columns                                       |
    | --------------- | ---- | ----------- | --------------------------------------------- |
    | `eight_schools` | 8    | 8 schools   | `school`, `effect`, `se`                      |
    | `radon`         | 919  | 85 counties | `county`, `log_radon`, `floor`, `log_uranium` |
    | `sleepstudy`    | 180  | 18 subjects | `subject`, `days`, `reaction`                 |

    Both logarithms are natural and already taken; `floor` is 0 for a measurement in the basement
    and 1 for one on the first floor; `reaction` is in milliseconds.

    Args:
        name: the data set.

    Raises:
        ValueError: `name` is not in `NAMES`.

    Example:
        >>> from varmeta.data import load
        >>> radon = load("radon")
        >>> radon.shape, radon["county"].nunique()
        ((919, 4), 85)
        >>> load("radium")
        Traceback (most recent call last):
        ...
        ValueError: name is 'radium'; wanted one of 'eight_schools', 'radon', 'sleepstudy'
    """
    if name not in NAMES:
        raise ValueError(f"name is {name!r}; wanted one of {', '.join(map(repr, NAMES))}")
    with (files(__name__) / f"{name}.csv").open(encoding="utf-8") as text:
        return pd.read_csv(text)
