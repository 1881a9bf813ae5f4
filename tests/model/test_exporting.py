"""A train step that `jax.export` has written gives the numbers of the train step."""

import collections

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train import tiny

from mhc_jax.exporting import name_nodes
from mhc_jax.train_step import abstract_batch, abstract_state, init_state, jit_train_step

# The same program as there.
pytestmark = pytest.mark.xdist_group("train")


def test_a_written_train_step_gives_the_same_numbers():
    config = tiny()
    shapes = abstract_state(config), abstract_batch(config)
    name_nodes(shapes)
    name_nodes(shapes)  # nothing is named twice
    step = jit_train_step(config)
    written = jax.export.export(step)(*shapes).serialize()
    read = jax.jit(jax.export.deserialize(written).call)
    batch = {
        name: jnp.asarray(np.random.default_rng(0).integers(0, 64, x.shape), x.dtype)
        for name, x in shapes[1].items()
    }
    got, want = (init_state(config) for _ in range(2))
    for _ in range(2):
        (got, metrics), (want, expected) = read(got, batch), step(want, batch)
        jax.tree.map(np.testing.assert_array_equal, metrics, expected)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert got.step == 2
    jax.tree.map(np.testing.assert_array_equal, got.params, want.params)
    jax.tree.map(np.testing.assert_array_equal, got.opt_state, want.opt_state)


def test_what_has_no_name_or_has_one_already():
    @flax.struct.dataclass
    class Static:
        array: jax.Array
        kind: str = flax.struct.field(pytree_node=False)

    with pytest.raises(TypeError, match=r"Static keeps \('a',\) beside its arrays: name it by jax"):
        name_nodes({"x": [Static(1, "a")]})
    Pair = collections.namedtuple("Pair", "a b")
    jax.export.register_namedtuple_serialization(Pair, serialized_name="somebody's own")
    name_nodes(Pair(1, None), collections.OrderedDict(a=2))
    Other = collections.namedtuple("Pair", "a b")
    Third = collections.namedtuple("Pair", "a b c")
    name_nodes(Other(1, 2))
    with pytest.raises(ValueError, match="Duplicate serialization registration for"):
        name_nodes(Third(1, 2, 3))
