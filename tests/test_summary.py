"""Summary tables."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import given
from hypothesis import strategies as st

import fclayers as fc

LEAVES = st.builds(
    jax.ShapeDtypeStruct,
    st.lists(st.integers(0, 50), max_size=3).map(tuple),
    st.sampled_from(["float32", "bfloat16", "int8", "complex64"]),
)
TREES = st.recursive(
    LEAVES,
    lambda children: (
        st.lists(children, max_size=3)
        | st.dictionaries(st.text("abc", max_size=3), children, max_size=3)
        | st.tuples(children, children).map(lambda pair: fc.LinearParams(*pair))
    ),
    max_leaves=6,
)


@given(TREES)
def test_totals_and_a_line_for_every_array(tree):
    lines = printed(tree)
    leaves = jax.tree.leaves(tree)
    assert len(lines) == len(leaves) + 4
    assert len({len(line) for line in lines}) == 1
    total = lines[-1].split()
    parameters = sum(leaf.size for leaf in leaves)
    assert total[0] == "total"
    assert total[1] == f"{parameters:,}"
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    number, unit = float(total[2]), ["B", "KiB", "MiB"].index(total[3])
    np.testing.assert_allclose(number * 1024**unit, size, atol=0.051 * 1024**unit)


def test_a_model_is_summarized_without_memory():
    shapes = jax.eval_shape(lambda: fc.init_mlp(jax.random.key(0), [25088, 4096, 4096, 1000]))
    lines = printed(shapes)
    first = "0.weight Linear (25088, 4096) float32 102,760,448 392.0 MiB 83.1%"
    assert lines[2].split() == first.split()
    assert lines[-1].split() == ["total", "123,642,856", "471.7", "MiB", "100.0%"]


def test_kinds_and_unusual_leaves():
    adam = printed(optax.adam(1e-3).init(fc.init_mlp(jax.random.key(0), [3, 2])))
    assert "ScaleByAdamState" in adam[2]
    assert "0.mu.0.weight" in adam[3]
    assert "Linear" in adam[3]
    odd = printed({"key": jax.random.key(0), "scalar": 1.5, "numpy": np.ones((2, 3), np.int8)})
    assert odd[-1].split()[1] == "8"
    assert printed(jnp.ones(3))[2].split()[0] == "array"
    assert len(printed({"function": jnp.tanh, "weight": jnp.ones(3)})) == 5
    assert printed({})[-1].split() == ["total", "0", "0", "B", "0.0%"]


def printed(tree):
    return str(fc.summarize(tree)).splitlines()
