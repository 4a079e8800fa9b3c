"""The wrapped optimizer: bit-identical updates, weights that move the right way, clear refusals."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dh_jax.config import MixingConfig, StageConfig
from dh_jax.errors import ConfigError, DataError
from dh_jax.influence.calculator import DataInfCalculator
from dh_jax.influence.optimizer import InfluenceAwareOptimizer, resolve_targets
from dh_jax.influence.sources import source_influence
from dh_jax.mixing.influence import influence
from dh_jax.mixing.policy import Observation, Policy, static, uniform
from dh_jax.mixing.registry import MOVING, PLANNED, make_policy
from tests.dh_jax.influence import tiny

KEY = jax.random.PRNGKey(3)
T = 16
NAMES = ("first", "second", "noise")


def refuse(params, batch, key):
    raise AssertionError("the loss was looked at")


def chain(seed):
    """Transition probabilities of a sharply peaked Markov chain over the vocabulary."""
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.full(tiny.VOCAB, 0.1), tiny.VOCAB)


NOISE = np.full((tiny.VOCAB, tiny.VOCAB), 1 / tiny.VOCAB)
CHAINS = {"first": chain(1), "second": chain(2), "noise": NOISE}


def sample(rng, transitions, rows):
    x = rng.integers(0, tiny.VOCAB, (rows, T))
    for t in range(1, T):
        reach = transitions[x[:, t - 1]].cumsum(axis=1)
        x[:, t] = (rng.random((rows, 1)) < reach / reach[:, -1:]).argmax(axis=1)
    return tiny.pack([[row] for row in x], T)


CALCULATOR = DataInfCalculator(tiny.sequence_loss, chunk=8)


def steering(policy=None, optimizer=None, **options):
    options = {"probe_names": ("first", "second"), "weights": [0.3, 0.3, 0.4]} | options
    return InfluenceAwareOptimizer(
        optimizer or optax.adamw(0.02),
        policy or influence(0.5, 0.0, 0.05, 0.8),
        CALCULATOR,
        source_names=NAMES,
        **options,
    )


def rows_of(rng, rows, names=NAMES):
    return {name: sample(rng, CHAINS[name], rows) for name in names}


# --- buffers ---


@pytest.mark.parametrize("name", [*PLANNED, *MOVING])
def test_a_state_made_outside_jit_may_be_donated(name):
    """No two of its arrays share a buffer, neither at the start nor after a move."""
    fields = {
        "doremi": {"reference": dict.fromkeys(NAMES, 1.0)},
        "schedule": {"stages": [StageConfig(5, {"first": 1.0})]},
        "aioli": {"exploration": 0.25},
    }.get(name, {})
    config = MixingConfig(policy=name, sizes=dict.fromkeys(NAMES, 2.0), **fields)
    policy = make_policy(config, NAMES)
    optimizer = steering(policy, optax.sgd(0.1), budget=0.1)
    donated = jax.jit(lambda state: jax.tree.map(lambda x: x + 0, state), donate_argnums=0)
    state = donated(optimizer.init({"w": jnp.ones(4)}))
    seen = Observation(
        state.step, state.weights_M, loss_M=jnp.ones(3), tokens_M=jnp.ones(3),
        influence_M=jnp.arange(3.0), alignment_M=jnp.arange(3.0), norm_M=jnp.ones(3),
        target_loss=jnp.float32(1),
    )  # fmt: skip
    weights_M, policy_state = jax.jit(policy.update)(seen, state.policy)
    donated(state._replace(weights_M=weights_M, policy=policy_state))


# --- the planted case ---


@pytest.mark.parametrize("target", ["first", "second"])
def test_weights_move_to_the_source_of_the_probes_own_distribution(target):
    rng = np.random.default_rng(0)
    optimizer = steering(interval=5, targets={target: 1.0})
    params = tiny.sequence_params(KEY)
    state = optimizer.init(params)
    moves = []

    @jax.jit
    def train_step(params, state, batch):
        def loss(params):
            return tiny.sequence_loss(params, batch, KEY).sum() / batch.loss_mask_BT.sum()

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for step in range(1, 41):
        weights = np.asarray(state.weights_M, np.float64)
        chosen = rng.choice(3, 16, p=weights / weights.sum())
        drawn = [sample(rng, CHAINS[NAMES[m]], 1) for m in chosen]
        batch = jax.tree.map(lambda *x: np.concatenate(x), *drawn)
        params, state = train_step(params, state, batch)
        assert int(state.step) == step
        if optimizer.due(step):
            sources, probes = rows_of(rng, 8), rows_of(rng, 8, ("first", "second"))
            state, move = optimizer.reweight(params, state, sources, probes, KEY)
            moves.append(move)

    assert [m.step for m in moves] == list(range(5, 41, 5))
    for before, after in itertools.pairwise(moves):
        np.testing.assert_array_equal(before.weights_M, after.previous_M)
    for m in moves:
        assert (m.weights_M >= np.float32(0.05)).all() and (m.weights_M <= np.float32(0.8)).all()
        assert m.coverage == 1
    good, bad = NAMES.index(target), NAMES.index("noise")
    assert moves[-1].weights_M[good] > 0.7  # from 0.3
    assert moves[-1].weights_M[bad] < 0.2  # from 0.4
    assert all(m.influence_M[good] < m.influence_M[bad] for m in moves)
    np.testing.assert_array_equal(state.weights_M, moves[-1].weights_M)


def test_more_of_a_source_of_lower_influence_lowers_the_probes_loss_more():
    """Influence against what it predicts: real steps on each source alone."""
    rng = np.random.default_rng(4)
    params = tiny.sequence_params(KEY)
    sources, probes = rows_of(rng, 64), rows_of(rng, 64, ("first",))
    scores = source_influence(CALCULATOR, params, sources, probes, {"first": 1.0}, KEY)

    def loss(params, batch):
        return tiny.sequence_loss(params, batch, KEY).sum() / batch.loss_mask_BT.sum()

    change = []
    for batch in sources.values():
        step = jax.tree.map(lambda p, g: p - 0.05 * g, params, jax.grad(loss)(params, batch))
        change.append(float(loss(step, probes["first"]) - loss(params, probes["first"])))
    assert np.argmin(scores) == np.argmin(change) == 0


# --- the wrapped optimizer ---


def test_wrapping_leaves_updates_bit_identical():
    bare = optax.chain(
        optax.clip_by_global_norm(0.1), optax.adamw(optax.cosine_decay_schedule(1e-2, 9))
    )
    wrapped = steering(optimizer=bare)
    params = tiny.sequence_params(KEY)
    bare_state, state = bare.init(params), wrapped.init(params)
    bare_update, update = jax.jit(bare.update), jax.jit(wrapped.update)
    for step in range(6):
        grads = jax.tree.map(lambda p, step=step: jnp.sin(p * (step + 1)), params)
        want, bare_state = bare_update(grads, bare_state, params)
        got, state = update(grads, state, params)
        jax.tree.map(np.testing.assert_array_equal, (got, state.inner), (want, bare_state))
        params = optax.apply_updates(params, got)
    assert int(state.step) == 6
    np.testing.assert_array_equal(state.weights_M, np.float32([0.3, 0.3, 0.4]))


def test_an_optimizer_that_wants_extra_arguments_gets_them():
    bare = optax.polyak_sgd()
    wrapped = steering(static(), optimizer=bare)
    params = {"w": jnp.ones(3)}
    grads = {"w": jnp.arange(3.0)}
    want, _ = bare.update(grads, bare.init(params), params, value=2.0)
    got, _ = wrapped.update(grads, wrapped.init(params), params, value=2.0)
    np.testing.assert_array_equal(got["w"], want["w"])


def test_it_stands_in_a_chain_of_optax():
    chained = optax.chain(steering(static(), optimizer=optax.sgd(1.0)), optax.scale(0.5))
    params = {"w": jnp.ones(3)}
    updates, state = chained.update(params, chained.init(params), params)
    np.testing.assert_array_equal(updates["w"], np.full(3, -0.5))
    assert int(state[0].step) == 1


def test_state_survives_flattening_and_moves_on_alike():
    rng = np.random.default_rng(1)
    optimizer = steering(influence(0.5, 0.5, 0.05, 0.8))
    params = tiny.sequence_params(KEY)
    state = optimizer.init(params)
    sources, probes = rows_of(rng, 8), rows_of(rng, 8)
    state, _ = optimizer.reweight(params, state, sources, probes, KEY)
    leaves, treedef = jax.tree.flatten(state)
    again = jax.tree.unflatten(treedef, [np.asarray(x) for x in leaves])
    results = [optimizer.reweight(params, s, sources, probes, KEY) for s in (state, again)]
    jax.tree.map(np.testing.assert_array_equal, *results)
    assert int(results[0][0].policy.moves) == 2


# --- when and what ---


def test_moves_are_due_every_interval_after_the_warm_up():
    def moves(interval, warmup):
        optimizer = steering(static(), interval=interval, warmup=warmup)
        return [step for step in range(50) if optimizer.due(step)]

    assert moves(20, 0) == [20, 40]
    assert moves(20, 7) == [7, 27, 47]
    assert moves(1, 0) == list(range(1, 50))


@pytest.mark.parametrize(
    ("policy", "want"), [(static(), [0.3, 0.3, 0.4]), (uniform(), [1 / 3, 1 / 3, 1 / 3])]
)
def test_policies_that_need_nothing_look_at_nothing(policy, want):
    optimizer = InfluenceAwareOptimizer(
        optax.sgd(0.1),
        policy,
        DataInfCalculator(refuse),
        source_names=NAMES,
        weights={"noise": 0.4, "second": 0.3, "first": 0.3},
    )
    state = optimizer.init({"w": jnp.ones(2)})
    np.testing.assert_array_equal(state.weights_M, np.float32(want))
    state, move = optimizer.reweight({"w": jnp.ones(2)}, state)
    np.testing.assert_array_equal(move.weights_M, np.float32(want))
    assert move.influence_M is None and move.coverage is None


def test_influence_of_a_source_is_the_mean_over_its_valid_rows():
    rng = np.random.default_rng(2)
    params = tiny.sequence_params(KEY)
    sources, probes = rows_of(rng, 4), rows_of(rng, 4)
    sources["second"].loss_mask_BT[1] = False
    targets = {"first": 0.25, "second": 0.75}
    got = source_influence(CALCULATOR, params, sources, probes, targets, KEY)

    rows = jax.tree.map(lambda *x: np.concatenate(x), *sources.values())
    gradient = {n: CALCULATOR.probe_gradient(params, probes[n], KEY) for n in targets}
    v = jax.tree.map(lambda a, b: 0.25 * a + 0.75 * b, gradient["first"], gradient["second"])
    q = CALCULATOR.precondition(CALCULATOR.fit(params, rows, KEY), v)
    scores = np.asarray(CALCULATOR.score_rows(params, q, rows, KEY))
    want = [scores[:4].mean(), scores[[4, 6, 7]].mean(), scores[8:].mean()]
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_targets_are_normalised_and_default_to_equal():
    assert resolve_targets({}, ["a", "b"]) == {"a": 0.5, "b": 0.5}
    assert resolve_targets({"b": 3.0, "a": 1.0, "c": 0.0}, "abc") == {"b": 0.75, "a": 0.25}


# --- what is refused ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interval": 0}, "interval is 0"),
        ({"warmup": -1}, "warmup is -1"),
        ({"probe_names": ()}, "needs a probe"),
        ({"targets": {"secnd": 1.0}}, "'secnd' .did you mean 'second'"),
        ({"targets": {"first": -1.0}}, "first is -1.0"),
        ({"targets": {"first": 0.0}}, "all 0"),
        ({"weights": [0.5, 0.5]}, "2 weights for 3 sources"),
        ({"weights": {"first": 1.0}}, "weights name first but the sources are first, second"),
        ({"policy": influence(min_weight=0.5)}, "min_weight over 3 sources"),
        ({"weights": [0.5, -0.1, 0.6]}, "weight of source 'second' is -0.1"),
        ({"weights": [0.5, float("nan"), 0.5]}, "weight of source 'second' is nan"),
        ({"weights": [0.0, 0.0, 0.0]}, "sum to 0; they must sum to 1"),
        ({"policy": Policy(*static()[:3], needs=frozenset({"sharpness"}))}, "needs sharpness"),
    ],
)
def test_impossible_arrangements_are_refused_at_once(options, message):
    with pytest.raises(ConfigError, match=message):
        steering(**options)


def poisoned(params):
    """Not finite wherever token 0 is read."""
    return params | {"embed": params["embed"].at[0].set(jnp.nan)}


def test_what_is_broken_is_named():
    rng = np.random.default_rng(3)
    optimizer = steering()
    params = tiny.sequence_params(KEY)
    state = optimizer.init(params)
    sources, probes = rows_of(rng, 8), rows_of(rng, 8)

    def attempt(params=params, sources=sources, probes=probes):
        return optimizer.reweight(params, state, sources, probes, KEY)

    def blank(batch):
        return batch._replace(loss_mask_BT=np.zeros_like(batch.loss_mask_BT))

    def without_token_0(batch):
        return batch._replace(tokens_BT=batch.tokens_BT.clip(min=1))

    clean, unread = (
        {name: without_token_0(batch) for name, batch in rows.items()} for rows in (sources, probes)
    )
    with pytest.raises(DataError, match="source 'second': none of its 8 rows"):
        attempt(sources=sources | {"second": blank(sources["second"])})
    with pytest.raises(DataError, match="probe 'first': none of its 8 rows"):
        attempt(probes=probes | {"first": blank(probes["first"])})
    with pytest.raises(DataError, match=r"gradient is not finite for source 'noise' \(. of 8"):
        attempt(poisoned(params), sources=clean | {"noise": sources["noise"]}, probes=unread)
    with pytest.raises(DataError, match="probe 'first': gradient is not finite"):
        attempt(poisoned(params), sources=clean)
    with pytest.raises(ConfigError, match="no rows for probe 'second'"):
        attempt(probes={"first": probes["first"]})
    with pytest.raises(ConfigError, match="no rows of source 'noise'"):
        attempt(sources={n: b for n, b in sources.items() if n != "noise"})
    with pytest.raises(ConfigError, match="rows of 2 sources given, but there are 3"):
        attempt(sources=list(sources.values())[:2])
    short = tiny.pack([[np.arange(5)]], 6)
    with pytest.raises(ConfigError, match=r"differ in row length.*'noise': 6"):
        attempt(sources=sources | {"noise": short})
