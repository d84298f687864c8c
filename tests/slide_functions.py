"""Random functions of arrays of any rank, and the loop over windows that `slide` is held against.

Unlike `slide_networks`, which draws networks, this draws one to eight operations of `jax.lax` and
`jax.numpy` on random axes. Numbers are small integers, also as floats, and most operations keep
them so: then results do not depend on the order of sums, and are compared exactly. Operations that
round mark their result, and what compares, counts or picks takes no such operand.

`python tests/slide_functions.py 1000` runs seeds and prints how often every operation was drawn,
and how much was shared; `python tests/slide_functions.py 0 17` draws and runs seed 17 alone.
"""

import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from itertools import takewhile
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import fclayers as fc

# Larger numbers are reduced, so that sums of exact ones are exact in float32.
LARGEST = 2.0**11
MOST_ELEMENTS = 600


class Known(NamedTuple):
    """A value while the function is drawn: exact ones are integers of at most `bound`."""

    index: int
    shape: tuple[int, ...]
    dtype: np.dtype
    exact: bool
    bound: float

    @property
    def ndim(self):
        return len(self.shape)

    @property
    def kind(self):
        """b, i, u, f or c."""
        return self.dtype.kind


class Made(NamedTuple):
    """An operation that was drawn: `fun(*operands)`, of the value and others."""

    fun: Callable[..., Any]
    others: tuple[Known, ...] = ()
    exact: bool = True
    bound: float | None = None
    note: str = ""


class Step(NamedTuple):
    name: str
    operands: tuple[int, ...]
    fun: Callable[..., Any]


class Case(NamedTuple):
    """A function of a window, where its windows lie, and an image."""

    seed: int
    fun: Callable[[Any], Any]
    window: tuple[int, ...]
    stride: tuple[int, ...]
    axes: tuple[int, ...]
    image: np.ndarray
    steps: list[Step]
    exact: list[bool]
    is_wide: bool

    def __repr__(self):
        steps = "\n".join(f"  {i + 1}: {s.name} of {s.operands}" for i, s in enumerate(self.steps))
        return (
            f"seed {self.seed}: image {self.image.dtype}{self.image.shape}, window {self.window}, "
            f"stride {self.stride}, axes {self.axes}, 64 bits {self.is_wide}\n{steps}"
        )


class Draw:
    """A seeded generator of numbers, and the values of the function so far."""

    def __init__(self, rng):
        self.rng = rng
        self.values: list[Known] = []

    def int(self, low, high):
        return int(self.rng.integers(low, high + 1))

    def chance(self, p):
        return bool(self.rng.random() < p)

    def pick(self, options):
        options = list(options)
        return options[self.int(0, len(options) - 1)]

    def axis(self, x):
        return self.int(0, x.ndim - 1)

    def axes(self, x, least=1):
        count = self.int(min(least, x.ndim), x.ndim)
        return tuple(int(i) for i in self.rng.permutation(x.ndim)[:count])

    def numbers(self, shape, dtype=np.float32, low=-3, high=3):
        """A constant of small integers."""
        dtype = np.dtype(dtype)
        if dtype.kind == "b":
            return self.rng.random(shape) < 0.5
        if dtype.kind == "u":
            low, high = 0, max(high, 1)
        array = self.rng.integers(low, high + 1, shape)
        if dtype.kind == "c":
            return (array + 1j * self.rng.integers(low, high + 1, shape)).astype(dtype)
        return array.astype(dtype)

    def like(self, x):
        """Another value of the same shape and dtype, or the same one."""
        same = [v for v in self.values if (v.shape, v.dtype) == (x.shape, x.dtype)]
        return self.pick(same)


