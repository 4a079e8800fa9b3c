"""Whose score is not finite: the documents of a row, each looked at alone.

Shapes: K queries, B rows, T tokens, S documents of a row.

Documents of a packed row do not meet, but not finite numbers do: attention multiplies the values
of other documents by 0, a backward pass their cotangents, `document_sums` their tokens, and 0 x
NaN is NaN. So one broken document makes the scores of its whole row NaN, and the first of the row
would be blamed. Only where something is wrong, each document is scored once more by itself.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np

from dh_jax.batch import Batch
from dh_jax.distributed.mesh import to_host
from dh_jax.influence.objective import refuse_non_finite


def refuse_scores(
    index: int,
    batch: Batch,
    scores_KBS: jax.Array,
    there_BS: np.ndarray,
    score: Callable[[Batch], jax.Array],
) -> None:
    """Raise where a score is NaN or infinite, naming the document that makes it so.

    Args:
        index: of the batch.
        batch: packed rows.
        scores_KBS: theirs.
        there_BS: documents with something to learn.
        score: ``rows -> scores_KBS``, of any number of rows.

    Raises:
        NotFinite: with the first such document and how many there are.
    """
    fine_KBS = np.isfinite(to_host(scores_KBS))
    if fine_KBS.all():
        return
    bad_BS = ~fine_KBS.all(axis=0) & there_BS
    own_BS = np.zeros(bad_BS.shape)
    for b in np.flatnonzero(bad_BS.any(axis=1)):
        lone_KSS = to_host(score(each_alone(batch, int(b), there_BS.shape[1])))
        total_S = np.diagonal(lone_KSS, axis1=1, axis2=2).sum(axis=0)
        own_BS[b, bad_BS[b]] = total_S[bad_BS[b]]
    refuse_non_finite(index, "score", own_BS)
    refuse_non_finite(index, "score", np.where(fine_KBS.all(axis=0), 0, np.nan))


def each_alone(batch: Batch, row: int, max_segments: int) -> Batch:
    """(S, T) rows: one row once for each of its documents, without the others.

    Their tokens are repeats of the document's first, of no document and learnt by nobody.
    """
    rows: Batch = jax.tree.map(
        lambda x: np.repeat(np.asarray(x)[row : row + 1], max_segments, axis=0), batch
    )
    own_ST = rows.segment_ids_BT == np.arange(1, max_segments + 1)[:, None]
    first_S = own_ST.argmax(axis=1)[:, None]
    return rows._replace(
        tokens_BT=np.where(
            own_ST, rows.tokens_BT, np.take_along_axis(rows.tokens_BT, first_S, axis=1)
        ),
        loss_mask_BT=rows.loss_mask_BT & own_ST,
        segment_ids_BT=np.where(own_ST, rows.segment_ids_BT, 0),
    )
