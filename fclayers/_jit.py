"""`jax.jit` as a decorator that type checkers see through."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, cast

import jax

F = TypeVar("F", bound=Callable[..., Any])


def jit(*static_argnames: str) -> Callable[[F], F]:
    """Jits a function with the named arguments static, inlined under an outer `jit`."""
    return cast("Callable[[F], F]", partial(jax.jit, static_argnames=static_argnames, inline=True))