def draw_case(seed, operations):
    rng = np.random.default_rng(seed)
    d = Draw(rng)
    ndim = d.pick([1, 2, 2, 3, 3, 4, 5])
    axes = tuple(int(i) for i in rng.permutation(ndim)[: d.int(1, min(3, ndim))])
    largest = {1: 12, 2: 8, 3: 5}.get(ndim, 3)
    shape = [max(d.int(1, largest), d.int(1, largest)) for _ in range(ndim)]
    if d.chance(0.04):
        shape[d.int(0, ndim - 1)] = 0
    shape = [max(1, n) if i in axes else n for i, n in enumerate(shape)]
    window = tuple(shape[axis] for axis in axes)
    stride = tuple(d.pick([1, 1, 1, 2, 2, 3, w, w + d.int(1, 2)]) for w in window)
    steps_more = {1: (0, 1, 2, 3, 5, 9), 2: (0, 1, 2, 2, 3), 3: (0, 1, 1, 2)}[len(axes)]
    size = list(shape)
    for axis, s in zip(axes, stride, strict=True):
        size[axis] += d.pick(steps_more) * s + d.int(0, s - 1)
    if d.chance(0.04):
        size = list(shape)
    is_wide = d.chance(0.2)
    dtype = d.pick(["float32"] * 10 + ["int32"] * 3 + ["uint8", "uint8", "bool", "complex64"])
    if is_wide:
        dtype = {"float32": "float64", "complex64": "complex128"}.get(dtype, dtype)
    image = d.numbers(tuple(size), dtype, -4, 4)

    with jax.enable_x64(is_wide):
        d.values = [Known(0, tuple(shape), np.dtype(dtype), True, 6.0)]
        steps: list[Step] = []
        for _ in range(d.int(1, 8)):
            _draw_step(d, operations, steps)
    outs = [len(steps)]
    if steps and d.chance(0.3):
        outs += [d.int(0, len(steps)) for _ in range(d.int(1, 2))]
    tree = d.pick(["one", "one", "tuple", "dict"]) if len(outs) == 1 else d.pick(["tuple", "dict"])

    def fun(x):
        env = [x]
        for step in steps:
            env.append(step.fun(*(env[i] for i in step.operands)))
        results = [env[i] for i in outs]
        if tree == "one":
            return results[0]
        return tuple(results) if tree == "tuple" else {str(i): r for i, r in enumerate(results)}

    exact = [d.values[i].exact for i in outs]
    return Case(seed, fun, window, stride, axes, image, steps, exact, is_wide)


def _draw_step(d, operations, steps):
    """Adds an operation that fits; few draws do not."""
    for _ in range(12):
        x = d.values[-1] if d.chance(0.75) else d.pick(d.values)
        if prod(x.shape) < 2 and d.chance(0.7):
            x = d.pick(d.values)
        operation = d.pick(operations)
        made = operation(d, x)
        if made is None:
            continue
        operands = (x, *made.others)
        exact = made.exact and all(value.exact for value in operands)
        bound = made.bound or max(value.bound for value in operands)
        fun, bound = _reduced(made.fun, exact, bound)
        structs = [jax.ShapeDtypeStruct(value.shape, value.dtype) for value in operands]
        try:
            result = jax.eval_shape(fun, *structs)
        except (TypeError, ValueError, NotImplementedError, ZeroDivisionError, IndexError):
            continue
        if prod(result.shape) > MOST_ELEMENTS or result.ndim > 6:
            continue
        steps.append(
            Step(f"{operation.__name__} {made.note}", tuple(v.index for v in operands), fun)
        )
        exact = exact or result.dtype.kind in "biu"
        bound = 1.0 if result.dtype.kind == "b" else bound
        d.values.append(Known(len(steps), result.shape, np.dtype(result.dtype), exact, bound))
        return


def _reduced(fun, exact, bound):
    """The operation, with large results reduced."""
    if bound <= LARGEST:
        return fun, bound

    def reduced(*operands):
        y = jnp.asarray(fun(*operands))
        if y.dtype.kind == "f" and exact:
            return lax.rem(y, jnp.asarray(7, y.dtype))
        if y.dtype.kind == "c" and exact:
            seven = jnp.asarray(7, y.real.dtype)
            return lax.complex(lax.rem(y.real, seven), lax.rem(y.imag, seven))
        return y / np.asarray(bound, y.dtype) if y.dtype.kind in "fc" else y

    return reduced, 10.0 if exact else 1.0


