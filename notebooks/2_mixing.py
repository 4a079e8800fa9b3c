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
# # Mixing and live weights
#
# A mixture says which share of the tokens each source gets. Here you will see how exactly the
# shares are kept, change them while batches are already waiting, and let a plan move them.

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
build_data(Path(os.environ.get("DH_DEMO", ".demo")), Console(quiet=True))

# %% [markdown]
# The config's weights are in proportion to size. `set_weights` takes any others.

# %%
loader = dh_jax.get_loader("demo", batch_size=8)
loader

# %% [markdown]
# ## Shares are kept at every moment
#
# Drawing sources at random keeps shares in the long run, and in the short run not at all: after
# 100 rows a source of 9 % may well have had 4 or 15. Here the order is planned instead, so that
# at every prefix each source is within one row of what its weight promises.

# %%
batches = [next(loader) for _ in range(40)]
planned_N = np.concatenate([batch.source_ids_B for batch in batches])
tokens_N = np.concatenate([(batch.segment_ids_BT > 0).sum(axis=1) for batch in batches])
weights = np.array(list(loader.weights.values()))
random_N = np.random.default_rng(0).choice(len(weights), len(planned_N), p=weights)


def deviation(sources_N):
    """Of the source that is furthest from its share so far, in rows."""
    tokens_NM = np.cumsum(np.eye(len(weights))[sources_N] * tokens_N[:, None], axis=0)
    return np.abs(tokens_NM - tokens_N.cumsum()[:, None] * weights).max(axis=1) / 256


ours, by_chance, seen = deviation(planned_N), deviation(random_N), tokens_N.cumsum()
print(f"largest deviation over {len(seen)} rows: planned {ours.max():.2f}, "
      f"drawn at random {by_chance.max():.2f}")
viz.lines(
    [viz.Series("planned", viz.Style("source-0"), [(seen, ours)]),
     viz.Series("at random", viz.Style("source-5", viz.style.DASHES[1]),
                [(seen, by_chance)])],
    760, 280, heading="largest deviation of a source from its share, rows",
)

# %% [markdown]
# ## A change holds from the next batch on
#
# While you train on one batch the next ones are made in the background. When weights change,
# those are taken back and dealt anew: nothing is lost, nothing repeated, and the change is in
# force at once. Let us ask for mathematics and documentation alone.

# %%
before = loader.weights
print("batches made ahead:", loader.config.prefetch)
loader.set_weights({"code": 0, "docs": 1, "prose": 0, "maths": 3, "puzzles": 0, "cpp": 0})
for _ in range(3):
    print([loader.names[m] for m in next(loader).source_ids_B])

# %%
viz.weight_bars(loader.weights, before=before)

# %% [markdown]
# ## Where it stands fits into a message
#
# The state holds, for each source, a few integers and how much it is owed. It goes into the
# checkpoint; a loader on other machines, with another batch size, goes on from it.

# %%
state = loader.get_state()
print(json.dumps(state["mixture"]["maths"], indent=1)[:700])

# %%
expected = next(loader)
with dh_jax.get_loader("demo", batch_size=8) as other:
    other.set_state(state)
    again = next(other)
print("the same batch:", np.array_equal(expected.tokens_BT, again.tokens_BT))
loader.close()

# %% [markdown]
# ## Letting something else decide
#
# What moves weights is a *policy*: two pure functions, `init` and `update`, over plain arrays.
# Some follow a plan, some look at losses or at influence (notebook 4). A plan of stages first:
# prose to begin with, and mathematics at the end.

# %%
import jax.numpy as jnp

from dh_jax.mixing.policy import Observation
from dh_jax.mixing.schedules import stages

names = list(before)
end = [0.1, 0.1, 0.1, 0.5, 0.1, 0.1]
policy = stages([20, 60, 100], [[0.1, 0.1, 0.5, 0.1, 0.1, 0.1], [1 / 6] * 6, end],
                interpolate=True)
policy

# %%
weights_M = policy.start(jnp.asarray(list(before.values())))
state, asked, got = policy.init(weights_M), [], []
loader = dh_jax.get_loader("demo", batch_size=16)
for step in range(1, 121):
    observation = Observation(jnp.int32(step), weights_M)
    weights_M, state = policy.update(observation, state)
    loader.set_weights(dict(zip(names, weights_M.tolist())))
    got.append(np.bincount(next(loader).source_ids_B, minlength=6))
    asked.append(np.asarray(weights_M))
tokens = [16 * 256.0 * (i + 1) for i in range(120)]
viz.weights_over_time(dict(zip(names, [(tokens, list(w)) for w in np.stack(asked, 1)])))

# %% [markdown]
# What came out, over windows of ten batches, follows it: weights may move at every step.

# %%
windows = np.stack(got).reshape(12, 10, 6).sum(1) / 160
viz.weights_over_time(dict(zip(names, [(tokens[9::10], list(w)) for w in windows.T])))

# %%
error = np.abs(np.cumsum(got, 0) - 16 * np.cumsum(asked, 0)).max()
print(f"rows asked for and rows delivered never differ by more than {error:.2f}")
loader.close()

# %% [markdown]
# ## Bounds
#
# A policy that learns could drop a source for good. Weights that move are therefore kept within
# bounds by an exact projection: the nearest mixture, by distance, that keeps them.

# %%
from dh_jax.mixing.simplex import project

wanted = jnp.asarray([0.97, 0.03, -0.02, 0.01, 0.005, 0.005])
kept = project(wanted, 0.02, 0.6)
print("wanted", np.asarray(wanted).round(3))
print("kept  ", np.asarray(kept).round(3), " sum", float(kept.sum()))
