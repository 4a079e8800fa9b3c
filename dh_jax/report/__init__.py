"""A run, or several, as one self-contained HTML page (`write_report`)."""

from __future__ import annotations

from dh_jax.report.finding import summarise
from dh_jax.report.page import write_report
from dh_jax.report.runs import Run, find_runs, load_run
from dh_jax.report.statistics import Summary

__all__ = ["Run", "Summary", "find_runs", "load_run", "summarise", "write_report"]
