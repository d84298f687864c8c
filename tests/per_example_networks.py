"""Random networks whose gradients of every example are compared with `vmap(grad)`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from forms import FORMS
from jax import lax

import fclayers as fc


class Network(NamedTuple):
    """`fun(params, example)` returns one array; two batches of examples."""

    seed: int
    fun: object
    params: dict
    batch: jax.Array
    other: jax.Array
    names: list


class Draw:
    """Draws parameters and choices; collects the functions of the network."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.params, self.parts, self.names = {}, [], []

    def int(self, low, high):
        return int(self.rng.integers(low, high + 1))

    def pick(self, options):
        return options[self.rng.integers(len(options))]

    def chance(self, p):
        return self.rng.random() < p

    def array(self, *shape):
        return jnp.asarray(self.rng.normal(size=shape) / max(1, shape[0] if shape else 1) ** 0.5)

    def param(self, value):
        name = f"p{len(self.params)}"
        self.params[name] = value
        return name

    def key(self):
        return jax.random.key(self.int(0, 10**6))


def linear(d, shape):
    features, out = shape[-1], d.int(1, 5)
    layer = fc.init_linear(d.key(), features, out, bias=d.chance(0.7), dtype=jnp.float64)
    form = d.pick(list(FORMS))
    name = d.param(FORMS[form](layer))
    return lambda p, x: fc.apply_linear(p[name], x), (*shape[:-1], out)


def several_axes(d, shape):
    layer = fc.init_linear(d.key(), shape, (2, 3), dtype=jnp.float64)
    name, axes = d.param(layer), tuple(range(len(shape)))
    return lambda p, x: fc.apply_linear(p[name], x, axis=axes), (2, 3)


def transposed(d, shape):
    n = shape[-1]
    name = d.param(d.array(4, n))
    return lambda p, x: jnp.einsum("...i,oi->...o", x, p[name]), (*shape[:-1], 4)


def weight_first(d, shape):
    name = d.param(d.array(shape[-1], 3))
    return lambda p, x: jnp.moveaxis(p[name].T @ x.reshape(-1, shape[-1]).T, 0, -1).reshape(
        *shape[:-1], 3
    ), (*shape[:-1], 3)


def tied(d, shape):
    """One square matrix, used twice or thrice, transposed as well."""
    n = shape[-1]
    name, flip, scale = d.param(d.array(n, n)), d.chance(0.5), d.pick([1.0, 0.5])

    def run(p, x):
        x = jnp.tanh(x @ p[name])
        x = jnp.tanh(x @ (p[name].T if flip else p[name] * scale))
        return x + x @ p[name]

    return run, shape


def parts_of_one(d, shape):
    """Slices of one parameter, apart or overlapping, and a stack of layers in a Python loop."""
    n, kind = shape[-1], d.pick(["apart", "overlapping", "stack", "split"])
    if kind == "stack":
        name = d.param(d.array(2, n, n))
        return lambda p, x: jnp.sin(x @ p[name][0]) @ p[name][1], shape
    name = d.param(d.array(2 * n, n))
    first = 0 if kind == "apart" else n // 2

    def run(p, x):
        one, other = p[name][first : first + n], p[name][n:]
        if kind == "split":
            one, other = jnp.split(p[name], 2)
        return jnp.sin(x @ one) + x @ other

    return run, shape


def function_of_parameters(d, shape):
    n = shape[-1]
    one, other = d.param(d.array(n, 3)), d.param(d.array(3))
    options = {
        "softplus": lambda p: jax.nn.softplus(p[one]),
        "columns": lambda p: jnp.concatenate([p[one], p[one][:, :1] * p[other]], 1),
        "norms": lambda p: p[one] / jnp.linalg.norm(p[one], axis=0) * p[other],
        "reversed": lambda p: p[one][::-1],
        "frozen": lambda p: lax.stop_gradient(p[one]) + p[other],
        "cast": lambda p: (p[one].reshape(3, n) * 2).reshape(n, 3).astype(jnp.float64),
    }
    made = options[d.pick(list(options))]
    return lambda p, x: x @ made(p), (*shape[:-1], jax.eval_shape(made, d.params).shape[-1])


def elementwise(d, shape):
    scale, shift = d.param(d.array(shape[-1])), d.param(d.array(*shape))

    def run(p, x):
        x = x - x.mean(-1, keepdims=True)
        x = x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 0.1)
        return x * p[scale] + p[shift]

    return run, shape


def attention(d, shape):
    if len(shape) != 2:
        return None
    n = shape[-1]
    qkv = d.param(fc.init_linear(d.key(), n, (3, 2, 2), dtype=jnp.float64))
    out = d.param(fc.init_linear(d.key(), (2, 2), n, dtype=jnp.float64))

    def run(p, x):
        q, k, v = jnp.moveaxis(fc.apply_linear(p[qkv], x), 1, 0)
        weights = jax.nn.softmax(jnp.einsum("phd,qhd->hpq", q, k))
        y = jnp.einsum("hpq,qhd->phd", weights, v)
        return x + fc.apply_linear(p[out], y, axis=(-2, -1))

    return run, shape


def scan_over_layers(d, shape):
    n, layers, remat, reverse = shape[-1], d.int(1, 3), d.chance(0.5), d.chance(0.3)
    inner = d.chance(0.3)
    stack = d.param({"w": d.array(layers, n, n), "b": d.array(layers, n)})
    shared = d.param(d.array(n, n))

    def run(p, x):
        def body(x, layer):
            x = jnp.tanh(x @ layer["w"].T + layer["b"])
            if inner:
                x, _ = lax.scan(
                    lambda c, _: (jnp.sin(c @ p[shared] @ layer["w"]), None), x, None, 2
                )
            return x + x @ p[shared], x.sum()

        body = jax.checkpoint(body) if remat else body
        x, sums = lax.scan(body, x, p[stack], reverse=reverse)
        return x + jnp.sin(sums).sum()

    return run, shape


