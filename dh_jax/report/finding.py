"""The finding in plain words, as favourable or unfavourable as the numbers are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from dh_jax.report.runs import Run
from dh_jax.report.statistics import (
    Clock,
    Difference,
    Spread,
    Summary,
    all_differences,
    by_policy,
    clock,
    finals,
    is_baseline,
    refusal,
    spread,
    target_loss,
    target_weights,
    warnings,
)
from dh_jax.report.teaching import DISTILLED


def summarise(runs: Sequence[Run]) -> Summary:
    """What the runs show, in numbers and in words.

    A comparison is made only between finished runs, at equal tokens and on shared seeds, of
    steered policies with the baselines static and uniform (without any, of all with the first
    run's policy); otherwise `Summary.refusal` says why not and `Summary.differences` is empty.
    """
    groups = by_policy(runs)
    targets = target_weights(runs)
    refused = refusal(runs, targets) if len(runs) > 1 else None
    differences = () if refused else tuple(all_differences(runs, targets))
    losses = {
        name: spread(target_loss(r.evals[-1], targets) for r in ended)
        for name, group in groups.items()
        if (ended := [r for r in group if r.evals and set(targets) <= set(r.evals[-1].domains)])
    }
    ends = {name: finals(group) for name, group in groups.items()}
    clocks = {name: clock(group) for name, group in groups.items()}
    return Summary(
        headline=_headline(runs, targets, differences, refused),
        sentences=tuple(_sentences(runs, targets, losses, differences, clocks)),
        policies=tuple(groups),
        seeds={name: tuple(r.seed for r in group) for name, group in groups.items()},
        targets=targets,
        domains=tuple(dict.fromkeys([*targets, *(d for f in ends.values() for d in f)])),
        final=ends,
        target_loss=losses,
        differences=differences,
        refusal=refused,
        warnings=tuple(warnings(runs)),
        clock=clocks,
    )


# --- sentences -------------------------------------------------------------------------------


def _headline(
    runs: Sequence[Run],
    targets: Mapping[str, float],
    differences: Sequence[Difference],
    refused: str | None,
) -> str:
    if refused:
        return f"No comparison is made: {refused}."
    if not differences:
        return _progress(runs, targets)
    parts = []
    for name in dict.fromkeys(d.steered for d in differences):
        told = [d for d in differences if d.steered == name and d.domain is None]
        groups: dict[tuple[str, str], list[str]] = {}
        for d in told:
            groups.setdefault(_verb(d), []).append(d.baseline)
        verbs = "; it ".join(f"{verb} {join(b)}{rest}" for (verb, rest), b in groups.items())
        subject = f"mixing steered by {name}" if moves(name) else f"{name} mixing"
        if not moves(name) and DISTILLED in name:
            subject = "a student of its teacher"
        parts.append(f"On held-out {join(list(targets))}, {subject} {verbs}.")
        others = [d for d in differences if d.domain not in (None, *targets)]
        if others and len({d.steered for d in differences}) == 1:  # of several, the text below
            parts.append(_price_elsewhere(others))
    return " ".join(parts)


def _price_elsewhere(differences: Sequence[Difference]) -> str:
    """What the domains that were not aimed at paid, or gained, as a mean over them."""
    means: dict[str, list[float]] = {}
    for d in differences:
        means.setdefault(d.baseline, []).append(d.spread.mean)
    said = []
    for base, found in means.items():
        mean = sum(found) / len(found)
        said.append(f"{number(abs(mean))} {'behind' if mean > 0 else 'ahead of'} {base}")
    count = max(map(len, means.values()))
    which = "the other domain it is" if count == 1 else f"the {count} others it is on average"
    return f"On {which} {join(said)} (nats a token)."


def moves(policy: str) -> bool:
    """Whether a policy, as a report names it, moves the mixture."""
    return not is_baseline(policy.replace(DISTILLED, ""))


def _verb(d: Difference) -> tuple[str, str]:
    """What goes before and after the baseline's name."""
    if d.verdict == "better":
        return "beats", ""
    if d.verdict == "worse":
        return "does worse than", ""
    if d.spread.mean == 0:
        return "ends level with", ""
    side = "ahead of" if d.spread.mean < 0 else "behind"
    if d.verdict == "single":
        return f"ends {side}", " in the one seed that was run"
    return f"ends {side}", ", but the 95 % interval includes zero"


def _progress(runs: Sequence[Run], targets: Mapping[str, float]) -> str:
    """One policy: how far the held-out loss came."""
    with_evals = [run for run in runs if run.evals]
    if not with_evals:
        return f"{runs[0].label}: no evaluation yet after {amount(runs[0].tokens)} tokens."
    first = spread(target_loss(r.evals[0], targets) for r in with_evals)
    last = spread(target_loss(r.evals[-1], targets) for r in with_evals)
    moved = "fell" if last.mean < first.mean else "rose" if last.mean > first.mean else "stayed"
    return (
        f"Held-out loss on {join(list(targets))} {moved} from {number(first.mean)} to "
        f"{number(last.mean)} nats a token over {amount(with_evals[0].tokens)} tokens."
    )


def _sentences(
    runs: Sequence[Run],
    targets: Mapping[str, float],
    losses: Mapping[str, Spread],
    differences: Sequence[Difference],
    clocks: Mapping[str, Clock],
) -> list[str]:
    several = len({d.steered for d in differences}) > 1
    said = [_against(d, losses, several) for d in differences if d.domain is None]
    for base in dict.fromkeys((d.steered, d.baseline) for d in differences):
        rest = [d for d in differences if (d.steered, d.baseline) == base]
        said += _elsewhere([d for d in rest if d.domain and d.domain not in targets])
    for name in filter(moves, clocks):
        if clocks[name].total > 0:
            spent = clocks[name].seconds.get("reweight", 0.0)
            said.append(
                f"The moves of {name} took {percent(clocks[name].overhead)} of the wall-clock time "
                f"({seconds(spent)} of {seconds(clocks[name].total)} a run), "
                f"{percent(clocks[name].of_training)} of the training steps' own."
            )
    if any(map(moves, clocks)) and all(clock.total for clock in clocks.values()):
        each = [
            f"{seconds(clock.total)} by {name} ({seconds(clock.seconds.get('compile', 0.0))})"
            for name, clock in clocks.items()
        ]
        said.append(f"A whole run took, with what it compiled once (in brackets), {join(each)}.")
    if differences:
        said.append(f"All runs trained on {_token_range(runs)} tokens.")
    return said


def _against(d: Difference, losses: Mapping[str, Spread], several: bool) -> str:
    lower = sum(value < 0 for value in d.spread.values)
    count = len(d.seeds)
    who = f"{d.steered} against" if several else "Against"
    lead = (
        f"{who} {d.baseline}: {signed(d.spread.mean)} nats a token "
        f"({signed_percent(d.relative)}; {number(losses[d.steered].mean)} against "
        f"{number(losses[d.baseline].mean)})"
    )
    if d.interval is None:
        return f"{lead}, from one seed, so without a measure of spread."
    low, high = d.interval
    sure = "" if low > 0 or high < 0 else ", which includes zero: no difference is shown"
    return (
        f"{lead}, lower in {lower} of {count} seeds; 95 % interval of the paired difference "
        f"{signed(low)} to {signed(high)}{sure}."
    )


def _elsewhere(differences: Sequence[Difference]) -> list[str]:
    if not differences:
        return []
    d = differences[0]
    changes = ", ".join(f"{x.domain} {signed(x.spread.mean)}" for x in differences)
    return [f"On the domains it did not aim at, {d.steered} minus {d.baseline} is: {changes}."]


def _token_range(runs: Sequence[Run]) -> str:
    least, most = min(r.tokens for r in runs), max(r.tokens for r in runs)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


# --- words for numbers -----------------------------------------------------------------------


def join(names: Sequence[str]) -> str:
    """``a, b and c``."""
    return (
        names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else ""
    )


def number(value: float, digits: int = 3) -> str:
    """A fixed number of decimals, with a true minus sign; ``not finite`` where it is not."""
    return f"{value:.{digits}f}".replace("-", "\u2212") if math.isfinite(value) else "not finite"


def signed(value: float, digits: int = 3) -> str:
    """As `number`, with a plus sign where it is positive."""
    return f"+{number(value, digits)}" if value > 0 else number(value, digits)


def figures(values: Iterable[float]) -> Callable[[float], str]:
    """For scores, whose scale an estimator decides: with a sign, and as many decimals as tell
    ``values`` apart; the largest decides for all."""
    most = max((abs(x) for x in values if math.isfinite(x)), default=0.0)
    power = math.floor(math.log10(most)) if most else 0

    def figure(value: float) -> str:
        if not math.isfinite(value):
            return "–"
        plain = -4 <= power <= 5
        text = f"{value:+.{max(0, 2 - power)}f}" if plain else f"{value:+.2e}"
        return text.replace("-", "\u2212")

    return figure


def percent(share: float) -> str:
    """A fraction as a percentage with one decimal; with two, where that would say all or none."""
    digits = 1 if round(100 * share, 1) % 100 or share in (0, 1) else 2
    return f"{number(100 * share, digits)}\u202f%"


def signed_percent(share: float) -> str:
    """As `percent`, with a plus sign where it is positive."""
    return f"{signed(100 * share, 1)}\u202f%"


def amount(count: float) -> str:
    """A count in three figures: ``491 k``, ``1.8 M``."""
    rounded = float(f"{count:.3g}")
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if rounded >= limit:
            return f"{rounded / limit:.3g} {unit}"
    return f"{rounded:g}"


def seconds(value: float) -> str:
    """A duration: ``0.41 s``, ``48 s``, ``3 min 20 s``, ``2 h 05 min``."""
    if value < 10:
        return f"{value:.2f} s"
    whole = round(value)
    if whole < 100:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(value / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"
