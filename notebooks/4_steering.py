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
# # A mixture that steers itself
#
# Nobody knows beforehand which mixture is best for what a model is meant to do. Here the mixture
# finds out while it trains: every few steps it measures how much each source's rows lower the
# loss on the *targets*, and moves weight there. You will write the loop yourself, and compare it
# with the same loop under fixed weights.

# %%
import os
from pathlib import Path

import jax
import numpy as np
import optax
from rich.console import Console

import dh_jax
import dh_jax.viz as viz
from dh_jax.demo.study import build_data

os.chdir("..")  # the repository, where `make demo` leaves its folder too
build_data(Path(os.environ.get("DH_DEMO", ".demo")), Console(quiet=True))
data = dh_jax.load_data_config("demo")
tokenizer = dh_jax.TokenizerWrapper.load(data.tokenizer)

# %% [markdown]
# ## A model and its loss
#
# Every loss in this library is `(params, batch, key) -> loss_BT`, not reduced. This one is a small
# Llama's; any of your own will do.

# %%
from dh_jax.config import ModelConfig
from dh_jax.models import decoder

shape = ModelConfig(width=128, layers=3, heads=4, kv_heads=2, mlp_width=352)
graph, start = decoder.build(shape, tokenizer.vocab_size, jax.random.key(0))
loss_fn = decoder.loss_fn(graph)
print(f"{decoder.count_parameters(start):,} parameters")

# %% [markdown]
# ## An optimizer that also moves weights
#
# `InfluenceAwareOptimizer` wraps any optax optimizer. Its `update` is that of the optimizer inside
# and belongs into a jitted step; `reweight` measures influence (DataInf) and asks the policy. The
# model is meant for mathematics and technical prose, half and half.

# %%
from dh_jax import DataInfCalculator, InfluenceAwareOptimizer
from dh_jax.mixing.influence import influence
from dh_jax.mixing.policy import static

STEPS, ROWS, INTERVAL = 72, 8, 8
targets = {"maths": 0.5, "docs": 0.5}


def make_optimizer(policy):
    schedule = optax.warmup_cosine_decay_schedule(0.0, 4e-3, 10, STEPS, 4e-4)
    return InfluenceAwareOptimizer(
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.1)),
        policy,
        DataInfCalculator(loss_fn, damping=0.1),
        source_names=list(data.sources),
        weights={name: source.weight for name, source in data.sources.items()},
        interval=INTERVAL,
        probe_names=list(data.probes),
        targets=targets,
    )


make_optimizer(influence(learning_rate=0.5))

# %% [markdown]
# ## The loop
#
# Rows for measuring come from loaders of their own, so they take nothing from training. Moves
# change the training loader, and hold from the next batch.

# %%
from dh_jax.functions import masked_mean


def open_samples(split, names, rows):
    return {name: dh_jax.get_loader(data, batch_size=rows, max_length=128, split=split,
                                    sources=[name], shuffle=True, repeat=True, prefetch=0, seed=1)
            for name in names}


eval_rows = {}
for name in data.sources:
    with dh_jax.get_loader(data, batch_size=16, split="eval", sources=[name]) as loader:
        eval_rows[name] = next(loader)


@jax.jit
def judge(params, batch):
    return masked_mean(loss_fn(params, batch, jax.random.key(0)), batch.loss_mask_BT)


def run(policy):
    optimizer = make_optimizer(policy)

    @jax.jit
    def step(params, state, batch):
        grads = jax.grad(judge)(params, batch)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, state = start, optimizer.init(start)
    samples, probes = open_samples("train", data.sources, 4), open_samples("probe", targets, 8)
    log = {"tokens": [], "weights": [], "loss": [], "seen": []}
    with dh_jax.get_loader(data, batch_size=ROWS) as loader:
        for number in range(1, STEPS + 1):
            params, state = step(params, state, next(loader))
            if optimizer.due(number, state):
                state, move = optimizer.reweight(
                    params, state,
                    {name: next(rows) for name, rows in samples.items()},
                    {name: next(rows) for name, rows in probes.items()},
                    jax.random.key(number),
                )
                loader.set_weights(dict(zip(loader.names, move.weights_M.tolist())))
            if number % INTERVAL == 0:
                log["tokens"].append(float(number * ROWS * 256))
                log["weights"].append(list(loader.weights.values()))
                log["loss"].append([float(judge(params, b)) for b in eval_rows.values()])
        log["seen"] = [s["tokens"] for s in loader.stats()["sources"].values()]
    return log


steered = run(influence(learning_rate=0.5))
fixed = run(static())

# %% [markdown]
# ## What it chose
#
# From shares by size to shares by use. Nobody told it which source serves which target.

# %%
names = list(data.sources)
viz.weights_over_time({
    name: (steered["tokens"], [w[m] for w in steered["weights"]]) for m, name in enumerate(names)
})

# %%
viz.weight_bars(
    dict(zip(names, steered["weights"][-1])),
    before={name: source.weight for name, source in data.sources.items()},
)

# %% [markdown]
# ## What it bought, and what it cost
#
# Held-out loss by source, both after equally many tokens. The targets should be better; what has
# been starved is worse, and that is the price.

# %%
viz.loss_by_source({
    run: {name: (log["tokens"], [x[m] for x in log["loss"]]) for m, name in enumerate(names)}
    for run, log in (("steered", steered), ("fixed", fixed))
})

# %%
difference = np.array(steered["loss"][-1]) - np.array(fixed["loss"][-1])
for name, change in sorted(zip(names, difference), key=lambda pair: pair[1]):
    print(f"{name:>8} {'target' if name in targets else '':7} {change:+.3f} nats a token")
print(f"\nmean over the targets: {np.mean([difference[names.index(t)] for t in targets]):+.3f}")

# %% [markdown]
# One seed shows how it works, not how well: `make demo` trains three seeds of each policy and puts
# intervals on the difference, and `docs/benchmarks.md` has other policies beside this one. Some
# (`odm`, `ado`, `doremi`, ...) need no probe and look at losses alone.
