"""Does steering pay over a longer run? The demo's nine runs, five times as long.

``python -m benchmarks.steering`` (about 40 minutes on two cores) prints the finding and a table,
and leaves the report at ``.bench/steering/report.html``. Interrupted, it goes on where it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dh_jax.demo.study import run_demo, study_jobs
from dh_jax.report import load_run, summarise

FOLDER = Path(".bench") / "steering"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=420)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    run_demo(FOLDER, steps=options.steps, seeds=options.seeds)
    jobs = study_jobs(FOLDER, steps=options.steps, seeds=options.seeds)
    summary = summarise([load_run(job.out) for job in jobs])
    print(f"\n{summary.headline}\n")
    for sentence in summary.sentences:
        print(f"- {sentence}")
    print("\n| policy | " + " | ".join(summary.domains) + " | overhead |")
    print("| --- |" + " ---: |" * (len(summary.domains) + 1))
    for policy in summary.policies:
        losses = [f"{summary.final[policy][d].loss.mean:.3f}" for d in summary.domains]
        print(f"| {policy} | {' | '.join(losses)} | {summary.clock[policy].overhead:.1%} |")


if __name__ == "__main__":
    main()
