"""`explain_slide`: what of a function is shared between windows, and which line stops it."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import jax

from fclayers._table import format_bytes, format_table
from fclayers.slide.interpret import Step
from fclayers.slide.transform import slide_and_trace

_COLLECTIVE = (
    r"= \(?(\w+)\[([\d,]*)\].* "
    r"(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)


_NOT_THE_USERS = (str(Path(str(jax.__file__)).parent), str(Path(__file__).parents[1]))


class Row(NamedTuple):
    """Consecutive steps of one source line.

    Attributes:
        line: File and line of the function's source.
        operations: Names of the JAX primitives.
        kind: `"shared"` (computed once for all windows), `"per position"` (once per window, on
            what is left of it), or `"per window"` (on each window, cut out).
        shape: Shape of the last result: with all windows, or for `"per window"` of one.
        reason: Why the steps are not shared.
    """

    line: str
    operations: tuple[str, ...]
    kind: str
    shape: tuple[int, ...]
    reason: str


class SlideReport(NamedTuple):
    """What `slide` makes of a function; prints as a table.

    Attributes:
        rows: What became of every line.
        positions: Number of windows along each window axis.
        flops: Operations of the shared program, counted by XLA before its optimizations.
        flops_windows: Operations of the function on every window, counted in the same way.
        temporary_bytes: Peak memory of the compiled program, without arguments and results.
        exchanged: Bytes that devices send each other by collective operation, if the image is
            sharded, on each device.
    """

    rows: tuple[Row, ...]
    positions: tuple[int, ...]
    flops: float
    flops_windows: float
    temporary_bytes: int
    exchanged: dict[str, int]

    @property
    def is_shared(self) -> bool:
        """Whether nothing is run window by window."""
        return all(row.kind != "per window" for row in self.rows)

    def __str__(self) -> str:
        cells = [
            (row.line, ", ".join(row.operations), row.kind, str(row.shape), row.reason)
            for row in self.rows
        ]
        table = format_table(("line", "operations", "computed", "shape", "because it"), cells)
        stops = next((row for row in self.rows if row.kind == "per window"), None)
        verdict = "shared all the way"
        if stops is not None:
            verdict = f"shared up to {stops.line}, which {stops.reason}"
        lines = [
            table,
            "",
            f"windows     {' × '.join(map(str, self.positions))} = {prod(self.positions):,}",
            f"verdict     {verdict}",
            f"operations  {self.flops:.3g}, window by window {self.flops_windows:.3g} "
            f"({self.flops_windows / max(self.flops, 1):.3g} times as many)",
            f"memory      {format_bytes(self.temporary_bytes)} of temporaries",
        ]
        lines += [
            f"exchanged   {format_bytes(size)} by {name}" for name, size in self.exchanged.items()
        ]
        return "\n".join(lines)


def explain_slide(
    fun: Callable[..., Any],
    window_shape: int | tuple[int, ...],
    *,
    stride: int | tuple[int, ...] = 1,
    axes: int | tuple[int, ...] | None = None,
    edges: str = "window",
) -> Callable[..., SlideReport]:
    """Makes a function that reports what `slide` would do; nothing is computed.

    Args:
        fun: As in `slide`.
        window_shape: As in `slide`.
        stride: As in `slide`.
        axes: As in `slide`.
        edges: As in `slide`.

    Returns:
        A function of the same arguments as `slide(...)`, arrays or `jax.ShapeDtypeStruct`s, that
        returns a `SlideReport`. It compiles the program to know its memory.

    Raises:
        TypeError: As `slide`.
        ValueError: As `slide`.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import fclayers as fc
        >>> def brightest(window):
        ...     smooth = fc.avg_pool(window[..., None], 3, stride=1)[..., 0]
        ...     return smooth.max()
        >>> image = jax.ShapeDtypeStruct((100, 100), jnp.float32)
        >>> report = fc.explain_slide(brightest, (15, 15))(image)
        >>> report.is_shared, report.positions
        (True, (86, 86))
    """
    traced = slide_and_trace(
        "explain_slide", fun, window_shape, stride=stride, axes=axes, edges=edges
    )

    def explain(*args: Any) -> SlideReport:
        arrays, rebuild = _split_arrays(args)
        steps: list[Step] = []
        counts: list[tuple[int, ...]] = []
        shapes: list[Any] = []

        def run(arrays: Sequence[Any]) -> Any:
            outs, trace, window = traced(*rebuild(arrays))
            steps[:], counts[:], shapes[:] = trace.steps, [trace.grid.counts], [window]
            return outs

        lowered = jax.jit(run).lower(arrays)
        (positions,), (window,) = counts, shapes

        def run_window(arrays: Sequence[Any], window: Any) -> Any:
            return fun(*rebuild(arrays)[:-1], window)

        one_window = jax.jit(run_window).lower(arrays, window)
        compiled = lowered.compile()
        memory = compiled.memory_analysis()
        return SlideReport(
            tuple(_rows(steps)),
            positions,
            _flops(lowered),
            _flops(one_window) * prod(positions),
            memory.temp_size_in_bytes if memory else 0,
            _exchanged(compiled.as_text() or ""),
        )

    return explain


def _split_arrays(args: Any) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """The arrays among the arguments, and how to put others in their place."""
    leaves, structure = jax.tree.flatten(args)
    is_array = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves]

    def rebuild(arrays: Sequence[Any]) -> Any:
        rest = iter(arrays)
        return jax.tree.unflatten(
            structure,
            [next(rest) if array else leaf for leaf, array in zip(leaves, is_array, strict=True)],
        )

    return [leaf for leaf, array in zip(leaves, is_array, strict=True) if array], rebuild


def _rows(steps: Sequence[Step]) -> Iterator[Row]:
    visible = [step for step in steps if step.kind != "constant"]
    lines = [(_source_line(step.eqns), step.kind, step.reason) for step in visible]
    for (line, kind, reason), group in groupby(range(len(visible)), lines.__getitem__):
        members = [visible[i] for i in group]
        names = dict.fromkeys(step.eqns[0].primitive.name for step in members)
        yield Row(line, tuple(names), kind, members[-1].shape, reason)


def _source_line(eqns: Sequence[Any]) -> str:
    """The innermost line that is neither JAX's nor this library's."""
    for eqn in eqns:
        traceback = eqn.source_info.traceback
        for frame in traceback.frames if traceback is not None else ():
            folder, name = os.path.split(frame.file_name)
            if not folder.startswith(_NOT_THE_USERS):
                return f"{name}:{frame.line_num}"
    return "?"


def _flops(lowered: Any) -> float:
    return float((lowered.cost_analysis() or {}).get("flops", 0.0))


def _exchanged(program: str) -> dict[str, int]:
    """Bytes of the results of collective operations in a compiled program."""
    sizes: dict[str, int] = {}
    for dtype, shape, name in re.findall(_COLLECTIVE, program):
        bits = int(re.sub(r"\D", "", dtype) or 8)
        count = prod(int(n) for n in shape.split(",") if n)
        sizes[name] = sizes.get(name, 0) + count * bits // 8
    return sizes
