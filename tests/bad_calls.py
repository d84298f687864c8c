"""Tables of calls that must fail, and the test made of one."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest

BadCall = tuple[Callable[[], Any], type[Exception], str]


def bad_calls(table: Mapping[str, BadCall]) -> Callable[[str], None]:
    """Makes the test of a table of `(call, error, pattern of its message)` by names of the cases.

    Assign it to a name that pytest collects: `test_error = bad_calls(BAD)`.
    """

    @pytest.mark.parametrize("name", table)
    def test(name: str) -> None:
        call, error, message = table[name]
        with pytest.raises(error, match=message):
            call()

    return test
