"""Views: values that hold the elements of one parameter, only laid out in another way."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.extend.core import JaxprEqn, Literal

from fclayers._util.jaxprs import aval

_SAME = {"copy", "copy_p", "sharding_constraint"}
_LAYOUTS = {"reshape", "squeeze", "expand_dims", "rev", "slice", "broadcast_in_dim"}


class View(NamedTuple):
    """Elements of a parameter.

    Attributes:
        leaf: Which parameter.
        box: Along each of its axes, the first and last plus one of the elements that are kept.
        scale: A number that they are multiplied by.
        steps: What else was done to their layout, in a form that can be compared.
        order: The last transposition: for each axis of the view, which axis it was before.
    """

    leaf: int
    box: tuple[tuple[int, int], ...]
    scale: float
    steps: tuple[object, ...]
    order: tuple[int, ...]


def whole(leaf: int, shape: tuple[int, ...]) -> View:
    """A parameter itself."""
    return View(leaf, tuple((0, size) for size in shape), 1.0, (), tuple(range(len(shape))))


def is_same(a: View, b: View) -> bool:
    """Whether two views hold the same elements, but for a transposition and the scale."""
    return (a.leaf, a.box, a.steps) == (b.leaf, b.box, b.steps)


def are_disjoint(a: View, b: View) -> bool:
    """Whether two views have no element in common."""
    return a.leaf != b.leaf or any(
        max(first, start) >= min(last, stop)
        for (first, last), (start, stop) in zip(a.box, b.box, strict=True)
    )


def follow(eqn: JaxprEqn, operand: int, view: View, stacked: int) -> list[View] | None:
    """The views that an equation makes of one, or `None` if its results are none.

    The view has `stacked` axes in front that the equation, which is in a loop, does not see.
    """
    name, params = eqn.primitive.name, eqn.params
    dtypes = [aval(var).dtype for var in (eqn.invars[operand], *eqn.outvars)]
    if not all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
        return None
    if name in _SAME or name == "convert_element_type":
        return [view]
    if name == "neg":
        return [view._replace(scale=-view.scale)]
    if name in ("mul", "div"):
        other = eqn.invars[1 - operand]
        if not isinstance(other, Literal) or (name == "div" and operand == 1):
            return None
        factor = float(other.val)
        return [view._replace(scale=view.scale * factor if name == "mul" else view.scale / factor)]
    shape = aval(eqn.invars[operand]).shape
    if name == "transpose":
        order = (*range(stacked), *(stacked + axis for axis in params["permutation"]))
        return [view._replace(order=tuple(view.order[axis] for axis in order))]
    if name == "split":
        axis, ends, start = stacked + params["axis"], [], 0
        for size in params["sizes"]:
            ends.append((start, start + size))
            start += size
        return [_cut(view, {axis: end}) for end in ends]
    if name == "slice" and all(stride == 1 for stride in params["strides"] or ()):
        limits = zip(params["start_indices"], params["limit_indices"], strict=True)
        return [_cut(view, {stacked + axis: limit for axis, limit in enumerate(limits)})]
    out = aval(eqn.outvars[0])
    if name not in _LAYOUTS or (out.size > aval(eqn.invars[operand]).size):
        return None
    if name == "reshape" and params["dimensions"] is not None:
        return None
    if name != "slice" and name != "rev" and out.shape == shape:
        return [view]
    return [_push(view, (name, stacked, out.shape, repr(params)), stacked + out.ndim)]


def _cut(view: View, limits: dict[int, tuple[int, int]]) -> View:
    """Some elements along axes of the view."""
    if view.steps:
        return _push(view, ("cut", tuple(sorted(limits.items()))), len(view.order))
    box = list(view.box)
    for axis, (start, stop) in limits.items():
        first, _ = box[view.order[axis]]
        box[view.order[axis]] = (first + start, first + stop)
    return view._replace(box=tuple(box))


def _push(view: View, step: object, ndim: int) -> View:
    return view._replace(steps=(*view.steps, view.order, step), order=tuple(range(ndim)))
