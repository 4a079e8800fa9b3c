"""The real decoder by taps: packed rows, scanned and rematerialised layers, in both precisions."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import pytest

from dh_jax.influence import per_document as doors
from dh_jax.influence.objective import Objective, Scope
from dh_jax.influence.taps import complete_layers
from dh_jax.models import decoder, tapped
from tests.dh_jax.influence.test_per_document import (
    CONFIG,
    KEY,
    TOLERANCE,
    S,
    T,
    lone_gradients,
    real_decoder,
    relative_error,
    rows,
)

LAYOUTS = {
    "plain": {},
    "scanned": {"scan_layers": True, "remat": "nothing_saveable"},
}


@pytest.mark.parametrize("layout", [pytest.param("plain", marks=pytest.mark.slow), "scanned"])
@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "float64"])
def test_tapped_gradients_of_packed_documents_are_those_of_lone_ones(layout, dtype, monkeypatch):
    config = dataclasses.replace(CONFIG, tied=False, **LAYOUTS[layout])
    with real_decoder(config, dtype, monkeypatch) as (graph, params):
        loss = decoder.loss_fn(graph)
        objective = Objective(
            loss,
            decoder.logits_fn(graph),
            tapped=tapped.tapped_loss_fn(graph),
            layers=tapped.tapped_layers(graph, params),
            zero_taps=partial(tapped.zero_taps, graph),
        )
        documents, batch = rows(1)
        door = doors.tapped(objective, Scope(max_segments=S, dtype=dtype, chunk=2))
        got = jax.jit(door.gradients)(params, batch, KEY)
        want = lone_gradients(loss, params, documents, T)
        assert set(want) - set(got) == {"head/kernel"}
        assert relative_error(got, want) < TOLERANCE[dtype]
        if dtype == "float32":
            kept, wrong = complete_layers(objective, params, batch, KEY)
            assert kept == objective.layers and wrong == {}
