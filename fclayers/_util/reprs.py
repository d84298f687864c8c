"""Short reprs of parameters: shapes and dtypes in place of numbers."""

from typing import Any

from fclayers._util.checks import is_array


def short_repr(node: Any) -> str:
    """The repr of a `NamedTuple` with arrays as jaxtyping writes them, such as `f32[784,10]`."""
    fields = (f"{name}={_short(value)}" for name, value in node._asdict().items())
    return f"{type(node).__name__}({', '.join(fields)})"


def _short(value: Any) -> str:
    if not is_array(value):
        return repr(value)
    dtype = str(value.dtype)
    for long, short in (("float", "f"), ("uint", "u"), ("int", "i"), ("complex", "c")):
        dtype = dtype.replace(long, short)
    return f"{dtype}[{','.join(map(str, value.shape))}]"
