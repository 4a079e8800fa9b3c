"""How fast influence is, beside torch libraries with the same weights and data.

    python -m benchmarks.influence [--rounds 3] [--repeats 5] [--only products,ekfac,datainf]

Every contender runs in a process of its own, on one core and one thread; ours and theirs take
turns, and figures are medians over rounds. CPU-seconds are without imports and compilation,
memory is what came on top of the imports. Libraries are looked for in ``.bench/dattri``,
``curvlinops`` and ``kronfluence``; one that is not there is said to be missing.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import numpy as np
from benchmarks import _influence_setting as setting
from benchmarks._measure import in_a_process

HERE = Path(__file__).resolve().parent
Figures = dict[str, float]

# What is measured: ours, then theirs and the folder of their package.
PRODUCTS = {
    "hessian": {
        "torch double backward": "",
        "dattri hvp, rev-rev": "dattri",
        "dattri hvp, rev-fwd": "dattri",
        "dattri hvp_at_x, rev-rev": "dattri",
    },
    "gauss-newton": {"curvlinops GGN": "curvlinops"},
}


def ours(task: str, repeats: int) -> Figures:
    found: Figures = in_a_process(HERE / "_influence_ours.py", [task, str(repeats)])
    return found


def theirs(task: str, package: str, repeats: int) -> Figures | None:
    folder = Path(".bench") / package
    if not folder.exists():
        return None
    path = [str(folder)] if package else []
    found: Figures = in_a_process(HERE / "_influence_peers.py", [task, str(repeats)], path=path)
    return found


def median(figures: list[Figures], name: str) -> float:
    return statistics.median(x[name] for x in figures)


def products(rounds: int, repeats: int) -> None:
    """Rows of one table: a product with one vector over 8 rows of 64 tokens."""
    print("\n| product | CPU ms | ours is faster by | MiB |\n| --- | ---: | ---: | ---: |")
    for task, peers in PRODUCTS.items():
        mine: list[Figures] = []
        found: dict[str, list[Figures]] = {name: [] for name in peers}
        for _ in range(rounds):
            mine.append(ours(task, repeats))
            for name, package in peers.items():
                if (seen := theirs(name, package, repeats)) is not None:
                    found[name].append(seen)
        line(f"ours, {task}", mine, "product", 0.0)
        for name, figures in found.items():
            if figures:
                line(name, figures, "product", median(mine, "product"))
            else:
                print(f"| {name} | not installed in .bench/{peers[name]} | | |")


def line(name: str, figures: list[Figures], key: str, base: float) -> None:
    value = median(figures, key)
    ratio = f"{value / base:.2f}x" if base else ""
    print(f"| {name} | {value * 1e3:.1f} | {ratio} | {median(figures, 'mib'):.0f} |", flush=True)


def ek_fac(rounds: int, repeats: int) -> None:
    """Factors and scores in CPU-seconds, and in passes of each framework itself."""
    mine = [ours("ekfac", repeats) for _ in range(rounds)]
    seen = [theirs("kronfluence", "kronfluence", repeats) for _ in range(rounds)]
    peers = [x for x in seen if x is not None]
    print("\n| EK-FAC | pass, s | factors, s | in passes | scores, s | in passes | MiB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, figures in (("ours", mine), ("kronfluence", peers)):
        if not figures:
            print(f"| {name} | not installed in .bench/kronfluence | | | | | |")
            continue
        one, factors, scores = (median(figures, key) for key in ("pass", "factors", "scores"))
        print(
            f"| {name} | {one:.2f} | {factors:.2f} | {factors / one:.2f} | {scores:.2f} | "
            f"{scores / one:.2f} | {median(figures, 'mib'):.0f} |",
            flush=True,
        )


def data_inf(rounds: int, repeats: int) -> None:
    print("\n| DataInf, 16 queries x 256 documents | CPU ms | ours is faster by | MiB |")
    print("| --- | ---: | ---: | ---: |")
    mine = [ours("datainf", repeats) for _ in range(rounds)]
    loop = [x for x in (theirs("literal loop", "", 1) for _ in range(rounds)) if x is not None]
    line("ours, from gradients", mine, "scores", 0.0)
    line("ours, from weights", mine, "all", 0.0)
    line("the formula by a loop, from gradients", loop, "scores", median(mine, "scores"))
    difference = float(np.load(setting.FOLDER / "datainf-difference.npy"))
    print(f"\nBoth in float32; relative difference of all scores {difference:.1e}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="products,ekfac,datainf", help="tables, by comma")
    given = parser.parse_args()
    setting.write()
    wanted = given.only.split(",")
    if "products" in wanted:
        products(given.rounds, given.repeats)
    if "datainf" in wanted:
        data_inf(given.rounds, given.repeats)
    if "ekfac" in wanted:
        ek_fac(1, 2)


if __name__ == "__main__":
    main()
