"""What XLA makes of the layer: one dot, one fused add, and the weight read where it lies."""

import re
from functools import partial
from math import prod

import jax
import jax.numpy as jnp
import pytest

import fclayers as fc

# Sizes that no other array of the program shares with the weight.
CASES = {
    "matrix": (48, 80, (32, 48), -1),
    "two batch axes": (48, 80, (4, 8, 48), -1),
    "one row": (48, 80, (1, 48), -1),
    "one sample": (48, 80, (48,), -1),
    "one row, large": (1024, 1040, (1, 1024), -1),
    "first axis": (48, 80, (48, 32), 0),
    "middle axis": (48, 80, (5, 48, 9), 1),
    "three axes": ((7, 5, 16), 80, (32, 7, 5, 16), (-3, -2, -1)),
    "three axes, two out": ((7, 5, 16), (10, 8), (3, 4, 7, 5, 16), (-3, -2, -1)),
    "three axes, out of order": ((7, 5, 16), 80, (5, 32, 16, 7), (3, 0, 2)),
}


def compile_layer(case, backward):
    in_features, out_features, x_shape, axis = CASES[case]
    params = jax.eval_shape(lambda: fc.init_linear(jax.random.key(0), in_features, out_features))
    x = jax.ShapeDtypeStruct(x_shape, jnp.float32)

    def forward(params, x):
        return fc.apply_linear(params, x, axis=axis)

    def gradients(params, x, cotangent):
        return jax.vjp(forward, params, x)[1](cotangent)

    args = (params, x, jax.eval_shape(forward, params, x)) if backward else (params, x)
    hlo = jax.jit(gradients if backward else forward).lower(*args).compile().as_text()
    return hlo, prod(params.weight.shape)


def written_sizes(hlo):
    """Sizes of the arrays that the compiled program writes: results of its top-level operations."""
    entry = hlo[hlo.index("\nENTRY") :]
    results = re.findall(r"= \w+\[([\d,]*)\]\S* ([\w-]+)\(", entry)
    free = {"parameter", "bitcast", "get-tuple-element"}
    return [
        prod(int(n) for n in shape.split(",") if n)
        for shape, opcode in results
        if opcode not in free
    ]


@pytest.mark.parametrize("case", CASES)
def test_forward_is_one_dot_and_one_add(case):
    hlo, weight_size = compile_layer(case, backward=False)
    assert len(re.findall(r" dot\(", hlo)) == 1
    body = re.sub(r"%region_.*?\n}", "", hlo, flags=re.DOTALL)
    assert len(re.findall(r" add\(", body)) <= 1
    assert weight_size not in written_sizes(hlo)


@pytest.mark.parametrize("case", CASES)
def test_backward_writes_the_weights_gradient_once_and_no_copy_of_the_weight(case):
    hlo, weight_size = compile_layer(case, backward=True)
    assert len(re.findall(r" dot\(", hlo)) <= 2
    assert written_sizes(hlo).count(weight_size) == 1


@pytest.mark.parametrize("num_kernels", [None, 2])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_pool_does_not_compute_sums_of_shifted_inputs_anew(stride, groups, num_kernels):
    def network(conv, x):
        y = fc.apply_conv(conv, x, groups=groups)
        return fc.max_pool(jax.nn.relu(y), (2, 2), stride=stride)

    conv = fc.init_conv(jax.random.key(0), (3, 3), groups, 8, groups=groups)
    if num_kernels:
        conv = jax.tree.map(lambda leaf: jnp.stack([leaf] * num_kernels), conv)
        network = jax.vmap(network, (0, None))
    x = jax.ShapeDtypeStruct((64, 64, groups), jnp.float32)
    hlo = jax.jit(network).lower(conv, x).compile().as_text()
    computations = hlo.split("\n\n")
    assert any(" multiply(" in one for one in computations)
    assert not any(" multiply(" in one and " select(" in one for one in computations)


def test_integers_are_not_convolved_on_a_gpu():
    """XLA's GPU backend has no such convolution; `slide` makes one of every product of a window."""
    weight = jnp.arange(5, dtype=jnp.uint8)
    sliding = fc.slide(lambda x: weight @ x, (5, 2), axes=(0, 1))
    kernel = jnp.ones((3, 3, 2, 4), jnp.int32)
    apply = partial(fc.apply_conv, fc.ConvParams(kernel, None), groups=2)
    for function, shape in ((sliding, (12, 9)), (apply, (12, 9, 4))):
        traced = jax.jit(function).trace(jax.ShapeDtypeStruct(shape, jnp.uint8))
        assert "convolution" not in traced.lower(lowering_platforms=("cuda",)).as_text()
