"""Formulations for CPUs against XLA's own."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

from fclayers.kernels.unrolled import unrolled_convolve
from fclayers.kernels.windows import Geometry


@st.composite
def tiny_convolutions(draw):
    ndim = draw(st.integers(1, 3))

    def per_axis(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(ndim))

    kernel, strides, dilations = per_axis(1, 3), per_axis(1, 2), per_axis(1, 2)
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    spatial = per_axis(1, 4)
    padding = tuple(
        (low, max(high, r - n - low))
        for r, n, low, high in zip(reach, spatial, per_axis(0, 3), per_axis(0, 3), strict=True)
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    inputs, outputs = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    x = rng.standard_normal((2, *spatial, inputs))
    weight = rng.standard_normal((*kernel, inputs, outputs))
    return x, weight, Geometry(kernel, strides, padding, dilations)


@given(tiny_convolutions())
def test_tiny_maps_as_one_product(case):
    x, weight, geometry = case
    spatial = "DHW"[3 - len(geometry.kernel) :]
    with jax.enable_x64(True):
        expected = lax.conv_general_dilated(
            jnp.asarray(x),
            jnp.asarray(weight),
            geometry.strides,
            geometry.padding,
            rhs_dilation=geometry.dilations,
            dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
        )
        y = unrolled_convolve(jnp.asarray(x), jnp.asarray(weight), geometry, None)
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)