def naive(case, image, *, jitted=True):
    """The function on every window, cut out with plain indexing, one after the other."""
    sizes = [image.shape[axis] for axis in case.axes]
    counts = [(n - w) // s + 1 for n, w, s in zip(sizes, case.window, case.stride, strict=True)]
    fun, results = jax.jit(case.fun) if jitted else case.fun, []
    for position in np.ndindex(*counts):
        index = [slice(None)] * image.ndim
        for axis, i, s, w in zip(case.axes, position, case.stride, case.window, strict=True):
            index[axis] = slice(i * s, i * s + w)
        results.append(jax.device_get(fun(jnp.asarray(image[tuple(index)]))))
    return jax.tree.map(lambda *outs: np.stack(outs).reshape(*counts, *outs[0].shape), *results)


def run_case(case, *, eager=True):
    """Raises an error unless `slide` agrees with the loop, jitted and eagerly, which is slow."""
    with jax.enable_x64(case.is_wide), warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        expected = naive(case, case.image)
        sliding = fc.slide(case.fun, case.window, stride=case.stride, axes=case.axes)
        functions = {"jitted": jax.jit(sliding)} | ({"eager": sliding} if eager else {})
        for kind, function in functions.items():
            actual = function(case.image)
            try:
                compare(actual, expected, case.exact, f"{kind}, {case}")
            except AssertionError:
                # XLA's CPU backend miscompiles some updates in place, also in the loop.
                by_hand = naive(case, case.image, jitted=False)
                compare(actual, by_hand, case.exact, f"{kind}, {case}")


def compare(actual, expected, exact, message):
    assert jax.tree.structure(actual) == jax.tree.structure(expected), message
    leaves = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), exact, strict=True)
    for ours, theirs, is_exact in leaves:
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), message
        if is_exact:
            np.testing.assert_array_equal(ours, theirs, err_msg=message)
            continue
        tolerance = 1e-11 if theirs.real.dtype.itemsize == 8 else 1e-4
        finite = np.abs(theirs[np.isfinite(theirs)])
        scale = tolerance * finite.max(initial=1.0)
        np.testing.assert_allclose(ours, theirs, tolerance, scale, err_msg=message)


def sharing(case):
    """How many of the function's steps are run window by window."""
    with jax.enable_x64(case.is_wide):
        rows = fc.explain_slide(case.fun, case.window, stride=case.stride, axes=case.axes)(
            jax.ShapeDtypeStruct(case.image.shape, case.image.dtype)
        ).rows
    kinds = {row.kind for row in rows}
    if "per window" not in kinds:
        return "shared entirely"
    return "shared in part" if len(kinds) > 1 else "window by window"


def _kind(step):
    """The operation without its parameters."""
    first, *rest = step.name.split()
    return " ".join([first, *takewhile(str.isalpha, rest)][:3])


def main(count, first=0):
    """Runs seeds from the first one, and prints what they were."""
    from slide_operations import OPERATIONS

    drawn, shared, failed, start = Counter(), Counter(), [], time.perf_counter()
    for seed in range(first, first + max(count, 1)):
        case = draw_case(seed, OPERATIONS)
        if not count:
            print(case)
        drawn.update(map(_kind, case.steps))
        try:
            run_case(case, eager=count < 100 or seed % 10 == 0)
            if seed % 10 == 0:
                shared[sharing(case)] += 1
        except Exception:
            failed.append(seed)
            print(f"FAILED seed {seed}\n{case}\n{traceback.format_exc()[-1500:]}", flush=True)
        if seed % 200 == 199:
            jax.clear_caches()  # which would fill the memory
            print(f"{seed + 1 - first} in {time.perf_counter() - start:.0f} s", flush=True)
    print(f"{len(failed)} of {count} failed: {failed}")
    print(f"of every tenth: {dict(shared)}")
    print(f"{len(drawn)} operations: {dict(drawn.most_common())}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
