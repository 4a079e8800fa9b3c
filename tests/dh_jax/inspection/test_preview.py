"""A preview counts what is there, and its page shows every text as text."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from dh_jax.config import SplitConfig, load_data_config
from dh_jax.data.loader import get_loader
from dh_jax.data.prepare import prepare
from dh_jax.data.sources import document_id, split_of
from dh_jax.data.tokenization import TokenizerWrapper
from dh_jax.errors import ConfigError
from dh_jax.inspection.page import write_preview
from dh_jax.inspection.preview import Preview, preview
from dh_jax.inspection.terminal import print_preview

NASTY = '</pre><script>alert("1")</script><b>&amp; \x1b[31m\x00 {{ config }} [bold]x[/bold]'


def texts_of(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def expected_lengths(path: Path, split: str, tokenizer: TokenizerWrapper) -> list[int]:
    """Lengths of the distinct texts of a split, by the hash alone."""
    splits = SplitConfig(probe=0.1, eval=0.1)
    texts = dict.fromkeys(texts_of(path))
    return [tokenizer.encode(t).size for t in texts if split_of(document_id(t), splits) == split]


@pytest.mark.parametrize("split", ["train", "eval"])
def test_a_store_is_surveyed_whole(
    split: str,
    make_config: Any,
    store: Path,
    corpora: dict[str, Path],
    tokenizer: TokenizerWrapper,
) -> None:
    found = preview(make_config(store=str(store)), split=split, batches=1, rows=0)
    assert not found.streamed and found.split == split and found.rows == []
    seen: set[str] = set()
    for name, source in found.sources.items():
        lengths = expected_lengths(corpora[name], split, tokenizer)
        figures = source.lengths
        assert source.documents == len(lengths)
        assert figures.documents_K.tolist() == [
            sum(2**k <= n < 2 ** (k + 1) for n in lengths) for k in range(figures.documents_K.size)
        ]
        assert figures.tokens_K.sum() == sum(lengths)
        assert figures.median == np.median(lengths) and figures.longest == max(lengths)
        assert figures.over_row == pytest.approx(np.mean([n > 64 for n in lengths]))
        texts = texts_of(corpora[name])
        assert source.duplicates == sum(t in seen or t in texts[:i] for i, t in enumerate(texts))
        seen.update(texts)
        assert found.prepared[name][split] == {"documents": len(lengths), "tokens": sum(lengths)}


def test_a_stream_is_surveyed_at_its_beginning_and_duplicates_are_counted(
    make_config: Any, corpora: dict[str, Path], tokenizer: TokenizerWrapper, tmp_path: Path
) -> None:
    lines = corpora["code"].read_text().splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_text("".join([*lines[:30], *lines[:30], "{\n", *lines[30:60]]))
    (tmp_path / "b.jsonl").write_text("".join([*lines[50:100], json.dumps({"text": " "}) + "\n"]))
    config = make_config(
        on_error="skip",
        splits={"probe": 0.0, "eval": 0.0},
        sources={
            name: {"kind": "files", "paths": [str(tmp_path / f"{name}.jsonl")]} for name in "ab"
        },
    )
    found = preview(config, batches=1, rows=0)
    texts = texts_of(corpora["code"])
    a, b = found.sources.values()
    assert (a.documents, b.documents) == (90, 50)
    assert a.left_out == {"corrupt_json": 1} and b.left_out == {"empty": 1}
    assert a.duplicates == 90 - len({*texts[:60]})
    assert b.duplicates == 50 - len({*texts[:100]} - {*texts[:60]})
    first = preview(config, batches=1, rows=0, documents=40).sources["a"]
    lengths = [tokenizer.encode(t).size for t in [*texts[:30], *texts[:10]]]
    assert first.documents == 40 and first.lengths.mean == pytest.approx(np.mean(lengths))


def test_batches_are_counted_as_they_are(make_config: Any, store: Path) -> None:
    config = make_config(store=str(store))
    found = preview(config, batches=3, batch_size=4, rows=5)
    with get_loader(config, batch_size=4) as loader:
        batches = [next(loader) for _ in range(3)]
        stats = loader.stats()
    tokens = sum((b.segment_ids_BT > 0).sum() for b in batches)
    assert found.packing_efficiency == tokens / (3 * 4 * 64) == stats["packing_efficiency"]
    assert found.learnt == sum(b.loss_mask_BT.sum() for b in batches) / tokens
    assert found.documents_a_row == sum(b.segment_ids_BT.max(1).sum() for b in batches) / 12
    for m, (name, source) in enumerate(found.sources.items()):
        rows = [(b, r) for b in batches for r in np.flatnonzero(b.source_ids_B == m)]
        own = sum((b.segment_ids_BT[r] > 0).sum() for b, r in rows)
        assert (source.rows, source.tokens) == (len(rows), own)
        assert source.learnt == sum(b.loss_mask_BT[r].sum() for b, r in rows) / own
        assert source.weight == loader.weights[name] and source.share == own / tokens
    # Every source has a row before any has its second.
    assert {row.source for row in found.rows[:3]} == {"code", "mail", "sums"}
    assert len(found.rows) == 5


def test_a_probe_is_surveyed_in_the_source_that_it_names(make_config: Any, store: Path) -> None:
    config = make_config(store=None, probes={"exam": "sums"})
    found = preview(config, split="probe", batches=1, rows=1)
    stored = preview(make_config(store=str(store)), split="probe", batches=1, rows=0)
    assert list(found.sources) == ["exam"]
    assert found.sources["exam"].lengths.longest == stored.sources["sums"].lengths.longest


@pytest.mark.parametrize("wrong", [{"batches": 0}, {"rows": -1}, {"documents": 0}])
def test_counts_below_the_least_are_refused(wrong: dict[str, int], make_config: Any) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))} is .*; the least is"):
        preview(make_config(), **wrong)


# --- the page --------------------------------------------------------------------------------


class Reader(HTMLParser):
    """Tags in order, and the text of every ``<pre>`` of a row by class of span."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.shown: list[list[tuple[str, str]]] = []  # one list a document
        self._in_pre = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "pre":
            self._in_pre = True
            self.shown.append([])
        if tag == "span" and self._in_pre:
            self.shown[-1].append((str(dict(attrs).get("class")), ""))

    def handle_endtag(self, tag: str) -> None:
        self._in_pre = self._in_pre and tag != "pre"

    def handle_data(self, data: str) -> None:
        if self._in_pre and self.shown[-1]:
            kind, before = self.shown[-1][-1]
            self.shown[-1][-1] = kind, before + data


