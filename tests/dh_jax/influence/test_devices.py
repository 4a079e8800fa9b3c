"""Every estimator on a mesh of eight devices, and every kernel lowered for cuda and tpu."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dh_jax.config import MeshConfig
from dh_jax.distributed.mesh import make_mesh, to_device
from dh_jax.influence.ekfac import ekfac, passes
from dh_jax.influence.empirical_fisher import datainf, woodbury
from dh_jax.influence.estimator import score
from dh_jax.influence.first_order import gradient_cosine, gradient_dot
from dh_jax.influence.fisher import sample_targets
from dh_jax.influence.iterative import conjugate_gradient
from dh_jax.influence.kronecker import preconditioned
from dh_jax.influence.newton import Inverse, newton_step
from dh_jax.influence.objective import Scope
from dh_jax.influence.per_document import plain, tapped
from dh_jax.influence.products import batch_product
from dh_jax.influence.projection import Kernel, projection
from dh_jax.influence.sketch import Sketch
from dh_jax.influence.taps import bias_paths
from tests.dh_jax.influence import tapped_tiny, tiny

pytestmark = pytest.mark.filterwarnings("ignore::dh_jax.influence.estimator.CoverageWarning")
KEY = jax.random.PRNGKey(1)
T, S = 12, 4


def rows(seed):
    return tiny.pack(tiny.random_rows(np.random.default_rng(seed), 8, T), T)


def sharded(params, mesh):
    """Whatever divides is split over fsdp: the tiny model has nothing that is split by size."""

    def place(x):
        even = [axis for axis in range(x.ndim) if x.shape[axis] % 2 == 0]
        spec = ["fsdp" if axis == even[0] else None for axis in range(x.ndim)] if even else []
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree.map(place, params)


ESTIMATORS = {
    "gradient_cosine": gradient_cosine,
    "datainf": datainf,
    "woodbury": woodbury,
    "ekfac": partial(ekfac, labels="true"),
    "conjugate_gradient": partial(conjugate_gradient, steps=4),
    "projection": partial(projection, size=64),
}


@pytest.mark.slow  # test_mesh.py has four devices
@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_mesh_of_eight_devices_gives_the_scores_of_one(name):
    estimator = ESTIMATORS[name](tapped_tiny.TAPPED, Scope("down|norm", S, chunk=8))
    params = tapped_tiny.make_params(KEY)
    train, other = rows(0), rows(1)

    def run(params, train, other):
        state = estimator.fit(params, [train], KEY)
        return score(estimator, params, state, [other], [train, other], KEY).values_KN

    alone = run(params, train, other)
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    placed = [to_device(batch, mesh) for batch in (train, other)]
    assert len(placed[0].tokens_BT.sharding.device_set) == 8
    split = sharded(params, mesh)
    assert not split["down"]["kernel"].sharding.is_fully_replicated
    meshed = run(split, *placed)
    assert np.linalg.norm(meshed - alone) < 1e-5 * np.linalg.norm(alone)
    assert np.count_nonzero(alone) > 100


def lowered(function, *arguments):
    exported = jax.export.export(jax.jit(function), platforms=["cuda", "tpu"])(*arguments)
    assert set(exported.platforms) == {"cuda", "tpu"}


def test_every_kernel_lowers_for_cuda_and_tpu():
    params, batch = tapped_tiny.make_params(KEY), jax.tree.map(jnp.asarray, rows(2))
    scope, objective = Scope("down|norm|embed", S), tapped_tiny.TAPPED
    sketch = Sketch(64)
    for door in (plain(objective, scope), tapped(objective, scope)):
        blocks = door.blocks(params)
        vectors = {p: jnp.ones((2, *b.shape)) for p, b in blocks.items()}
        weights = {p: jnp.ones((2, 8, S)) for p in blocks}
        lowered(door.gradients, params, batch, KEY)
        lowered(door.squares, params, batch, KEY)
        lowered(door.products, params, vectors, batch, KEY)
        lowered(door.products_each, params, vectors, batch, KEY)
        lowered(door.combine, params, weights, batch, KEY)
        lowered(partial(door.sketched, sketch), params, batch, KEY)
        lowered(door.health, params, batch, KEY)
    for curvature in ("hessian", "gauss_newton", "empirical_fisher", "sampled_fisher"):
        product = batch_product(objective, scope, curvature)
        lowered(product, params, vectors, batch, KEY)
    lowered(partial(sample_targets, objective.logits), params, batch, KEY)

    first, second = passes(objective, scope, tapped(objective, scope).blocks)
    labelled = (batch.targets_BT, jnp.ones((8, T)))
    lowered(first, params, batch, *labelled, KEY)
    factors = ekfac(objective, scope, labels="true", strategy="kfac").fit(params, [batch], KEY)
    lowered(second, params, factors, batch, *labelled, KEY)
    biases = bias_paths(objective, scope)
    lowered(lambda f, v: preconditioned(f, v, biases, 0.1), factors, vectors)

    lowered(gradient_dot(objective, scope).score, params, (), vectors, batch, KEY)
    lowered(gradient_cosine(objective, scope).score, params, (), vectors, batch, KEY)
    kernel = Kernel(jnp.eye(64))
    lowered(
        projection(objective, scope, size=64).score, params, kernel, jnp.ones((2, 64)), batch, KEY
    )
    narrow = scope._replace(parameters="norm")
    inverse, two = Inverse(jnp.eye(10)), jnp.ones((2, 10))
    lowered(newton_step(objective, narrow).score, params, inverse, two, batch, KEY)
