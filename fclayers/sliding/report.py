"""`explain_slide`: what of a function is shared between windows, and which line stops it."""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from math import prod
from typing import NamedTuple

import jax
from jaxtyping import Array, PyTree

from fclayers._util.errors import public
from fclayers._util.jaxprs import source_line
from fclayers._util.tables import format_bytes, format_table
from fclayers.sliding.interpret import Step, Trace
from fclayers.sliding.transform import slide_and_trace


class Row(NamedTuple):
    """Consecutive steps of one source line.

    Attributes:
        line: File and line of the function's source.
        operations: Names of the JAX primitives.
        kind: `"shared"` (computed once for all windows), `"bordered (start 1, end 2)"` (the same,
            but for so many elements at the ends of each window), `"per position"` (once per
            window, on what is left of it), or `"per window"` (on each window, cut out).
        shape: Shape of the last result: with all windows, or for `"bordered"` and `"per window"` of
            one.
        flops: Multiplications, additions and comparisons for all windows.
        reason: Why the steps are not shared.
    """

    line: str
    operations: tuple[str, ...]
    kind: str
    shape: tuple[int, ...]
    flops: float
    reason: str


class SlideReport(NamedTuple):
    """What `slide` makes of a function; prints as a table.

    Attributes:
        rows: What became of every line.
        positions: Number of windows along each window axis.
        flops: Multiplications, additions and comparisons for all windows: the sum of the rows.
        flops_windows: Those of the function on every window, counted in the same way.
        temporary_bytes: Peak memory of the compiled program, without arguments and results.
    """

    rows: tuple[Row, ...]
    positions: tuple[int, ...]
    flops: float
    flops_windows: float
    temporary_bytes: int

    @property
    def is_shared(self) -> bool:
        """Whether nothing is run window by window."""
        return all(row.kind != "per window" for row in self.rows)

    def __repr__(self) -> str:
        cells = [
            (
                row.line,
                ", ".join(row.operations),
                row.kind,
                row.shape,
                f"{row.flops:.2g}",
                row.reason,
            )
            for row in self.rows
        ]
        table = format_table(
            ("line", "operations", "computed", "shape", "flops", "because it"), cells
        )
        stops = next((row for row in self.rows if row.kind == "per window"), None)
        verdict = (
            f"shared up to {stops.line}, which {stops.reason}" if stops else "shared all the way"
        )
        lines = [
            table,
            "",
            f"windows     {' × '.join(map(str, self.positions))} = {prod(self.positions):,}",
            f"verdict     {verdict}",
            f"operations  {self.flops:.3g}, window by window {self.flops_windows:.3g} "
            f"({self.flops_windows / max(self.flops, 1):.3g} times as many)",
            f"memory      {format_bytes(self.temporary_bytes)} of temporaries",
        ]
        return "\n".join(lines)


@public
def explain_slide(
    fun: Callable[..., PyTree[Array]],
    window_shape: tuple[int, ...],
    *,
    stride: int | tuple[int, ...] = 1,
    axes: int | tuple[int, ...] | None = None,
    edges: str = "window",
) -> Callable[..., SlideReport]:
    """Makes a function that reports what `slide` would do; it compiles, but runs nothing.

    Args:
        fun: As in `slide`.
        window_shape: As in `slide`.
        stride: As in `slide`.
        axes: As in `slide`.
        edges: As in `slide`.

    Returns:
        A function of the same arguments as `slide(...)`, arrays or `jax.ShapeDtypeStruct` leaves,
        that returns a `SlideReport`.

    Raises:
        TypeError: As `slide`.
        ValueError: As `slide`.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import fclayers as fc
        >>> def brightest(window):
        ...     smooth = fc.avg_pool(window[..., None], (3, 3), stride=1)[..., 0]
        ...     return smooth.max()
        >>> image = jax.ShapeDtypeStruct((100, 100), jnp.float32)
        >>> report = fc.explain_slide(brightest, (15, 15))(image)
        >>> report.is_shared, report.positions
        (True, (86, 86))
    """
    traced = slide_and_trace(
        fun, window_shape, stride=stride, axes=axes, edges=edges, trace_one=True
    )

    def explain(*args: PyTree) -> SlideReport:
        arrays, rebuild = _split_arrays(args)
        seen: list[Trace] = []

        def run(arrays: Sequence[Array]) -> PyTree[Array]:
            outs, trace = traced(*rebuild(arrays))
            seen[:] = [trace]
            return outs

        lowered = jax.jit(run).lower(arrays)
        (trace,) = seen
        positions = trace.grid.counts

        memory = lowered.compile().memory_analysis()
        return SlideReport(
            tuple(_rows(trace.steps)),
            positions,
            sum(step.operations for step in trace.steps),
            sum(step.operations_of_windows for step in trace.steps),
            memory.temp_size_in_bytes if memory else 0,
        )

    return public(explain, "explain_slide")


def _split_arrays(args: PyTree) -> tuple[list[PyTree], Callable[[Sequence[PyTree]], PyTree]]:
    """The arrays among the arguments, and how to put others in their place."""
    leaves, structure = jax.tree.flatten(args)
    is_array = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves]

    def rebuild(arrays: Sequence[PyTree]) -> PyTree:
        rest = iter(arrays)
        return jax.tree.unflatten(
            structure,
            [next(rest) if array else leaf for leaf, array in zip(leaves, is_array, strict=True)],
        )

    return [leaf for leaf, array in zip(leaves, is_array, strict=True) if array], rebuild


def _rows(steps: Sequence[Step]) -> Iterator[Row]:
    visible = [step for step in steps if step.kind != "constant"]
    lines = [(source_line(step.eqns), step.kind, step.reason) for step in visible]
    for (line, kind, reason), group in groupby(range(len(visible)), lines.__getitem__):
        members = [visible[i] for i in group]
        names = dict.fromkeys(step.eqns[0].primitive.name for step in members)
        flops = sum(step.operations for step in members)
        yield Row(line, tuple(names), kind, members[-1].shape, flops, reason)
