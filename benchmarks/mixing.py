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
from benchmarks._worlds import M, WORLDS, Data, draw, world
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
TUNED_ON, REPORTED_ON = 0, 1  # seeds of the languages
SEARCH_SEEDS = (100, 101)  # the best static mixture is chosen on other data than it is judged
UNIFORM = np.full(M, 1 / M)
FIGURE = Path("docs") / "mixing.svg"


def contenders() -> dict[str, Contender]:
    """Every policy that moves; those that know the target within the bounds that ship."""
    inside = partial(bounded, low=0.02, high=0.9)
    return {
        "influence": Contender(inside(influence(0.5, 0.5))),
        "gradient alignment": Contender(inside(alignment(0.5, 0.5))),
        "group influence (TiKMiX-D)": Contender(inside(group_influence(0.5, 0.5))),
        "influence share (MobileLLM-R1)": Contender(inside(influence_share(0.5))),
        "DoGE": Contender(inside(doge(1.0))),
        "Aioli": Contender(aioli(1.0, 0.25, 12), 5),
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
        groups = worlds * seeds
        reference = np.zeros((worlds, M)) if reference_WM is None else reference_WM
        keys = jax.random.split(
            jax.random.key(7), len(self.seeds)
        )  # paired over worlds, contenders
        outcome = go(
            self.data,
            jnp.asarray(start_WKNM.reshape(groups, count, M), jnp.float32),
            jnp.asarray(np.repeat(reference, seeds, axis=0), jnp.float32),
            jnp.tile(keys, worlds),
        )
        shape = (worlds, seeds, count)
        return Outcome(*(np.asarray(x, np.float64).reshape(*shape, *x.shape[2:]) for x in outcome))


def judged(target: np.ndarray) -> np.ndarray:
    """One number a run, (W, K, N): the last phase's loss; of a drifting target both phases' mean."""
    final = target[..., -1]
    drift = WORLDS.index("drift")
    final[drift] = target[drift].mean(axis=-1)
    return final


def figures(outcome: Outcome) -> Figures:
    return Figures(
        judged(outcome.target_P)[:, :, 0], outcome.source_M[:, :, 0], outcome.weights_SM[:, :, 0]
    )


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


# --- what is trained beforehand --------------------------------------------------------------------


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--languages", type=int, default=REPORTED_ON)
    parser.add_argument("--only", nargs="*", help="contenders to run; default: all")
    options = parser.parse_args()
    begun = time.process_time()

    def note(what: str) -> None:
        print(f"# {time.process_time() - begun:6.0f} CPU-s  {what}", flush=True)

    fixed = runner(Contender(static()), STEPS)
    best_WM = search(Bench(options.languages, SEARCH_SEEDS), fixed)
    note("best static mixtures found")
    for name, best_M in zip(WORLDS, best_WM, strict=True):
        print(f"#   {name:9s}", np.round(best_M, 2))
    bench = Bench(options.languages, tuple(range(options.seeds)))
    every = np.ones((len(WORLDS), options.seeds, 1, 1))
    one_of = lambda weights: figures(bench.run(fixed, every * weights))
    uniform = one_of(UNIFORM)
    best = one_of(best_WM[:, None, None])
    gap_W = (uniform.target_WK - best.target_WK).mean(axis=1)
    note(f"uniform and best; gaps {np.round(gap_W, 3)}")
    results = {"uniform": uniform, "best static": best}
    reference_WM = uniform.source_WKM.mean(axis=1)
    for name, contender in contenders().items():
        if options.only and name not in options.only:
            continue
        outcome = bench.run(runner(contender, STEPS), every * UNIFORM, reference_WM)
        results[name] = figures(outcome)
        r = (results[name].target_WK - best.target_WK).mean(axis=1) / gap_W
        note(f"{name}: {np.round(r, 2)} mean {r.mean():.3f}")
        print(
            np.round(results[name].weights_WKSM[:, 0, [3, 10, -1]], 2).tolist()
            if options.only
            else ""
        )


if __name__ == "__main__":
    main()
