"""A small language model with every kind of tapped layer, written apart from the library's."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from dh_jax.functions import TappedLayer
from dh_jax.influence.objective import Objective
from tests.dh_jax.influence import tiny

VOCAB, WIDTH, INNER = tiny.VOCAB, 5, 6
SCOPED = r"^(?!head)"  # all that is tapped


@functools.partial(jax.jit, static_argnames=("dtype", "tied"))
def make_params(key, dtype=jnp.float32, *, tied=False):
    keys = iter(jax.random.split(key, 12))

    def draw(*shape):
        return jax.random.normal(next(keys), shape, dtype) / 2

    params = {
        "embed": {"table": draw(VOCAB, WIDTH)},
        "layers": {
            str(i): {
                "norm": {"scale": 1 + draw(WIDTH)},
                "up": {"kernel": draw(WIDTH, INNER), "bias": draw(INNER)},
            }
            for i in range(2)
        },
        "down": {"kernel": draw(INNER, WIDTH), "bias": draw(WIDTH)},  # shared by both layers
    }
    return params if tied else params | {"head": {"kernel": draw(WIDTH, VOCAB)}}


LAYERS = {"embed": TappedLayer("embedding", "embed/table")} | {
    name: layer
    for i in range(2)
    for name, layer in {
        f"layers/{i}/norm": TappedLayer("norm", f"layers/{i}/norm/scale"),
        f"layers/{i}/up": TappedLayer("linear", f"layers/{i}/up/kernel", f"layers/{i}/up/bias"),
        f"layers/{i}/down": TappedLayer("linear", "down/kernel", "down/bias"),
    }.items()
}


def hidden(params, batch, tap):
    ids, t = batch.segment_ids_BT, jnp.arange(batch.tokens_BT.shape[1])
    seen = (ids[:, :, None] == ids[:, None, :]) & (t[:, None] >= t)
    share = (seen / seen.sum(axis=-1, keepdims=True)).astype(params["embed"]["table"].dtype)
    x = tap("embed", batch.tokens_BT, params["embed"]["table"][batch.tokens_BT])
    for i in range(2):
        layer = params["layers"][str(i)]
        n = x * jax.lax.rsqrt((x * x).mean(axis=-1, keepdims=True) + 1e-5)
        n = tap(f"layers/{i}/norm", n, n * layer["norm"]["scale"])
        m = jnp.einsum("bts,bsd->btd", share, n)
        h = tap(f"layers/{i}/up", m, m @ layer["up"]["kernel"] + layer["up"]["bias"])
        h = jnp.tanh(h)
        down = h @ params["down"]["kernel"] + params["down"]["bias"]
        x = x + tap(f"layers/{i}/down", h, down)
    return x


def logits(params, batch, tap=lambda name, x, y: y):
    x = hidden(params, batch, tap)
    return x @ (params["head"]["kernel"] if "head" in params else params["embed"]["table"].T)


def loss(params, batch, key):
    return tiny.cross_entropy(logits(params, batch), batch)


def tapped(params, taps, batch, key):
    kept = {}

    def tap(name, x, y):
        if name not in taps:
            return y
        kept[name] = x
        return y + taps[name].astype(y.dtype)

    return tiny.cross_entropy(logits(params, batch, tap), batch), kept


def zero_taps(params, batch):
    shapes = {}

    def measure(params, batch):
        def tap(name, x, y):
            shapes[name] = y
            return y

        logits(params, batch, tap)
        return shapes

    found = jax.eval_shape(measure, params, batch)
    return {name: jnp.zeros(s.shape, s.dtype) for name, s in found.items()}


PLAIN = Objective(loss, logits)
TAPPED = Objective(loss, logits, tapped=tapped, layers=LAYERS, zero_taps=zero_taps)
