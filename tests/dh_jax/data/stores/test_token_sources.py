"""Megatron's and MosaicML's token files, written here by their published layouts.

Independent of the reader: literal `struct` calls, one document after another. (The MDS reader was
also held against files of mosaicml-streaming's own writer; see docs/decisions.md.)
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from dh_jax.config import MdsSource, MegatronSource, SplitConfig, source_config
from dh_jax.data.sources import split_of
from dh_jax.data.store import StoredDocuments
from dh_jax.data.stores.token_sources import open_token_source
from dh_jax.errors import ConfigError, DataError

SPLITS = SplitConfig(probe=0.3, eval=0.3)
CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}


def some_documents(count: int = 40, high: int = 120) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, high, rng.integers(1, 400)).tolist() for _ in range(count)]


def tokens_of(documents: StoredDocuments) -> list[list[int]]:
    places = zip(documents.shards_D, documents.starts_D, documents.lengths_D, strict=True)
    return [documents.shards[k].tokens[s : s + n].tolist() for k, s, n in places]


# --- Megatron --------------------------------------------------------------------------------


def write_megatron(
    base: Path, documents: list[list[int]], dtype: str, *, legacy: bool = False, cut: int = 10**9
) -> None:
    """A pair of files; documents longer than ``cut`` are written as several sequences."""
    sequences, bounds = [], [0]
    for document in documents:
        sequences += [document[i : i + cut] for i in range(0, len(document), cut)]
        bounds.append(len(sequences))
    item = np.dtype(dtype).itemsize
    with open(f"{base}.bin", "wb") as data, open(f"{base}.idx", "wb") as index:
        for sequence in sequences:
            data.write(np.array(sequence, dtype).tobytes())
        starts = [0]
        for sequence in sequences:
            starts.append(starts[-1] + len(sequence))
        lengths, n = [len(s) for s in sequences], len(sequences)
        if legacy:
            index.write(b"TNTIDX\x00\x00" + struct.pack("<QQQ", 1, CODES[dtype], item))
            index.write(struct.pack("<QQQ", n, n, len(bounds)))
            index.write(struct.pack(f"<{n + 1}q", *range(n + 1)))
            index.write(struct.pack(f"<{n + 1}q", *starts))
            index.write(struct.pack(f"<{n}q", *lengths))
        else:
            index.write(b"MMIDIDX\x00\x00" + struct.pack("<QB", 1, CODES[dtype]))
            index.write(struct.pack("<QQ", n, len(bounds)))
            index.write(struct.pack(f"<{n}i", *lengths))
            index.write(struct.pack(f"<{n}q", *(s * item for s in starts[:-1])))
        index.write(struct.pack(f"<{len(bounds)}q", *bounds))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("dtype", CODES)
def test_megatron_files_of_both_indices_and_every_type(
    tmp_path: Path, dtype: str, legacy: bool
) -> None:
    documents = some_documents()
    write_megatron(tmp_path / "a", documents, dtype, legacy=legacy, cut=50)
    for path in (tmp_path / "a", tmp_path / "a.bin", tmp_path / "a.idx"):
        opened = open_token_source(MegatronSource(path=str(path)), None, SPLITS)
        assert tokens_of(opened) == documents
        assert opened.shards[0].tokens.dtype == dtype
        assert len(set(opened.ids_D.tolist())) == len(documents)


def test_splits_follow_the_rule_of_texts_and_equal_content_shares_one(tmp_path: Path) -> None:
    documents = some_documents(300)
    write_megatron(tmp_path / "a", documents * 2, "uint16")
    for ids in ("position", "content"):
        spec = MegatronSource(path=str(tmp_path / "a"), ids=ids)
        parts = {s: open_token_source(spec, s, SPLITS) for s in ("train", "probe", "eval")}
        everything = [tuple(t) for part in parts.values() for t in tokens_of(part)]
        assert sorted(everything) == sorted(tuple(d) for d in documents * 2)
        for split, part in parts.items():
            assert {split_of(i, SPLITS) for i in part.ids_D.tolist()} == {split}
            assert 0.1 < part.ids_D.size / 600 < 0.6
        sets = [set(map(tuple, tokens_of(part))) for part in parts.values()]
        shared = sets[0] & sets[1] | sets[0] & sets[2] | sets[1] & sets[2]
        assert (shared == set()) == (ids == "content")
    limited = MegatronSource(path=str(tmp_path / "a"), max_documents=7)
    assert tokens_of(open_token_source(limited, None, SPLITS)) == documents[:7]


def test_damaged_megatron_files_are_one_line_with_the_cure(tmp_path: Path) -> None:
    base = tmp_path / "a"
    spec = MegatronSource(path=str(base))
    with pytest.raises(DataError, match=r"a\.idx cannot be mapped.*restore it"):
        open_token_source(spec, None, SPLITS)
    write_megatron(base, some_documents(), "int32")
    index, data = Path(f"{base}.idx").read_bytes(), Path(f"{base}.bin").read_bytes()
    Path(f"{base}.bin").write_bytes(data[:-4])
    with pytest.raises(DataError, match=r"a\.bin is cut short: \d+ tokens of \d+"):
        open_token_source(spec, None, SPLITS)
    Path(f"{base}.bin").write_bytes(data)
    swapped = bytearray(index)
    swapped[35] += 1  # the first sequence's length
    float_type = index[:17] + bytes([7]) + index[18:]
    for wrong in (index[:-9], index[:20], b"x" * 99, float_type, bytes(swapped)):
        Path(f"{base}.idx").write_bytes(wrong)
        with pytest.raises(DataError, match=r"a\.idx") as caught:
            open_token_source(spec, None, SPLITS)
        assert "\n" not in str(caught.value)


# --- MDS -------------------------------------------------------------------------------------


def write_mds(
    folder: Path, samples: list[dict[str, bytes]], encodings: dict[str, str], *, zstd: bool = False
) -> None:
    """Shards of 15 samples; ``samples`` hold encoded columns."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for k in range(0, len(samples), 15):
        bodies = []
        for sample in samples[k : k + 15]:
            sizes = b"".join(struct.pack("<I", len(sample[c])) for c in encodings)
            bodies.append(sizes + b"".join(sample[c] for c in encodings))
        config = json.dumps({"column_names": list(encodings)}).encode()
        at, offsets = 4 + 4 * (len(bodies) + 1) + len(config), []
        for body in bodies:
            offsets.append(at)
            at += len(body)
        offsets.append(at)
        raw = struct.pack(f"<{len(bodies) + 2}I", len(bodies), *offsets) + config + b"".join(bodies)
        name = f"shard.{k // 15:05}.mds"
        entry: dict[str, Any] = {
            "column_encodings": list(encodings.values()),
            "column_names": list(encodings),
            "column_sizes": [None] * len(encodings),
            "compression": "zstd" if zstd else None,
            "format": "mds",
            "hashes": [],
            "raw_data": {"basename": name, "bytes": len(raw), "hashes": {}},
            "samples": len(bodies),
            "size_limit": 1 << 26,
            "version": 2,
            "zip_data": None,
        }
        if zstd:
            raw = zstandard.compress(raw)
            name += ".zstd"
            entry["zip_data"] = {"basename": name, "bytes": len(raw), "hashes": {}}
        (folder / name).write_bytes(raw)
        shards.append(entry)
    (folder / "index.json").write_text(json.dumps({"shards": shards, "version": 2}))


