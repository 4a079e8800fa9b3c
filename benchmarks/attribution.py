"""Do scores tell the truth? Against retraining, beside trivial baselines and other libraries.

    python -m benchmarks.attribution [--only digits,text,...] [--seeds 4] [--full]

Four tables: digits (linear datamodeling score of a perceptron), text (of a tiny decoder), one
(leave-one-out of softmax regression) and labels (finding wrong labels with adapters). Retraining
is kept in ``.bench/attribution`` and not repeated. Libraries are looked for in
``.bench/kronfluence``, ``dattri`` and ``traker``; one that is not there is said to be missing.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _attribution_ours, _digits, _labels, _leave_one_out, _text
from benchmarks._lds import FOLDER, Truth, ceiling, half_subsets, lds, retrained, trainer
from benchmarks._measure import in_a_process
from benchmarks._models import flat, save
from dh_jax.models.pretrained import save_pretrained

HERE = Path(__file__).resolve().parent
SUBSETS = 100
PEERS = {
    "digits": {
        "kronfluence EK-FAC, damping 1e-8": "kronfluence",
        "kronfluence EK-FAC, damping None": "kronfluence",
        "dattri CG, 20 steps": "dattri",
        "traker, k=512": "traker",
    },
    "text": {
        "kronfluence EK-FAC, damping 1e-8": "kronfluence",
        "kronfluence EK-FAC, damping None": "kronfluence",
    },
}


def digits(seeds: int) -> tuple[Truth, np.ndarray]:
    """Truth, and the training documents' losses under the model whose scores are judged."""
    images, labels = _digits.digits()
    N = _digits.TRAIN
    numbers = np.arange(N + _digits.QUERIES)
    train = trainer(_digits.init, _digits.row_loss(images, labels), _digits.RECIPE)
    params = jax.jit(train)(jnp.arange(N), jax.random.key(0))
    save("digits", params)
    np.savez(FOLDER / "digits-data.npz", inputs=images[numbers], targets=labels[numbers], train=N)
    losses = _digits.query_losses(images, labels, numbers[N:])
    subsets = half_subsets(N, SUBSETS)
    truth = retrained("digits", train, losses, subsets, seeds, SUBSETS)
    return truth, np.asarray(_digits.query_losses(images, labels, numbers[:N])(params))


def text(seeds: int) -> tuple[Truth, np.ndarray]:
    windows, N = _text.rows(), _text.TRAIN
    train = trainer(_text.init, _text.row_loss(windows), _text.RECIPE)
    params = jax.jit(train)(jnp.arange(N), jax.random.key(0))
    if not (FOLDER / "text.npz").exists() or any(
        not np.array_equal(x, y)
        for x, y in zip(
            flat(_attribution_ours.load("text")).values(), flat(params).values(), strict=True
        )
    ):
        import shutil

        shutil.rmtree(FOLDER / "text-hf", ignore_errors=True)
        save_pretrained(FOLDER / "text-hf", _text.CONFIG, params)
        save("text", params)
    np.savez(FOLDER / "text-data.npz", inputs=windows[:, :-1], targets=windows[:, 1:], train=N)
    losses = _text.query_losses(windows[N:])
    truth = retrained("text", train, losses, half_subsets(N, SUBSETS), seeds, 1)
    return truth, np.asarray(_text.query_losses(windows[:N])(params))


def judge(setting: str, truth: Truth, losses_N: np.ndarray, only: str) -> None:
    seeds = len(truth.losses_SMK)
    print(f"\n{setting}: {SUBSETS} half-subsets x {seeds} seeds; a perfect score would reach ", end="")
    print(f"{ceiling(truth):.3f}\n\n| | LDS | CPU s | with compiling | MiB |")
    print("| --- | ---: | ---: | ---: | ---: |", flush=True)
    K = truth.losses_SMK.shape[-1]
    value, error = lds(np.broadcast_to(-losses_N, (K, len(losses_N))), truth)
    print(f"| loss of the document | {value:.3f} ± {error:.3f} | | | |", flush=True)
    out = FOLDER / f"{setting}-scores.npy"
    for method in _attribution_ours.METHODS[setting]:
        if only in method:
            seen = in_a_process(HERE / "_attribution_ours.py", [setting, method, str(out)])
            row(method, truth, out, seen)
    for method, package in PEERS[setting].items():
        folder = Path(".bench") / package
        if only not in method:
            continue
        if not folder.exists():
            print(f"| {method} | not installed in {folder} | | | |", flush=True)
            continue
        seen = in_a_process(
            HERE / "_attribution_peers.py", [setting, method, str(out)], path=[str(folder)]
        )
        row(method, truth, out, seen)


def row(method: str, truth: Truth, out: Path, seen: dict[str, Any]) -> None:
    value, error = lds(np.load(out), truth)
    first = f"{seen['cpu_compiling']:.1f}" if "cpu_compiling" in seen else ""
    print(
        f"| {method} | {value:.3f} ± {error:.3f} | {seen['cpu']:.2f} | {first} | {seen['mib']:.0f} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="digits,text,one,labels", help="tables, by comma")
    parser.add_argument("--method", default="", help="only methods with this in their name")
    parser.add_argument("--seeds", type=int, default=20, help="of the digits")
    parser.add_argument("--text-seeds", type=int, default=2, help="of the text (5 minutes each)")
    given = parser.parse_args()
    wanted = given.only.split(",")
    if "digits" in wanted:
        judge("digits", *digits(given.seeds), given.method)
    if "one" in wanted:
        _leave_one_out.main()
    if "labels" in wanted:
        _labels.main()
    if "text" in wanted:
        judge("text", *text(given.text_seeds), given.method)


if __name__ == "__main__":
    main()
