"""The page of a run: whole in itself, escaped, sorted by value, and honest about what is broken."""

from __future__ import annotations

import base64
import json
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from test_verdict import near
from test_verdict import table as verdict_table

from varmeta.files import BrokenFile
from varmeta.html_report import html_report, read_table
from varmeta.report_write import png
from varmeta.verdict import verdict


def table(**strategies: dict[str, Any]) -> pd.DataFrame:
    """With the columns that a verdict does not read."""
    found = verdict_table(**strategies)
    return found.assign(
        carries="tasks", rmse=1.0, gap=np.nan, seconds=1.0, gradients=10.0, elpd_se=0.1
    )


class Page(HTMLParser):
    """The tags of a page with their attributes, and the text of its cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "td":
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "td":
            self.cells[-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    rows = {"A": near(0.0, 0.0), "B <i>": near(0.2, pareto_k=0.9), "C": near(0.02, converged=False)}
    table(**rows).to_csv(tmp_path / "table.csv", index=False)
    settings = {"train: the targets": "float64 #1cf2ce046d79", "the model's code": "#1a183415b78a"}
    manifest = {"settings": settings, "command": "varmeta compare radon --out 'a & b'"}
    (tmp_path / "run.json").write_text(json.dumps(manifest))
    (tmp_path / "scores.png").write_bytes(png(Figure((1, 1))))
    (tmp_path / "forest_slope.png").write_bytes(png(Figure((1, 1))))
    (tmp_path / "of_another_program.png").write_bytes(b"no picture")
    return tmp_path


def test_the_page_needs_nothing_else(run: Path) -> None:
    text = html_report(run)
    page = Page(text)
    assert "http:" not in text and "https:" not in text and "url(" not in text
    assert not page.all("link") and all("src" not in script for script in page.all("script"))
    pictures = page.all("img")
    assert len(pictures) == 2 and "slope" in str(pictures[1]["alt"])
    for picture in pictures:
        kind, data = str(picture["src"]).split(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data).startswith(b"\x89PNG")


def test_the_page_says_the_verdict_and_escapes_names(run: Path) -> None:
    text = html_report(run)
    assert "<i>" not in text and "B &lt;i&gt;" in text and "a &amp; b" in text
    for sentence in verdict(read_table(run / "table.csv")):
        assert sentence in unescape(text)
    assert "float64" in text and "#1a183415b78a" not in text


def test_cells_are_sorted_by_their_values(run: Path) -> None:
    page = Page(html_report(run))
    values = {
        text: cell["data-value"] for text, cell in zip(page.cells, page.all("td"), strict=True)
    }
    assert values["0.90"] == "0.9" and values["−0.2000 ± 0.0100"] == "-0.2"
    assert values["yes"] == "1" and values["no"] == "0"
    assert all(head["title"] for head in page.all("th"))


def test_a_density_of_zero_is_no_exact_posterior(run: Path) -> None:
    rows = {"A": near(0.0, 0.0), "B": near(np.inf, pareto_k=-np.inf), "C": near(0.1)}
    table(**rows).to_csv(run / "table.csv", index=False)
    page = Page(html_report(run, "mine"))
    cells = dict(zip(page.cells, page.all("td"), strict=True))
    assert cells["exact given Σ"]["data-value"] == "-Infinity"
    assert [t for t in page.cells if t.startswith("−inf")] and page.cells.count(
        "exact given Σ"
    ) == 1
    assert "<h1>mine</h1>" in html_report(run, "mine")


def test_types_survive_the_file(run: Path) -> None:
    found = read_table(run / "table.csv")
    assert found["converged"].tolist() == [True, True, False]
    assert verdict(found) == verdict(
        table(
            **{
                "A": near(0.0, 0.0),
                "B <i>": near(0.2, pareto_k=0.9),
                "C": near(0.02, converged=False),
            }
        )
    )


def test_what_is_missing_or_broken_is_named(run: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no table.csv; give the output folder"):
        html_report(run / "nowhere")
    (run / "table.csv").write_text("a,b\n1,2\n")
    with pytest.raises(BrokenFile, match=r"has no column 'carries'.*compare again"):
        html_report(run)
    (run / "table.csv").write_text("")
    with pytest.raises(BrokenFile, match="is no table"):
        html_report(run)
