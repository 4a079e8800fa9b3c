"""Do policies find the mixture that is best? Six synthetic worlds with a known optimum.

``python -m benchmarks.mixing`` prints the tables of docs/benchmarks.md and writes its plot.
Every policy is the library's own, and so is the influence that it is shown. Regret 0 is the best
static mixture that a search finds, 1 is uniform; below 0, a policy that moves beats all that do
not. Settings were chosen on languages of another seed than those that are reported.

Shapes: W worlds, K seeds, N candidates or proxies, M sources, P phases, S moves.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._simulation import Contender, Outcome, runner
from benchmarks._worlds import WORLDS, Data, M, draw, world
from dh_jax.mixing import regmix
from dh_jax.mixing.ado import ado
from dh_jax.mixing.aioli import aioli
from dh_jax.mixing.combinators import bounded
from dh_jax.mixing.doge import doge
from dh_jax.mixing.doremi import average_weights, doremi
from dh_jax.mixing.group_influence import group_influence, influence_share
from dh_jax.mixing.influence import alignment, influence
from dh_jax.mixing.odm import odm
from dh_jax.mixing.policy import static

STEPS = 600
PROXIES, PROXY_STEPS = 32, STEPS // 4  # of RegMix, for each world and seed
REPORTED_ON = 1  # seed of the languages; settings were chosen on 0
SEARCH_SEEDS = (100, 101)  # the best static mixture is chosen on other data than it is judged
TIMED = 3  # times that a contender and a static run take turns; the least of each counts
UNIFORM = np.full(M, 1 / M)
FIGURE = Path("docs") / "mixing.svg"


def contenders() -> dict[str, Contender]:
    """Every policy that moves. Without bounds, as in the papers, but for one row of the table."""
    return {
        "influence": Contender(influence(0.5, 0.8)),
        # About 5 % of the steps' time, by fewer moves or by fewer rows; both move as far in a
        # hundred steps, and remember as long, as the first.
        "influence, every 50": Contender(influence(1.25, 0.8**2.5), 50),
        "influence, half the rows": Contender(influence(0.625, 0.8**1.25), 25, 2, 8),
        "influence, 0.02 to 0.9": Contender(bounded(influence(0.5, 0.8), 0.02, 0.9)),
        "gradient alignment": Contender(alignment(0.5, 0.8)),
        "group influence": Contender(group_influence(0.5, 0.8)),
        "influence share": Contender(influence_share(0.8)),
        "DoGE": Contender(doge(8.0)),
        "Aioli": Contender(aioli(16.0, 0.25, 12), 5),
        "ADO": Contender(ado(), 5),
        "ODM": Contender(odm(0.9), 5),
        # Losses are shown less the reference's, so that all worlds share one program.
        "DoReMi": Contender(doremi([0.0] * M), 5),
    }


class Figures(NamedTuple):
    """Held-out losses of one contender, nats a target."""

    target_WK: np.ndarray
    source_WKM: np.ndarray
    weights_WKSM: np.ndarray
    overhead: float  # CPU time beyond that of a static run, as a share of it


class Bench:
    """The worlds' data, and runs on them."""

    def __init__(self, languages: int, seeds: tuple[int, ...]):
        self.seeds = seeds
        drawn = [draw(world(name, languages), seed) for name in WORLDS for seed in seeds]
        self.data: Data = jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *drawn)

    def run(
        self,
        go: Callable[..., Outcome],
        start_WKNM: np.ndarray,
        reference_WM: np.ndarray | None = None,
    ) -> Outcome:
        """Outcomes of shape (W, K, N, ...): N runs of each world and seed."""
        worlds, seeds, count = len(WORLDS), len(self.seeds), start_WKNM.shape[2]
        reference_WM = np.zeros((worlds, M)) if reference_WM is None else reference_WM
        outcome = go(
            self.data,
            jnp.asarray(start_WKNM.reshape(worlds * seeds, count, M), jnp.float32),
            jnp.asarray(np.repeat(reference_WM, seeds, axis=0), jnp.float32),
            jnp.tile(jax.random.split(jax.random.key(7), seeds), worlds),  # the same for everyone
        )
        shape = (worlds, seeds, count)
        return Outcome(*(np.asarray(x, np.float64).reshape(*shape, *x.shape[2:]) for x in outcome))

    def alone(self, weights: np.ndarray) -> np.ndarray:
        """(W, K, 1, M) one run of each world and seed, from weights that fit that shape."""
        return np.broadcast_to(weights, (len(WORLDS), len(self.seeds), 1, M))


