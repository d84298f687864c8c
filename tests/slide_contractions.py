"""Operations of the random functions that go over many elements: sums, products, pools, orders."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from slide_control import CONTROL
from slide_functions import Made

import fclayers as fc


def reduce(d, x):
    axes, keep = d.axes(x, 0), d.chance(0.2)
    size = int(np.prod([x.shape[i] for i in axes]))
    options = {
        "sum": (lambda x: x.sum(axes, keepdims=keep), "biufc", x.bound * size, True),
        "mean": (lambda x: x.mean(axes, keepdims=keep), "if", x.bound, False),
        "var": (lambda x: x.var(axes, keepdims=keep), "f", x.bound**2, False),
        "logsumexp": (lambda x: jax.nn.logsumexp(x, axes), "f", x.bound + 6, False),
        "any": (lambda x: x.any(axes, keepdims=keep), "biu", 1.0, True),
        "all": (lambda x: x.all(axes, keepdims=keep), "biu", 1.0, True),
    }
    if size:
        options |= {
            "max": (lambda x: x.max(axes, keepdims=keep), "biuf", x.bound, True),
            "min": (lambda x: x.min(axes, keepdims=keep), "biuf", x.bound, True),
            "ptp": (lambda x: jnp.ptp(x, axes), "if", 2 * x.bound, True),
        }
    if x.exact:
        options |= {
            "prod": (lambda x: jnp.sign(x).prod(axes), "if", 1.0, True),
            "count": (lambda x: jnp.count_nonzero(x, axes), "biufc", 99.0, True),
            "norm": (lambda x: jnp.sqrt((x * x).sum(axes)), "f", x.bound * size, False),
        }
    name = d.pick([name for name, option in options.items() if x.kind in option[1]])
    fun, _, bound, exact = options[name]
    return Made(fun, exact=exact, bound=max(bound, 1.0), note=f"{name} {axes} {keep}")


def arg_reduce(d, x):
    """The first of equal ones, in int32 and others."""
    if not (x.exact and x.ndim and 0 not in x.shape) or x.kind == "c":
        return None
    axis, dtype = d.axis(x), d.pick([jnp.int32, jnp.uint8, jnp.int16])
    options = {
        "argmax": lambda x: jnp.argmax(x, axis),
        "argmin": lambda x: jnp.argmin(x, axis, keepdims=True),
        "argmax all": lambda x: jnp.argmax(x),
        "lax.argmax": lambda x: lax.argmax(x, axis, dtype),
        "lax.argmin": lambda x: lax.argmin(x, axis, dtype),
    }
    name = d.pick(options)
    return Made(options[name], note=f"{name} {axis}", bound=99.0)


def sort(d, x):
    if not x.ndim or x.kind == "c":
        return None
    axis, other, k = d.axis(x), d.like(x), d.int(1, 3)
    descending = d.chance(0.3)
    options = {"sort": lambda x, y: jnp.sort(x, axis, descending=descending)}
    if x.kind == "f" and 0 not in x.shape:
        axes = d.pick([axis, d.axes(x), None])
        q = d.pick([0.5, 0.3, np.array([0.25, 1.0])])
        options["median"] = lambda x, y: jnp.median(x, axes)
        options["quantile"] = lambda x, y: jnp.quantile(x, jnp.asarray(q, x.dtype), axes)
    if x.exact and other.exact:
        options |= {
            "argsort": lambda x, y: jnp.argsort(x, axis, stable=True),
            "two keys": lambda x, y: lax.sort((x, y), dimension=axis, num_keys=2)[1],
            "one key": lambda x, y: lax.sort((x, y), dimension=axis, num_keys=1)[1],
            "lexsort": lambda x, y: jnp.lexsort((x, y), axis),
        }
    if x.kind in "iuf":
        options["top_k"] = lambda x, y: lax.top_k(x, k)[0]
        if x.exact:
            options["top_k indices"] = lambda x, y: lax.top_k(x, k)[1]
    name = d.pick(options)
    exact = name not in ("median", "quantile")
    return Made(options[name], (other,), exact, x.bound + 60, f"{name} {axis} {descending}")


def cumulate(d, x):
    if not x.ndim or x.kind == "b":
        return None
    axis, reverse = d.axis(x), d.chance(0.4)
    n = max(x.shape[axis], 1)
    options = {
        "cumsum": (lambda x: lax.cumsum(x, axis, reverse), "iufc", x.bound * n, True),
        "jnp.cumsum": (lambda x: jnp.cumsum(x), "iuf", x.bound * 500, True),
        "cummax": (lambda x: lax.cummax(x, axis, reverse), "iuf", x.bound, True),
        "cummin": (lambda x: lax.cummin(x, axis, reverse), "iuf", x.bound, True),
        "scan add": (
            lambda x: lax.associative_scan(jnp.add, x, reverse, axis=axis),
            "iuf",
            x.bound * n,
            True,
        ),
        "scan max": (lambda x: lax.associative_scan(jnp.maximum, x, axis=axis), "if", None, True),
        "cumlogsumexp": (lambda x: lax.cumlogsumexp(x, axis, reverse), "f", x.bound + 3, False),
    }
    if x.exact:
        options["cumprod"] = (lambda x: lax.cumprod(jnp.sign(x), axis, reverse), "if", 1.0, True)
    names = [name for name, option in options.items() if x.kind in option[1]]
    name = d.pick(names)
    fun, _, bound, exact = options[name]
    return Made(fun, exact=exact, bound=bound, note=f"{name} {axis} {reverse}")


def product(d, x):
    """Matrix products with constants, with other values and with itself."""
    if not x.ndim or x.kind == "b" or 0 in x.shape:
        return None
    axis, n = d.axis(x), d.int(1, 3)
    k = x.shape[axis]
    matrix = d.numbers((k, n), x.dtype, -2, 2)
    other = d.like(x)
    names = "abcdef"[: x.ndim]
    again = "".join(a if d.chance(0.5) else a.upper() for a in names)
    kept = [a for a in dict.fromkeys(names + again) if d.chance(0.5) or a not in names + again]
    d.rng.shuffle(kept)
    spec = f"{names},{again}->{''.join(kept)}"
    whole = d.numbers((*x.shape, n), x.dtype, -1, 1)
    part = d.axes(x)
    partial = d.numbers((n, *(x.shape[i] for i in part)), x.dtype, -1, 1)
    batched = d.numbers((x.shape[0], 2, x.shape[-1]), x.dtype, -1, 1)
    numbers = (((x.ndim - 1,), (2,)), ((0,), (0,)))
    wide = {"f": x.dtype, "i": np.dtype(np.int32)}.get(x.kind)
    options = {
        "matrix": lambda x, y: jnp.tensordot(x, matrix, (axis, 0)),
        "matrix first": lambda x, y: jnp.tensordot(matrix.T, x, (1, axis)),
        "flat": lambda x, y: x.reshape(-1) @ whole.reshape(-1, n),
        "all": lambda x, y: jnp.tensordot(x, whole, x.ndim),
        "part": lambda x, y: lax.dot_general(
            x, partial, ((part, tuple(range(1, 1 + len(part)))), ((), ()))
        ),
        "einsum": lambda x, y: jnp.einsum(spec, x, y),
        "outer": lambda x, y: jnp.outer(x.ravel()[:8], y.ravel()[:8]),
        "inner": lambda x, y: jnp.vdot(x, y),
        "gram": lambda x, y: x @ jnp.swapaxes(y, -1, -2),
    }
    if x.ndim > 1:
        options["batch"] = lambda x, y: lax.dot_general(
            x, batched, numbers, preferred_element_type=wide
        )
    name = d.pick(options)
    bound = 4 * (x.bound + 1) * (other.bound + 1) * max(np.prod(x.shape), 1)
    return Made(options[name], (other,), bound=float(bound), note=f"{name} {spec} {axis} {part}")


def conv(d, x):
    """On any axes, with every parameter."""
    if x.ndim < 1 or x.kind not in "fic" or 0 in x.shape:
        return None
    extra = d.int(max(0, 2 - x.ndim), 2) if x.ndim < 4 else 0
    order = [int(i) for i in d.rng.permutation(x.ndim + extra)]
    shape = [*x.shape, *(1,) * extra]
    spatial = len(shape) - 2
    if spatial > 3:
        return None
    spec = "".join("NCHWD"[i] for i in order)
    sizes = {letter: shape[spec.index(letter)] for letter in spec}
    groups = d.pick([g for g in (1, 1, 2, 3) if sizes["C"] % g == 0])
    batch_groups = 1 if groups > 1 else d.pick([g for g in (1, 1, 2) if sizes["N"] % g == 0])
    taps = [d.int(1, 3) for _ in range(spatial)]
    out = d.int(1, 2) * groups * batch_groups
    weight = d.numbers((*taps, sizes["C"] // groups, out), x.dtype, -2, 2)
    letters = "HWD"[:spatial]
    pads = [(d.pick([0, 0, 0, 1, 2, -1]), d.pick([0, 0, 0, 1, 2, -1])) for _ in taps]
    padding = d.pick(["VALID", "SAME", pads])
    extras = {
        "window_strides": [d.pick([1, 1, 2]) for _ in taps],
        "padding": padding,
        "lhs_dilation": [d.pick([1, 1, 1, 2]) for _ in taps],
        "rhs_dilation": [d.pick([1, 1, 2]) for _ in taps],
        "feature_group_count": groups,
        "batch_group_count": batch_groups,
        "dimension_numbers": (spec, f"{letters}IO", spec),
        "preferred_element_type": d.pick([None, None, x.dtype]),
    }

    def convolve(x):
        # As products, convolutions spread what is not finite.
        x = jnp.nan_to_num(x, posinf=64, neginf=-64) if x.dtype.kind in "fc" else x
        return lax.conv_general_dilated(x.reshape(shape), weight, **extras)

    return Made(convolve, bound=4 * x.bound * max(weight.size // out, 1), note=str(extras))


def pool(d, x):
    """Windows over every axis, padded and dilated; some with any function, some by gradients."""
    if not x.ndim or x.kind not in "fi" or 0 in x.shape:
        return None
    name = d.pick(["max", "min", "add", "mul", "any", "gradient", "fc", "several"])
    taps = [d.pick([1, 1, 2, 3]) for _ in x.shape]
    strides = [d.pick([1, 1, 2]) for _ in taps]
    padded = d.chance(0.4)
    padding = [(d.int(0, 1), d.int(0, 1)) if padded else (0, 0) for _ in taps]
    is_dilated = d.chance(0.3) and name not in ("gradient", "fc")
    base = [d.pick([1, 2]) if is_dilated and d.chance(0.5) else 1 for _ in taps]
    dilation = [d.pick([1, 2]) if is_dilated else 1 for _ in taps]
    top, lowest = np.inf, -np.inf
    if x.kind == "i":
        top, lowest = np.iinfo(x.dtype).max, np.iinfo(x.dtype).min
    initial, monoid = {
        "max": (lowest, lax.max),
        "min": (top, lax.min),
        "add": (0, lax.add),
        "mul": (1, lax.mul),
        "any": (0, lambda a, b: lax.max(a, lax.abs(b))),
    }.get(name, (lowest, lax.max))
    first = np.array(initial, x.dtype)

    def reduce_window(x):
        if name == "mul":
            x = jnp.sign(x)
        return lax.reduce_window(
            x, first, monoid, taps, strides, padding, base_dilation=base, window_dilation=dilation
        )

    def several(x):
        return lax.reduce_window(
            (x, -x),
            (first, first),
            lambda a, b: (lax.max(a[0], b[0]), lax.max(a[1], b[1])),
            taps,
            strides,
            padding,
        )[1]

    note = f"{name} {taps} {strides} {padding} {base} {dilation}"
    if name in ("gradient", "mul") and (not x.exact or (name == "gradient" and x.kind != "f")):
        return None
    if name == "gradient":
        return Made(jax.grad(lambda x: (2 * reduce_window(x)).sum()), note=note, bound=100.0)
    if name == "fc":
        size = (min(taps[0], x.shape[0]),)
        return Made(lambda x: fc.max_pool(x.reshape(x.shape[0], -1), size), note=note)
    if name == "several":
        return Made(several, note=note)
    bound = x.bound * np.prod(taps) if name == "add" else x.bound
    return Made(reduce_window, bound=float(bound), note=note)


def fourier(d, x):
    if not x.ndim or x.kind not in "fc" or 0 in x.shape:
        return None
    axis = d.axis(x)
    options = {
        "fft": lambda x: jnp.fft.fft(x, axis=axis),
        "ifft": lambda x: jnp.fft.ifft(x, axis=axis),
        "fftn": lambda x: jnp.fft.fftn(x) if x.ndim < 4 else jnp.fft.fft(x),
    }
    if x.kind == "f":
        options |= {"rfft": lambda x: jnp.fft.rfft(x, axis=axis)}
        options |= {"rfft abs": lambda x: jnp.abs(jnp.fft.rfft(x, axis=axis)) ** 2}
    name = d.pick(options)
    return Made(options[name], exact=False, bound=4096.0, note=f"{name} {axis}")


def shift(d, x):
    """Convolutions and interpolations of one dimension."""
    if not x.ndim or x.kind != "f" or 0 in x.shape:
        return None
    kernel = d.numbers((d.int(1, 3),), x.dtype)
    mode = d.pick(["full", "same", "valid"])
    size = tuple(d.int(1, 5) for _ in x.shape)
    method = d.pick(["nearest", "linear"])
    options = {
        "convolve": (lambda x: jnp.convolve(x.ravel(), kernel, mode), True),
        "resize": (lambda x: jax.image.resize(x, size, method), method == "nearest"),
        "gradient": (lambda x: jnp.gradient(x, axis=0) if x.shape[0] > 1 else x, False),
        "correlate": (lambda x: jnp.correlate(kernel, x.ravel(), mode), True),
    }
    name = d.pick(options)
    fun, exact = options[name]
    return Made(fun, exact=exact, bound=10 * x.bound, note=f"{name} {mode} {size} {method}")


CONTRACTIONS = (
    *(reduce, arg_reduce, sort, cumulate, product, product, conv, conv, pool, pool),
    *(fourier, shift, *CONTROL),
)
