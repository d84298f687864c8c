"""`jax.jit` as a decorator of public functions that type checkers see through."""

from collections.abc import Callable
from functools import partial, wraps
from inspect import signature
from typing import Any, cast

import jax

from fclayers._util.errors import F, public


def jit(*static_argnames: str, function_or_array: str | None = None) -> Callable[[F], F]:
    """Jits a public function with the named arguments static, inlined under an outer `jit`.

    The last positional argument may be a function if its name is `function_or_array`. As that may
    close over traced arrays, JAX's cache does not see it: outside `jit` every such call compiles.
    """

    def decorate(function: F) -> F:
        named = public(function)
        options = {"static_argnames": static_argnames, "inline": True}
        jitted = jax.jit(named, **options)  # type: ignore[call-overload]
        if function_or_array is None:
            return cast("F", jitted)
        place = list(signature(function).parameters).index(function_or_array)

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            given = args[place] if len(args) > place else kwargs.get(function_or_array)
            if not callable(given):
                return jitted(*args, **kwargs)
            closed = partial(named, **{function_or_array: given})
            others = {k: v for k, v in kwargs.items() if k != function_or_array}
            return jax.jit(closed, **options)(*args[:place], **others)  # type: ignore[call-overload]

        return cast("F", call)

    return decorate
