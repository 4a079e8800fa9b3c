"""SFTDataset: one source of conversations -> packed rows whose masks are the answers."""

from __future__ import annotations

from typing import Any

from dh_jax.config import DataConfig, SourceConfig
from dh_jax.data.datasets.pretrain import PretrainDataset
from dh_jax.errors import ConfigError


class SFTDataset(PretrainDataset):
    """Rows of T tokens of one source of conversations; a Grain data set like any other.

    Conversations are rendered by the tokenizer's chat template, and of each row exactly the
    assistant's tokens are learnt (`encoding.conversation_encoder`). All else, the arguments
    included, is as in `PretrainDataset`.

    Raises:
        ConfigError: the source's records are not conversations.
    """

    def __init__(self, name: str, spec: SourceConfig, config: DataConfig, **options: Any):
        if spec.text.conversation is None:
            raise ConfigError(
                f"source {name!r} holds plain text; say that its records are conversations, for "
                "example text: {conversation: messages}, or take PretrainDataset"
            )
        super().__init__(name, spec, config, **options)
