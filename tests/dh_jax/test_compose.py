"""Composition by Hydra, and data configs that touch none of Hydra's global state."""

from __future__ import annotations

import pytest
from hydra.core.global_hydra import GlobalHydra

from dh_jax.compose import compose_run
from dh_jax.config import (
    DataConfig,
    FilesSource,
    HubSource,
    list_configs,
    load_data_config,
    weights_of,
)
from dh_jax.errors import ConfigError


@pytest.mark.parametrize("group", ["model", "mesh", "mixing", "influence", "training"])
def test_every_shipped_config_composes_into_the_typed_run(group: str) -> None:
    for name in list_configs()[group]:
        run = compose_run([f"{group}={name}"])
        assert isinstance(run.data, DataConfig)
    assert not GlobalHydra.instance().is_initialized()


def test_every_shipped_data_config_loads_and_its_weights_sum_to_one() -> None:
    for name in list_configs()["data"]:
        config = load_data_config(name)
        assert abs(sum(weights_of(config.sources).values()) - 1) < 1e-9
        assert all(isinstance(s, HubSource | FilesSource) for s in config.sources.values())


def test_the_older_mixture_has_its_weights() -> None:
    weights = sorted(weights_of(load_data_config("mixed_pretrain").sources).values())
    assert weights == [0.10, 0.15, 0.15, 0.25, 0.35]
    assert load_data_config("fineweb").max_length == 2048
    assert load_data_config("downstream").max_length == 512


def test_mappings_of_the_users_own_names_can_be_replaced_and_extended() -> None:
    run = compose_run(["influence=demo", "influence.targets={prose: 1}"])
    assert run.influence.targets == {"prose": 1}
    run = compose_run(["influence=demo", "influence.targets.prose=0.5"])
    assert run.influence.targets == {"maths": 1.0, "prose": 0.5}


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({}, "has no sources"),
        ({"sources": {"a": {"kind": "fils"}}}, "did you mean 'files'"),
        ({"sources": {"a": {"kind": "files"}}}, "paths is empty"),
        ({"sources": {"a": {"kind": "hub", "path": "x", "weight": -1}}}, "weight -1"),
        (
            {"sources": {"a": {"kind": "hub", "path": "x"}}, "probes": {"p": "b"}},
            "names source 'b'",
        ),
        ({"sources": {"a": {"kind": "hub", "path": "x"}}, "max_length": 1}, "max_length is 1"),
        ({"sources": {"a": {"kind": "hub", "path": "x"}}, "packing": {"windw": 1}}, "'window'"),
    ],
)
def test_wrong_data_configs_name_the_value_and_the_cure(raw: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_data_config(raw)


def test_text_shorthands_replace_the_default_column() -> None:
    def text(value: object) -> object:
        raw = {"sources": {"a": {"kind": "hub", "path": "x", "text": value}}}
        return load_data_config(raw).sources["a"].text

    assert text("content").column == "content"
    assert text(["title", "body"]).columns == ["title", "body"]
    assert text({"template": "{a}"}).column is None
