"""The page of what can be trusted, small; every kind is run by `test_fingerprint.py` and others."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from benchmarks import stale, threads, trust

KILLS = "| maml | 1 | 1 | 1 |\n| **all** | 240 | 150 | 149 |\n"
SIZE = """
| tasks | stage | CPU seconds before | after | peak GB before | after | file MB before | after |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |
| 1,000 of 5 rows | compare | | 7.3 | | 9.56 | | |
| 20,000 of 5 rows | compare | 92 | 57 | 2.99 | 1.20 | | |
| | export | | 15.1 | | 1.52 | about 700 | 234 |
| 50 of 1 row, 1 of 20,000 | compare | | 73.6 | | 9.23 | | |
"""


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(trust, "RESULTS", tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def found() -> dict[str, object]:
    few = ("batch_size", "seed", "version of torch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stale, "STALE", {name: stale.STALE[name] for name in few})
        return {
            "refused": stale.table(),
            "resumed": {"model: function": "goes on", "strategy: maml": "goes on"},
            "inputs": pd.DataFrame({"ours": [3], "vague": [0], "raw": [0], "silent": [0]}, ["all"]),
            "pairs": threads.table(["imaml"]),
        }


def test_the_page(found: dict[str, object], results: Path) -> None:
    """Each figure, with the command that it is of."""
    text, good = trust.page(**found)  # type: ignore[arg-type]
    assert good
    for line in (
        "| 7 of 8, of 3 kinds; 1 read with a warning, finished |",
        "| the same arguments in a new process go on, bit for bit | 2 of 2 |",
        "| 3 of 3; 0 raw, 0 silent | `python -m benchmarks.bad_inputs` |",
        "| pairs of 1 strategies in two threads, as alone | 1 of 1 |",
        "| batch_size | refused | refused | – | batch_size (None, now 2) |",
        "| version of torch | refused | read | refused | torch (",
        "> checkpoint run.pt is of another run; it differs in batch_size (None, now 2). Give",
        "> folder 'runs/mine' holds an unfinished run with other settings: it differs in seed (0,",
        "| kills by SIGKILL survived | not measured |",
        "| peak of memory, 20,000 tasks | not measured |",
    ):
        assert line in text, line
    (results / "kills.md").write_text(KILLS)
    (results / "size.md").write_text(SIZE)
    text = trust.renewed(text)
    assert "| kills by SIGKILL survived | 149 of 150 runs, after 240 kills |" in text
    assert "| peak of memory, 20,000 tasks | 1.52 GB |" in text
    assert "| peak of memory, 100,000 tasks | not measured |" in text
    assert trust.page(**found)[0] == text  # type: ignore[arg-type]


@pytest.mark.parametrize("part", ["refused", "resumed", "inputs", "pairs"])
def test_one_defect_shows(part: str, found: dict[str, object]) -> None:
    broken = dict(found)
    if part == "refused":
        broken[part] = found[part].assign(**{stale.FINISHED: "taken up", "wanted": False})  # type: ignore[attr-defined]
        told = "| 5 of 8, of 3 kinds; 0 read"
    elif part == "resumed":
        broken[part] = {"model: function": "goes on", "strategy: maml": "another result"}
        told = "| 1 of 2 |"
    elif part == "inputs":
        broken[part] = pd.DataFrame({"ours": [3], "vague": [0], "raw": [0], "silent": [1]}, ["all"])
        told = "| 3 of 4; 0 raw, 1 silent |"
    else:
        broken[part] = found[part].assign(randn=False)  # type: ignore[attr-defined]
        told = "Not so: imaml with imaml."
    text, good = trust.page(**broken)  # type: ignore[arg-type]
    assert told in text and not good
