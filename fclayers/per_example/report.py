"""`explain_per_example`: how the gradient of every parameter is found, and what it costs."""

from collections.abc import Callable
from math import prod
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from fclayers._util.errors import public
from fclayers._util.jaxprs import source_line
from fclayers._util.tables import format_bytes, format_table
from fclayers._util.trees import path_name
from fclayers.per_example.factors import sizes_of
from fclayers.per_example.groups import (
    Group,
    formed_norm_operations,
    group,
    keep_none,
    leaf_elements,
    pair_operations,
)
from fclayers.per_example.norms import is_by_factors, per_example_norms
from fclayers.per_example.problem import Fun, count_examples, pose
from fclayers.per_example.program import Program


class PerExampleRow(NamedTuple):
    """One array of the parameters.

    Attributes:
        parameter: Its path.
        shape: Its shape.
        kind: `"outer product"`: the gradient of an example is one, and its norm follows from two
            vectors. `"positions"`: it is a sum of outer products, and its norm follows from the
            inner products of all pairs of positions. `"formed"`: every example's gradient is
            formed, some examples at a time. `"fallback"`: so it is, by a backward pass of its own.
            `"unused"`: it has no influence. `"integer"`: it has no gradient.
        lines: Files and lines of the function's source where it meets the example.
        flops: Multiplications for the norms of all examples, without the backward pass.
        reason: Why its gradients are formed.
    """

    parameter: str
    shape: tuple[int, ...]
    kind: str
    lines: tuple[str, ...]
    flops: float
    reason: str


class PerExampleReport(NamedTuple):
    """How the gradients of examples are found; prints as a table.

    Attributes:
        rows: One for every array of the parameters.
        examples: Number of examples.
        flops: Multiplications for all norms, without the backward pass: the sum of the rows.
        flops_formed: Multiplications for forming all gradients instead.
        temporary_bytes: Peak memory of the compiled norms, without arguments and results.
        gradient_bytes: Memory of all gradients, which `jax.vmap(jax.grad(loss))` stores.
    """

    rows: tuple[PerExampleRow, ...]
    examples: int
    flops: float
    flops_formed: float
    temporary_bytes: int
    gradient_bytes: int

    @property
    def falls_back(self) -> bool:
        """Whether a parameter takes a backward pass of its own."""
        return any(row.kind == "fallback" for row in self.rows)

    def __repr__(self) -> str:
        cells = [
            (
                row.parameter,
                row.shape,
                row.kind,
                ", ".join(row.lines),
                f"{row.flops:.2g}",
                row.reason,
            )
            for row in self.rows
        ]
        table = format_table(
            ("parameter", "shape", "gradient", "lines", "flops", "because it"), cells
        )
        times = self.flops_formed / max(self.flops, 1)
        lines = [
            table,
            "",
            f"examples    {self.examples:,}",
            f"operations  {self.flops:.3g} for the norms, "
            f"{self.flops_formed:.3g} for the gradients ({times:.3g} times as many)",
            f"memory      {format_bytes(self.temporary_bytes)} of temporaries, all gradients "
            f"{format_bytes(self.gradient_bytes)}",
        ]
        return "\n".join(lines)


@public
def explain_per_example(loss: Fun) -> Callable[[PyTree, PyTree], PerExampleReport]:
    """Makes a function that reports how `per_example_norms` and the others find the gradients.

    Args:
        loss: As in `per_example_norms`.

    Returns:
        A function of the parameters and a batch, arrays or `jax.ShapeDtypeStruct` leaves, that
        returns a `PerExampleReport`. It compiles the norms, but runs nothing.

    Raises:
        TypeError: As `per_example_norms`.
        ValueError: As `per_example_norms`.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import fclayers as fc
        >>> params = fc.init_linear(jax.random.key(0), 3, 2)
        >>> def loss(params, x):
        ...     return jnp.sum(fc.apply_linear(params, x) ** 2)
        >>> report = fc.explain_per_example(loss)(params, jnp.ones((8, 3)))
        >>> [(row.parameter, row.kind) for row in report.rows]
        [('weight', 'outer product'), ('bias', 'formed')]
    """

    def explain(params: PyTree, batch: PyTree) -> PerExampleReport:
        programs: list[Program] = []

        def run(params: PyTree, batch: PyTree) -> None:
            problem, _ = pose(loss, params, batch, scalar=True)
            programs.append(problem.program)

        jax.eval_shape(run, params, batch)
        compiled = jax.jit(per_example_norms(loss)).lower(params, batch).compile()
        memory, (program,) = compiled.memory_analysis(), programs
        count, groups = count_examples(batch), group(program, keep_none)
        paths = [path_name(path) for path, _ in jax.tree.leaves_with_path(params)]
        rows = tuple(_row(program, groups, i, path, count) for i, path in enumerate(paths))
        shapes = [a for a in program.shapes if jnp.issubdtype(a.dtype, jnp.inexact)]
        return PerExampleReport(
            rows,
            count,
            sum(row.flops for row in rows),
            count * sum(formed_norm_operations(program, group) for group in groups),
            memory.temp_size_in_bytes if memory else 0,
            count * sum(prod(a.shape) * a.dtype.itemsize for a in shapes),
        )

    return public(explain, "explain_per_example")


def _row(program: Program, groups: list[Group], leaf: int, path: str, count: int) -> PerExampleRow:
    shape = program.shapes[leaf]
    own = next((group for group in groups if leaf in group.leaves), None)
    if own is None:
        trained = jnp.issubdtype(shape.dtype, jnp.inexact)
        kind = "unused" if trained else "integer"
        return PerExampleRow(path, shape.shape, kind, (), 0.0, "")
    names = [name for name in own.names if leaf in program.sources[name]]
    uses = [use for name in names for use in program.uses[name] if use.eqns]
    lines = tuple(dict.fromkeys(source_line(use.eqns) for use in uses))
    kind, reason = own.kind, own.reason
    flops = formed_norm_operations(program, own)
    if is_by_factors(program, own):
        one = all(sizes_of(site).positions == 1 for site in own.sites) and len(own.sites) == 1
        kind, flops, reason = "outer product" if one else "positions", pair_operations(own), ""
    elif kind == "factors":
        kind, reason = "formed", "has fewer elements than pairs of positions"
    share = prod(shape.shape) / max(1, leaf_elements(program, own))
    return PerExampleRow(path, shape.shape, kind, lines, count * flops * share, reason)