def judged(target: np.ndarray) -> np.ndarray:
    """(W, K, N) one number a run: the last phase's loss; of a drifting target both phases' mean."""
    final = target[..., -1].copy()
    drift = WORLDS.index("drift")
    final[drift] = target[drift].mean(axis=-1)
    return final


def figures(outcome: Outcome, overhead: float = 0.0) -> Figures:
    """Of the only run of each world and seed."""
    first = (judged(outcome.target_P), outcome.source_M, outcome.weights_SM)
    return Figures(*(x[:, :, 0] for x in first), overhead)


# --- the optimum ---------------------------------------------------------------------------------


def search(bench: Bench, go: Callable[..., Outcome], rounds: int = 3) -> np.ndarray:
    """(W, M) the best static mixture of each world: the corners, pairs and random ones first,
    then ever nearer to the best."""
    rng = np.random.default_rng(0)
    worlds, seeds = len(WORLDS), len(bench.seeds)
    pairs = [(a + b) / 2 for i, a in enumerate(np.eye(M)) for b in np.eye(M)[:i]]
    spread = rng.dirichlet(np.full(M, 0.5), 26)
    candidates = np.tile(np.concatenate([np.eye(M), UNIFORM[None], pairs, spread]), (worlds, 1, 1))
    for k in range(rounds):
        start = np.repeat(candidates[:, None], seeds, axis=1)
        losses = judged(bench.run(go, start).target_P).mean(axis=1)
        order = np.argsort(losses, axis=1)[:, :6]
        tops = np.take_along_axis(candidates, order[..., None], axis=1)
        sharpness = 20.0 * 4**k  # of the gammas that a Dirichlet about each of the six is made of
        near = rng.gamma(sharpness * np.tile(tops, (1, 3, 1)) + 0.2)
        candidates = np.concatenate([tops, near / near.sum(-1, keepdims=True)], axis=1)
    return np.asarray(tops[:, :3].mean(axis=1))  # the mean of three is less of a lucky draw


# --- what is trained beforehand ------------------------------------------------------------------


def found_by_regmix(bench: Bench) -> np.ndarray:
    """(W, K, M) RegMix's answer, each from proxies of its own."""
    rng = np.random.default_rng(1)
    worlds, seeds = len(WORLDS), len(bench.seeds)
    tried = regmix.sample_mixtures(rng, UNIFORM, worlds * seeds * PROXIES)
    tried = tried.reshape(worlds, seeds, PROXIES, M)
    go = runner(Contender(static()), PROXY_STEPS)
    losses = judged(bench.run(go, tried).target_P)
    answer = np.zeros((worlds, seeds, M))
    for w in range(worlds):
        for k in range(seeds):
            model = regmix.fit(tried[w, k], losses[w, k])
            answer[w, k] = regmix.best_weights(rng, model, UNIFORM, candidates=20_000, top=20)
    return answer


def averages(weights_WKSM: np.ndarray) -> np.ndarray:
    """(W, K, M) what a proxy run recommends."""
    return np.array([[average_weights(s) for s in seeds] for seeds in weights_WKSM])


# --- the whole -----------------------------------------------------------------------------------


def compare(languages: int, seeds: int, note: Callable[[str], None]) -> dict[str, Figures]:
    """Figures of every contender; among them ``uniform`` and ``best static``."""
    fixed = runner(Contender(static()), STEPS)
    best_WM = search(Bench(languages, SEARCH_SEEDS), fixed)
    for name, best_M in zip(WORLDS, best_WM, strict=True):
        note(f"best static mixture of {name}: {np.round(best_M, 2)}")
    bench = Bench(languages, tuple(range(seeds)))

    even = bench.alone(UNIFORM)
    results = {
        "best static": figures(bench.run(fixed, bench.alone(best_WM[:, None, None]))),
        "uniform": figures(bench.run(fixed, even)),
    }
    reference_WM = results["uniform"].source_WKM.mean(axis=1)
    for name, contender in contenders().items():
        go = runner(contender, STEPS)
        outcome = bench.run(go, even, reference_WM)
        seconds = [
            [cpu_seconds(partial(bench.run, each, even, reference_WM)) for each in (fixed, go)]
            for _ in range(TIMED)
        ]
        still, moving = np.min(seconds, axis=0)
        results[name] = figures(outcome, moving / still - 1)
        note(name)
    for name, before in (("DoGE", 1.0), ("DoReMi", 2.0)):  # runs that go before
        weights = averages(results[name].weights_WKSM)[:, :, None]
        results[f"{name}, averaged"] = figures(bench.run(fixed, weights), before)
    found = found_by_regmix(bench)[:, :, None]
    results["RegMix"] = figures(bench.run(fixed, found), PROXIES * PROXY_STEPS / STEPS)
    note("RegMix")
    return results


