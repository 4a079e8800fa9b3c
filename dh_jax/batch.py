"""The noun of the house: a `Batch` of packed rows, and where its rows came from.

Legend of shapes, used in names throughout (``tokens_BT``):

====  ==========================================================
B     rows of a batch (global, or this host's share of it)
T     tokens of a row
S     segments (documents, or pieces of them) a row may hold
K     entries a sparse teacher keeps for each token
V     vocabulary
D, F  width of the model, width of its feed-forward layers
H, K  query heads, key-value heads (attention code only)
N     examples whose gradients are compared
====  ==========================================================
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from typing import Any

    Array = Any  # numpy.ndarray on the host, jax.Array on a device


class TopKLogits(NamedTuple):
    """A teacher's sparse next-token distribution, aligned with ``Batch.targets_BT``."""

    ids_BTK: Array  # int32, vocabulary ids, most probable first
    log_probs_BTK: Array  # float32, natural log of the teacher's probabilities
    log_tail_BT: Array  # float32, log of the probability mass outside the K entries


class Batch(NamedTuple):
    """Packed rows. A NamedTuple, hence a pytree; NumPy from a loader, JAX on a device.

    Targets are already shifted and never cross a document, so no consumer shifts again.
    """

    tokens_BT: Array  # int32; 0 where padded
    targets_BT: Array  # int32; the next token of the same document, 0 where there is none
    loss_mask_BT: Array  # bool; True where targets_BT is to be learnt
    segment_ids_BT: Array  # int32; 1, 2, ... along the row, 0 = padding
    positions_BT: Array  # int32; from 0 in every segment, also where a document was split
    source_ids_B: Array  # int32; index into the loader's source names
    teacher: TopKLogits | None = None


class Origins(NamedTuple):
    """Which documents a batch's segments are: kept on the host, since ids need 64 bits.

    Entry ``[b, s]`` describes segment ``s + 1`` of row ``b``; lengths are 0 past the last one.
    """

    document_ids_BS: Array  # uint64, content hash of the document's text
    offsets_BS: Array  # int64, where in its document (in tokens) the piece begins
    lengths_BS: Array  # int32, tokens of the piece

    def documents(self, row: int) -> list[str]:
        """Names of a row's documents in their order, 16 hexadecimal digits as `dh show` takes."""
        pieces = zip(self.document_ids_BS[row], self.lengths_BS[row], strict=True)
        return [f"{int(document):016x}" for document, length in pieces if length > 0]


def checksum(batch: Batch) -> str:
    """64 bits of BLAKE2b, in hex, over what a step learns from a NumPy batch: its tokens, its
    targets and which of them are learnt. By it a replayed batch is known to be the same."""
    digest = hashlib.blake2b(digest_size=8)
    for array in (batch.tokens_BT, batch.targets_BT, batch.loss_mask_BT):
        digest.update(array.tobytes())
    return digest.hexdigest()
