"""`jax.jit` as a decorator of public functions that type checkers see through."""

from collections.abc import Callable
from typing import cast

import jax

from fclayers._util.errors import F, public


def jit(*static_argnames: str) -> Callable[[F], F]:
    """Jits a public function with the named arguments static, inlined under an outer `jit`."""

    def decorate(function: F) -> F:
        jitted = jax.jit(public(function), static_argnames=static_argnames, inline=True)
        return cast("F", jitted)

    return decorate
