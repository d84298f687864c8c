"""Sharded layers: specifications, errors, and on eight forced devices, equality and traffic.

Devices are forced before JAX starts, so that this file is also a script: with eight devices it runs
the functions named `check_...`, of which each is a test here.
"""

import json
import os
import re
import subprocess
import sys
import time
import traceback
import warnings
from functools import partial
from math import prod
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bad_calls import bad_calls
from forms import FORMS
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fclayers as fc

KEY = jax.random.key(0)
SHAPES = [(8, 1), (4, 2), (2, 4), (1, 8)]
# With EVERY_MESH=1 all shapes and all forms with both types of axes, else not all with both.
EVERY_MESH = os.environ.get("EVERY_MESH") == "1"
TYPES = AxisType.Auto, AxisType.Explicit


def make_mesh(shape, axis_type):
    return jax.make_mesh(shape, ("data", "model"), axis_types=(axis_type,) * 2)


def meshes(*shapes):
    return [make_mesh(shape, axis_type) for shape in shapes for axis_type in TYPES]


def meshes_of_all_shapes():
    if EVERY_MESH:
        return meshes(*SHAPES)
    return [make_mesh(shape, TYPES[i % 2]) for i, shape in enumerate(SHAPES)]


def cases_for(mesh, cases):
    """Auto axes need nothing of the library: two forms, unless all are asked for."""
    few = not mesh.explicit_axes and not EVERY_MESH
    return [case for case in cases if not few or case[0] in ("plain", "adapted int8")]


def put(mesh, array, *spec):
    return jax.device_put(array, NamedSharding(mesh, P(*spec)))


def assert_close(actual, expected):
    """Floating-point leaves; those of integers have no gradients."""
    pairs = zip(*map(jax.tree.leaves, (actual, expected)), strict=True)
    for ours, theirs in pairs:
        if ours.dtype != jax.dtypes.float0:
            scale = max(1, np.abs(theirs).max(initial=0))
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * scale)


def assert_sharded_alike(actual, expected):
    for ours, theirs in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim)


