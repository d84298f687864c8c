"""slide: one equation, for every function."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from slide_networks import cases, naive

import fclayers as fc


def assert_equation_holds(case, dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        params = [jnp.asarray(p, dtype) for p in case.params]
        image = jnp.asarray(case.image, dtype)
        sliding = fc.slide(case.fun, case.window, stride=case.stride, axes=case.axes)
        actual = jax.jit(sliding)(params, image)
        expected = naive(case, params, image)
        assert jax.tree.structure(actual) == jax.tree.structure(expected)
        for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            assert ours.shape == theirs.shape
            assert ours.dtype == theirs.dtype
            scale = np.abs(theirs).max(initial=1.0)
            np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance * scale)


@given(cases())
def test_equation_in_float64(case):
    assert_equation_holds(case, "float64", 1e-12)
