"""The page: well-formed, self-contained, true to the files, and safe from their text."""

from __future__ import annotations

import json
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hydra.core.override_parser.overrides_parser import OverridesParser

from dh_jax.errors import DataError
from dh_jax.report import load_run, summarise, write_report
from dh_jax.report.finding import signed
from dh_jax.report.page import command_of, render
from tests.dh_jax.report.simulated import SOURCES, last_losses, raw, simulate, write_lines

VOID = {"meta", "link", "br", "path", "use", "rect", "circle", "line"}


class Page(HTMLParser):
    """Checks that tags nest, and keeps ids, references, tables and the text of some elements."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.loads: list[str] = []
        self.tables: list[list[list[tuple[str, str | None]]]] = []
        self.texts: dict[str, list[str]] = {"h1": [], "pre": [], "script": [], "p": [], "li": []}
        self.values: list[tuple[float, str]] = []
        self._cell: list[str] | None = None
        self._value: str | None = None
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if "id" in given:
            self.ids.append(given["id"] or "")
        self.references += (given.get("aria-labelledby") or "").split()
        target = given.get("href") or ""
        if target.startswith("#"):
            self.references.append(target[1:])
        elif target and target != "data:,":
            self.loads.append(target)
        self.loads += [given[k] or "" for k in ("src", "srcset", "data", "action") if k in given]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self._cell, self._value = [], given.get("data-value")
        elif tag in self.texts:
            self.texts[tag].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()
        if tag in ("td", "th") and self._cell is not None:
            self.tables[-1][-1].append((" ".join("".join(self._cell).split()), self._value))
            self._cell = None

    def handle_data(self, data: str) -> None:
        if self._cell is not None:
            self._cell.append(data)
        for tag in set(self.open) & self.texts.keys():
            self.texts[tag][-1] += data

    def table(self, first_heading: str, width: int) -> list[list[tuple[str, str | None]]]:
        """The rows below the heading of the table with this first heading and so many columns."""
        for table in self.tables:
            for at, row in enumerate(table):
                if row and row[0][0] == first_heading and len(row) == width:
                    return table[at + 1 :]
        raise AssertionError(f"no table headed {first_heading!r} of {width} columns")


@pytest.fixture(scope="module")
def page_text(nine: list[Path]) -> str:
    out = nine[0].parent / "report.html"
    write_report(nine, out)
    return out.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(page_text: str) -> Page:
    return Page(page_text)


def test_the_page_is_well_formed_small_and_fetches_nothing(page: Page, page_text: str) -> None:
    assert len(set(page.ids)) == len(page.ids)
    assert set(page.references) <= set(page.ids)
    assert page.loads == []
    assert not re.search(r"https?://|@import|url\((?!#)", page_text)
    assert len(page_text.encode()) < 3_000_000
    assert "<!doctype html>" in page_text[:20].lower()


def test_every_number_with_a_value_shows_that_value(page: Page) -> None:
    shown = [(text, value) for t in page.tables for row in t for text, value in row if value]
    assert len(shown) > 100
    for text, value in shown:
        digits = re.match(r"[−+]?[\d,]+(\.\d+)?", text)
        assert digits, (text, value)
        printed = float(digits.group().replace("−", "-").replace(",", "").replace("+", ""))
        scale = 100 if "\u202f%" in text or text.endswith("%") else 1
        places = len((digits.group(1) or ".")[1:])
        assert printed == pytest.approx(scale * float(value), abs=0.5001 * 10**-places), text


def test_the_table_of_final_losses_holds_numpys_means_and_errors(
    page: Page, nine: list[Path]
) -> None:
    rows = {row[0][0].removesuffix(" target"): row for row in page.table("domain", 7)}
    assert list(rows) == ["maths", "code", "docs", "prose", "puzzles"]  # targets first
    for column, domain in enumerate(SOURCES):
        means = []
        for place, (policy, key) in enumerate(
            (p, k) for k in ("loss", "bits_per_byte") for p in ("influence", "static", "uniform")
        ):
            values = last_losses(nine, policy, key)[:, column]
            error = values.std(ddof=1) / np.sqrt(3)
            text, value = rows[domain][1 + place]
            assert text.startswith(f"{values.mean():.3f} ± {error:.3f}")
            assert float(value or "nan") == pytest.approx(values.mean(), rel=1e-12)
            means.append(values.mean())
        marked = [place for place in range(3) if "lowest" in rows[domain][1 + place][0]]
        assert marked == [int(np.argmin(means[:3]))]


def test_the_paired_table_holds_every_seed(page: Page, nine: list[Path]) -> None:
    rows = page.table("seed", 6)
    losses = {p: last_losses(nine, p)[:, 3] for p in ("influence", "static", "uniform")}
    gains = [losses["influence"] - losses[p] for p in ("static", "uniform")]
    for seed in range(3):
        expected = [*(losses[p][seed] for p in losses), *(gain[seed] for gain in gains)]
        np.testing.assert_allclose([float(v or "nan") for _, v in rows[seed][1:]], expected)
    assert [text for text, _ in rows[3][1:4]] == [f"{losses[p].mean():.3f}" for p in losses]
    for gain, (text, _) in zip(gains, rows[5][4:], strict=True):
        low, high = scipy.stats.ttest_1samp(gain, 0.0).confidence_interval(0.95)
        assert text == f"{signed(low)} to {signed(high)}"


def test_tokens_by_source_and_seconds_by_phase_are_the_means_of_the_logs(
    page: Page, nine: list[Path]
) -> None:
    for row in page.table("source", 7):
        for place, policy in enumerate(("influence", "static", "uniform")):
            chosen = [f for f in nine if f.name.startswith(policy)]
            ends = [[r for r in raw(f) if r["kind"] == "train"][-1] for f in chosen]
            tokens = np.mean([end["tokens_by_source"][row[0][0]] for end in ends])
            assert row[1 + 2 * place][0] == f"{tokens:,.0f}"
    row = page.table("policy", 9)[0]
    times = [r for f in nine[:3] for r in raw(f, "timing.jsonl")]
    for place, phase in enumerate(("compile", "train", "eval", "reweight", "checkpoint")):
        mean = sum(r["seconds"] for r in times if r["phase"] == phase) / 3
        assert row[1 + place][0] == f"{mean:.2f}"


def test_the_finding_and_its_sentences_head_the_page(page: Page, nine: list[Path]) -> None:
    summary = summarise([load_run(f) for f in nine])
    assert page.texts["h1"] == [summary.headline]
    assert set(summary.sentences) <= set(page.texts["p"])


def test_documents_are_escaped_and_ranked(page: Page, page_text: str, nine: list[Path]) -> None:
    assert len(page.texts["script"]) == 1, "a document's <script> became an element"
    assert "<b>bold</b>" not in page_text
    documents = json.loads((nine[0] / "documents.json").read_text())["documents"]
    ranked = sorted(documents, key=lambda d: d["score"])
    ends = (*ranked[:8], *ranked[::-1][:8])
    assert page.texts["pre"][:16] == [d["text"][:2000] for d in ends]
    for d in ends:
        assert f"<code>{d['id']}</code>" in page_text
        assert f'data-value="{-d["score"]}">{signed(-d["score"], 2)}<' in page_text


def test_hostile_names_are_escaped_everywhere(run_folder: Path) -> None:
    run = load_run(run_folder)
    bad = "<img src=x onerror=alert(1)>"
    hostile = run._replace(
        device=bad, versions={bad: bad}, config_text=bad, command=bad, notes=(bad,),
        sources=(bad, *run.sources), documents=None,
    )  # fmt: skip
    text = render([hostile], summarise([hostile]), title=bad)
    assert "<img" not in text
    assert Page(text).texts["pre"][0] == bad


def test_every_figure_is_there_for_wide_and_narrow_screens(page_text: str) -> None:
    figures = re.findall(r'<figure id="figure-([^"]*)">', page_text)
    assert figures == [
        "target", "differences", "domains", "weights-influence", "helpfulness-influence",
        "tokens", "time", "throughput", "training", "scores",
    ]  # fmt: skip
    for name in figures:
        for kind in ("wide", "narrow"):
            assert page_text.count(f'id="{name}-{kind}-title"') == 1
    assert page_text.count("<svg ") == 2 * len(figures)


def test_one_run_makes_a_page_without_comparisons(run_folder: Path, tmp_path: Path) -> None:
    summary = write_report([run_folder], tmp_path)  # a folder gets report.html
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    first, last = (raw_eval(run_folder, at)["maths"]["loss"] for at in (0, -1))
    assert summary.headline == (
        f"Held-out loss on maths fell from {first:.3f} to {last:.3f} nats a token "
        "over 81.9 k tokens."
    )
    page = Page(text)
    assert page.texts["h1"] == [summary.headline]
    assert not re.search(r"paired|against static|mean over seeds|lowest mean", text)
    assert {"weights-influence", "scores"} <= set(re.findall(r'id="figure-([^"]*)"', text))


def raw_eval(folder: Path, at: int) -> dict[str, Any]:
    domains: dict[str, Any] = [r for r in raw(folder) if r["kind"] == "eval"][at]["domains"]
    return domains


def test_a_run_barely_begun_still_makes_a_page(run_folder: Path, tmp_path: Path) -> None:
    first = next(r for r in raw(run_folder) if r["kind"] == "train")
    write_lines(run_folder / "metrics.jsonl", [first])
    (run_folder / "timing.jsonl").write_text("")
    (run_folder / "documents.json").unlink()
    summary = write_report([run_folder], tmp_path / "new" / "page.html")
    assert "no evaluation yet" in summary.headline
    Page((tmp_path / "new" / "page.html").read_text(encoding="utf-8"))


def test_a_report_that_fails_leaves_the_old_one_whole(run_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    out.write_text("old")
    (run_folder / "run.json").write_text("{")
    with pytest.raises(DataError):
        write_report([run_folder], out)
    assert out.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["page.html", "run"]


def test_the_command_carries_the_config_back_through_hydras_parser(run_folder: Path) -> None:
    run = load_run(run_folder)
    words = shlex.split(command_of(run))
    assert words[:2] == ["dh", "train"]
    parsed = OverridesParser.create().parse_overrides(words[2:])
    given = {o.key_or_group: o.value() for o in parsed}
    assert given["data"] == "demo" and given["mixing"] == "influence"
    for group in ("mixing", "influence", "training"):
        for key, value in run.config[group].items():
            if key != "policy":
                assert given[f"{group}.{key}"] == value


def test_a_write_that_fails_leaves_nothing_half_written(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left on device")

    out = tmp_path / "page.html"
    out.write_text("old")
    monkeypatch.setattr("dh_jax.report.page.os.replace", full)
    monkeypatch.setattr("dh_jax.report.page.render", lambda *_: "new")
    with pytest.raises(OSError, match="no space left"):
        write_report([run_folder], out)
    assert out.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["page.html", "run"]


def test_a_diverged_run_is_drawn_and_not_compared(tmp_path: Path) -> None:
    folders = [simulate(tmp_path / p, p, 0, steps=20) for p in ("influence", "static")]
    path = folders[0] / "metrics.jsonl"
    path.write_text(re.sub(r'"(loss|bits_per_byte)": [\d.]+', r'"\1": NaN', path.read_text()))
    summary = write_report(folders, tmp_path / "page.html")
    assert summary.refusal == "the final loss is not finite in influence, seed 0"
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "not finite" in text
    Page(text)
