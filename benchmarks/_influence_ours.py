"""One task of ours in a process of its own: `... TASK REPEATS`; prints CPU-seconds and memory."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _influence_setting as setting
from benchmarks._measure import cpu_seconds, peak_mib, pin, resident_mib
from dh_jax.influence import empirical_fisher
from dh_jax.influence.ekfac import ekfac
from dh_jax.influence.empirical_fisher import datainf
from dh_jax.influence.estimator import CoverageWarning, gather_gradients, score
from dh_jax.influence.gradients import select
from dh_jax.influence.objective import Scope
from dh_jax.influence.per_document import per_document
from dh_jax.influence.products import Curvature, batch_product

KEY = jax.random.key(0)
Work = Callable[[], Any]


def product(curvature: Curvature) -> dict[str, Work]:
    params = setting.params_of("small")
    scope = Scope(chunk=8, reduction="mean")
    apply = batch_product(setting.objective("small"), scope, curvature)
    batch = jax.tree.map(jnp.asarray, setting.as_batch(setting.windows(8, 0)))
    rng = np.random.default_rng(1)
    vectors = {
        path: jnp.asarray(rng.normal(size=(1, *x.shape)), jnp.float32)
        for path, x in select(params).blocks.items()
    }
    return {"product": lambda: jax.block_until_ready(apply(params, vectors, batch, KEY))}


def ek_fac() -> dict[str, Work]:
    params, scope = setting.params_of("wide"), Scope(chunk=32)
    objective = setting.objective("wide")
    estimator = ekfac(objective, scope)
    train, queries = (setting.as_batch(setting.windows(n, s)) for n, s in ((256, 0), (16, 1)))

    @jax.jit
    def slope(params: Any, rows: Any) -> Any:
        return jax.grad(lambda p: objective.loss(p, rows, KEY).sum())(params)

    def one_pass() -> None:
        for i in range(0, 256, 32):
            jax.block_until_ready(slope(params, jax.tree.map(lambda x, i=i: x[i : i + 32], train)))

    state = estimator.fit(params, [train], KEY)
    return {
        "pass": one_pass,
        "factors": lambda: jax.block_until_ready(estimator.fit(params, [train], KEY)),
        "scores": lambda: score(estimator, params, state, [queries], [train], KEY),
    }


def data_inf() -> dict[str, Work]:
    """From weights to scores, and the formula alone from gradients, as the literal loop has it."""
    params, scope = setting.params_of("small"), Scope(chunk=16, parameters="attention/.*kernel")
    estimator = datainf(setting.objective("small"), scope)
    train, queries = (setting.as_batch(setting.windows(n, s)) for n, s in ((256, 0), (16, 1)))

    def run() -> Any:
        state = estimator.fit(params, [train], KEY)
        return score(estimator, params, state, [queries], [train], KEY).values_KN

    door = per_document(setting.objective("small"), scope)
    gradients = jax.jit(door.gradients)
    sets = []
    for name, rows in (("train", train), ("queries", queries)):
        found = gather_gradients(gradients, scope, params, [rows], KEY)
        kept = {path.replace("/", "."): np.asarray(g) for path, g in found.items()}
        np.savez(setting.FOLDER / f"datainf-{name}.npz", **kept)
        sets.append(found)
    np.save(setting.FOLDER / "datainf-scores.npy", run())

    @jax.jit
    def formula(g: Any, v: Any) -> jax.Array:
        total = jnp.zeros((16, 256))
        for path, each in g.items():
            squares_N = jnp.square(each).reshape(256, -1).sum(axis=1)
            level = 0.1 * squares_N.mean() / each[0].size
            moved = empirical_fisher._swapped(v[path], each, level, level + squares_N)
            total -= moved.reshape(16, -1) @ each.reshape(256, -1).T
        return total

    return {"all": run, "scores": lambda: jax.block_until_ready(formula(*sets))}


TASKS: dict[str, Callable[[], dict[str, Work]]] = {
    "hessian": lambda: product("hessian"),
    "gauss-newton": lambda: product("gauss_newton"),
    "ekfac": ek_fac,
    "datainf": data_inf,
}


def main(task: str, repeats: int) -> None:
    pin()
    warnings.simplefilter("ignore", CoverageWarning)
    works = TASKS[task]()
    out: dict[str, float] = {}
    before = resident_mib()
    for name, work in works.items():
        work()  # compiles
        times = []
        for _ in range(repeats):
            start = cpu_seconds()
            work()
            times.append(cpu_seconds() - start)
        out[name] = float(np.median(times))
    print(json.dumps(out | {"mib": peak_mib() - before}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
