"""Errors about arguments, which name the public function that was called."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])


class BadType(TypeError):
    """An argument of the wrong type; `public` puts the function's name in front."""


class BadValue(ValueError):
    """An argument out of range; `public` puts the function's name in front."""


def public(function: F, name: str | None = None) -> F:
    """Puts the name of a public function in front of the errors that checks raise in it."""
    prefix = name or function.__name__

    @wraps(function)
    def named(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except BadType as error:
            raise TypeError(f"{prefix}: {error}") from error.__cause__
        except BadValue as error:
            raise ValueError(f"{prefix}: {error}") from error.__cause__

    return cast("F", named)