def cpu_seconds(work: Callable[[], object]) -> float:
    """What one call takes of the processor."""
    begun = time.process_time()
    work()
    return time.process_time() - begun


def regrets(results: dict[str, Figures]) -> dict[str, np.ndarray]:
    """(W, K) by contender: 0 at the best static mixture of the same seed, 1 a mean gap above it."""
    best_WK = results["best static"].target_WK
    gap_W = (results["uniform"].target_WK - best_WK).mean(axis=1)
    return {name: (f.target_WK - best_WK) / gap_W[:, None] for name, f in results.items()}


def table(results: dict[str, Figures]) -> str:
    """Markdown: regrets by world and their means; losses that the target-blind ones aim at."""
    columns = [*WORLDS, "mean", "without drift", "worst", "all sources", "worst source", "CPU"]
    lines = [f"| | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    for name, regret_WK in regrets(results).items():
        f, mean_W = results[name], regret_WK.mean(axis=1)
        source_WM = f.source_WKM.mean(axis=1)
        cells = [
            *(f"{x:.2f}" for x in mean_W),
            f"{mean_W.mean():.3f} ± {regret_WK.mean(axis=0).std(ddof=1):.3f}",
            f"{np.delete(mean_W, WORLDS.index('drift')).mean():.3f}",
            f"{mean_W.max():.2f}",
            f"{source_WM.mean():.2f}",
            f"{source_WM.max(axis=1).mean():.2f}",
            f"{f.overhead:+.1%}",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(results: dict[str, Figures], path: Path) -> None:
    """Regret of every contender in every world, best at the top; bars are one sd over seeds."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams.update({"svg.hashsalt": "mixing", "svg.fonttype": "none", "font.size": 9})
    shown = {n: r for n, r in regrets(results).items() if n not in ("best static", "uniform")}
    names = sorted(shown, key=lambda name: -shown[name].mean())
    figure, axes = pyplot.subplots(figsize=(7.2, 0.36 * len(names) + 1.2), layout="constrained")
    for w, (world_name, mark) in enumerate(zip(WORLDS, "osD^vX", strict=True)):
        middle = [shown[name][w].mean() for name in names]
        spread = [shown[name][w].std(ddof=1) for name in names]
        height = np.arange(len(names)) + 0.1 * (2.5 - w)
        axes.errorbar(middle, height, xerr=spread, fmt=mark, ms=4, lw=0.8, label=world_name)
    means = [shown[name].mean() for name in names]
    axes.plot(means, range(len(names)), "|k", ms=17, mew=1.8, label="mean")
    axes.axvline(0, color="0.3", lw=0.8)
    axes.axvline(1, color="0.3", lw=0.8, ls=":")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("regret: 0 = best static mixture, 1 = uniform (dotted)")
    axes.legend(
        ncols=7, loc="lower center", bbox_to_anchor=(0.4, 1), frameon=False, fontsize=8,
        handletextpad=0.1, columnspacing=0.9,
    )  # fmt: skip
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--languages", type=int, default=REPORTED_ON, help="seed of the languages")
    parser.add_argument("--figure", type=Path, default=FIGURE)
    options = parser.parse_args()
    begun = time.process_time()

    def note(what: str) -> None:
        print(f"# {time.process_time() - begun:4.0f} CPU-s  {what}", flush=True)

    results = compare(options.languages, options.seeds, note)
    plot(results, options.figure)
    print(table(results))
    note(f"done; {options.figure} is written")


if __name__ == "__main__":
    main()
