"""One estimator of ours on one setting, in a process of its own: `... SETTING METHOD SCORES`.

Prints CPU-seconds of fitting, queries and scores, with compiling and a second time without, and
the memory that came on top of the imports. The scores (K, N) are written as .npy.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks import _digits, _text
from benchmarks._measure import cpu_seconds, peak_mib, pin, resident_mib
from benchmarks._models import load
from dh_jax.batch import Batch
from dh_jax.influence.ekfac import ekfac
from dh_jax.influence.empirical_fisher import datainf, woodbury
from dh_jax.influence.estimator import CoverageWarning, Estimator, score
from dh_jax.influence.first_order import gradient_cosine, gradient_dot
from dh_jax.influence.iterative import conjugate_gradient, low_rank
from dh_jax.influence.objective import Objective, Scope
from dh_jax.influence.projection import projection

Make = Callable[[Objective, Objective, Scope], Estimator]

# (objective with taps, without, scope); damping is the library's rule everywhere.
METHODS: dict[str, dict[str, Make]] = {
    "digits": {
        "gradient dot": lambda o, p, s: gradient_dot(o, s),
        "gradient cosine": lambda o, p, s: gradient_cosine(o, s),
        "TRAK, k=2048": lambda o, p, s: projection(o, s, kernel="trak"),
        "DataInf": lambda o, p, s: datainf(o, s),
        "empirical Fisher": lambda o, p, s: woodbury(o, s),
        "K-FAC": lambda o, p, s: ekfac(o, s, strategy="kfac"),
        "EK-FAC": lambda o, p, s: ekfac(o, s),
        "EK-FAC, all labels": lambda o, p, s: ekfac(o, s, labels="all"),
        "Gauss-Newton, block CG": lambda o, p, s: conjugate_gradient(
            o, s, preconditioner=ekfac(o, s), steps=6
        ),
    },
    "text": {
        "gradient dot": lambda o, p, s: gradient_dot(p, s),
        "gradient cosine": lambda o, p, s: gradient_cosine(p, s),
        "DataInf": lambda o, p, s: datainf(p, s),
        "empirical Fisher": lambda o, p, s: woodbury(p, s),
        "EK-FAC": lambda o, p, s: ekfac(o, s),
        "EK-FAC, 8 drawn labels": lambda o, p, s: ekfac(o, s, samples=8),
        "Gauss-Newton, block CG, 2 steps": lambda o, p, s: conjugate_gradient(
            o, s, preconditioner=ekfac(o, s), steps=2
        ),
        "Gauss-Newton, Lanczos, rank 14": lambda o, p, s: low_rank(p, s, rank=14),
        "Gauss-Newton, Lanczos, rank 32": lambda o, p, s: low_rank(p, s, rank=32),
    },
}


def problem(setting: str) -> tuple[Any, Objective, Objective, Scope, list[Batch], list[Batch]]:
    params = load(setting)
    if setting == "digits":
        images, labels = _digits.digits()
        with_taps = _digits.objective(images)
        numbers = np.arange(_digits.TRAIN + _digits.QUERIES)
        batch = _digits.as_batch(numbers, labels)
        N, chunk = _digits.TRAIN, 400
        plain = Objective(with_taps.loss, with_taps.logits)
    else:
        with_taps, plain = _text.objective(taps=True), _text.objective(taps=False)
        batch = _text.as_batch(_text.rows())
        N, chunk = _text.TRAIN, 32
    train, queries = (jax.tree.map(lambda x, c=cut: x[c], batch) for cut in _cuts(N))
    return params, with_taps, plain, Scope(chunk=chunk), [train], [queries]


def _cuts(N: int) -> tuple[slice, slice]:
    return slice(0, N), slice(N, None)


def main(setting: str, method: str, out: str) -> None:
    pin()
    warnings.simplefilter("ignore", CoverageWarning)
    params, with_taps, plain, scope, train, queries = problem(setting)
    estimator = METHODS[setting][method](with_taps, plain, scope)
    before, times = resident_mib(), []
    for _ in range(2):
        start = cpu_seconds()
        key = jax.random.key(0)
        state = estimator.fit(params, train, key)
        scores = score(estimator, params, state, queries, train, key).values_KN
        times.append(cpu_seconds() - start)
    np.save(out, scores)
    print(json.dumps({"cpu": times[1], "cpu_compiling": times[0], "mib": peak_mib() - before}))


if __name__ == "__main__":
    main(*sys.argv[1:])
