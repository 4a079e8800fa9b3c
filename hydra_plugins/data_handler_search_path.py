"""Adds our configs to the search path of every Hydra application in the environment.

So another application composes them by name: ``app.py data=mixed_pretrain``. Hydra finds this
module because it lies in the namespace package ``hydra_plugins``, which therefore must never
get an ``__init__.py``. Every Hydra application imports it, so it stays light.
"""

from __future__ import annotations

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

from dh_jax.config import config_folder


class DataHandlerSearchPath(SearchPathPlugin):
    """Appends the shipped configs, so the application's own of the same name win."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append(provider="data-handler", path=f"file://{config_folder()}")
