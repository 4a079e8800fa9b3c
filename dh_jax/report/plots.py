"""Which figures a report has: from runs to drawings, each in a wide and a narrow form."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from dh_jax import viz
from dh_jax.report.finding import join
from dh_jax.report.runs import Documents, Run, tokens_at
from dh_jax.report.statistics import Summary, clock, target_loss

WIDE, NARROW = 840, 372  # CSS pixels; a phone gets the narrow drawing
PHASES = {"train": "static", "eval": "uniform", "reweight": "policy-0",
          "checkpoint": "policy-2", "compile": "rule"}  # fmt: skip
OTHER_PHASE = "muted"
THROUGHPUT_WINDOWS = 40


class Drawing(NamedTuple):
    """One figure of the page: inline SVG for wide and narrow screens, and how to read it."""

    title: str
    caption: str
    wide: str
    narrow: str


def drawings(runs: Mapping[str, list[Run]], summary: Summary) -> dict[str, Drawing]:
    """Every figure that these runs have data for, by name (runs: by policy)."""
    found = itertools.chain(
        _losses(runs, summary),
        _differences(summary),
        _mixture(runs),
        _tokens(runs),
        _time(runs),
        _training(runs),
        _documents(scored_run(runs)),
    )
    return dict(found)


def scored_run(runs: Mapping[str, list[Run]]) -> Run | None:
    """The first run (steered first, then by seed) whose documents were scored."""
    every = itertools.chain.from_iterable(runs.values())
    return next((run for run in every if run.documents and run.documents.documents), None)


def all_sources(runs: Mapping[str, list[Run]]) -> list[str]:
    """Names of the sources of all runs, in the order of the configs."""
    every = itertools.chain.from_iterable(runs.values())
    return list(dict.fromkeys(name for run in every for name in run.sources))


def _draw(
    name: str, title: str, caption: str, make: Callable[[int], Figure]
) -> tuple[str, Drawing]:
    wide, narrow = (
        viz.to_svg(make(width), key=f"{name}-{kind}", title=title, description=caption, kind=kind)
        for kind, width in (("wide", WIDE), ("narrow", NARROW))
    )
    return name, Drawing(title, caption, wide, narrow)


def _height(width: int) -> int:
    return 330 if width == WIDE else 290


# --- losses ----------------------------------------------------------------------------------


def _losses(runs: Mapping[str, list[Run]], summary: Summary) -> Iterator[tuple[str, Drawing]]:
    styles = viz.policy_styles(list(runs))
    seen = {name: [r for r in group if r.evals] for name, group in runs.items()}
    seen = {name: group for name, group in seen.items() if group}
    if not seen:
        return
    aims = join(list(summary.targets))
    mean = _mean_words(seen)
    series = [
        viz.Series(name, styles[name], [_target_curve(run, summary.targets) for run in group])
        for name, group in seen.items()
    ]
    yield _draw(
        "target",
        f"Held-out loss on {aims}",
        f"Loss on documents of {aims} that training never sees"
        f"{', after equal numbers of tokens' if len(series) > 1 else ''}{mean}. "
        f"Lower is better.{_cut_words([series])}",
        lambda width: viz.lines(
            series,
            width,
            _height(width),
            heading=f"{aims}: held-out loss, nats a token",
            top=viz.settled(series),
        ),
    )
    domains = summary.domains
    if len(domains) < 2:
        return
    groups = {
        domain: [
            viz.Series(name, styles[name], [_domain_curve(run, domain) for run in having])
            for name, group in seen.items()
            if (having := [run for run in group if domain in run.evals[-1].domains])
        ]
        for domain in domains
    }
    yield _draw(
        "domains",
        "Held-out loss of every domain",
        f"Nats a token over tokens{mean}. Each panel has its own scale."
        f"{_cut_words(groups.values())}",
        lambda width: viz.panels(groups, width, 3 if width == WIDE else 1),
    )


def _several(runs: Mapping[str, list[Run]]) -> bool:
    return any(len(group) > 1 for group in runs.values())


def _mean_words(runs: Mapping[str, list[Run]]) -> str:
    several = _several(runs)
    return "; thin lines are seeds, the bold line is their mean" if several else ""


def _cut_words(groups: Iterable[Sequence[viz.Series]]) -> str:
    cut = any(viz.settled(series) is not None for series in groups)
    return " The steep start is cut off." if cut else ""


def _target_curve(run: Run, targets: Mapping[str, float]) -> tuple[list[float], list[float]]:
    points = [p for p in run.evals if set(targets) <= set(p.domains)]
    return (
        tokens_at(run, [p.step for p in points]).tolist(),
        [target_loss(p, targets) for p in points],
    )


def _domain_curve(run: Run, domain: str) -> tuple[list[float], list[float]]:
    return (
        tokens_at(run, [p.step for p in run.evals]).tolist(),
        [p.domains[domain].loss for p in run.evals],
    )


def _differences(summary: Summary) -> Iterator[tuple[str, Drawing]]:
    if not summary.differences:
        return
    groups: dict[str, list[viz.Effect]] = {}
    several = len(summary.targets) > 1
    for d in summary.differences:
        if d.domain is None and not several:
            continue  # the one target has a row of its own
        label = d.domain or "targets (mean)"
        strong = d.domain is None or d.domain in summary.targets
        effect = viz.Effect(label, d.spread.values, d.spread.mean, d.interval, strong)
        groups.setdefault(f"{d.steered} minus {d.baseline}", []).append(effect)
    for name, rows in groups.items():
        groups[name] = sorted(rows, key=lambda e: not e.strong)
    yield _draw(
        "differences",
        "Paired differences in final loss",
        "Steered minus baseline with the same seed: the diamond is the mean, the bar its 95 % "
        "interval, the circles below it are seeds. A bar that crosses 0 shows no difference. "
        "Targets are bold.",
        lambda width: viz.effects(groups, width, 2 if width == WIDE and len(groups) > 1 else 1),
    )


# --- the mixture -----------------------------------------------------------------------------


def _mixture(runs: Mapping[str, list[Run]]) -> Iterator[tuple[str, Drawing]]:
    sources = all_sources(runs)
    styles = viz.source_styles(sources)
    for name, group in runs.items():
        mean = _mean_words({name: group})
        if any(run.train[0].weights != p.weights for run in group for p in run.train):
            weights = [
                viz.Series(source, styles[source], [_weight_curve(run, source) for run in group])
                for source in sources
            ]
            yield _draw(
                f"weights-{name}",
                f"Weights chosen by {name}",
                f"Share of the mixture that each source was given{mean}.",
                lambda width, weights=weights: viz.lines(  # type: ignore[misc]
                    weights, width, _height(width), heading="weight in the mixture", scale="share"
                ),
            )
        moved = [run for run in group if any(p.influence for p in run.reweights)]
        if moved:
            helpful = [
                viz.Series(source, styles[source], curves)
                for source in sources
                if (curves := [c for run in moved if (c := _helpfulness(run, source))[0]])
            ]
            yield _draw(
                f"helpfulness-{name}",
                f"Helpfulness of each source, as {name} estimates it",
                "Minus the influence on the targets' loss: above 0 a source lowers that loss, "
                "below 0 it raises it. DataInf's own scale, which damping makes large: compare "
                f"sources{mean}.",
                lambda width, helpful=helpful: viz.lines(  # type: ignore[misc]
                    helpful,
                    width,
                    _height(width),
                    heading="helpfulness (minus influence)",
                    scale="signed",
                ),
            )


def _weight_curve(run: Run, source: str) -> tuple[list[float], list[float]]:
    return (
        [float(p.tokens) for p in run.train],
        [p.weights.get(source, 0.0) for p in run.train],
    )


def _helpfulness(run: Run, source: str) -> tuple[list[float], list[float]]:
    points = [p for p in run.reweights if source in p.influence]
    return tokens_at(run, [p.step for p in points]).tolist(), [-p.influence[source] for p in points]


def _tokens(runs: Mapping[str, list[Run]]) -> Iterator[tuple[str, Drawing]]:
    sources = all_sources(runs)
    styles = viz.policy_styles(list(runs))
    amounts = {
        name: (styles[name], [tokens_of(group, source) for source in sources])
        for name, group in runs.items()
    }
    yield _draw(
        "tokens",
        "Tokens seen of each source",
        f"Trained on by the end of the run{', mean over seeds' if _several(runs) else ''}.",
        lambda width: viz.dots(sources, amounts, width),
    )


def tokens_of(group: Sequence[Run], source: str) -> float:
    """Tokens of a source trained on by the end, mean over runs."""
    return float(np.mean([run.train[-1].tokens_by_source.get(source, 0.0) for run in group]))


# --- time, training, documents ---------------------------------------------------------------


def _time(runs: Mapping[str, list[Run]]) -> Iterator[tuple[str, Drawing]]:
    timed = {name: group for name, group in runs.items() if any(r.timings for r in group)}
    if not timed:
        return
    clocks = {name: clock(group) for name, group in timed.items()}
    phases = [p for p in PHASES if any(p in c.seconds for c in clocks.values())]
    phases += sorted({p for c in clocks.values() for p in c.seconds}.difference(PHASES))
    parts = {
        phase: (
            PHASES.get(phase, OTHER_PHASE),
            [c.seconds.get(phase, 0.0) for c in clocks.values()],
        )
        for phase in phases
    }
    yield _draw(
        "time",
        "Where the time went",
        f"Wall-clock seconds of a run by phase{', mean over seeds' if _several(timed) else ''}.",
        lambda width: viz.stacks(list(clocks), parts, width, unit="seconds a run"),
    )
    styles = viz.policy_styles(list(runs))
    series = [
        viz.Series(name, styles[name], curves)
        for name, group in timed.items()
        if (curves := [curve for run in group if (curve := throughput(run))[0]])
    ]
    if series:
        yield _draw(
            "throughput",
            "Throughput of the training steps",
            f"Tokens a second within the training phase{_mean_words(timed)}.",
            lambda width: viz.lines(
                series, width, _height(width) - 70, heading="tokens a second", scale="amount"
            ),
        )


def throughput(run: Run) -> tuple[list[float], list[float]]:
    """Tokens a second of the training phase over cumulative tokens, in windows of steps."""
    spent = sorted((p.step, p.seconds) for p in run.timings if p.phase == "train")
    if not spent:
        return [], []
    steps = np.asarray([step for step, _ in spent])
    total = np.cumsum([seconds for _, seconds in spent])
    tokens = tokens_at(run, steps.tolist())
    edges = np.unique(np.linspace(0, len(steps) - 1, THROUGHPUT_WINDOWS + 1).round().astype(int))
    elapsed = np.diff(total[edges])
    kept = elapsed > 0
    return (
        tokens[edges[1:]][kept].tolist(),
        (np.diff(tokens[edges])[kept] / elapsed[kept]).tolist(),
    )


def _training(runs: Mapping[str, list[Run]]) -> Iterator[tuple[str, Drawing]]:
    styles = viz.policy_styles(list(runs))
    shown = {
        "training loss, nats a token": "loss",
        "norm of the gradient": "grad_norm",
        "learning rate": "learning_rate",
    }
    groups = {
        heading: [
            viz.Series(
                name,
                styles[name],
                [
                    ([float(p.tokens) for p in run.train], [getattr(p, field) for p in run.train])
                    for run in group
                ],
            )
            for name, group in runs.items()
        ]
        for heading, field in shown.items()
    }
    yield _draw(
        "training",
        "The optimisation",
        "On the batches trained on; their mixture moves with the weights, so a lower training loss "
        f"does not say that a policy is better.{_cut_words(groups.values())}",
        lambda width: viz.panels(groups, width, 3 if width == WIDE else 1),
    )


def _documents(run: Run | None) -> Iterator[tuple[str, Drawing]]:
    if run is None or run.documents is None:
        return
    documents: Documents = run.documents
    styles = viz.source_styles(list(run.sources))
    scores: dict[str, list[float]] = {}
    for d in documents.documents:
        scores.setdefault(d.source, []).append(-d.score)
    groups = {
        name: (styles.get(name, viz.Style("muted")), scores[name])
        for name in (*run.sources, *sorted(set(scores).difference(run.sources)))
        if name in scores
    }
    count, scored = len(documents.documents), documents.scored or 0
    ends = f", the ends of {scored:,} scored," if scored > count else ""
    yield _draw(
        "scores",
        f"Helpfulness of {count} documents{ends} for {documents.target}",
        "Each tick is a document, the diamond the mean of its source's. Right of 0 a document "
        "lowers the loss (helps), left of 0 it raises it (harms).",
        lambda width: viz.strips(groups, width, unit="helpfulness (minus influence)"),
    )
