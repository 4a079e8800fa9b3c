"""How things look in a notebook: HTML for figures, batches, loaders, policies and documents.

`dh_jax.viz` registers these with IPython when it is imported there (or by ``%load_ext
dh_jax.viz``). Types are named, not imported: what a notebook does not use is not loaded. Colours
follow the notebook's theme (Jupyter, VS Code, Sphinx), else the system's.
"""

from __future__ import annotations

import hashlib
import html
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from dh_jax.batch import Batch
from dh_jax.viz.batches import packed_rows
from dh_jax.viz.parts import MADE_HERE
from dh_jax.viz.style import css_variables, source_styles
from dh_jax.viz.svg import to_svg

KEY = "dh0figure0key"
DARK = (
    'body[data-jp-theme-light="false"]', 'body[data-theme="dark"]', "body.vscode-dark"
)  # fmt: skip
LIGHT = (
    'body[data-jp-theme-light="true"]', 'body[data-theme="light"]', "body.vscode-light"
)  # fmt: skip
LOOK = """
.dh-viz{max-width:760px;margin:.4em 0;color:var(--ink);font:14px/1.45 system-ui,sans-serif}
.dh-viz svg{display:block;width:100%;height:auto;overflow:visible;font-family:system-ui,sans-serif}
.dh-viz table{border-collapse:collapse;font:inherit;color:inherit;margin:0;border:0}
.dh-viz caption{text-align:left;color:var(--muted);padding-bottom:.4em;caption-side:top}
.dh-viz th,.dh-viz td{text-align:left;padding:.25em 1em .25em 0;border:0;
border-bottom:1px solid var(--grid);background:none;vertical-align:top;color:inherit;max-width:none}
.dh-viz thead th{color:var(--muted);font-weight:500}.dh-viz tbody th{font-weight:500}
.dh-viz tr{background:none!important}
.dh-viz .n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.dh-viz .bar{display:block;width:9em;height:.8em;margin-top:.3em;background:var(--panel)}
.dh-viz .bar i{display:block;height:100%;background:var(--c)}
.dh-viz .up{background:color-mix(in srgb,var(--source-0) var(--a),transparent)}
.dh-viz .down{background:color-mix(in srgb,var(--source-5) var(--a),transparent)}
.dh-viz .text{font-family:ui-monospace,monospace;font-size:12.5px;overflow-wrap:anywhere}
""".replace("\n", "")


def style() -> str:
    """The ``<style>`` element that every output carries, so that each can be shown alone."""
    light, dark = css_variables("light"), css_variables("dark")
    night = ",".join(f"{x} .dh-viz" for x in DARK)
    day = ",".join(f"{x} .dh-viz" for x in LIGHT)
    return (
        f"<style>.dh-viz{{{light}}}@media (prefers-color-scheme:dark){{.dh-viz{{{dark}}}}}"
        f"{day}{{{light}}}{night}{{{dark}}}{LOOK}</style>"
    )


def figure_html(figure: Figure) -> str | None:
    """A figure of `dh_jax.viz` in the notebook's colours; None for anybody else's."""
    if figure.get_gid() != MADE_HERE:
        return None
    return _wrapped(_drawn(figure))


def batch_html(batch: Batch) -> str:
    """The first rows of a batch, drawn, with its shape and what is in it."""
    segments_BT, learnt_BT = np.asarray(batch.segment_ids_BT), np.asarray(batch.loss_mask_BT)
    rows, length = segments_BT.shape
    said = (
        f"{rows} rows of {length:,} tokens, {int(segments_BT.max(axis=1).sum()):,} documents or "
        f"pieces; {(segments_BT > 0).mean():.1%} of the places filled, {learnt_BT.mean():.1%} "
        f"learnt{', with a teacher' if batch.teacher is not None else ''}"
    )
    return _wrapped(f"<p>{said}</p>{_drawn(packed_rows(batch))}")


def loader_html(loader: Any) -> str:
    """A loader's sources: weights as bars, and what has been delivered of each."""
    stats = loader.stats()
    styles, weights = source_styles(loader.names), loader.weights
    most = max(weights.values(), default=0.0) or 1.0
    body = [
        (
            _name(name, styles[name].colour), _bar(weights[name] / most, styles[name].colour),
            f"{weights[name]:.1%}", _share(part["share"]), f"{part['tokens']:,}",
            f"{part['epoch']}",
        )
        for name, part in stats["sources"].items()
    ]  # fmt: skip
    said = (
        f"{loader.batch_size} rows of {loader.row_length:,} tokens a batch; "
        f"{stats['batches']:,} batches, {stats['tokens']:,} tokens delivered"
    )
    heads = ("source", "", "weight", "share so far", "tokens", "epoch")
    return _wrapped(_table(said, heads, body, numbers={2, 3, 4, 5}))


def policy_html(policy: Any) -> str:
    """What a mixture policy looks at when it moves."""
    needs = ", ".join(sorted(policy.needs)) or "nothing: it costs nothing"
    return _wrapped(f"<p>A mixture policy. It looks at {html.escape(needs)}.</p>")


def optimizer_html(optimizer: Any) -> str:
    """The mixture that an `InfluenceAwareOptimizer` starts with, and what it moves it by."""
    weights = dict(zip(optimizer.source_names, optimizer._start_M.tolist(), strict=True))
    targets = ", ".join(f"{n} {w:.0%}" for n, w in optimizer.targets.items()) or "none"
    needs = ", ".join(sorted(optimizer.policy.needs)) or "nothing"
    said = f"Moves every {optimizer.interval} steps; looks at {needs}; targets: {targets}."
    return _wrapped(_weights(said, weights))


