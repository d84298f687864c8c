"""Bad input: a clear error, at trace time, that names the function and what came."""

import jax
import jax.numpy as jnp
import pytest
from bad_calls import bad_calls

import fclayers as fc

KEY = jax.random.key(0)
LAYER = fc.init_linear(KEY, 4, 3)
CONV_LIKE = fc.init_linear(KEY, (2, 4), 3)
MLP = fc.init_mlp(KEY, [4, 5, 3])
BILINEAR = fc.init_bilinear(KEY, 4, 5, 3)
X = jnp.ones((2, 4))

CASES = {
    "wrong feature count": (
        lambda: fc.apply_linear(LAYER, jnp.ones((2, 5))),
        ValueError,
        r"apply_linear: x of shape \(2, 5\) has features \(5,\) along axis=-1, "
        r"but the weight of shape \(4, 3\) takes \(4,\)",
    ),
    "wrong number of feature axes": (
        lambda: fc.apply_linear(CONV_LIKE, X),
        ValueError,
        r"apply_linear: x of shape \(2, 4\) has features \(4,\) .* takes \(2, 4\)",
    ),
    "axes in the wrong order": (
        lambda: fc.apply_linear(CONV_LIKE, X, axis=(1, 0)),
        ValueError,
        r"apply_linear: .* features \(4, 2\) along axis=\(1, 0\).* takes \(2, 4\)",
    ),
    "axis out of range": (
        lambda: fc.apply_linear(LAYER, X, axis=2),
        ValueError,
        r"apply_linear: axis 2 is not an axis of x, whose shape is \(2, 4\)",
    ),
    "negative axis out of range": (
        lambda: fc.apply_linear(LAYER, X, axis=(-3,)),
        ValueError,
        r"apply_linear: axis -3 is not an axis",
    ),
    "axis not an integer": (
        lambda: fc.apply_linear(LAYER, X, axis=1.0),
        ValueError,
        r"apply_linear: axis 1\.0 is not an axis",
    ),
    "axis a boolean": (
        lambda: fc.apply_linear(LAYER, X, axis=True),
        ValueError,
        "apply_linear: axis True is not an axis",
    ),
    "integer compute dtype": (
        lambda: fc.apply_linear(LAYER, X, dtype=jnp.int32),
        ValueError,
        "apply_linear: dtype must be floating-point or complex",
    ),
    "axis repeated": (
        lambda: fc.apply_linear(LAYER, X, axis=(1, -1)),
        ValueError,
        r"apply_linear: axis \(1, -1\) names an axis of x twice",
    ),
    "scalar x": (
        lambda: fc.apply_linear(LAYER, 3.0),
        ValueError,
        r"apply_linear: axis -1 is not an axis of x, whose shape is \(\)",
    ),
    "x a list": (
        lambda: fc.apply_linear(LAYER, [1.0, 2.0]),
        TypeError,
        "apply_linear: expected x to be an array, got list",
    ),
    "x a string": (lambda: fc.apply_linear(LAYER, "x"), TypeError, "apply_linear.*'str'"),
    "params a dict": (
        lambda: fc.apply_linear(LAYER._asdict(), X),
        TypeError,
        "apply_linear: expected params to be LinearParams, got dict",
    ),
    "params a plain tuple": (
        lambda: fc.apply_linear(tuple(LAYER), X),
        TypeError,
        "apply_linear: expected params to be LinearParams, got tuple",
    ),
    "params and x swapped": (
        lambda: fc.apply_linear(X, LAYER),
        TypeError,
        r"apply_linear: expected params to be LinearParams, got an array of shape \(2, 4\)",
    ),
    "weight and bias swapped": (
        lambda: fc.apply_linear(fc.LinearParams(LAYER.bias, LAYER.weight), X),
        ValueError,
        r"apply_linear: the bias must .* weight of shape \(3,\) and a bias of shape \(4, 3\)",
    ),
    "bias of another layer": (
        lambda: fc.apply_linear(LAYER._replace(bias=jnp.ones(5)), X),
        ValueError,
        r"apply_linear: the bias must .* weight of shape \(4, 3\) and a bias of shape \(5,\)",
    ),
    "no weight": (
        lambda: fc.apply_linear(fc.LinearParams(None, None), X),
        TypeError,
        "apply_linear: expected the weight to be an array, LowRank, .* got NoneType",
    ),
    "fractional features": (
        lambda: fc.init_linear(KEY, 4.0, 3),
        ValueError,
        r"init_linear: in_features must be an integer >= 0, got 4\.0",
    ),
    "negative features": (
        lambda: fc.init_linear(KEY, 4, (2, -3)),
        ValueError,
        "init_linear: out_features must be an integer >= 0, got -3",
    ),
    "boolean features": (
        lambda: fc.init_linear(KEY, True, 3),
        ValueError,
        "init_linear: in_features must be an integer >= 0, got True",
    ),
    "features in a string": (
        lambda: fc.init_linear(KEY, "43", 3),
        ValueError,
        "init_linear: in_features must be an integer >= 0, got '43'",
    ),
    "traced features": (
        lambda: jax.jit(lambda n: fc.init_linear(KEY, n, 3))(4),
        ValueError,
        "init_linear: in_features must be an integer >= 0, got .*Trace",
    ),
    "integer parameters": (
        lambda: fc.init_linear(KEY, 4, 3, dtype=jnp.int32),
        ValueError,
        "init_linear: dtype must be floating-point or complex, got .*int32",
    ),
    "seed for a key": (
        lambda: fc.init_linear(0, 4, 3),
        TypeError,
        "init_linear: expected one key from jax.random.key, got 0 of type int",
    ),
    "array for a key": (
        lambda: fc.init_linear(jnp.ones(2), 4, 3),
        TypeError,
        r"init_linear: expected one key .* shape \(2,\) and dtype float32",
    ),
    "several keys": (
        lambda: fc.init_mlp(jax.random.split(KEY), [4, 3]),
        TypeError,
        r"init_mlp: expected one key .* shape \(2,\) and dtype key",
    ),
    "one size": (
        lambda: fc.init_mlp(KEY, [4]),
        ValueError,
        r"init_mlp: sizes must have at least two entries, \[in, hidden..., out\], got \[4\]",
    ),
    "sizes a number": (
        lambda: fc.init_mlp(KEY, 4),
        ValueError,
        "init_mlp: sizes must have at least two entries.* got 4",
    ),
    "negative size": (
        lambda: fc.init_mlp(KEY, [4, -5, 3]),
        ValueError,
        r"init_mlp: sizes\[1\] must be an integer >= 0, got -5",
    ),
    "dropout without a key": (
        lambda: fc.apply_mlp(MLP, X, dropout_rate=0.5),
        ValueError,
        "apply_mlp: dropout_rate=0.5 needs a key, got key=None",
    ),
    "dropout with a seed": (
        lambda: fc.apply_mlp(MLP, X, dropout_rate=0.5, key=0),
        TypeError,
        r"apply_mlp: expected one key from jax.random.key, got an array of shape \(\)",
    ),
    "dropout of everything": (
        lambda: fc.apply_mlp(MLP, X, dropout_rate=1.0, key=KEY),
        ValueError,
        r"apply_mlp: dropout_rate must be in \[0, 1\), got 1\.0",
    ),
    "one layer for an mlp": (
        lambda: fc.apply_mlp(LAYER, X),
        TypeError,
        "apply_mlp: expected params to be a sequence of layers .* got LinearParams",
    ),
    "no layers": (
        lambda: fc.apply_mlp((), X),
        ValueError,
        "apply_mlp: expected at least one layer",
    ),
    "mlp of wrong features": (
        lambda: fc.apply_mlp(MLP, jnp.ones((2, 6))),
        ValueError,
        r"apply_linear: x of shape \(2, 6\) .* takes \(4,\)",
    ),
    "bilinear features swapped": (
        lambda: fc.apply_bilinear(BILINEAR, jnp.ones((2, 5)), jnp.ones((2, 4))),
        ValueError,
        r"apply_bilinear: expected x1 .* got shapes \(2, 5\), \(2, 4\) and \(4, 5, 3\)",
    ),
    "bilinear batches differ": (
        lambda: fc.apply_bilinear(BILINEAR, jnp.ones((2, 4)), jnp.ones((3, 5))),
        ValueError,
        r"apply_bilinear: expected x1 .* got shapes \(2, 4\), \(3, 5\)",
    ),
    "bilinear of a linear layer": (
        lambda: fc.apply_bilinear(LAYER, X, X),
        TypeError,
        "apply_bilinear: expected params to be BilinearParams, got LinearParams",
    ),
    "bilinear of a matrix": (
        lambda: fc.apply_bilinear(fc.BilinearParams(*LAYER), X, X),
        ValueError,
        r"apply_bilinear: expected .* weight \(in1, in2, out\), got .* \(4, 3\)",
    ),
    "linear of a convolution": (
        lambda: fc.apply_linear(fc.init_conv(KEY, (1, 1), 4, 3), X),
        TypeError,
        "apply_linear: .* LinearParams, got ConvParams; conv_to_linear converts a convolution",
    ),
    "linear of a bilinear layer": (
        lambda: fc.apply_linear(BILINEAR, X),
        TypeError,
        "apply_linear: .* LinearParams, got BilinearParams; apply_bilinear applies",
    ),
    "bilinear bias of two axes": (
        lambda: fc.apply_bilinear(BILINEAR._replace(bias=BILINEAR.weight[0]), X, jnp.ones((2, 5))),
        ValueError,
        r"apply_bilinear: expected a weight \(in1, in2, out\) and a bias \(out,\), got .* \(5, 3\)",
    ),
    "bilinear features a pair": (
        lambda: fc.init_bilinear(KEY, (2, 3), 4, 5),
        ValueError,
        r"init_bilinear: in1_features must be an integer >= 0, got \(2, 3\)",
    ),
}


test_error = bad_calls(CASES)


@pytest.mark.parametrize("name", CASES)
def test_error_under_jit(name):
    call, error, message = CASES[name]
    with pytest.raises(error, match=message):
        jax.eval_shape(call)
