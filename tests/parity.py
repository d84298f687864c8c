"""The parity cases: inputs as NumPy arrays, in PyTorch's layout, and this library's results.

`tests/golden/linear.npz` holds PyTorch's results for them; `tests/peers` computes them live.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import fclayers as fc

Arrays = dict[str, np.ndarray]


class Case(NamedTuple):
    """A layer's kind and arrays: `weight` and `bias` as PyTorch stores them, inputs, cotangent."""

    name: str
    kind: str
    arrays: Arrays


def make_cases() -> list[Case]:
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    def linear(name: str, batch: tuple[int, ...], inputs: int, outputs: int, bias: bool) -> Case:
        arrays = {"weight": draw(outputs, inputs), "x": draw(*batch, inputs)}
        arrays |= {"bias": draw(outputs)} if bias else {}
        return Case(name, "linear", arrays | {"cotangent": draw(*batch, outputs)})

    def bilinear(name: str, batch: tuple[int, ...], in1: int, in2: int, outputs: int) -> Case:
        arrays = {"weight": draw(outputs, in1, in2), "bias": draw(outputs)}
        arrays |= {"x1": draw(*batch, in1), "x2": draw(*batch, in2)}
        return Case(name, "bilinear", arrays | {"cotangent": draw(*batch, outputs)})

    return [
        linear("one_sample", (), 7, 5, bias=True),
        linear("batch_of_one", (1,), 12, 9, bias=True),
        linear("batch", (6,), 8, 11, bias=True),
        linear("no_bias", (4,), 5, 3, bias=False),
        linear("two_batch_axes", (3, 4), 6, 2, bias=True),
        linear("one_output", (5,), 9, 1, bias=True),
        linear("empty_batch", (0,), 4, 3, bias=True),
        bilinear("bilinear", (5,), 3, 4, 6),
        bilinear("bilinear_one_sample", (), 4, 2, 3),
    ]


def fclayers_results(case: Case) -> Arrays:
    """The output and, as `d_<name>`, the gradient of every input, all in PyTorch's layout."""
    arrays = {name: jnp.asarray(array) for name, array in case.arrays.items()}
    cotangent = arrays.pop("cotangent")

    def apply(arrays: dict[str, jax.Array]) -> jax.Array:
        params = fc.LinearParams(jnp.moveaxis(arrays["weight"], 0, -1), arrays.get("bias"))
        if case.kind == "bilinear":
            return fc.apply_bilinear(fc.BilinearParams(*params), arrays["x1"], arrays["x2"])
        return fc.apply_linear(params, arrays["x"])

    y, pullback = jax.vjp(apply, arrays)
    (gradients,) = pullback(cotangent)
    return {"y": np.asarray(y)} | {f"d_{name}": np.asarray(g) for name, g in gradients.items()}


def assert_same(actual: Arrays, expected: Arrays) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(actual[name], expected[name], rtol=1e-5, atol=1e-5, err_msg=name)
