"""Composing a run from config groups and overrides with Hydra, for the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dh_jax.attribution.config import AttributionConfig
from dh_jax.config import (
    ConfigError,
    RunConfig,
    TorchRunConfig,
    config_folder,
    explain,
    list_configs,
    public_run,
    suggest,
    validate_data,
)
from dh_jax.search.config import SearchRunConfig

AnyRun = TypeVar("AnyRun", RunConfig, TorchRunConfig, AttributionConfig, SearchRunConfig)


def compose_run(overrides: Sequence[str] = ()) -> RunConfig:
    """The run of `dh train`; see `compose`."""
    return compose("train", RunConfig, overrides)


def compose_search(overrides: Sequence[str] = ()) -> SearchRunConfig:
    """The search of `dh mix`; see `compose`."""
    return compose("mix", SearchRunConfig, overrides)


def compose(root: str, schema: type[AnyRun], overrides: Sequence[str] = ()) -> AnyRun:
    """The run that ``configs/{root}.yaml`` and the overrides describe, typed and checked.

    Args:
        root: ``train`` (JAX), ``torch_train`` (the bridge's reference trainer) or ``mix``.
        schema: what it must fit.
        overrides: in Hydra's grammar, e.g. ``["data=demo", "training.steps=100"]``. A group also
            takes a file of one's own: ``data=my/mixture.yaml``.

    Raises:
        ConfigError: a group, key or value is wrong; one line with the nearest known name.
    """
    ConfigStore.instance().store(name=f"{root}_schema", node=schema)
    whole = [x for x in overrides if x.partition("=")[0] in OPEN]
    others = [_opened(_own_file(x)) for x in overrides if x not in whole]
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(config_folder())):
            composed = hydra_compose(root, overrides=others)
        for override in OverridesParser.create().parse_overrides(whole):
            OmegaConf.update(composed, override.key_or_group, override.value(), merge=False)
        run = OmegaConf.to_object(composed)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_one_line(error, schema)) from error
    assert isinstance(run, schema)
    run.data = validate_data(run.data)
    return run


# Mappings whose keys are the user's own names. Hydra would refuse a new name as a misspelling,
# and would merge `influence.targets={a: 1}` into the targets of a YAML file; here it replaces them.
OPEN = (
    "data.sources", "data.probes", "influence.targets", "estimator.arguments",
    "mixing.bounds", "mixing.sizes", "mixing.reference",
)  # fmt: skip


def _opened(override: str) -> str:
    """``++``, which adds or changes, for a key inside an open mapping."""
    inside = any(override.startswith(f"{mapping}.") for mapping in OPEN)
    return f"++{override}" if inside else override


def _own_file(override: str) -> str:
    """Make ``group=path.yaml`` a config that Hydra knows by name."""
    group, _, path = override.partition("=")
    if not path.endswith((".yaml", ".yml")) or group not in list_configs():
        return override
    if not Path(path).is_file():
        raise ConfigError(f"{override}: no such file; shipped: {', '.join(list_configs()[group])}")
    name = f"own_{Path(path).stem}"
    ConfigStore.instance().store(group=group, name=name, node=OmegaConf.load(path))
    return f"{group}={name}"


def _one_line(error: Exception, schema: type) -> str:
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        known = list_configs().get(group, [])
        return (
            f"no {group} config {name!r}{suggest(name, known)}; shipped: {', '.join(known)} "
            "(`dh configs` lists all)"
        )
    cause = error.__cause__
    if isinstance(cause, OmegaConfBaseException):
        return explain(cause, schema, "config")
    if isinstance(error, OmegaConfBaseException):
        return explain(error, schema, "config")
    return " ".join(str(error).split())


# --- showing -----------------------------------------------------------------------------------

# Groups that only other commands than `dh train` read.
OTHER_ROOTS: dict[str, tuple[str, type[Any]]] = {
    "estimator": ("attribution", AttributionConfig),
    "queries": ("attribution", AttributionConfig),
    "search": ("mix", SearchRunConfig),
    "distributed": ("torch_train", TorchRunConfig),
}


def show(overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The composed config: of the groups that the overrides choose, or whole if they choose none.

    Options of file systems, which may hold secrets, are left out.

    Raises:
        ConfigError: as `compose`.
    """
    keys = [override.partition("=")[0].lstrip("+~") for override in overrides]
    groups = [key.partition(".")[0] for key in keys]
    root, schema = next((OTHER_ROOTS[g] for g in groups if g in OTHER_ROOTS), ("train", RunConfig))
    whole = public_run(compose(root, schema, overrides))
    chosen = [key for key in keys if key in list_configs() and key in whole]
    return {key: whole[key] for key in chosen} if chosen else whole


def as_yaml(config: dict[str, Any]) -> str:
    """A shown config as it would stand in a file."""
    return OmegaConf.to_yaml(OmegaConf.create(config))
