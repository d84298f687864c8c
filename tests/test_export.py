"""export_apply and load_exported: the same function in another process, and no half files."""

import os
import subprocess
import sys
from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forms import FORMS
from jax import lax

import fclayers as fc
from fclayers.export import export_apply, load_exported

pytestmark = pytest.mark.slow

KEY = jax.random.key(0)
MLP = fc.init_mlp(KEY, [48, 16, 7])
X = jax.random.normal(jax.random.key(1), (5, 48))
EVERYWHERE = ("cpu", "cuda", "rocm", "tpu")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "network.jax"


def mlp_and_convs(params, x):
    """A head on flat features, and as convolutions on the same maps."""
    mlp, convs = params
    scores = fc.apply_conv(convs[1], jax.nn.relu(fc.apply_conv(convs[0], x)))
    return {"mlp": fc.apply_mlp(mlp, x[:, :4, :4].reshape(len(x), -1)), "convs": scores}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_exported_for_every_platform(form, path):
    mlp = tuple(FORMS[form](layer) for layer in MLP)
    if "block" in form and "int8" not in form:
        mlp = (fc.materialize(mlp[0]), mlp[1])  # whose blocks are not the channels'
    params, x = (mlp, fc.mlp_to_conv(mlp, (4, 4))), jax.random.normal(KEY, (5, 6, 5, 3))
    export_apply(mlp_and_convs, params, x[:1], path, platforms=EVERYWHERE)
    read = jax.export.deserialize(bytearray(path.read_bytes()))
    assert read.platforms == EVERYWHERE
    expected = jax.jit(mlp_and_convs)(params, x)
    chex.assert_trees_all_close(load_exported(path)(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1, 300])
def test_batches_of_any_size(size, path):
    shape = jax.ShapeDtypeStruct((4, 48), jnp.float32)
    export_apply(fc.apply_mlp, MLP, shape, path)
    x = np.random.default_rng(size).standard_normal((size, 48), np.float32)
    y = load_exported(path)(x)
    assert isinstance(y, jax.Array)
    np.testing.assert_allclose(y, fc.apply_mlp(MLP, x), rtol=1e-5, atol=1e-6)


