"""Text tables, for the `__repr__` of `NamedTuple`s."""

from collections.abc import Sequence

Cells = Sequence[object]


def format_table(
    header: Cells, rows: Sequence[Cells], *, total: Cells | None = None, numeric: int | None = None
) -> str:
    """Aligns cells in columns, with rules; columns from `numeric` on are right-aligned."""
    lines = [list(map(str, cells)) for cells in (header, *rows, *([total] if total else []))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    numeric = len(header) if numeric is None else numeric
    printed = [
        "  ".join(
            cell.ljust(width) if i < numeric else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    rule = "-" * max(map(len, printed))
    body, last = (printed[1:-1], [rule, printed[-1]]) if total else (printed[1:], [])
    return "\n".join([printed[0], rule, *body, *last])


def format_bytes(size: float) -> str:
    """Formats a number of bytes with a binary unit, such as `1.5 KiB`."""
    if size < 1024:
        return f"{size} B"
    for unit in ("KiB", "MiB", "GiB"):
        size /= 1024
        if size < 1024:
            return f"{size:.1f} {unit}"
    return f"{size / 1024:.1f} TiB"
