"""What a set of runs shows: spreads over seeds, paired differences, and whether they compare.

The unit of evidence is a seed. A difference is taken within a seed (same data order, same
initial parameters), then averaged; its interval is Student's t over those paired differences
(Student, "The Probable Error of a Mean", Biometrika 6, 1908).
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from dh_jax.report.runs import EvalPoint, Run, tokens_at

BASELINES = ("static", "uniform")
CONFIDENCE = 0.95
TOKEN_TOLERANCE = 0.01  # runs whose token counts differ by more are not compared
WEIGHT = re.compile(r"data\.sources\..+\.weight")
# What repetitions of a run may differ in: the seed, and where and how they were kept.
REPEATED = ("training.seed", "data.seed", "out", "resume", "training.tensorboard", "training.wandb",
            "training.keep", "training.checkpoint_interval")  # fmt: skip
# Where data have two names, every policy says which (`dh_jax.report.variants`).
FREE_KEYS = ("mixing.", "influence.", "distillation.", "data.name", *REPEATED)


class Spread(NamedTuple):
    """Values of one quantity over seeds. ``standard_error`` is None below two values."""

    values: tuple[float, ...]
    mean: float
    standard_error: float | None


class Difference(NamedTuple):
    """Steered minus baseline, seed by seed, in nats a target; negative = steered is better.
    (Where no policy is a baseline, the first run's stands for one: see `references`.)

    ``interval`` (95 %, two-sided) is None below two seeds. ``relative`` is the mean difference
    as a fraction of the baseline's mean.
    """

    steered: str
    baseline: str
    domain: str | None  # None: the weighted mean over the targets
    seeds: tuple[int, ...]
    spread: Spread
    interval: tuple[float, float] | None
    relative: float

    @property
    def verdict(self) -> str:
        """better, worse (the interval excludes zero), unclear, or single (one seed only)."""
        if self.interval is None:
            return "single"
        if self.interval[1] < 0:
            return "better"
        return "worse" if self.interval[0] > 0 else "unclear"


class Final(NamedTuple):
    """Held-out loss (nats a target) and bits a byte at the last evaluation, over seeds."""

    loss: Spread
    bits_per_byte: Spread


class Clock(NamedTuple):
    """Seconds by phase, mean over the runs of a policy, and tokens a second of training."""

    seconds: dict[str, float]
    tokens_per_second: float | None

    @property
    def total(self) -> float:
        """Seconds of all phases together."""
        return sum(self.seconds.values())

    @property
    def overhead(self) -> float:
        """Share of the time that reweighting took."""
        return self.seconds.get("reweight", 0.0) / self.total if self.total > 0 else 0.0

    @property
    def of_training(self) -> float:
        """Seconds of reweighting by those of training steps: what `mixing.budget` bounds."""
        busy = self.seconds.get("train", 0.0)
        return self.seconds.get("reweight", 0.0) / busy if busy > 0 else 0.0


class Summary(NamedTuple):
    """The finding of a report, in numbers and in words."""

    headline: str
    sentences: tuple[str, ...]
    policies: tuple[str, ...]  # steered first
    seeds: dict[str, tuple[int, ...]]
    targets: dict[str, float]  # weights that sum to 1
    domains: tuple[str, ...]  # every evaluated domain, targets first
    final: dict[str, dict[str, Final]]  # policy -> domain
    target_loss: dict[str, Spread]  # policy -> weighted mean over the targets
    differences: tuple[Difference, ...]  # empty where the comparison is refused
    refusal: str | None
    warnings: tuple[str, ...]
    clock: dict[str, Clock]


# --- Student's t -----------------------------------------------------------------------------


def t_cdf(t: float, dof: int) -> float:
    """P(T <= t) of Student's t, in closed form for a whole number of degrees of freedom.

    Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    angle = math.atan2(t, math.sqrt(dof))
    sine, cosine = math.sin(angle), math.cos(angle)
    term, total = 1.0, 0.0
    if dof % 2:  # A = (2/pi) (angle + sin (cos + 2/3 cos^3 + ...))
        term = cosine
        for k in range(1, (dof - 1) // 2 + 1):
            total += term
            term *= cosine * cosine * 2 * k / (2 * k + 1)
        inside = 2 / math.pi * (angle + sine * total)
    else:  # A = sin (1 + 1/2 cos^2 + 1·3/(2·4) cos^4 + ...)
        for k in range(1, dof // 2 + 1):
            total += term
            term *= cosine * cosine * (2 * k - 1) / (2 * k)
        inside = sine * total
    return 0.5 + inside / 2


def t_quantile(p: float, dof: int) -> float:
    """The t with ``t_cdf(t, dof) == p``, by bisection to the last bits; 0.5 <= p < 1."""
    low, high = 0.0, 1.0
    while t_cdf(high, dof) < p:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, dof) < p else (low, middle)
    return (low + high) / 2


def spread(values: Iterable[float]) -> Spread:
    """Mean and standard error (sample standard deviation over root n)."""
    kept = tuple(values)
    mean, count = statistics.fmean(kept), len(kept)
    if count < 2:
        return Spread(kept, mean, None)
    variance = sum((value - mean) ** 2 for value in kept) / (count - 1)  # NaN of a run that is NaN
    return Spread(kept, mean, math.sqrt(variance / count))


def interval(s: Spread, confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """Two-sided Student's t interval of the mean; None below two values."""
    if s.standard_error is None:
        return None
    half = t_quantile((1 + confidence) / 2, len(s.values) - 1) * s.standard_error
    return s.mean - half, s.mean + half


# --- runs ------------------------------------------------------------------------------------


def is_baseline(policy: str) -> bool:
    """Whether others are measured against a policy, as a report names it (``static (a)``, too)."""
    return policy.partition(" (")[0] in BASELINES


def by_policy(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs by policy, steered policies first, each sorted by seed."""
    order = sorted({run.policy for run in runs}, key=lambda name: (is_baseline(name), name))
    return {
        name: sorted((r for r in runs if r.policy == name), key=lambda r: (r.seed, str(r.folder)))
        for name in order
    }


def references(runs: Sequence[Run]) -> list[str]:
    """The policies that all others are measured against: the baselines, or the first run's where
    there are none, or nothing else."""
    names = list(by_policy(runs))
    baselines = [name for name in names if is_baseline(name)]
    if baselines and len(baselines) < len(names):
        return baselines
    return [runs[0].policy] if len(names) > 1 else []


def target_weights(runs: Sequence[Run]) -> dict[str, float]:
    """Weights of the target domains, of the first steered run if any; they sum to 1.

    A run without targets is judged on all its domains equally.
    """
    first = next((r for r in runs if not is_baseline(r.policy) and r.targets), None)
    first = first or next((r for r in runs if r.targets), None)
    if first is None:
        names = next((list(r.evals[-1].domains) for r in runs if r.evals), [])
        return {name: 1 / len(names) for name in names}
    total = sum(first.targets.values())
    return {name: weight / total for name, weight in first.targets.items() if weight > 0}


def target_loss(point: EvalPoint, targets: Mapping[str, float]) -> float:
    """Weighted mean over the targets of the held-out loss, in nats a target token."""
    return sum(weight * point.domains[name].loss for name, weight in targets.items())


def refusal(runs: Sequence[Run], targets: Mapping[str, float]) -> str | None:
    """Why these runs cannot be compared, in one sentence; None if they can."""
    groups = by_policy(runs)
    for group in groups.values():
        seeds = [run.seed for run in group]
        twice = next((seed for seed in seeds if seeds.count(seed) > 1), None)
        if twice is not None:
            folders = ", ".join(r.folder.name for r in group if r.seed == twice)
            return f"two runs are both {group[0].policy} with seed {twice} ({folders})"
    if unfinished := [f"{r.label} ({r.status})" for r in runs if r.status != "finished"]:
        return f"not every run is finished: {', '.join(unfinished)}"
    if blind := [r.label for r in runs if not r.evals]:
        return f"runs without an evaluation: {', '.join(blind)}"
    if lacking := [r.label for r in runs if not set(targets) <= set(r.evals[-1].domains)]:
        return f"the targets {', '.join(targets)} are not evaluated in {', '.join(lacking)}"
    if len({tuple(sorted(target_weights([r]).items())) for r in runs if r.targets}) > 1:
        return "the runs aim at different targets"
    ends = {r.label: float(tokens_at(r, [r.evals[-1].step])[0]) for r in runs}
    least, most = min(ends, key=lambda k: ends[k]), max(ends, key=lambda k: ends[k])
    if ends[most] - ends[least] > TOKEN_TOLERANCE * ends[most]:
        return (
            f"the runs saw unequal numbers of tokens: {ends[least]:,.0f} ({least}) "
            f"to {ends[most]:,.0f} ({most})"
        )
    if diverged := [r.label for r in runs if not math.isfinite(target_loss(r.evals[-1], targets))]:
        return f"the final loss is not finite in {', '.join(diverged)}"
    for name in (n for n in groups if n not in references(runs)):
        for base in references(runs):
            if not {r.seed for r in groups[name]} & {r.seed for r in groups[base]}:
                return f"{name} and {base} share no seed, so nothing can be paired"
    return None


def warnings(runs: Sequence[Run]) -> list[str]:
    """What a reader must know before believing a comparison."""
    said = []
    groups = by_policy(runs)
    seeds = {name: tuple(r.seed for r in group) for name, group in groups.items()}
    if len(set(seeds.values())) > 1:
        each = "; ".join(f"{n}: {', '.join(map(str, s))}" for n, s in seeds.items())
        said.append(
            f"The policies ran with different seeds ({each}); differences pair the seeds they "
            "share, and means per policy are over different seeds."
        )
    differing = config_differences(runs)
    if any(WEIGHT.fullmatch(key) for key in differing):
        each = "; ".join(f"{run.label}: {_first_weights(run)}" for run in runs)
        said.append(f"The runs are of different configured weights ({each}).")
    for key, values in differing.items():
        if not key.startswith(FREE_KEYS) and not WEIGHT.fullmatch(key):
            shown = ", ".join(
                f"{value} ({run.label})" for run, value in zip(runs, values, strict=True)
            )
            said.append(f"The runs differ in {key} as well as in their policy: {shown}.")
    for name in sorted({key for run in runs for key in run.versions}):
        found = sorted({run.versions.get(name, "none") for run in runs})
        if len(found) > 1:
            said.append(f"The runs used different versions of {name}: {', '.join(found)}.")
    if len(devices := sorted({run.device for run in runs})) > 1:
        said.append(
            f"The runs used different devices ({', '.join(devices)}); times do not compare."
        )
    said += [
        f"{run.label} is not finished ({run.status}): these are its figures so far."
        for run in runs
        if run.status != "finished"
    ]
    said += [f"{run.label}: {note}." for run in runs for note in run.notes]
    return said


def _first_weights(run: Run) -> str:
    weights = run.train[0].weights
    return ", ".join(f"{name} {weight:.2g}" for name, weight in weights.items() if weight)


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mapping -> ``{"training.seed": 0, ...}``; lists are kept whole."""
    items: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        items.update(flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value})
    return items


def config_differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Configuration keys that are not the same in all runs, with each run's value."""
    flats = [flat(run.config) for run in runs]
    keys = dict.fromkeys(key for config in flats for key in config)
    columns = {key: [config.get(key) for config in flats] for key in keys}
    return {k: values for k, values in columns.items() if any(v != values[0] for v in values)}


def clock(runs: Sequence[Run]) -> Clock:
    """Mean seconds by phase over runs, and tokens a second over the training phase alone."""
    seconds: dict[str, float] = {}
    trained = 0.0
    for run in runs:
        for point in run.timings:
            seconds[point.phase] = seconds.get(point.phase, 0.0) + point.seconds / len(runs)
        trained += run.tokens / len(runs)
    busy = seconds.get("train", 0.0)
    return Clock(seconds, trained / busy if busy > 0 else None)


def difference(
    steered: Sequence[Run],
    baseline: Sequence[Run],
    weights: Mapping[str, float],
    domain: str | None,
) -> Difference:
    """The paired difference of the weighted final loss over the seeds both policies have."""
    ours = {run.seed: target_loss(run.evals[-1], weights) for run in steered}
    theirs = {run.seed: target_loss(run.evals[-1], weights) for run in baseline}
    seeds = tuple(sorted(ours.keys() & theirs.keys()))
    paired = spread(ours[seed] - theirs[seed] for seed in seeds)
    level = statistics.fmean(theirs[seed] for seed in seeds)
    return Difference(
        steered[0].policy, baseline[0].policy, domain, seeds, paired, interval(paired),
        paired.mean / level,
    )  # fmt: skip


def all_differences(runs: Sequence[Run], targets: Mapping[str, float]) -> list[Difference]:
    """Every policy against every one of `references`: on the targets, then on each domain."""
    found = []
    groups, bases = by_policy(runs), references(runs)
    for name in (n for n in groups if n not in bases):
        for base in bases:
            found.append(difference(groups[name], groups[base], targets, None))
            evaluated = [set(r.evals[-1].domains) for r in (*groups[name], *groups[base])]
            order = dict.fromkeys([*targets, *groups[name][0].evals[-1].domains])
            shared = [d for d in order if all(d in e for e in evaluated)]
            found += [difference(groups[name], groups[base], {d: 1.0}, d) for d in shared]
    return found


def finals(runs: Sequence[Run]) -> dict[str, Final]:
    """Final loss and bits a byte of each domain over the runs (of one policy) that have it."""
    ends = [run.evals[-1].domains for run in runs if run.evals]
    names = dict.fromkeys(name for end in ends for name in end)
    return {
        name: Final(
            spread(end[name].loss for end in ends if name in end),
            spread(end[name].bits_per_byte for end in ends if name in end),
        )
        for name in names
    }
