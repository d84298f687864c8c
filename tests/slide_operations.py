"""The operations of the random functions: each draws its parameters for a value, or declines.

An operation that would compare, count or pick rounded numbers declines them.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from slide_contractions import CONTRACTIONS
from slide_functions import Made


def unary(d, x):
    """Elementwise."""
    exact = {
        "neg": (lambda x: -x, "iufc", x.bound),
        "abs": (jnp.abs, "iuf", x.bound),
        "sign": (jnp.sign, "iuf", 1.0),
        "square": (jnp.square, "iufc", 2 * x.bound**2),
        "cube": (lambda x: lax.integer_pow(x, 3), "if", x.bound**3),
        "relu": (jax.nn.relu, "f", x.bound),
        "clip": (lambda x: jnp.clip(x, -2, 3), "if", 3.0),
        "not": (jnp.logical_not, "biufc", 1.0),
        "invert": (lambda x: ~x, "biu", None),
        "count": (lax.population_count, "iu", None),
        "isfinite": (jnp.isfinite, "fc", 1.0),
        "conj": (jnp.conj, "c", x.bound),
        "real": (jnp.real, "c", x.bound),
        "imag": (jnp.imag, "c", x.bound),
        "copy": (jnp.copy, "biufc", x.bound),
        "stop": (lax.stop_gradient, "f", x.bound),
        "precision": (lambda x: lax.reduce_precision(x, 8, 23), "f", x.bound),
        "barrier": (lax.optimization_barrier, "biufc", x.bound),
    }
    if x.exact:
        exact["floor"] = (lambda x: jnp.floor(x / 2), "f", x.bound)
    rounding = {
        "tanh": (jnp.tanh, "fc", 2.0),
        "sin": (lambda x: jnp.sin(x), "f", 1.0),
        "exp": (lambda x: jnp.exp(-jnp.abs(x)), "f", 1.0),
        "gelu": (jax.nn.gelu, "f", x.bound),
        "silu": (jax.nn.silu, "f", x.bound),
        "erf": (lax.erf, "f", 1.0),
        "logistic": (jax.nn.sigmoid, "f", 1.0),
        "softplus": (jax.nn.softplus, "f", x.bound + 1),
        "log1p": (lambda x: jnp.log1p(jnp.abs(x)), "f", x.bound),
    }
    if x.exact:
        rounding |= {
            "log": (lambda x: jnp.log(jnp.abs(x)), "f", 10.0),
            "sqrt": (lambda x: jnp.sqrt(jnp.abs(x)), "f", x.bound),
            "reciprocal": (lambda x: 1 / jnp.abs(x), "f", 2.0),
            "rsqrt": (lambda x: lax.rsqrt(jnp.abs(x) + 1), "f", 1.0),
        }
    options = exact if d.chance(0.75) else rounding
    names = [name for name, (_, kinds, _) in options.items() if x.kind in kinds]
    if not names:
        return None
    name = d.pick(names)
    fun, _, bound = options[name]
    return Made(fun, exact=options is exact, bound=bound, note=name)


def cast(d, x):
    if not x.exact:
        return None
    kinds = ["bool", "uint8", "int32", "float32", "int8", "complex64", "float16"]
    to = d.pick(kinds if x.kind != "c" else ["complex64"])
    if to == "float16" or x.dtype == np.float16:
        return Made(lambda x: x.astype("float16").astype("float32"), bound=x.bound)
    if x.kind == "f" and to in ("uint8", "int8", "int32"):
        # What infinities and NaN become is up to the compiler.
        return Made(lambda x: jnp.where(jnp.abs(x) < 100, jnp.abs(x), 0).astype(to), note=to)
    return Made(lambda x: x.astype(to), note=to, bound=max(x.bound, 256.0))


def second(d, x):
    """Another operand: an earlier value, a constant that broadcasts, or a part of the value."""
    kind = d.pick(["value", "constant", "scalar", "uniform", "reduced", "position"])
    if kind == "value":
        other = d.like(x)
        return kind, (other,), lambda x, y: y, other.bound
    if kind == "reduced" and x.ndim and x.kind != "b" and 0 not in x.shape:
        axis = d.axis(x)
        return kind, (), lambda x: x.max(axis, keepdims=True), x.bound
    if kind == "position" and x.ndim:
        axis = d.axis(x)

        def position(x):
            return lax.broadcasted_iota(jnp.int32, x.shape, axis).astype(x.dtype)

        return kind, (), position, 8.0
    shape = () if kind == "scalar" else tuple(d.pick([1, n]) for n in x.shape)
    if kind == "uniform":
        shape = shape[d.int(0, len(shape)) :]
    array = d.numbers(shape, x.dtype)
    return kind, (), lambda x: jnp.asarray(array), 4.0


def binary(d, x):
    kind, others, make, bound = second(d, x)
    both = x.bound + bound
    options = {
        "add": (jnp.add, "iufc", both),
        "sub": (jnp.subtract, "iufc", both),
        "mul": (jnp.multiply, "biufc", 2 * x.bound * bound),
        "max": (jnp.maximum, "biuf", None),
        "min": (jnp.minimum, "biuf", None),
        "and": (lambda a, b: a & b, "biu", None),
        "or": (lambda a, b: a | b, "biu", None),
        "xor": (lambda a, b: a ^ b, "biu", None),
        "where": (lambda a, b: jnp.where(_is_nonzero(a), a, b), "biuf", both),
        "flipped": (lambda a, b: b - 2 * a, "if", 3 * both),
    }
    if x.exact and all(other.exact for other in others):
        options |= {
            "less": (jnp.less, "biuf", 1.0),
            "greater_equal": (jnp.greater_equal, "biuf", 1.0),
            "equal": (jnp.equal, "biufc", 1.0),
            "not_equal": (jnp.not_equal, "biufc", 1.0),
            "select": (lambda a, b: jnp.where(a > b, a, b + 1), "iuf", both + 1),
            "rem": (lambda a, b: lax.rem(a, jnp.abs(b) + 1), "if", x.bound),
            "shift": (lambda a, b: a >> (b & 3), "iu", None),
            "divide": (lambda a, b: a / (jnp.abs(b) + 1), "f", x.bound),
            "by zero": (lambda a, b: a / jnp.abs(b), "f", x.bound),
            "arctan": (lambda a, b: jnp.arctan2(a, jnp.abs(b) + 1), "f", 2.0),
        }
    names = [name for name, (_, kinds, _) in options.items() if x.kind in kinds]
    name = d.pick(names)
    fun, _, bound = options[name]
    return Made(
        lambda x, *others: fun(x, make(x, *others)),
        others,
        exact=name not in ("divide", "by zero", "arctan"),
        bound=bound,
        note=f"{name} {kind}",
    )


def _is_nonzero(x):
    """Of results that round, none lies near the limit."""
    return x if x.dtype == bool else jnp.abs(x) > 0.1


def meets_itself(d, x):
    """Every element of an axis with every other one, or with another value's."""
    if not x.ndim or x.kind == "b" or prod_of(x) > 60:
        return None
    axis, place = d.axis(x), d.int(0, x.ndim)
    other = d.like(x)
    name = d.pick(["mul", "sub", "max"] if x.kind != "c" else ["mul", "sub"])
    fun = {"mul": jnp.multiply, "sub": jnp.subtract, "max": jnp.maximum}[name]

    def meet(x, y):
        return fun(jnp.expand_dims(x, axis), jnp.expand_dims(y, place))

    return Made(meet, (other,), bound=2 * (x.bound + 1) * (other.bound + 1), note=name)