def test_served_without_this_library(path):
    export_apply(fc.apply_mlp, MLP, X, path)
    script = """
import sys
import jax
exported = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
y = exported.call(jax.numpy.ones((3, 48)))
assert "fclayers" not in sys.modules
print(y.shape, *map(float, y[2]))
"""
    # In a folder of its own, with nothing but what is installed on its path.
    run = subprocess.run(
        [sys.executable, "-I", "-c", script, str(path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=path.parent,
    )
    shape, numbers = run.stdout.split(")")
    assert shape == "(3, 7"
    expected = fc.apply_mlp(MLP, jnp.ones(48))
    np.testing.assert_allclose([float(n) for n in numbers.split()], expected, rtol=1e-5, atol=1e-6)


def test_the_file_is_as_large_as_the_weights(path):
    layer = fc.init_linear(KEY, 500, 1000)
    for params in (layer, fc.quantize(layer)):
        export_apply(fc.apply_linear, params, jnp.ones((1, 500)), path)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        assert size < path.stat().st_size < size + 50_000


def small_classifier(params, window):
    conv, head = params
    features = fc.max_pool(jax.nn.relu(fc.apply_conv(conv, window[..., None])), (2, 2))
    return fc.apply_mlp(head, features.reshape(-1))


def probabilities(params, x):
    logits = fc.apply_mlp(params, x["features"].astype(jnp.float32)) + x["offsets"][:, None]
    values, classes = fc.linear_top_k(params[-1], jax.nn.relu(logits[:, :1] * jnp.ones(16)), 3)
    return jax.nn.softmax(logits), [values, (classes,)]


NETWORKS = {
    "slide over images": (
        lambda params, images: jax.vmap(fc.slide(small_classifier, (10, 8)), (None, 0))(
            params, images
        ),
        (fc.init_conv(KEY, (3, 3), 1, 4), fc.init_mlp(KEY, [4 * 3 * 4, 8, 5])),
        jax.random.normal(KEY, (3, 16, 12)),
    ),
    "convolutions with fewer products": (
        lambda params, images: fc.apply_conv(
            params, jax.vmap(partial(fc.apply_conv, params))(images)
        ),
        fc.init_conv(KEY, (3, 3), 32, 32),
        jax.random.normal(KEY, (3, 28, 28, 32)),
    ),
    "trees of several dtypes": (
        probabilities,
        MLP,
        {"features": X.astype(jnp.bfloat16), "offsets": jnp.arange(5.0)},
    ),
    "integers, and parameters in NumPy": (
        lambda table, ids: jnp.asarray(table)[ids].sum(1),
        np.arange(24, dtype=np.float32).reshape(8, 3),
        jnp.array([[0, 7], [3, 3], [1, 2]]),
    ),
    "parameters that are not all arrays": (
        lambda params, x: fc.apply_mlp(params["layers"], x) * params["factor"],
        {"layers": MLP, "factor": 0.5, "name": "head"},
        X,
    ),
    "loops and conditions": (
        lambda params, x: lax.fori_loop(
            0, 3, lambda i, x: jnp.where(x > i, fc.apply_linear(params, x), x), x
        ),
        fc.init_linear(KEY, 48, 48),
        X,
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_all_kinds(name, path):
    fn, params, x = NETWORKS[name]
    export_apply(fn, params, x, path, platforms=("cpu", "tpu"))
    expected = jax.jit(lambda x: fn(params, x))(x)
    chex.assert_trees_all_close(load_exported(path)(x), expected, rtol=1e-4, atol=1e-4)


def test_64_bits(path):
    with jax.enable_x64(True):
        mlp = fc.init_mlp(KEY, [4, 3, 2], dtype=jnp.float64)
        x = np.random.default_rng(0).standard_normal((6, 4))
        export_apply(fc.apply_mlp, mlp, x, path)
        y = load_exported(path)(x)
    hidden = np.maximum(x @ np.asarray(mlp[0].weight) + np.asarray(mlp[0].bias), 0)
    expected = hidden @ np.asarray(mlp[1].weight) + np.asarray(mlp[1].bias)
    assert y.dtype == jnp.float64
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)


def test_what_was_written_last_is_there_or_what_was_before(path, monkeypatch):
    export_apply(fc.apply_mlp, MLP, X, path)
    before = path.read_bytes()

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space left"):
            export_apply(fc.apply_mlp, fc.quantize(MLP), X, path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]
    export_apply(fc.apply_mlp, fc.quantize(MLP), X, path)
    assert path.read_bytes() != before
    with pytest.raises(FileNotFoundError, match="missing"):
        export_apply(fc.apply_mlp, MLP, X, path.parent / "missing" / "network.jax")


def test_truncated_and_damaged_files_are_refused(path):
    export_apply(fc.apply_mlp, MLP, X, path)
    sound = path.read_bytes()
    rng = np.random.default_rng(0)
    broken = [b"", sound[:10], sound[:-1], sound + b"\0", bytes(len(sound)), sound[:-32]]
    for _ in range(300):
        mutated = bytearray(sound)
        place = rng.integers(len(sound))
        mutated[place] ^= 1 << rng.integers(8)
        broken += [bytes(mutated), sound[:place]]
    for data in broken:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"load_exported: .*network\.jax is truncated"):
            load_exported(path)
    path.write_bytes(sound)
    assert load_exported(path)(X).shape == (5, 7)
    with pytest.raises(FileNotFoundError):
        load_exported(path.parent / "missing")


class Batch(NamedTuple):
    features: jax.Array


BAD_EXPORTS = {
    "a scalar in the example": (
        (fc.apply_mlp, MLP, {"a": X, "b": jnp.ones(())}),
        ValueError,
        r"export_apply: example\.b must have a batch axis, got an array of shape \(\)",
    ),
    "two batch sizes": (
        (fc.apply_mlp, MLP, (X, X[:3])),
        ValueError,
        r"export_apply: expected arrays in example with one batch size, got \[3, 5\]",
    ),
    "no array": ((fc.apply_mlp, MLP, {}), ValueError, r"one batch size, got \[\]"),
    "an example of text": (
        (fc.apply_mlp, MLP, "x"),
        TypeError,
        "export_apply: expected example to be an array, got 'x' of type str",
    ),
    "wrong features": (
        (fc.apply_mlp, MLP, X[:, :9]),
        ValueError,
        r"export_apply: fun must take a batch of any size, with 1 it raised ValueError: "
        r"apply_linear: x of shape \(1, 9\)",
    ),
    "a function of five rows": (
        (lambda params, x: fc.apply_mlp(params, x.reshape(5, 48)), MLP, X),
        ValueError,
        "export_apply: fun must take a batch of any size, with 1 it raised TypeError",
    ),
    "a mean over the batch": (
        (lambda params, x: fc.apply_mlp(params, x).mean(), MLP, X),
        ValueError,
        r"export_apply: the results must have the batch .* for a batch of 1 result is .* \(\)",
    ),
    "a mean that keeps the axis": (
        (lambda params, x: {"y": fc.apply_mlp(params, x).mean(0, keepdims=True)}, MLP, X),
        ValueError,
        r"export_apply: .* for a batch of 2 result\.y is an array of shape \(1, 7\)",
    ),
    "shapes for parameters": (
        (fc.apply_mlp, jax.eval_shape(lambda: MLP), X),
        TypeError,
        r"export_apply: a parameter has a shape \(48, 16\), but no values",
    ),
    "a NamedTuple": (
        (lambda params, x: fc.apply_mlp(params, x.features), MLP, Batch(X)),
        ValueError,
        "export_apply: the function cannot be written: .*unregistered type.*Batch",
    ),
}


@pytest.mark.parametrize("name", BAD_EXPORTS)
def test_what_cannot_be_exported(name, path):
    (fn, params, example), error, message = BAD_EXPORTS[name]
    with pytest.raises(error, match=f"(?s){message}"):
        export_apply(fn, params, example, path)
    assert not path.exists()


@pytest.mark.parametrize("platforms", ["cpu", ("gpu",), ("cpu", "abacus"), ()])
def test_unknown_platforms(platforms, path):
    with pytest.raises(ValueError, match=r"export_apply: platforms must be some of \('cpu',"):
        export_apply(fc.apply_mlp, MLP, X, path, platforms=platforms)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (X[:, :9], r"expected x to be an array of shape \(b, 48\) and dtype float32, got .*5, 9"),
        (X[0], r"expected x to be .*, got an array of shape \(48,\)"),
        (X.astype(int), "expected x to be .*, got an array of shape .* and dtype int32"),
        ((X, X), "expected x to have the structure"),
        (X[:0], r"expected one batch size b >= 1, got \[0\]"),
    ],
)
def test_what_an_exported_function_does_not_take(x, message, path):
    export_apply(fc.apply_mlp, MLP, X, path)
    with pytest.raises(ValueError, match=rf"load_exported: .*network\.jax: {message}"):
        load_exported(path)(x)


def test_another_platform(path):
    export_apply(fc.apply_mlp, MLP, X, path, platforms=("tpu",))
    with pytest.raises(ValueError, match=r"exported for platforms '\('tpu'"):
        load_exported(path)(X)


def test_a_file_is_read_again_and_again(path):
    """Loading leaves nothing behind that a second function of the same name would find."""
    export = partial(export_apply, fc.apply_mlp, example=X, path=path)
    loaded = []
    for factor in (1.0, 2.0):
        export(jax.tree.map(lambda a, factor=factor: factor * a, MLP))
        loaded.append(load_exported(path))
    assert not np.allclose(loaded[0](X), loaded[1](X))
    np.testing.assert_allclose(loaded[0](X), fc.apply_mlp(MLP, X), rtol=1e-5, atol=1e-6)
