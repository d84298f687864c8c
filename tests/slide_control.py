"""Operations of the random functions that pick and put elements by data, and functions inside."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from slide_functions import Made


def whole(x, i=0):
    """An integer that depends on the data."""
    flat = x.ravel()
    return jnp.real(flat[i % max(flat.size, 1)]).astype(jnp.int32)


def picked(d, x):
    return x.exact and x.ndim and 0 not in x.shape


def gather(d, x):
    """By constant places, by data, and by windows of places."""
    if not picked(d, x):
        return None
    axis, k = d.axis(x), d.int(1, 3)
    n = x.shape[axis]
    places = d.rng.integers(-n, n, d.pick([(k,), (k, 2), ()]))
    far = d.rng.integers(-2 * n, 2 * n, (k,))
    mode = d.pick(["clip", "fill", "wrap"])
    sizes = [d.int(1, m) for m in x.shape]
    start = [d.int(-2, 3) for _ in x.shape]
    along = d.rng.integers(0, n, [2 if i == axis else m for i, m in enumerate(x.shape)])
    slices = tuple(1 if i == axis else d.pick([m, m, d.int(1, m)]) for i, m in enumerate(x.shape))
    offsets = tuple(range(1, x.ndim)) if d.chance(0.5) else tuple(range(1, x.ndim + 1))
    numbers = lax.GatherDimensionNumbers(offsets, (axis,) if len(offsets) < x.ndim else (), (axis,))
    options = {
        "take": lambda x: jnp.take(x, places, axis),
        "take far": lambda x: jnp.take(x, far, axis, mode=mode),
        "by data": lambda x: jnp.take(x, whole(x, 1), axis, mode=mode),
        "along": lambda x: jnp.take_along_axis(x, along, axis),
        "along data": lambda x: jnp.take_along_axis(
            x, jnp.abs(jnp.real(x)).astype(jnp.int32) % n, axis
        ),
        "slice by data": lambda x: lax.dynamic_slice(
            x, [whole(x, i) + s for i, s in enumerate(start)], sizes
        ),
        "slice one by data": lambda x: lax.dynamic_slice_in_dim(x, whole(x), sizes[axis], axis),
        "raw slice": lambda x: lax.dynamic_slice(
            x, [jnp.int32(s) for s in start], sizes, allow_negative_indices=False
        ),
        "lax.gather": lambda x: lax.gather(x, far[:, None], numbers, slices, mode=mode),
        "mask": lambda x: x[..., np.arange(x.shape[-1]) % 2 == 0],
        "index": lambda x: x[places],
        "choose": lambda x: (
            jnp.select([x > 0, x < -1], [x, -x], 2 * x) if x.dtype.kind in "if" else x
        ),
    }
    name = d.pick(options)
    if mode == "wrap" and name == "lax.gather":
        return None
    return Made(options[name], bound=2 * x.bound + 2, note=f"{name} {axis} {mode} {sizes} {start}")


def scatter(d, x):
    if not picked(d, x) or x.kind not in "fi":
        return None
    axis, k = d.axis(x), d.int(1, 3)
    n = x.shape[axis]
    where = d.rng.integers(-n, n, (k,))
    one = int(where[0])
    at = tuple(slice(None) for _ in range(axis))
    start = [d.int(-1, 3) for _ in x.shape]
    sizes = [d.int(1, m) for m in x.shape]
    update = d.numbers(sizes, x.dtype)
    options = {
        "set": lambda x: x.at[(*at, where)].set(3),
        "add": lambda x: x.at[(*at, where)].add(2),
        "add sum": lambda x: x.at[(*at, one)].add(x.sum()),
        "max": lambda x: x.at[(*at, where)].max(1),
        "multiply": lambda x: x.at[(*at, one)].multiply(2),
        "by data": lambda x: x.at[(*at, whole(x, 1))].set(5),
        "add by data": lambda x: x.at[(*at, whole(x, 1) % n)].add(5),
        "corner": lambda x: x.at[tuple(0 for _ in x.shape)].set(x.max()),
        "update slice": lambda x: lax.dynamic_update_slice(x, update, start),
        "update by data": lambda x: lax.dynamic_update_slice(
            x, update, [whole(x, i) for i in range(x.ndim)]
        ),
        "segments": lambda x: jax.ops.segment_sum(x, np.arange(x.shape[0]) % 2, 2),
        "histogram": lambda x: jnp.zeros(4, x.dtype).at[whole(x) % 4].add(x.ravel()[0]),
        "mask": lambda x: jnp.where(x > x.mean(), x, 0) if x.dtype.kind == "i" else x * (x > 0),
    }
    name = d.pick(options)
    bound = x.bound * (1 + np.prod(x.shape)) + 6
    return Made(options[name], bound=float(bound), note=f"{name} {axis} {where} {start} {sizes}")


@jax.custom_jvp
def smooth(x):
    return jnp.concatenate([x, x]).sum(0) + x


smooth.defjvp(lambda primals, tangents: (smooth(*primals), smooth(*tangents)))


@jax.custom_vjp
def clipped(x):
    return jnp.maximum(x, -1)


clipped.defvjp(lambda x: (clipped(x), None), lambda _, g: (g,))


@jax.custom_jvp
def flat(x):
    return x.reshape(-1), x[:1]


flat.defjvp(lambda primals, tangents: (flat(*primals), flat(*tangents)))


def function_inside(d, x):
    """Calls, loops, branches, maps and custom derivatives."""
    if not picked(d, x) or x.kind not in "fi":
        return None
    axis, reverse, length = d.axis(x), d.chance(0.3), d.int(0, 3)
    shape = x.shape[1:]
    other = d.like(x)

    def scan(step, first, x):
        return lax.scan(step, first, x, reverse=reverse)

    def grow(c, y):
        return jnp.maximum(c, y) + 1, c

    def both(carry, ys):
        return carry + ys.sum(0) if carry.ndim else ys

    options = {
        "jit": lambda x, y: jax.jit(lambda x: x[::-1] + y)(x),
        "checkpoint": lambda x, y: jax.checkpoint(lambda x: 2 * x + y)(x),
        "cond": lambda x, y: lax.cond(x.sum() > 1, lambda x: x + y, lambda x: -x, x),
        "cond element": lambda x, y: lax.cond(whole(x) > 0, lambda: x, lambda: y),
        "switch": lambda x, y: lax.switch(
            whole(x), [lambda x: x, lambda x: x[::-1], lambda x: y], x
        ),
        "scan": lambda x, y: both(*scan(grow, jnp.zeros(shape, x.dtype), x)),
        "scan window": lambda x, y: scan(lambda c, y: (c + x, y), x, y)[0],
        "scan steps": lambda x, y: lax.scan(
            lambda c, _: (jnp.roll(c, 1, axis), c[0]), x, None, length=length
        )[1],
        "for": lambda x, y: lax.fori_loop(0, length, lambda i, x: x + i, x),
        "for by data": lambda x, y: lax.fori_loop(0, jnp.abs(whole(x)) % 4, lambda i, x: x + y, x),
        "while": lambda x, y: lax.while_loop(lambda x: x.sum() > 3, lambda x: x - 2, x),
        "map": lambda x, y: lax.map(lambda x: x.sum() + x, x),
        "vmap": lambda x, y: jax.vmap(lambda a, b: a + b.max(), axis, axis)(x, y),
        "vmap out": lambda x, y: jax.vmap(lambda a: a * 2 + 1, axis, 0)(x),
        "custom jvp": lambda x, y: smooth(x),
        "custom vjp": lambda x, y: clipped(x),
        "two results": lambda x, y: flat(x)[0] + flat(y)[1].sum(),
        "platform": lambda x, y: lax.platform_dependent(
            x, cpu=jnp.abs, cuda=jnp.abs, tpu=jnp.negative
        ),
        "platform default": lambda x, y: lax.platform_dependent(
            x, tpu=jnp.negative, default=jnp.abs
        ),
        "reduce": lambda x, y: lax.reduce(x, np.array(0, x.dtype), lambda a, b: a + b, (axis,)),
        "integral": lambda x, y: jnp.cumsum(jnp.cumsum(x, 0), -1),
        "polynomial": lambda x, y: jnp.polyval(jnp.array([1, -1, 2], x.dtype), jnp.sign(x)),
    }
    if x.kind == "f":
        options |= {
            "gradient": lambda x, y: jax.grad(lambda x: (x * x * y).sum())(x),
            "jvp": lambda x, y: jax.jvp(lambda x: x * x, (x,), (y,))[1],
            "relu": lambda x, y: jax.nn.relu6(x) + jax.nn.relu(y),
        }
    name = d.pick(options)
    bound = (x.bound + 4) * (other.bound + 4) * 8 * max(x.shape) ** 2
    return Made(options[name], (other,), bound=float(bound), note=f"{name} {axis} {length}")


def search(d, x):
    """Values among others."""
    if not picked(d, x) or x.kind not in "fi":
        return None
    grid = np.sort(d.numbers((4,), x.dtype))
    other = d.like(x)
    options = {
        "searchsorted": lambda x, y: jnp.searchsorted(grid, x),
        "digitize": lambda x, y: jnp.digitize(x, grid),
        "isin": lambda x, y: jnp.isin(x, grid[:2]),
        "in window": lambda x, y: jnp.searchsorted(jnp.sort(x.ravel()), y.ravel()[:3]),
        "equal anywhere": lambda x, y: (x.ravel()[:, None] == y.ravel()[:5]).any(1),
        "triangle": partial(lambda f, x, y: f(x) @ y.T, jnp.tril) if x.ndim == 2 else jnp.add,
    }
    name = d.pick(options)
    bound = 99.0 if name != "triangle" else (x.bound + 1) * (other.bound + 1) * 9.0
    return Made(options[name], (other,), bound=bound, note=name)


CONTROL = (gather, gather, scatter, function_inside, function_inside, search)
