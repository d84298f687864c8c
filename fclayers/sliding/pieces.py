"""Values in pieces: segments of a window axis that lie differently.

Padding changes only what lies near the border of a window. Behind a padded convolution, the first
and the last elements differ from window to window, and the middle is shared between neighbors. A
value in pieces has its dimensions cut into segments; a block, one segment of every dimension, is a
`Value`. Along two window axes that is nine blocks: the interior, whose array has one element per
pixel, four edges and four corners, which have position axes.

Dimensions are products of factors, as those of values are of atoms, and factors are cut.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, product
from math import prod
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from fclayers.sliding.values import Unshared, Value, dense, while_tracing

Cuts = tuple[int, ...]
Index = tuple[int, ...]


class Pieces(NamedTuple):
    """The segments of every factor of every dimension, and the blocks, by segment."""

    dims: tuple[tuple[Cuts, ...], ...]
    blocks: Mapping[Index, Value]

    @property
    def factors(self) -> tuple[Cuts, ...]:
        return tuple(factor for dim in self.dims for factor in dim)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(prod(map(sum, dim)) for dim in self.dims)


def in_pieces(value: Value | Pieces) -> Pieces:
    if isinstance(value, Pieces):
        return value
    return Pieces(tuple(((size,),) for size in value.shape), {(0,) * len(value.shape): value})


def as_value(pieces: Pieces) -> Value | Pieces:
    """The value of a single block."""
    if len(pieces.blocks) > 1:
        return pieces
    (value,) = pieces.blocks.values()
    rest = iter(value.dims)
    dims = tuple(tuple(atom for _ in dim for atom in next(rest)) for dim in pieces.dims)
    return value._replace(dims=dims)


def arrays_of(values: Sequence[Value | Pieces]) -> list[Array]:
    """The arrays of all blocks."""
    return [block.array for value in values for block in in_pieces(value).blocks.values()]


def with_arrays(values: Sequence[Value | Pieces], arrays: Sequence[Array]) -> list[Value | Pieces]:
    """Values of other arrays, in the order of `arrays_of`."""
    rest = iter(arrays)
    return [
        map_blocks(lambda block: block._replace(array=next(rest)), value)
        if isinstance(value, Pieces)
        else value._replace(array=next(rest))
        for value in values
    ]


def layout(value: Value | Pieces) -> object:
    """All that tells how a value lies, without its arrays."""
    blocks = in_pieces(value).blocks
    return in_pieces(value).dims, {i: tuple(block)[1:] for i, block in blocks.items()}


def varies_inside(value: object) -> bool:
    """Whether a value has elements of windows that are shared."""
    if isinstance(value, Pieces):
        return any(map(varies_inside, value.blocks.values()))
    return isinstance(value, Value) and any(atom.axis is not None for atom in value.atoms)


def describe_borders(pieces: Pieces) -> str:
    """How many elements at the start and the end of window axes are not shared."""
    found = []
    for factor, cuts in enumerate(pieces.factors):
        if len(cuts) > 1:
            shared = [i for i in range(len(cuts)) if kind(pieces, factor, i) == "shared"]
            start = sum(cuts[: shared[0]]) if shared else sum(cuts)
            end = sum(cuts[shared[-1] + 1 :]) if shared else 0
            found.append(f"start {start}, end {end}")
    borders = dict.fromkeys(text for text in found if text != "start 0, end 0")
    return f"bordered ({'; '.join(borders)})" if borders else "shared"


def concrete(value: Value) -> np.ndarray | None:
    """A constant whose numbers are known while the function is traced."""
    if not value.is_constant or isinstance(value.array, jax.core.Tracer):
        return None
    with while_tracing():
        return np.asarray(dense(value).array).reshape(value.shape)


def one_factor(pieces: Pieces, dim: int) -> int:
    """The factor of a dimension that has only one."""
    if len(pieces.dims[dim]) != 1:
        raise Unshared("takes window axes merged with others")
    return sum(map(len, pieces.dims[:dim]))


def places_of(pieces: Pieces) -> list[list[int]]:
    """The factors of every dimension."""
    factors = iter(range(len(pieces.factors)))
    return [[next(factors) for _ in dim] for dim in pieces.dims]


def map_blocks(function: Callable[..., Value], pieces: Pieces) -> Pieces:
    return pieces._replace(blocks={i: function(block) for i, block in pieces.blocks.items()})


def indices(factors: Sequence[Cuts]) -> list[Index]:
    """All combinations of a segment of each factor."""
    return list(product(*(range(len(cuts)) for cuts in factors)))


def block_shape(factors: Sequence[Cuts], index: Index) -> tuple[int, ...]:
    return tuple(cuts[i] for cuts, i in zip(factors, index, strict=True))


def kind(pieces: Pieces, factor: int, segment: int) -> str:
    """Whether a segment is "shared", "uniform", or "plain": different for each window."""
    found = "uniform"
    for index, block in pieces.blocks.items():
        if index[factor] == segment:
            atoms = block.dims[factor]
            if any(atom.axis is not None for atom in atoms):
                return "shared"
            if not all(atom.uniform for atom in atoms):
                found = "plain"
    return found


def starts(cuts: Cuts) -> list[int]:
    """Where the segments start."""
    return [0, *accumulate(cuts)][:-1]


def is_plain(value: Pieces, factor: int) -> bool:
    """Whether a factor is not cut and has nothing of a window axis."""
    return len(value.factors[factor]) == 1 and kind(value, factor, 0) != "shared"
