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
# # Influence: what helped, and does it?
#
# A model has been trained on six kinds of text. Which of its documents made it better at
# mathematics? Influence answers without training again: it asks how the loss on a probe would
# change if a document counted a little more. Here you will train a small model, score some
# hundred documents for three probes, read those at both ends, and then put the answer to the test.

# %%
import os
import shutil
import tempfile
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import dh_jax
import dh_jax.viz as viz
from dh_jax.demo.study import build_data

os.chdir("..")  # the repository, where `make demo` leaves its folder too
build_data(Path(os.environ.get("DH_DEMO", ".demo")), Console(quiet=True))
folder = Path(tempfile.mkdtemp())

# %% [markdown]
# ## A model
#
# The same call as `dh train data=demo model=tiny training.steps=80`: 1.1 million parameters, on a
# laptop half a minute.

# %%
from dh_jax.compose import compose, compose_run
from dh_jax.train import train

records = []
facts = train(
    compose_run(["data=demo", "model=tiny", "training.steps=80", "training.batch_size=8",
                 "training.eval_interval=20", "training.eval_rows=16", f"out={folder}/run"]),
    listeners=(records.append,),
)
evals = [r for r in records if r["kind"] == "eval"]
tokens = [r["step"] * 8 * 256.0 for r in evals]
viz.loss_by_source({"held-out loss": {
    name: (tokens, [r["domains"][name]["loss"] for r in evals]) for name in evals[0]["domains"]
}})

# %% [markdown]
# ## Scores
#
# EK-FAC fits the curvature of the loss, layer by layer, and every document of the training split
# is then scored by one pass. This is what `dh influence` does; here its parts are called one by
# one. Each probe is one query: the mean over some of its held-out documents.

# %%
from dh_jax.attribution.config import AttributionConfig
from dh_jax.attribution.findings import find
from dh_jax.attribution.run import open_influence, score_documents
from dh_jax.influence.estimator import CoverageWarning

probes = ["maths", "docs", "cpp"]
config = compose("attribution", AttributionConfig, [
    "data=demo", f"run={folder}/run", "estimator=ekfac", "estimator.fit_documents=64",
    f"queries.probes=[{','.join(probes)}]", "documents=256", "top=6", "tinted=1",
    "estimator.chunk=8", f"out={folder}/influence",
])
warnings.simplefilter("ignore", CoverageWarning)  # we look at the coverage ourselves, below
opened = open_influence(config)
done = score_documents(opened)
findings = find(opened, done.store, done.prepared, jax.random.key(0))
print(f"{findings.pieces} pieces of {findings.documents} documents scored in "
      f"{findings.seconds:.0f} s, {1000 * findings.pace:.0f} ms a piece")
print(f"{opened.estimator.coverage(opened.model.params):.0%} of the parameters are measured: the "
      "table of tokens is the head as well, and is left out")

# %% [markdown]
# ## Sources
#
# The mean over each source's documents, for each probe. Blue helps, orange harms. What is alike
# should help: look at the diagonal, and for what helps beside it.

# %%
mean_KM = findings.statistics.mean_KM[[findings.queries.index(p) for p in probes]]
order = [findings.sources.index(name) for name in findings.sources]
viz.influence_matrix(mean_KM.T[order], findings.sources, probes)

# %% [markdown]
# Means hide how much documents differ. For mathematics, both ends of the list:

# %%
section = next(s for s in findings.sections if s.query == "maths")
text_of = {d.document: "".join(p.text for p in d.pieces)
           for d in (*section.helpful, *section.harmful)}
viz.top_documents([viz.RankedDocument(d.source, text_of[d.document], d.helpfulness)
                   for d in (*section.helpful, *section.harmful)], sources=findings.sources)

# %% [markdown]
# ## Reading them
#
# A list of scores is worth little unread. The first document of each list is tinted: blue tokens
# help and orange ones harm, and together they make the document's score.

# %%
section._replace(helpful=section.helpful[:4], harmful=section.harmful[:4])

# %% [markdown]
# ## Does it hold?
#
# The score is a prediction: a step of training on helpful documents should lower the loss on the
# probe, a step on harmful ones should lower it less, or raise it. So take the best and the worst
# eighth of the documents for mathematics, go twelve steps from the trained model on each, and
# judge on mathematics that neither the training nor the scoring has seen.

# %%
import optax

from dh_jax.functions import masked_mean

model, rows = opened.model, opened.rows
helpful_N, batches = [], []
for index, batch in enumerate(rows):
    shard = done.store.read(index)
    helpful_N.append(-np.asarray(shard.scores_KN)[probes.index("maths")])
    batches.append((batch, shard.columns["row"], shard.columns["segment"]))
everything = np.concatenate(helpful_N)
low, high = np.quantile(everything, [1 / 8, 7 / 8])


def take(batch, rows):
    return jax.tree.map(lambda x: x[rows], batch)


def chosen(keep):
    """Rows in which only the documents are learnt whose helpfulness `keep` accepts."""
    found = []
    for values, (batch, row, segment) in zip(helpful_N, batches):
        mask = np.zeros_like(batch.loss_mask_BT)
        for r, s in zip(row[keep(values)], segment[keep(values)]):
            mask[r] |= batch.loss_mask_BT[r] & (batch.segment_ids_BT[r] == s)
        found.append(take(batch._replace(loss_mask_BT=mask), mask.any(axis=1)))
    return jax.tree.map(lambda *x: jnp.concatenate(x), *found)


groups = {"most helpful": chosen(lambda v: v >= high), "most harmful": chosen(lambda v: v <= low)}
rng = np.random.default_rng(0)
groups["drawn at random"] = chosen(lambda v: rng.random(len(v)) < 1 / 8)
print({name: f"{len(b.tokens_BT)} rows, {int(b.loss_mask_BT.sum()):,} targets"
       for name, b in groups.items()})

# %%
with dh_jax.get_loader(opened.config.data, batch_size=24, split="eval",
                       sources=["maths"]) as held_out:
    judge = jax.tree.map(jnp.asarray, next(held_out))


@jax.jit
def loss_on(params, batch):
    loss_BT = model.objective.loss(params, batch, jax.random.key(0))
    return masked_mean(loss_BT, batch.loss_mask_BT)


optimizer = optax.sgd(0.05)


@jax.jit
def step(params, state, batch):
    updates, state = optimizer.update(jax.grad(loss_on)(params, batch), state, params)
    return optax.apply_updates(params, updates), state


curves, size = {}, 16
for name, group in groups.items():
    params, state = model.params, optimizer.init(model.params)
    losses = [float(loss_on(params, judge))]
    for number in range(12):
        places = np.arange(number * size, (number + 1) * size) % len(group.tokens_BT)
        params, state = step(params, state, take(group, places))
        losses.append(float(loss_on(params, judge)))
    curves[name] = ([size * 256.0 * i for i in range(13)], losses)
styles = [viz.Style("source-0"), viz.Style("source-5", viz.style.DASHES[1]),
          viz.Style("static", viz.style.DASHES[2])]
viz.lines([viz.Series(n, s, [c]) for (n, c), s in zip(curves.items(), styles)], 760, 300,
          heading="held-out loss on maths, nats a token")

# %%
for name, (_, losses) in curves.items():
    print(f"{name:>16}: {losses[0]:.4f} -> {losses[-1]:.4f} nats a token")

# %% [markdown]
# `dh influence` writes all of this as one page and a table, `scores.parquet`, goes on where it
# was stopped, and takes SmolLM2 or any other Llama or Qwen folder as the model
# (`model=pretrained model.pretrained=...`).

# %%
shutil.rmtree(folder)
