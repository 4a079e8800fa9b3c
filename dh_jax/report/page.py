"""The page itself: runs in, one HTML file out, with nothing to fetch from anywhere."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from dh_jax import viz
from dh_jax.errors import DataError
from dh_jax.report import finding, plots
from dh_jax.report.runs import Run, ScoredDocument, find_runs, load_run
from dh_jax.report.statistics import Summary, by_policy, config_differences, is_baseline
from dh_jax.report.teaching import is_distilled, teaching
from dh_jax.report.variants import tell_apart

HERE = Path(__file__).resolve().parent
SHOWN_DOCUMENTS = 8  # at each end
SHOWN_CHARACTERS = 2000


class Excerpt(NamedTuple):
    """A document as the page shows it: its beginning, and how much is left out."""

    document: ScoredDocument
    text: str
    first_words: str
    left_out: int


def write_report(folders: Sequence[Path], out: Path, *, title: str | None = None) -> Summary:
    """Write the report of one run, or of several to compare, as one HTML file.

    Args:
        folders: run folders, or folders of run folders.
        out: the HTML file; a folder gets ``report.html``. It appears whole or not at all.
        title: the line above the finding; by default the data and model it is about.

    Returns:
        The finding, in numbers and words.

    Raises:
        DataError: a run is missing or broken.
    """
    paths = list(dict.fromkeys(p.resolve() for folder in folders for p in find_runs(Path(folder))))
    if not paths:
        raise DataError("no run folder was named; a report needs at least one")
    runs = tell_apart([load_run(path) for path in paths])
    summary = finding.summarise(runs)
    out = Path(out)
    write_page(out / "report.html" if out.is_dir() else out, render(runs, summary, title))
    return summary


def page_template(folder: Path, **filters: Callable[..., Any]) -> Template:
    """The ``page.html`` of a folder, over the head, macros and script that all pages share.
    Whatever it is given is escaped, and a name that it is not given is an error."""
    environment = Environment(
        loader=FileSystemLoader([folder, HERE]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters)
    script = (HERE / "page.js").read_text(encoding="utf-8")
    # The page's policy admits this script by its hash and no other, whatever a document says.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment.globals |= {"script": Markup(script), "script_hash": f"sha256-{digest}"}
    return environment.get_template("page.html")


def render(runs: Sequence[Run], summary: Summary, title: str | None = None) -> str:
    """The page as text."""
    groups = by_policy(runs)
    ordered = [run for group in groups.values() for run in group]
    scored = plots.scored_run(groups)
    shown = excerpts(scored)
    template = page_template(
        HERE,
        number=finding.number,
        signed=finding.signed,
        figure=finding.figures(-d.document.score for end in shown.values() for d in end),
        percent=finding.percent,
        signed_percent=finding.signed_percent,
        amount=finding.amount,
        seconds=finding.seconds,
        join_words=finding.join,
    )
    sources = plots.all_sources(groups)
    return template.render(
        title=title or default_title(runs),
        summary=summary,
        steered=[name for name in summary.policies if finding.moves(name)],
        references=[name for name in summary.policies if is_baseline(name)],
        groups=groups,
        runs=ordered,
        best=best(summary),
        drawings=plots.drawings(groups, summary),
        style=Markup(stylesheet()),
        policy_styles=viz.policy_styles(list(groups)),
        source_styles=viz.source_styles(sources),
        source_tokens={
            name: {source: plots.tokens_of(group, source) for source in sources}
            for name, group in groups.items()
        },
        sources=sources,
        phases=list(dict.fromkeys(p for c in summary.clock.values() for p in c.seconds)),
        scored=scored,
        excerpts=shown,
        taught=[
            (run, points[-1]) for run in ordered if (points := teaching(run.folder, run.config))
        ],
        config_differences=config_differences(ordered) if len(ordered) > 1 else {},
        versions=versions(ordered),
        commands=commands(ordered),
        recorded=all(run.command for run in ordered),
    )


def stylesheet() -> str:
    """The page's CSS with the colours of both themes."""
    light, dark = viz.css_variables("light"), viz.css_variables("dark")
    return (
        f":root {{ {light} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"
        + (HERE / "page.css").read_text(encoding="utf-8")
    )


def default_title(runs: Sequence[Run]) -> str:
    """What the runs are about, from their configs: data, model, number of runs."""
    named = {
        group: sorted({str((run.config.get(group) or {}).get("name") or "") for run in runs} - {""})
        for group in ("data", "model")
    }
    about = " · ".join(finding.join(names) for names in named.values() if names)
    count = "one run" if len(runs) == 1 else f"{len(runs)} runs"
    return f"{about} · {count}" if about else count


def best(summary: Summary) -> dict[str, str]:
    """The policy with the lowest mean loss of each domain, where policies may be compared."""
    if summary.refusal:
        return {}
    domains = dict.fromkeys(d for finals in summary.final.values() for d in finals)
    lowest = {}
    for domain in domains:
        means = {n: f[domain].loss.mean for n, f in summary.final.items() if domain in f}
        if len(means) > 1:
            lowest[domain] = min(means, key=lambda name: means[name])
    return lowest


def excerpts(run: Run | None) -> dict[str, list[Excerpt]]:
    """The documents at both ends: most helpful (lowest influence) and most harmful first."""
    if run is None or run.documents is None:
        return {}
    ranked = sorted(run.documents.documents, key=lambda d: d.score)
    few = min(SHOWN_DOCUMENTS, (len(ranked) + 1) // 2)
    ends = {"Most helpful": ranked[:few], "Most harmful": ranked[few:][::-1][:few]}
    return {name: [_excerpt(d) for d in documents] for name, documents in ends.items()}


def _excerpt(document: ScoredDocument) -> Excerpt:
    words = " ".join(document.text[:400].split())
    return Excerpt(
        document,
        document.text[:SHOWN_CHARACTERS],
        words[:90] + ("…" if len(words) > 90 else ""),
        max(0, len(document.text) - SHOWN_CHARACTERS),
    )


def versions(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Every version that any run used, by package."""
    names = sorted({name for run in runs for name in run.versions})
    return {n: sorted({run.versions[n] for run in runs if n in run.versions}) for n in names}


# --- how to make it again --------------------------------------------------------------------


def commands(runs: Sequence[Run]) -> list[str]:
    """The command of every run: as recorded, else put together from its config."""
    return [run.command or command_of(run) for run in runs]


def command_of(run: Run) -> str:
    """``dh train`` with the named groups, and every setting of how it trained and steered."""
    words = ["dh train"]
    for group in ("data", "model", "mesh"):
        if name := (run.config.get(group) or {}).get("name"):
            words.append(f"{group}={name}")
    words.append(f"mixing={run.config['mixing']['policy']}")
    taught = ("distillation",) if is_distilled(run.config) else ()
    for group in ("mixing", "influence", *taught, "training"):
        for key, value in (run.config.get(group) or {}).items():
            if (group, key) != ("mixing", "policy"):
                words.append(f"{group}.{key}={_hydra(value)}")
    words.append(f"out={run.config.get('out') or run.folder}")
    return " ".join([words[0], *map(shlex.quote, words[1:])])


def _hydra(value: Any) -> str:
    """A value in Hydra's override grammar, where keys of a mapping are bare words."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_hydra(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_hydra, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def write_page(path: Path, text: str) -> None:
    """Write a page under a temporary name and move it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
