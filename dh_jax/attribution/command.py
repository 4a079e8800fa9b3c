"""The whole of `dh influence`: score, then write the table, the facts and the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from dh_jax.attribution.config import AttributionConfig
from dh_jax.attribution.findings import find
from dh_jax.attribution.page import write_report
from dh_jax.attribution.price import price_influence, refuse_too_large
from dh_jax.attribution.run import Listener, describe, open_influence, score_documents
from dh_jax.attribution.table import write_table
from dh_jax.data.seeding import derive
from dh_jax.data.stores.shards import write_json

TABLE, FACTS, PAGE = "scores.parquet", "influence.json", "report.html"


def influence(
    config: AttributionConfig, *, listener: Listener = lambda *_: None, command: str | None = None
) -> dict[str, Any]:
    """Run `dh influence`; the same call goes on with a run that was stopped.

    Args:
        config: see `AttributionConfig`; ``out`` is its folder.
        listener: told what is done, for a progress bar.
        command: how a user would start it again, for the report.

    Returns:
        The content of ``influence.json``.

    Raises:
        ConfigError: the config is wrong, or ``memory_limit`` would be exceeded.
        StateError: the folder holds scores of other inputs.
        DataError: data cannot be read, a score is not finite, or a file is damaged.
    """
    if config.memory_limit is not None:
        refuse_too_large(price_influence(config), config.memory_limit)
    opened = open_influence(config)
    folder = Path(opened.config.out)
    done = score_documents(opened, listener)
    facts = describe(opened, done, command) | {"report": str(folder / PAGE)}
    facts["scored"] = write_table(
        folder / TABLE,
        done.store.shards(),
        opened.queries.names,
        opened.sources,
        {key: facts[key] for key in ("model", "coverage", "command")},
    )
    tinted = opened.config.tinted > 0 and opened.estimator.by_token is not None
    what = "measuring the tokens of" if tinted else "reading"
    listener(f"{what} the documents to show", 0, None)
    key = jax.random.key(derive(opened.config.seed, "influence"))
    findings = find(opened, done.store, done.prepared, key)
    facts["documents"] = findings.documents
    write_json(folder / FACTS, facts)
    write_report(folder / PAGE, findings, facts)
    return facts