def prod_of(x):
    return int(np.prod(x.shape))


def transpose(d, x):
    order = tuple(int(i) for i in d.rng.permutation(x.ndim))
    return Made(lambda x: x.transpose(order), note=str(order))


def reshape(d, x):
    order = tuple(int(i) for i in d.rng.permutation(x.ndim))
    kind = d.pick(
        ["ravel", "ravel F", "dimensions", "split", "merge", "random", "squeeze", "expand"]
    )
    if kind == "ravel":
        return Made(jnp.ravel, note=kind)
    if kind == "ravel F":
        return Made(lambda x: x.ravel(order="F"), note=kind)
    if kind == "dimensions":
        shape = d.pick([(prod_of(x),), tuple(x.shape[i] for i in order), x.shape])
        return Made(lambda x: lax.reshape(x, shape, dimensions=order), note=f"{order} {shape}")
    if kind == "squeeze":
        return Made(jnp.squeeze)
    if kind == "expand":
        axis = d.int(0, x.ndim)
        return Made(lambda x: jnp.expand_dims(x, axis), note=f"expand {axis}")
    if not x.ndim or not prod_of(x):
        return None
    shape, axis = list(x.shape), d.axis(x)
    if kind == "split":
        factor = d.pick([n for n in range(1, x.shape[axis] + 1) if x.shape[axis] % n == 0])
        shape[axis : axis + 1] = [factor, x.shape[axis] // factor]
    elif kind == "merge" and x.ndim > 1:
        axis = d.int(0, x.ndim - 2)
        shape[axis : axis + 2] = [shape[axis] * shape[axis + 1]]
    else:
        rest, shape = prod_of(x), []
        while rest > 1 and len(shape) < 4:
            shape.append(d.pick([n for n in range(1, rest + 1) if rest % n == 0]))
            rest //= shape[-1]
        shape.append(rest)
    return Made(lambda x: x.reshape(shape), note=str(shape))


def move(d, x):
    """Flips, rolls, repeats and broadcasts."""
    if not x.ndim:
        return Made(lambda x: jnp.broadcast_to(x, (2, 3)), note="broadcast")
    axis, n = d.axis(x), d.int(-2, 3)
    axes, count = d.axes(x), d.int(0, 3)
    options = {
        "flip": lambda x: jnp.flip(x, axes),
        "roll": lambda x: jnp.roll(x, n, axis),
        "roll all": lambda x: jnp.roll(x, n),
        "repeat": lambda x: jnp.repeat(x, count, axis),
        "tile": lambda x: jnp.tile(x, [count if i == axis else 1 for i in range(x.ndim)]),
        "tile front": lambda x: jnp.tile(x, 2),
        "broadcast": lambda x: jnp.broadcast_to(x, (2, *x.shape)),
        "swap": lambda x: jnp.swapaxes(x, axis, axes[0]),
        "widen": lambda x: jnp.broadcast_to(
            lax.slice_in_dim(x, 0, 1, axis=axis),
            [3 if i == axis else k for i, k in enumerate(x.shape)],
        ),
        "rot90": lambda x: jnp.rot90(x, n, (0, x.ndim - 1)),
        "tril": lambda x: jnp.tril(x, n),
        "diagonal": lambda x: jnp.diagonal(x, n, 0, x.ndim - 1),
        "atleast": lambda x: jnp.atleast_3d(x),
    }
    name = d.pick(options)
    return Made(options[name], note=f"{name} axis {axis} {axes} {n} {count}")


def index(d, x):
    """Slices, with steps of both signs, single elements, new axes and nothing at all."""
    items = []
    for n in x.shape:
        kind = d.pick(["all", "all", "cut", "cut", "step", "back", "one", "none", "new"])
        start = d.int(0, max(n - 1, 0))
        stop = d.int(start + 1, max(n, start + 1))
        if kind == "new":
            items += [None, slice(None)]
        elif kind == "one" and n:
            items.append(start)
        elif kind == "none" and d.chance(0.15):
            items.append(slice(start, start))
        else:
            cuts = {"cut": slice(start, stop), "step": slice(start, None, d.int(1, 3))}
            cuts["back"] = slice(None, None, -d.int(1, 2))
            items.append(cuts.get(kind, slice(None)))
    return Made(lambda x: x[tuple(items)], note=str(items))


def pad(d, x):
    modes = [
        "constant",
        "edge",
        "reflect",
        "symmetric",
        "wrap",
        "maximum",
        "minimum",
        "linear_ramp",
    ]
    mode = d.pick([*modes, "mean", "median", "lax", "lax"])
    sides = [(d.pick([0, 0, 1, 2]), d.pick([0, 0, 1, 2])) for _ in x.shape]
    if mode == "lax":
        config = [(d.int(-1, 2), d.int(-1, 2), d.pick([0, 0, 0, 1, 2])) for _ in x.shape]
        fill = d.numbers((), x.dtype)
        return Made(lambda x: lax.pad(x, fill, config), note=f"lax {config}")
    if mode in ("linear_ramp", "mean", "median") and x.kind != "f":
        return None
    if x.kind == "c" and mode in ("maximum", "minimum"):
        return None
    rounds = mode in ("linear_ramp", "mean", "median")
    return Made(lambda x: jnp.pad(x, sides, mode=mode), exact=not rounds, note=f"{mode} {sides}")


def join(d, x):
    """Concatenations, stacks, and parts of splits."""
    other = d.like(x)
    if not x.ndim:
        return Made(lambda x, y: jnp.stack([x, y, x]), (other,), note="stack")
    axis = d.axis(x)
    shape = tuple(d.int(0, 2) if i == axis else n for i, n in enumerate(x.shape))
    constant = d.numbers(shape, x.dtype)
    cut, sections = d.int(0, x.shape[axis]), d.int(1, 3)
    part = d.int(0, sections - 1)
    options = {
        "concatenate": lambda x, y: jnp.concatenate([x, y], axis),
        "with a constant": lambda x, y: jnp.concatenate([x, jnp.asarray(constant), y], axis),
        "shifted": lambda x, y: jnp.concatenate(
            [lax.slice_in_dim(x, cut, None, axis=axis), lax.slice_in_dim(y, 0, cut, axis=axis)],
            axis,
        ),
        "stack": lambda x, y: jnp.stack([x, y], axis),
        "split": lambda x, y: jnp.array_split(x, sections, axis)[part],
        "diff": lambda x, y: x[1:] + y[:-1],
        "append": lambda x, y: jnp.append(x, y),
    }
    name = d.pick(options)
    bound = 2 * max(x.bound, other.bound, 4.0)
    return Made(options[name], (other,), bound=bound, note=f"{name} axis {axis} {shape}")


def noise(d, x):
    """A mask that all windows share."""
    if x.kind != "f":
        return None
    key = jax.random.key(d.int(0, 99))
    drop = d.chance(0.5)

    def mask(x):
        keep = jax.random.bernoulli(key, 0.6, x.shape)
        # XLA makes a product with zeros and ones a choice in some programs: +0 for -0 and NaN.
        return jnp.where(keep, x / 0.5, 0) if drop else (1 + keep) * x

    return Made(mask, bound=2 * x.bound)


def one_hot(d, x):
    if x.kind not in "iu" or prod_of(x) > 60:
        return None
    return Made(lambda x: jax.nn.one_hot(x, 3), bound=1.0)


def normalize(d, x):
    if x.kind != "f" or not x.ndim:
        return None
    axes = d.axes(x)
    options = {
        "softmax": (lambda x: jax.nn.softmax(x, axes), 1.0),
        "log softmax": (lambda x: jax.nn.log_softmax(x, axes), x.bound * 3 + 6),
        "centered": (lambda x: x - x.mean(axes, keepdims=True), x.bound * 2),
        "scaled": (lambda x: x / (1 + jnp.abs(x).mean(axes, keepdims=True)), x.bound),
    }
    name = d.pick(options)
    fun, bound = options[name]
    return Made(fun, exact=False, bound=bound, note=f"{name} {axes}")


OPERATIONS = (
    *(unary, unary, cast, binary, binary, meets_itself, transpose, reshape, reshape, move, index),
    *(index, pad, pad, join, noise, one_hot, normalize, *CONTRACTIONS),
)
