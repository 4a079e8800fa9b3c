"""Looking for mixture weights before a run: many small ones first (`find_weights`)."""

from __future__ import annotations

from dh_jax.search.config import SearchConfig, SearchRunConfig
from dh_jax.search.find import Finding, find_weights
from dh_jax.search.page import plan_of, write_search_report

__all__ = [
    "Finding",
    "SearchConfig",
    "SearchRunConfig",
    "find_weights",
    "plan_of",
    "write_search_report",
]