@pytest.fixture(scope="module")
def nasty(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Preview, str]:
    """A page about documents, and a source, that try to be something else than text."""
    folder = tmp_path_factory.mktemp("nasty")
    lines = [
        json.dumps({"text": f"{i} {NASTY} {'long ' * (400 * (i % 16 == 3))}"}) for i in range(40)
    ]
    (folder / "a.jsonl").write_text("\n".join(lines))
    config = load_data_config(
        {
            "name": "<i>mine</i>",
            "tokenizer": str(tokenizer_folder),
            "max_length": 2048,
            "store": str(folder / "store"),
            "sources": {"<b>[red]&": {"kind": "files", "paths": [str(folder / "a.jsonl")]}},
        }
    )
    prepare(config)
    found = preview(config, batches=1, batch_size=2, rows=2)
    write_preview(found, config, folder / "page.html")
    assert sorted(p.name for p in folder.glob("*.html")) == ["page.html"]
    return found, (folder / "page.html").read_text()


def test_the_page_is_one_file_that_fetches_nothing_and_runs_its_own_script_alone(
    nasty: Any,
) -> None:
    _, page = nasty
    reader = Reader()
    reader.feed(page)
    names = {tag for tag, _ in reader.tags}
    assert not names & {"img", "iframe", "object"} and "<i>mine" not in page
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = (a["content"] for tag, a in reader.tags if a.get("http-equiv"))
    assert f"script-src 'sha256-{digest}';" in policy
    assert all("src" not in attributes for _, attributes in reader.tags)
    links = [a["href"] for tag, a in reader.tags if "href" in a]
    assert links and all(str(link).startswith(("#", "data:")) for link in links)
    ids = [a["id"] for _, a in reader.tags if "id" in a]
    assert len(set(ids)) == len(ids)
    assert {str(x)[1:] for x in links if str(x).startswith("#")} <= set(ids)
    assert "prefers-color-scheme: dark" in page and "default-src 'none'" in page
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", page)


def test_every_document_is_shown_as_text_with_what_is_learnt_marked(nasty: Any) -> None:
    found, page = nasty
    reader = Reader()
    reader.feed(page)
    segments = [segment for row in found.rows for segment in row.segments]
    assert len(segments) > 8 and page.count("<script>") == 1
    for segment, shown in zip(segments, reader.shown, strict=False):
        kinds = [kind for kind, _ in shown]
        text = "".join(part for kind, part in shown if kind != "cut")
        whole = "".join(span.text for span in segment.spans)
        whole = whole.replace("\x1b", "␛").replace("\x00", "␀")
        assert text == whole[:1500] and kinds[:2] == ["read", "learnt"]
        assert ("cut" in kinds) == (len(whole) > 1500)
    assert any(kind == "cut" for shown in reader.shown for kind, _ in shown)
    assert "&lt;i&gt;mine&lt;/i&gt;" in page and "&lt;b&gt;[red]&amp;" in page
    names = list(found.sources)
    assert re.findall(r'class="row" style="--source: var\(--source-(\d)\)', page) == [
        str(names.index(row.source) % 8) for row in found.rows
    ]
    tones = [i % 2 for row in found.rows for i in range(len(row.segments))]
    kinds = re.findall(r'class="(segment[^"]*)"', page)
    assert [int(kind == "segment second") for kind in kinds] == tones


def test_the_terminal_shows_markup_and_control_characters_as_text(
    nasty: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    print_preview(nasty[0], Console(force_terminal=True, color_system="standard", width=80))
    said = capsys.readouterr().out
    assert "<b>[red]&" in said and "[bold]x[/bold]" in said and "␛[31m␀" in said
    styled = re.findall(r"\x1b\[([0-9;]*)m", said)
    assert "30;46" in styled and "4;36" in styled  # learnt; only read
