"""The fully connected layer by hand: every number it computes, written out.

Run it with `python examples/linear_by_hand.py`.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

import fclayers as fc


def one_output() -> float:
    """A layer with two inputs and one output, on one sample."""
    params = fc.LinearParams(
        weight=jnp.array([[0.1098], [-0.5404]]),
        bias=jnp.array([-0.4456]),
    )
    x = jnp.array([1.0, 2.0])

    print("A layer from 2 features to 1")
    print("============================")
    print(f"input   x = {_format(x)}")
    print(f"weight  W = {_format(params.weight[:, 0])}")
    print(f"bias    b = {params.bias[0]:.4f}")
    print()
    print("The output is the sum of the products, and the bias:")
    products = x * params.weight[:, 0]
    print(f"  x1·W1 = {x[0]:g} · {params.weight[0, 0]:.4f} = {products[0]:.4f}")
    print(f"  x2·W2 = {x[1]:g} · {params.weight[1, 0]:.4f} = {products[1]:.4f}")
    by_hand = products[0] + products[1] + params.bias[0]
    print(f"  y     = {products[0]:.4f} + {products[1]:.4f} + {params.bias[0]:.4f} = {by_hand:.4f}")
    y = fc.apply_linear(params, x)
    print(f"apply_linear(params, x) = {y[0]:.4f}")
    np.testing.assert_allclose(y[0], by_hand, rtol=1e-6)
    return float(y[0])


def a_batch() -> jax.Array:
    """A layer with five inputs and ten outputs, on a batch of three samples."""
    params = fc.init_linear(jax.random.key(0), 5, 10)
    x = jnp.array(
        [
            [0.1, 0.2, 0.3, 0.3, 0.3],
            [0.4, 0.5, 0.6, 0.6, 0.6],
            [0.7, 0.8, 0.9, 0.9, 0.9],
        ]
    )

    print()
    print("A layer from 5 features to 10, on 3 samples at once")
    print("===================================================")
    print(f"X: 3 samples × 5 features  {x.shape}")
    print(_format(x))
    print(f"W: 5 features × 10 outputs {params.weight.shape}")
    print(_format(params.weight))
    print(f"b: 10 outputs {params.bias.shape}")
    print(_format(params.bias))
    print()
    print("X @ W + b, written out: each output is a row of X times a column of W, plus its bias")
    y = fc.apply_linear(params, x)
    terms = " + ".join(f"{x[0, i]:.1f}·({params.weight[i, 0]:.3f})" for i in range(5))
    print(f"  y[0, 0] = {terms} + ({params.bias[0]:.3f}) = {y[0, 0]:.4f}")
    print()
    print(f"apply_linear(params, X)    {y.shape}")
    print(_format(y))
    np.testing.assert_allclose(y, x @ params.weight + params.bias, rtol=1e-5)
    print("is X @ W + b: yes")
    for row, sample in zip(y, x, strict=True):
        np.testing.assert_allclose(fc.apply_linear(params, sample), row, rtol=1e-5)
    print("and each row is the layer on that sample alone: yes")
    return y


def _format(array: jax.Array) -> str:
    return np.array2string(np.asarray(array), precision=4, suppress_small=True, max_line_width=100)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    one_output()
    a_batch()