def traffic(function, *args):
    """The collectives of the compiled function, each with the bytes of its results on a device."""
    text = jax.jit(function).lower(*args).compile().as_text()
    names = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    found = []
    for results, name in re.findall(rf"= (.*?) ({names})(?:-start)?\(", text):
        arrays = re.findall(r"\b[a-z]+(\d+)\[([\d,]*)\]", results)
        counts = [prod(map(int, filter(None, shape.split(",")))) for _, shape in arrays]
        found.append((name, sum(int(b) // 8 * n for (b, _), n in zip(arrays, counts, strict=True))))
    return found


def check_five_adam_steps():
    mlp = fc.init_mlp(KEY, [16, 32, 24, 8])
    x, y = jax.random.normal(KEY, (16, 16)), jax.random.normal(KEY, (16, 8))
    optimizer = optax.adam(1e-2)

    @jax.jit
    def train(params, x, y):
        def step(carry, _):
            params, opt_state = carry
            gradients = jax.grad(lambda p: jnp.square(fc.apply_mlp(p, x) - y).mean())(params)
            updates, opt_state = optimizer.update(gradients, opt_state)
            return (optax.apply_updates(params, updates), opt_state), gradients

        carry = params, optimizer.init(params)
        return fc.apply_mlp(params, x), jax.lax.scan(step, carry, length=5)

    expected = train(mlp, x, y)
    batch = P("data", None), P("data", None)
    cases = [(mesh, fc.mlp_specs(mlp)) for mesh in meshes_of_all_shapes()]
    fsdp = fc.partition_specs(mlp, "fsdp", mesh_axis="data")
    cases += [(mesh, fsdp) for mesh in (meshes((8, 1)) if EVERY_MESH else meshes((8, 1))[1:])]
    for mesh, specs in cases:
        with jax.set_mesh(mesh):
            args = fc.shard((mlp, x, y), mesh, (specs, *batch))
            actual = train(*args)
        assert_close(actual, expected)
        if mesh.explicit_axes:
            (params, (adam, _)), gradients = actual[1]
            for tree in (params, adam.mu, jax.tree.map(lambda g: g[0], gradients)):
                assert_sharded_alike(tree, args[0])


def check_the_state_of_an_optimizer_is_sharded_as_the_parameters():
    mlp = fc.init_mlp(KEY, [16, 32, 24])
    for mesh in meshes((4, 2)):
        with jax.set_mesh(mesh):
            params = fc.shard(mlp, mesh, fc.mlp_specs(mlp))
            assert_sharded_alike(optax.adam(1e-2).init(params)[0].mu, params)


def check_every_form_of_the_layer():
    layer = fc.init_linear(KEY, (4, 6), (8, 2))
    x = jax.random.normal(KEY, (8, 4, 6))

    def run_one(form, kind, params, x):
        y, pull = jax.vjp(lambda *args: fc.apply_linear(*args, axis=(1, 2)), params, x)
        if jax.typeof(y).sharding.mesh.explicit_axes:
            outputs = (None if kind in ("row", "replicated") else "model"), None
            if "block" in form and "int8" not in form:
                outputs = None, "model"  # the blocks divide the last axis
            assert jax.typeof(y).sharding.spec == P("data", *outputs)
        return y, pull(jnp.sin(y))

    @jax.jit
    def run(cases):
        return {key: run_one(*key, *args) for key, args in cases.items()}

    forms = {form: make(layer) for form, make in FORMS.items()}
    # The gradient of a normalized scale is zero but for rounding.
    names = [(form, k) for form in FORMS if form != "normalized int8" for k in ("column", "row")]
    names += [("plain", "replicated"), ("plain", "fsdp")]
    expected = run({(form, kind): (forms[form], x) for form, kind in names})
    for mesh in meshes((4, 2)):

        def place(form, kind, mesh=mesh):
            features = "model" if kind == "row" else None
            specs = fc.partition_specs(forms[form], kind), P("data", features, None)
            return fc.shard((forms[form], x), mesh, specs)

        with jax.set_mesh(mesh):
            actual = run({case: place(*case) for case in cases_for(mesh, names)})
        assert_close(actual, {key: expected[key] for key in actual})


def check_under_vmap_map_and_without_a_mesh_in_context():
    layer = fc.init_linear(KEY, 16, 8)
    x = jax.random.normal(KEY, (4, 8, 16))
    expected = fc.apply_linear(layer, x)
    labels = jnp.arange(32).reshape(4, 8) % 8
    losses = fc.linear_cross_entropy(layer, x, labels)
    for mesh in meshes((4, 2)):
        for kind in ("column", "row"):
            sharded = fc.shard(layer, mesh, fc.partition_specs(layer, kind))
            inputs = put(mesh, x, "data", None, "model" if kind == "row" else None)
            assert_close(fc.apply_linear(sharded, inputs), expected)
            assert_close(fc.linear_cross_entropy(sharded, inputs, labels), losses)
            with jax.set_mesh(mesh):
                mapped = jax.jit(jax.vmap(fc.apply_linear, (None, 0)))(sharded, inputs)
                assert_close(mapped, expected)
                inputs = put(mesh, x, None, "data", None)
                assert_close(jax.lax.map(partial(fc.apply_linear, sharded), inputs), expected)


def check_the_bilinear_layer():
    layer = fc.init_bilinear(KEY, 4, 6, 8)
    x1, x2 = jax.random.normal(KEY, (8, 4)), jax.random.normal(KEY, (8, 6))
    expected = fc.apply_bilinear(layer, x1, x2)
    for mesh in meshes((4, 2)):
        for kind in ("column", "row"):
            sharded = fc.shard(layer, mesh, fc.partition_specs(layer, kind))
            inputs = put(mesh, x1, "data", None), put(mesh, x2, "data", None)
            assert_close(fc.apply_bilinear(sharded, *inputs), expected)


def check_convolutions():
    conv = fc.init_conv(KEY, (3, 3), 4, 6)
    on_map = fc.init_linear(KEY, (3, 3, 4), 6)
    x = jax.random.normal(KEY, (8, 8, 10, 4))

    @jax.jit
    def run(cases):
        def run_one(params, x):
            y, pull = jax.vjp(partial(fc.apply_conv, padding=1), params, x)
            return fc.max_pool(y, (2, 2)), pull(jnp.sin(y))

        return {key: run_one(*args) for key, args in cases.items()}

    layers = {form: fc.linear_to_conv(make(on_map)) for form, make in FORMS.items()}
    layers["plain"] = conv
    # The gradient of a normalized scale is zero but for rounding.
    cases = [(form, "column", P("data")) for form in FORMS if form != "normalized int8"]
    cases += [("plain", "row", P("data")), ("plain", "fsdp", P("data"))]
    cases += [("plain", "replicated", P("data", "model"))]
    expected = run({case: (layers[case[0]], x) for case in cases})
    for mesh in meshes((4, 2)):

        def place(form, kind, spec, mesh=mesh):
            return fc.shard((layers[form], x), mesh, (fc.partition_specs(layers[form], kind), spec))

        with jax.set_mesh(mesh):
            actual = run({case: place(*case) for case in cases_for(mesh, cases)})
        assert_close(actual, {key: expected[key] for key in actual})


def check_cross_entropy_and_predictions():
    layer = fc.init_linear(KEY, 16, 48)
    x = jax.random.normal(KEY, (8, 3, 16))
    labels = jax.random.randint(KEY, (8, 3), 0, 48)
    where = (jnp.arange(24) % 5 != 0).reshape(8, 3)

    @jax.jit
    def run(cases):
        def loss(params, x, labels, where):
            arguments = {"chunk_size": 10, "label_smoothing": 0.1, "z_loss": 0.01}
            return fc.linear_cross_entropy(
                params, x, labels, where=where, reduction="mean", **arguments
            )

        found = {
            key: jax.value_and_grad(loss, (0, 1), allow_int=True)(*args)
            for key, args in cases.items()
        }
        params, x, *_ = cases["plain", "column"]
        found["top", "k"] = (
            fc.linear_top_k(params, x, 30, chunk_size=10),
            fc.linear_argmax(params, x),
        )
        return found

    forms = {form: make(layer) for form, make in FORMS.items()}
    few = "plain", "low rank", "int8 in blocks", "adapted int8"
    names = [(form, "column") for form in (FORMS if EVERY_MESH else few)]
    names += [("plain", "row"), ("plain", "fsdp")]
    expected = run({(form, kind): (forms[form], x, labels, where) for form, kind in names})
    for mesh in meshes((4, 2)):
        batch_specs = P("data", None, None), P("data", None), P("data", None)

        def place(form, kind, mesh=mesh, batch_specs=batch_specs):
            specs = fc.partition_specs(forms[form], kind), *batch_specs
            return fc.shard((forms[form], x, labels, where), mesh, specs)

        with jax.set_mesh(mesh):
            actual = run({case: place(*case) for case in cases_for(mesh, names)})
        assert_close(actual, {key: expected[key] for key in actual})


def check_a_shard_without_any_possible_class():
    layer = fc.init_linear(KEY, 16, 48)
    layer = layer._replace(bias=jnp.where(jnp.arange(48) < 20, layer.bias, -jnp.inf))
    x, labels = jax.random.normal(KEY, (8, 16)), jnp.arange(8).at[0].set(48)
    where = jnp.arange(8) > 0

    def loss(params, x, labels, where):
        return fc.linear_cross_entropy(params, x, labels, where=where, reduction="sum")

    run = jax.jit(jax.value_and_grad(loss, (0, 1)))
    expected = run(layer, x, labels, where)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(expected))
    for mesh in meshes((2, 4)):
        with jax.set_mesh(mesh):
            params = fc.shard(layer, mesh, fc.partition_specs(layer, "column"))
            batch = [put(mesh, a, "data") for a in (x, labels, where)]
            assert_close(run(params, *batch), expected)
            losses = fc.linear_cross_entropy(params, *batch[:2])
        np.testing.assert_array_equal(np.isnan(losses), ~where)


def check_cross_entropy_leaves_the_classes_where_they_are():
    layer = fc.init_linear(KEY, 16, 4096)
    x, labels = jax.random.normal(KEY, (8, 16)), jnp.arange(8) * 500

    def loss(params, x, labels):
        return fc.linear_cross_entropy(params, x, labels, reduction="mean")

    expected = jax.value_and_grad(loss)(layer, x, labels)
    specs = fc.partition_specs(layer, "column"), P("data", None), P("data")
    for mesh in meshes((2, 4)):
        with jax.set_mesh(mesh):
            args = fc.shard((layer, x, labels), mesh, specs)
            told = loss
            if not mesh.explicit_axes:
                told = jax.sharding.explicit_axes(loss, in_sharding=specs)
            run = jax.value_and_grad(told)
            assert_close(jax.jit(run)(*args), expected)
            moved = traffic(run, *args)
        assert not [size for name, size in moved if name != "all-reduce"]
        gradients = sum(a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(args[0]))
        # Of every row the largest logit, the sum and the label's logit; and the loss.
        rows = 4 * 3 * len(labels) // 2
        assert sum(size for _, size in moved) == gradients + rows + 4


def check_heads_on_auto_axes_do_not_gather_the_classes():
    layer = fc.init_linear(KEY, 16, 4096)
    x, labels = jax.random.normal(KEY, (8, 16)), jnp.arange(8) * 500
    sizes = {"chunk_size": 256, "row_chunk_size": 4}

    def loss(params, x, labels):
        return fc.linear_cross_entropy(params, x, labels, reduction="mean", **sizes)

    def log_prob(params, x, labels):
        return sum(a.sum() for a in fc.linear_log_prob(params, x, labels, **sizes))

    auto = [mesh for mesh in meshes((2, 4)) if not mesh.explicit_axes]
    assert auto
    for mesh in auto:
        for transposed in (False, True):
            params, spec = layer, P(None, "model")
            if transposed:
                params, spec = layer._replace(weight=fc.Transposed(layer.weight.T)), P("model")
                spec = fc.Transposed(P("model", None))
            specs = fc.LinearParams(spec, P("model")), P("data", None), P("data")
            with jax.set_mesh(mesh):
                args = fc.shard((params, x, labels), mesh, specs)
                for function in (loss, log_prob):
                    run = jax.value_and_grad(function, (0, 1))
                    assert_close(jax.jit(run)(*args), run(params, x, labels))
                    assert {name for name, _ in traffic(run, *args)} == {"all-reduce"}


def check_other_functions_of_heads():
    layer, teacher = fc.init_linear(KEY, 16, 48), fc.init_linear(jax.random.key(1), 12, 48)
    x, x_teacher = jax.random.normal(KEY, (8, 3, 16)), jax.random.normal(KEY, (8, 3, 12))
    labels = jax.random.randint(KEY, (8, 3), 0, 48)
    soft, weights = jax.nn.softmax(jax.random.normal(KEY, (8, 3, 48))), jnp.arange(48) / 48

    @jax.jit
    def run(params, teacher, x, x_teacher, labels, soft, weights):
        explicit = jax.sharding.get_abstract_mesh().explicit_axes

        def loss(params, teacher, x, soft, weights):
            given = soft if explicit else lambda classes: soft[..., classes]
            found = [
                *fc.linear_log_prob(params, x, labels, temperature=0.7, chunk_size=10),
                fc.linear_cross_entropy(params, x, given, class_weights=weights, chunk_size=10),
                fc.linear_cross_entropy(
                    params, x, labels, class_weights=weights, label_smoothing=0.1, reduction="mean"
                ),
                *(
                    fc.linear_distillation(params, teacher, x, x_teacher, direction=direction)
                    for direction in ("forward", "reverse", "jensen_shannon")
                ),
            ]
            return sum(a.sum() for a in found)

        samples = [fc.linear_sample(KEY, params, x, top_k=k, chunk_size=10) for k in (None, 3)]
        gradients = jax.value_and_grad(loss, (0, 1, 2, 3, 4))
        return samples, gradients(params, teacher, x, soft, weights)

    arrays = layer, teacher, x, x_teacher, labels, soft, weights
    expected = run(*arrays)
    column = fc.partition_specs(layer, "column")
    batch = P("data", None, None)
    specs = column, column, batch, batch, P("data", None), P("data", None, "model"), P("model")
    for mesh in meshes((4, 2)):
        with jax.set_mesh(mesh):
            args = fc.shard(arrays, mesh, specs)
            assert_close(run(*args), expected)
            if mesh.explicit_axes:
                with pytest.raises(
                    ValueError, match="linear_cross_entropy: labels must be an array"
                ):
                    fc.linear_cross_entropy(args[0], args[2], lambda classes: classes)


def check_two_layers_cost_one_all_reduce():
    batch, inner, outer = 16, 64, 32
    for mesh in meshes_of_all_shapes():
        data, model = mesh.devices.shape
        block = fc.init_mlp(KEY, [outer, inner, outer])
        with jax.set_mesh(mesh):
            params = fc.shard(block, mesh, fc.mlp_specs(block))
            x = put(mesh, jnp.ones((batch, outer)), "data", None)
            moved = traffic(fc.apply_mlp, params, x)
        assert moved == [("all-reduce", 4 * batch // data * outer)] * (model > 1)


def check_bytes_of_a_step_follow_the_formula():
    sizes = [32, 64, 48, 64, 16]
    params = fc.init_mlp(KEY, sizes)
    specs = fc.mlp_specs(params)

    def loss(params, x, y):
        return jnp.square(fc.apply_mlp(params, x) - y).sum()

    for mesh in meshes_of_all_shapes():
        data, model = mesh.devices.shape
        rows = 4
        x, y = jnp.ones((rows * data, 32)), jnp.ones((rows * data, 16))
        with jax.set_mesh(mesh):
            args = fc.shard((params, x, y), mesh, (specs, P("data", None), P("data", None)))
            moved = traffic(jax.value_and_grad(loss), *args)
        assert {name for name, _ in moved} == {"all-reduce"}
        total = sum(size for _, size in moved)
        # Along "model": the outputs of both pairs, and back the inputs of the second.
        activations = 4 * rows * (48 + 16 + 48) * (model > 1)
        # Along "data": the gradients of what a device has of the parameters, and the loss.
        local = sum(a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(args[0]))
        gradients = (local + 4) * (data > 1)
        assert total == activations + gradients


def check_what_does_not_divide_is_named():
    mlp = fc.init_mlp(KEY, [6, 8, 9])
    for mesh in meshes((2, 4)):
        with pytest.raises(ValueError, match="nothing was laid out") as raised:
            fc.shard(mlp, mesh, fc.partition_specs(mlp, "column"))
        assert str(raised.value).splitlines()[1:] == [
            "  params.1.weight has shape (8, 9), whose axis of size 9 cannot be sharded over "
            "4 devices along 'model'",
            "  params.1.bias has shape (9,), whose axis of size 9 cannot be sharded over "
            "4 devices along 'model'",
        ]


def in_shard_map(function, *args, devices=1):
    """With the last argument sharded; on one device, types vary over the mesh as on several."""
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    specs = (*[P()] * (len(args) - 1), P("data"))
    sharded = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=P("data"))
    return jax.jit(sharded)(*args)


def squares(params, x):
    return (fc.apply_mlp(params, x) ** 2).sum()


HEAD = fc.init_linear(KEY, 12, 50)
OF_ROWS = {
    "loss in chunks": lambda params, x: fc.linear_cross_entropy(
        HEAD, x, jnp.zeros(len(x), int), chunk_size=16, row_chunk_size=2
    ),
    "norms": fc.per_example_norms(squares),
    "kernel matrix": lambda params, x: fc.empirical_ntk(fc.apply_mlp)(params, x, x),
    "clipped sum": lambda params, x: jax.tree.leaves(fc.clipped_grad(squares, 1.0)(params, x))[0],
}


def check_functions_of_rows_in_shard_map():
    """Every device has its examples, and the same parameters."""
    params, x = fc.init_mlp(KEY, [12, 8, 3]), jax.random.normal(KEY, (16, 12))
    for function in OF_ROWS.values():
        expected = np.concatenate([function(params, part) for part in np.split(x, 8)])
        actual = in_shard_map(function, params, x, devices=8)
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def run_checks():
    outcomes = {}
    for name, check in CHECKS.items():
        start = time.perf_counter()
        try:
            check()
            outcomes[name] = "passed"
        except Exception:
            outcomes[name] = traceback.format_exc()
        print(f"{time.perf_counter() - start:5.1f} s {name}", file=sys.stderr)
    return outcomes


CHECKS = {name: check for name, check in globals().items() if name.startswith("check_")}


@pytest.fixture(scope="module")
def outcomes():
    tests = str(Path(__file__).parent)
    flags = os.environ.get("XLA_FLAGS", "")
    environment = os.environ | {
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=8".strip(),
        "PYTHONPATH": os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")]),
    }
    run = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_on_eight_devices(outcomes, name):
    assert outcomes[name] == "passed", outcomes[name]


LAYER = fc.init_linear(KEY, (4, 6), (8, 2))


def test_specifications_of_every_form():
    column = {form: fc.partition_specs(make(LAYER), "column") for form, make in FORMS.items()}
    row = {form: fc.partition_specs(make(LAYER), "row") for form, make in FORMS.items()}
    out, inp = P(None, None, "model", None), P("model", None, None, None)
    bias, scale, up = P("model", None), P(None, "model", None), P(None, "model", None)
    down = P("model", None, None)
    assert column["plain"] == fc.LinearParams(out, bias)
    assert row["plain"] == fc.LinearParams(inp, P())
    assert column["low rank"] == fc.LinearParams(fc.LowRank(P(), up), bias)
    assert row["low rank"] == fc.LinearParams(fc.LowRank(down, P()), P())
    assert column["int8 in blocks"] == fc.LinearParams(fc.Int8(out, scale), bias)
    assert row["int8 in blocks"] == fc.LinearParams(fc.Int8(inp, P()), P())
    int8 = column["int8"].weight
    assert column["adapted int8"] == fc.LinearParams(fc.Lora(int8, P(), up, P()), bias)
    assert row["adapted"] == fc.LinearParams(fc.Lora(inp, down, P(), P()), P())
    assert column["normalized"] == fc.LinearParams(fc.WeightNorm(out, bias), bias)
    assert row["normalized"] == fc.LinearParams(fc.WeightNorm(inp, P()), P())
    blocks = fc.BlockDiagonal(P("model", None, None, None, None))
    assert column["block diagonal"] == fc.LinearParams(blocks, bias)
    assert row["block diagonal"] == fc.LinearParams(blocks, P())


def test_specifications_of_other_trees():
    conv = fc.init_conv(KEY, (3, 3), 4, 6)
    tree = {"conv": conv, "head": fc.init_mlp(KEY, [6, 5], bias=False), "step": jnp.zeros((9, 9))}
    assert fc.partition_specs(tree, "column", mesh_axis="m") == {
        "conv": fc.ConvParams(P(None, None, None, "m"), P("m")),
        "head": (fc.LinearParams(P(None, "m"), None),),
        "step": P(),
    }
    assert fc.partition_specs(tree, "row", mesh_axis="m") == {
        "conv": fc.ConvParams(P(None, None, "m", None), P()),
        "head": (fc.LinearParams(P("m", None), None),),
        "step": P(),
    }
    assert fc.partition_specs(tree, "fsdp", mesh_axis=("a", "b"))["head"][0].weight == P(
        ("a", "b"), None
    )
    everywhere = jax.tree.leaves(fc.partition_specs(tree, "replicated"))
    assert everywhere == [P()] * 4
    assert fc.partition_specs(fc.init_linear(KEY, (), 3), "row") == fc.LinearParams(P(), P())
    assert fc.partition_specs(fc.init_linear(KEY, 3, ()), "column") == fc.LinearParams(P(), P())


@pytest.mark.parametrize("num_layers", range(1, 6))
def test_pairs_of_layers(num_layers):
    mlp = fc.init_mlp(KEY, [4] * (num_layers + 1))
    kinds = ["column", "row", "column", "row", "column"][:num_layers]
    if num_layers % 2:
        kinds[-1] = "replicated"
    expected = tuple(fc.partition_specs(p, kind) for p, kind in zip(mlp, kinds, strict=True))
    assert fc.mlp_specs(mlp) == expected


MESH = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))
MLP = fc.init_mlp(KEY, [6, 4])
BAD = {
    "kind": (
        lambda: fc.partition_specs(MLP, "rows"),
        ValueError,
        "partition_specs: kind must be 'column', 'row', 'replicated' or 'fsdp', got 'rows'",
    ),
    "no layer": (
        lambda: fc.partition_specs({}, "row"),
        TypeError,
        "partition_specs: expected params to have a layer in it, got dict",
    ),
    "one layer for several": (
        lambda: fc.mlp_specs(MLP[0]),
        TypeError,
        "mlp_specs: expected params to be a sequence of layers .* got LinearParams",
    ),
    "no mesh": (
        lambda: fc.shard(MLP, jax.devices(), fc.mlp_specs(MLP)),
        TypeError,
        r"shard: expected mesh to be a jax\.sharding\.Mesh, got list",
    ),
    "another tree": (
        lambda: fc.shard(MLP, MESH, fc.mlp_specs(MLP)[0]),
        ValueError,
        "shard: expected specs to be a tree like PyTreeDef",
    ),
    "no specification": (
        lambda: fc.shard(MLP[0], MESH, fc.LinearParams("model", P())),
        TypeError,
        "shard: expected specs of PartitionSpec, got 'model' of type str",
    ),
    "no such axis": (
        lambda: fc.shard(MLP, MESH, (fc.partition_specs(MLP[0], "row", mesh_axis="rows"),)),
        ValueError,
        r"params\.0\.weight is sharded along 'rows', the mesh has the axes \('data', 'model'\)",
    ),
    "too few axes": (
        lambda: fc.shard(jnp.ones(4), MESH, P(None, "model")),
        ValueError,
        r"because\n  params has shape \(4,\), too few axes for P",
    ),
}


test_error = bad_calls(BAD)


if __name__ == "__main__":
    print(json.dumps(run_checks()))


CONVS = {
    "one channel": ((1, 40, 40, 1), (3, 3, 1, 8), 1),
    "depthwise": ((1, 8, 8, 4), (3, 3, 1, 4), 4),
    "groups": ((1, 8, 8, 8), (3, 3, 4, 8), 2),
    "fewer products": ((1, 28, 28, 32), (3, 3, 32, 32), 1),
    "fewer products in tiles": ((1, 128, 128, 64), (3, 3, 64, 64), 1),
    "tiles": ((1, 200, 200, 24), (3, 3, 24, 24), 1),
}


@pytest.mark.parametrize("name", CONVS)
def test_convolutions_in_shard_map(name):
    x_shape, weight_shape, groups = CONVS[name]
    x, weight = jax.random.normal(KEY, x_shape), jax.random.normal(KEY, weight_shape)

    def gradient(weight, x):
        def loss(x):
            y = fc.apply_conv(fc.ConvParams(weight, None), x, padding=1, groups=groups)
            return (y**2).mean()

        return jax.grad(loss)(x)

    expected = jax.jit(gradient)(weight, x)
    scale = np.abs(expected).max()
    actual = in_shard_map(gradient, weight, x)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("rows", [1, 64])
def test_integer_weights_in_shard_map(rows):
    params = fc.quantize(fc.init_linear(KEY, 1024, 512), block_size=128)
    x = jax.random.normal(KEY, (rows, 1024))
    expected = fc.apply_linear(params, x)
    np.testing.assert_allclose(
        in_shard_map(fc.apply_linear, params, x), expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", OF_ROWS)
def test_functions_of_rows_in_shard_map(name):
    params, x = fc.init_mlp(KEY, [12, 8, 3]), jax.random.normal(KEY, (6, 12))
    expected = OF_ROWS[name](params, x)
    actual = in_shard_map(OF_ROWS[name], params, x)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 4])
def test_slide_in_shard_map(groups):
    conv = fc.init_conv(KEY, (3, 3), 4, 8, groups=groups)

    def network(window):
        y = jax.nn.relu(fc.apply_conv(conv, window, padding=1, groups=groups))
        return fc.avg_pool(y, (2, 2), padding=1).max((0, 1))

    def slide(images):
        return jax.vmap(fc.slide(network, (8, 8)))(images)

    images = jax.random.normal(KEY, (2, 20, 24, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        actual = in_shard_map(slide, images)
    np.testing.assert_allclose(actual, slide(images), rtol=1e-5, atol=1e-5)
