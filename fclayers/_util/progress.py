"""Progress bars, if tqdm is installed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def progress_bar(total: int, *, unit: str, initial: int = 0, show: bool = True) -> Iterator[Any]:
    """Opens tqdm's bar for `total` units of work, or a silent one if not `show` or without tqdm."""
    if show:
        try:
            from tqdm import tqdm  # type: ignore[import-untyped]
        except ModuleNotFoundError:
            show = False
    if not show:
        yield _NoBar()
        return
    with tqdm(total=total, initial=initial, unit=unit, unit_scale=total >= 1000) as bar:
        yield bar


class _NoBar:
    def update(self, n: int = 1) -> None:
        pass

    def set_postfix(self, values: dict[str, str], refresh: bool) -> None:
        pass