def test_mds_shards_of_tokens_of_several_sizes_are_refused(tmp_path: Path) -> None:
    """Compiled code reads all shards by one width. Two shards, of 15 samples each."""
    documents = some_documents(30)
    for types in (["uint16"] * 2, ["uint16", "int64"], ["int64", "uint16"]):
        arrays = [{"tokens": as_array(d, types[i // 15], True)} for i, d in enumerate(documents)]
        write_mds(tmp_path / "m", arrays, {"tokens": "ndarray"})
        spec = MdsSource(path=str(tmp_path / "m"))
        if len(set(types)) == 1:
            assert tokens_of(open_token_source(spec, None, SPLITS)) == documents
            continue
        said = rf"shard\.00001\.mds holds tokens of {types[1]}, the shards before it of {types[0]}"
        with pytest.raises(DataError, match=said):
            open_token_source(spec, None, SPLITS)


def as_array(tokens: list[int], dtype: str, with_type: bool) -> bytes:
    """One dimension: the type's code if the column leaves it open, shape, values."""
    code = {"uint16": 16, "int32": 33, "int64": 65}[dtype]
    width = 0 if len(tokens) < 256 else 1
    shape = bytes([1 << 2 | width]) + len(tokens).to_bytes(1 << width, "little")
    return bytes([code] * with_type) + shape + np.array(tokens, dtype).tobytes()


@pytest.mark.parametrize("zstd", [False, True])
def test_mds_shards_of_bytes(tmp_path: Path, zstd: bool) -> None:
    documents = some_documents(high=60_000)
    samples = [{"tokens": np.array(d, "uint16").tobytes()} for d in documents]
    write_mds(tmp_path / "m", samples, {"tokens": "bytes"}, zstd=zstd)
    spec = MdsSource(path=str(tmp_path / "m"), dtype="uint16")
    if zstd:
        with pytest.raises(ConfigError, match="is compressed; set cache"):
            open_token_source(spec, None, SPLITS)
        spec.cache = str(tmp_path / "cache")
    for _ in range(2):
        assert tokens_of(open_token_source(spec, None, SPLITS)) == documents


@pytest.mark.parametrize("dtype", ["uint16", "int32", "int64"])
@pytest.mark.parametrize("with_type", [False, True])
def test_mds_shards_of_arrays_among_other_columns(
    tmp_path: Path, dtype: str, with_type: bool
) -> None:
    documents = some_documents()
    samples = [
        {"id": b"x" * (i % 5), "input_ids": as_array(d, dtype, with_type), "z": b"after"}
        for i, d in enumerate(documents)
    ]
    encoding = "ndarray" if with_type else f"ndarray:{dtype}"
    write_mds(tmp_path, samples, {"id": "str", "input_ids": encoding, "z": "str"})
    opened = open_token_source(MdsSource(path=str(tmp_path)), None, SPLITS)
    assert tokens_of(opened) == documents
    assert all(shard.tokens.dtype == dtype for shard in opened.shards)


@given(st.lists(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=9), min_size=1))
def test_any_documents_survive_both_formats(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]]
) -> None:
    folder = tmp_path_factory.mktemp("tokens")
    write_megatron(folder / "a", documents, "int32", cut=3)
    write_mds(folder, [{"tokens": as_array(d, "int32", True)} for d in documents],
              {"tokens": "ndarray"})  # fmt: skip
    for spec in (MegatronSource(path=str(folder / "a")), MdsSource(path=str(folder))):
        assert tokens_of(open_token_source(spec, None, SPLITS)) == documents


def test_damaged_mds_shards_and_wrong_specs_are_one_line_with_the_cure(tmp_path: Path) -> None:
    samples = [{"tokens": np.array(d, "uint16").tobytes()} for d in some_documents()]
    write_mds(tmp_path, samples, {"tokens": "bytes"})

    def refused(kind: type[Exception], match: str, **options: Any) -> None:
        with pytest.raises(kind, match=match) as caught:
            open_token_source(MdsSource(path=str(tmp_path), **options), None, SPLITS)
        assert "\n" not in str(caught.value)

    refused(ConfigError, "dtype None; set dtype to one of")
    refused(ConfigError, "does not hold whole tokens of int64", dtype="int64")
    refused(ConfigError, "no column 'text'.*with tokens", column="text", dtype="uint16")
    shard = tmp_path / "shard.00001.mds"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    refused(DataError, r"shard\.00001\.mds is damaged .it ends at byte", dtype="uint16")
    shard.write_bytes(struct.pack("<I", 3) + whole[4:])
    refused(DataError, "3 samples, its index says 15", dtype="uint16")
    shard.unlink()
    refused(DataError, r"shard\.00001\.mds cannot be mapped", dtype="uint16")
    write_mds(tmp_path / "z", samples, {"tokens": "bytes"}, zstd=True)
    packed = tmp_path / "z" / "shard.00000.mds.zstd"
    packed.write_bytes(packed.read_bytes()[:-20])
    spec = MdsSource(path=str(tmp_path / "z"), dtype="uint16", cache=str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"shard\.00000\.mds is damaged"):
        open_token_source(spec, None, SPLITS)
    assert list((tmp_path / "cache").iterdir()) == []  # nothing half-written
    (tmp_path / "index.json").unlink()
    refused(DataError, "no index of MDS shards")


def test_specs_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"ids is 'contents'.*did you mean 'content'"):
        source_config("s", {"kind": "megatron", "path": "x", "ids": "contents"})
    with pytest.raises(ConfigError, match="path is empty"):
        source_config("s", {"kind": "mds"})
    spec = source_config("s", {"kind": "megatron", "path": "x", "split": "train"})
    with pytest.raises(ConfigError, match="is all train"):
        open_token_source(spec, "probe", SPLITS)
