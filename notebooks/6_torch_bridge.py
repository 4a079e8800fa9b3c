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
# # The torch bridge
#
# The trainer is written in torch and shall stay so. `dh_torch_bridge` gives it the same rows as
# JAX sees, to the bit, in Hugging Face's names, with weights that may move and a state for the
# checkpoint. Here a model goes from JAX to torch and agrees on the loss; then torch trains it.

# %%
import os
import tempfile
from pathlib import Path

import jax
import numpy as np
import torch
from rich.console import Console

import dh_jax
import dh_jax.viz as viz
import dh_torch_bridge
from dh_jax.demo.study import build_data

os.chdir("..")  # the repository, where `make demo` leaves its folder too
build_data(Path(os.environ.get("DH_DEMO", ".demo")), Console(quiet=True))
_ = torch.manual_seed(0)

# %% [markdown]
# ## The same rows
#
# Both loaders take the same arguments. Tensors share memory with the batch; labels alone are
# copies.

# %%
options = {"batch_size": 4, "max_length": 1024}
with dh_jax.get_loader("demo", **options) as ours:
    batch, names = next(ours), ours.names
loader = dh_torch_bridge.get_loader("demo", **options)
tensors = next(loader)
print({name: (str(x.dtype), tuple(x.shape)) for name, x in tensors.items()})
print("the same tokens:", np.array_equal(tensors["input_ids"].numpy(), batch.tokens_BT))
viz.packed_rows(batch, names=names)

# %% [markdown]
# ## The same loss
#
# A small Llama, drawn in JAX, saved as a Hugging Face folder and read by `transformers`. Attention
# must not cross documents: the mask says so, and `shift_labels` are the targets, shifted already.

# %%
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from dh_jax.config import ModelConfig
from dh_jax.models import decoder
from dh_jax.models.pretrained import save_pretrained

disable_progress_bar()
config = ModelConfig(width=128, layers=3, heads=4, kv_heads=2, mlp_width=352)
tokenizer = dh_jax.TokenizerWrapper.load(dh_jax.load_data_config("demo").tokenizer)
graph, params = decoder.build(config, tokenizer.vocab_size, jax.random.key(0))
folder = Path(tempfile.mkdtemp()) / "model"
save_pretrained(folder, config, params, tokenizer)
model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")


def losses(tensors):
    """Nats of every target; 0 where nothing is learnt."""
    logits = model(
        input_ids=tensors["input_ids"].long(),
        position_ids=tensors["position_ids"].long(),
        attention_mask=dh_torch_bridge.document_mask(tensors["segment_ids"]),
    ).logits
    return torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), tensors["shift_labels"], reduction="none"
    )


with torch.no_grad():
    theirs_BT = losses(tensors).numpy()
ours_BT = np.asarray(jax.jit(decoder.loss_fn(graph))(params, batch, jax.random.key(0)))
print(f"JAX   {ours_BT.sum() / batch.loss_mask_BT.sum():.6f} nats a token")
print(f"torch {theirs_BT.sum() / batch.loss_mask_BT.sum():.6f} nats a token")
print(f"largest difference of a token: {np.abs(ours_BT - theirs_BT).max():.1e}")

# %% [markdown]
# ## A torch loop
#
# An ordinary loop. In its middle the weights move towards mathematics, which is in force from the
# next batch; and the loader's state is taken, as a checkpoint would.

# %%
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
STEPS, MOVE = 40, 20
log = {"tokens": [], "loss": {name: [] for name in names}, "weights": []}
seen = {name: 10.0 for name in names}
for step in range(1, STEPS + 1):
    loss_BT = losses(tensors)
    count = (tensors["shift_labels"] != -100).sum()
    optimizer.zero_grad()
    (loss_BT.sum() / count).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    for m in tensors["source_ids"].unique().tolist():
        rows = tensors["source_ids"] == m
        targets = (tensors["shift_labels"][rows] != -100).sum()
        now = float(loss_BT[rows].detach().sum() / targets)
        seen[names[m]] = now if seen[names[m]] == 10.0 else 0.7 * seen[names[m]] + 0.3 * now
    if step == MOVE:
        state = loader.state_dict()
        loader.set_weights({name: 5.0 if name == "maths" else 1.0 for name in names})
    log["tokens"].append(step * 4 * 1024.0)
    log["weights"].append(list(loader.weights.values()))
    for name in names:
        log["loss"][name].append(seen[name])
    tensors = next(loader)

# %%
viz.weights_over_time({
    name: (log["tokens"], [w[m] for w in log["weights"]]) for m, name in enumerate(names)
})

# %% [markdown]
# Training losses by source, smoothed over the batches that held some of it:

# %%
viz.loss_by_source({"torch": {
    name: (log["tokens"][5:], log["loss"][name][5:]) for name in names
}})

# %% [markdown]
# ## Going on from a checkpoint
#
# The state of step 20 in a new loader, as after a crash: the batch that was next then is next now.

# %%
loader.close()
with dh_torch_bridge.get_loader("demo", **options) as first:
    for _ in range(MOVE):
        next(first)
    expected = next(first)
with dh_torch_bridge.get_loader("demo", **options) as again:
    again.load_state_dict(state)
    print("the same batch:", torch.equal(next(again)["input_ids"], expected["input_ids"]))

# %% [markdown]
# ## On many ranks
#
# Each rank asks for its part, `get_loader(..., shard=(rank, ranks))`, and all see one global
# order. `make_mesh`, `data_shard` and `distribute` (DDP or FSDP2) take three lines more; a whole
# trainer to copy from is `dh_torch_bridge/train.py`:
#
# ```sh
# torchrun --nproc-per-node 2 -m dh_torch_bridge.train data=demo distributed=fsdp2 out=runs/torch
# ```