def recurrent(d, shape):
    if len(shape) != 2:
        return None
    n = shape[-1]
    start, w, u = d.param(d.array(3)), d.param(d.array(n, 3)), d.param(d.array(3, 3))

    def run(p, x):
        def body(h, x):
            h = jnp.tanh(x @ p[w] + h @ p[u])
            return h, h

        return lax.scan(body, p[start], x)[1]

    return run, (shape[0], 3)


def embedding(d, shape):
    """Looked up by the data, and tied to a product."""
    table, kind = d.param(d.array(6, shape[-1])), d.pick(["gather", "take", "slice"])

    def run(p, x):
        places = (jnp.abs(x[..., 0]) * 4).astype(jnp.int32)
        if kind == "slice":
            return x + p[table][places.ravel()[0] % 6]
        rows = (
            jnp.take(p[table], places, 0, mode="clip") if kind == "take" else p[table][places % 6]
        )
        return jnp.tanh(x + rows) @ p[table].T @ p[table]

    return run, shape


def unknown(d, shape):
    """Operations for which there is no rule."""
    n, kind = shape[-1], d.pick(["rows", "choice", "custom"])
    name = d.param(d.array(400 if kind == "rows" else n, n))

    @jax.custom_vjp
    def custom(x, w):
        return jnp.sin(x @ w)

    custom.defvjp(
        lambda x, w: (custom(x, w), (x, w)),
        lambda kept, g: (g @ kept[1].T, 2 * jnp.einsum("...i,...o->io", kept[0], g)),
    )

    def run(p, x):
        if kind == "rows":
            start = (jnp.abs(x.ravel()[0]) * 3).astype(jnp.int32)
            return x + lax.dynamic_slice_in_dim(p[name], start, 3, 0).sum(0)
        if kind == "choice":
            return x @ jnp.where(x.sum() > 0, p[name], -2 * p[name])
        return custom(x, p[name])

    return run, shape


def convolution(d, shape):
    if len(shape) != 3:
        return None
    groups = d.pick([g for g in (1, 2) if shape[-1] % g == 0])
    kernel = d.int(1, 3), d.int(1, 3)
    options = {
        "stride": d.int(1, 2),
        "padding": d.pick(["SAME", "VALID", 1]),
        "dilation": d.int(1, 2),
        "groups": groups,
    }
    padded = [size + 2 * (options["padding"] == 1) for size in shape[:2]]
    reach = [(size - 1) * options["dilation"] + 1 for size in kernel]
    if options["padding"] != "SAME" and any(np.greater(reach, padded)):
        return None
    layer = fc.init_conv(
        d.key(), kernel, shape[-1], 2 * d.int(1, 2), groups=groups, dtype=jnp.float64
    )
    if groups == 1 and d.chance(0.3):
        layer = FORMS[d.pick(["low rank", "int8", "normalized", "adapted"])](layer)
    name = d.param(layer)

    def run(p, x):
        return fc.apply_conv(p[name], x, **options)

    return run, jax.eval_shape(run, d.params, jnp.zeros(shape)).shape


def transposed_convolution(d, shape):
    if len(shape) != 3:
        return None
    name = d.param(d.array(2, 3, shape[-1], 2))

    def run(p, x):
        return lax.conv_transpose(
            x[None], p[name], (2, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )[0]

    return run, jax.eval_shape(run, d.params, jnp.zeros(shape)).shape


def channels_first(d, shape):
    if len(shape) != 3:
        return None
    name = d.param(d.array(2, shape[-1], 2, 2))

    def run(p, x):
        y = lax.conv(jnp.moveaxis(x, -1, 0)[None], p[name], (1, 1), "SAME")
        return jnp.moveaxis(y[0], 0, -1)

    return run, (*shape[:-1], 2)


PARTS = [
    linear,
    several_axes,
    transposed,
    weight_first,
    tied,
    parts_of_one,
    function_of_parameters,
    elementwise,
    attention,
    scan_over_layers,
    recurrent,
    embedding,
    unknown,
    convolution,
    transposed_convolution,
    channels_first,
]


def draw_network(seed):
    """A network of one to four parts."""
    d = Draw(seed)
    shape = tuple(d.int(2, 5) for _ in range(d.pick([1, 2, 2, 3])))
    if len(shape) == 3:
        shape = (d.int(4, 6), d.int(4, 6), d.int(1, 4))
    first, parts = shape, []
    while len(parts) < 4 and not (parts and d.chance(0.3)):
        convolutions = [convolution, transposed_convolution, channels_first]
        part = d.pick(convolutions if len(shape) == 3 and d.chance(0.7) else PARTS)
        made = part(d, shape)
        if made is None or 0 in made[1] or np.prod(made[1]) > 500:
            continue
        run, shape = made
        parts.append((run, d.pick([jnp.tanh, jnp.sin, jax.nn.softplus, jax.nn.gelu])))
        d.names.append(part.__name__)
    params = d.params | {"none": None, "count": jnp.arange(3), "unused": jnp.ones(2)}

    def fun(params, x):
        for run, activation in parts:
            x = activation(run(params, x))
        return x.reshape(-1)[:3] * params["count"].sum()

    n, m = d.int(1, 4), d.int(1, 3)
    batch, other = (jnp.asarray(d.rng.normal(size=(k, *first))) for k in (n, m))
    return Network(seed, fun, params, batch, other, d.names)