def move_html(move: Any) -> str:
    """One move of the weights; sources in their order, since the record names none."""
    names = [f"source {m}" for m in range(len(move.weights_M))]
    weights = dict(zip(names, np.asarray(move.weights_M).tolist(), strict=True))
    before = dict(zip(names, np.asarray(move.previous_M).tolist(), strict=True))
    return _wrapped(_weights(f"The move after step {move.step}.", weights, before))


def scores_html(scores: Any) -> str:
    """Documents' scores by query: how many, how far apart, and where both ends lie."""
    body = []
    for k, values_N in enumerate(np.asarray(scores.values_KN)):
        ends = [
            f"{values_N[n]:+.3g} (batch {scores.batch_N[n]}, row {scores.row_N[n]}, segment "
            f"{scores.segment_N[n]})"
            for n in (int(values_N.argmin()), int(values_N.argmax()))
        ]
        body.append((str(k), f"{values_N.mean():+.3g}", f"{values_N.std():.3g}", *ends))
    said = f"{len(scores.row_N):,} documents; positive scores are harmful"
    heads = ("query", "mean", "deviation", "most helpful", "most harmful")
    return _wrapped(_table(said, heads, body, numbers={1, 2}))


def section_html(section: Any) -> str:
    """A query's documents at both ends with their text, tinted by what each token adds."""
    parts, styles = [], source_styles(section.sources)
    for end, documents in (("Most helpful", section.helpful), ("Most harmful", section.harmful)):
        body = [
            (_name(d.source, styles[d.source].colour), f"{d.helpfulness:+.3g}", _tinted(d.pieces))
            for d in documents
        ]
        said = f"{end} for {html.escape(section.query)}"
        parts.append(_table(said, ("source", "helpfulness", "text"), body, numbers={1}))
    return _wrapped("".join(parts))


FORMATTERS = (
    ("matplotlib.figure", "Figure", figure_html),
    ("dh_jax.batch", "Batch", batch_html),
    ("dh_jax.data.delivery", "Loader", loader_html),
    ("dh_jax.mixing.policy", "Policy", policy_html),
    ("dh_jax.influence.optimizer", "InfluenceAwareOptimizer", optimizer_html),
    ("dh_jax.influence.optimizer", "Reweighting", move_html),
    ("dh_jax.influence.estimator", "Scores", scores_html),
    ("dh_jax.attribution.findings", "Section", section_html),
)


def register(shell: Any) -> None:
    """Teach an IPython shell how our types look."""
    formatter = shell.display_formatter.formatters["text/html"]
    for home, name, function in FORMATTERS:
        formatter.for_type_by_name(home, name, function)


def register_if_there() -> None:
    """Register where IPython runs already; it is never imported for that."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if shell is not None:
        register(shell)


# --- pieces of HTML --------------------------------------------------------------------------


def _wrapped(inner: str) -> str:
    return f'{style()}<div class="dh-viz">{inner}</div>'


def _drawn(figure: Figure) -> str:
    title = str(figure.get_label()) or "figure"
    svg = to_svg(figure, key=KEY, title=title, description="")
    # Known by what it shows: unique among outputs, and the same in every execution.
    return svg.replace(KEY, f"dh{hashlib.blake2b(svg.encode(), digest_size=6).hexdigest()}")


def _table(
    said: str, heads: Sequence[str], body: Iterable[Sequence[str]], *, numbers: set[int]
) -> str:
    """A table whose cells are HTML already; the first of a row is its heading."""
    kind = {i: ' class="n"' for i in numbers}
    head = "".join(f'<th scope="col"{kind.get(i, "")}>{h}</th>' for i, h in enumerate(heads))
    rows = "".join(
        f'<tr><th scope="row">{row[0]}</th>'
        + "".join(f"<td{kind.get(i, '')}>{cell}</td>" for i, cell in enumerate(row[1:], 1))
        + "</tr>"
        for row in body
    )
    return (
        f"<table><caption>{said}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{rows}</tbody></table>"
    )


def _weights(
    said: str, weights: Mapping[str, float], before: Mapping[str, float] | None = None
) -> str:
    styles, most = source_styles(list(weights)), max(weights.values(), default=0.0) or 1.0
    body = [
        (_name(name, styles[name].colour), _bar(weight / most, styles[name].colour),
         f"{weight:.1%}", *([f"{weight - before[name]:+.1%}"] if before else []))
        for name, weight in weights.items()
    ]  # fmt: skip
    heads = ("source", "", "weight", *(["change"] if before else []))
    return _table(html.escape(said), heads, body, numbers={2, 3})


def _name(name: str, colour: str) -> str:
    return f'<span style="color:var(--{colour})">■</span> {html.escape(name)}'


def _bar(share: float, colour: str) -> str:
    return f'<span class="bar"><i style="--c:var(--{colour});width:{100 * share:.1f}%"></i></span>'


def _share(share: float) -> str:
    return "–" if np.isnan(share) else f"{share:.1%}"


def _tinted(pieces: Iterable[Any]) -> str:
    out, left = [], 600  # characters
    for piece in pieces:
        text, level = piece.text[:left], piece.level
        left -= len(text)
        shown = html.escape(text)
        if level:
            kind = "up" if level > 0 else "down"
            shown = f'<span class="{kind}" style="--a:{15 * abs(level)}%">{shown}</span>'
        out.append(shown)
        if left <= 0:
            out.append(" …")
            break
    return f'<span class="text">{"".join(out)}</span>'
