"""Who stays and in which split, against the plain rules written down once more."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dh_jax.config import SPLITS, SplitConfig
from dh_jax.data.preparing.deduplicate import (
    HASH,
    REASONS,
    STAYS,
    drop_exact,
    drop_near,
    role_code,
    splits_of,
)
from dh_jax.data.sources import split_of

ids = st.integers(0, 2**64 - 1)
fractions = st.sampled_from([0.0, 0.01, 0.1, 0.25, 0.49])
configs = st.builds(SplitConfig, fractions, fractions)
roles = st.sampled_from([0, 1, 2, HASH])
few_ids = st.sampled_from([3, 2**60, 2**61 + 5, 2**63, 2**64 - 1])


def arrays(documents: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    return (
        np.array([i for i, _ in documents], np.uint64),
        np.array([role for _, role in documents], np.int8),
    )


@given(st.lists(st.tuples(ids, roles)), configs)
def test_splits_are_those_of_single_documents(
    documents: list[tuple[int, int]], splits: SplitConfig
) -> None:
    found = splits_of(*arrays(documents), splits)
    names = [*SPLITS, "hash"]
    assert [SPLITS[code] for code in found] == [
        split_of(i, splits, names[role]) for i, role in documents
    ]
    assert [role_code(name) for name in names] == [0, 1, 2, HASH]


@given(st.lists(st.tuples(few_ids, roles)), configs)
def test_the_first_of_equal_documents_stays(
    documents: list[tuple[int, int]], splits: SplitConfig
) -> None:
    verdict, first = drop_exact(*arrays(documents), splits)
    seen: dict[int, tuple[int, int]] = {}
    for at, (identity, _) in enumerate(documents):
        split = int(verdict.splits_D[at])
        before, place = seen.setdefault(identity, (split, at))
        expected = "" if place == at else "duplicate" if before == split else "held_out"
        assert REASONS[verdict.reasons_D[at]] == expected and first[at] == place


@given(
    st.lists(st.tuples(ids, roles, st.integers(0, 3)), max_size=12, unique_by=lambda d: d[0]),
    configs,
    st.sampled_from(["drop", "together"]),
    st.randoms(use_true_random=False),
)
def test_no_cluster_is_in_training_and_held_out(
    documents: list[tuple[int, int, int]], splits: SplitConfig, action: str, rng: object
) -> None:
    identities, role = arrays([(i, r) for i, r, _ in documents])
    clusters = np.array([c for _, _, c in documents], np.int64)
    before, _ = drop_exact(identities, role, splits)
    after = drop_near(before, identities, role, clusters, splits, action)
    stays = after.reasons_D == STAYS
    fixed = (role == SPLITS.index("probe")) | (role == SPLITS.index("eval"))
    assert stays[fixed].all()  # sets held out whole are never thinned
    assert (after.splits_D[role != HASH] == role[role != HASH]).all()
    for cluster in set(clusters.tolist()):
        inside = stays & (clusters == cluster)
        assert inside.any()
        found = {SPLITS[code] for code in after.splits_D[inside]}
        if not fixed[inside].any():
            assert len(found) == 1 and (action == "together" or inside.sum() == 1)
        else:
            assert "train" not in found
    if action == "together":  # whatever the order of documents
        order = np.array(rng.sample(range(len(documents)), len(documents)), np.int64)  # type: ignore[attr-defined]
        other, _ = drop_exact(identities[order], role[order], splits)
        shuffled = drop_near(other, identities[order], role[order], clusters[order], splits, action)
        np.testing.assert_array_equal(shuffled.splits_D, after.splits_D[order])
        np.testing.assert_array_equal(shuffled.reasons_D, after.reasons_D[order])
