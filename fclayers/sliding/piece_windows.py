"""Rules for convolutions and pools on values in pieces: padding makes segments of its own."""

from fractions import Fraction
from typing import NamedTuple

from jax.extend.core import JaxprEqn

from fclayers._util.jaxprs import out_shapes
from fclayers.sliding.pieces import Cuts, Index, Pieces, indices, kind, one_factor, starts
from fclayers.sliding.regions import Region, rebind, select, slices_of
from fclayers.sliding.values import Grid, Unshared, Value, axis_of, step, window_atom


class Along(NamedTuple):
    """The geometry of a convolution or pool along one dimension."""

    size: int
    stride: int
    padding: tuple[int, int]
    base_dilation: int
    dilation: int

    def reads(self, start: int, stop: int) -> tuple[int, int]:
        """First and last place that these outputs read, `base_dilation` per element."""
        first = start * self.stride - self.padding[0]
        last = (stop - 1) * self.stride - self.padding[0] + (self.size - 1) * self.dilation
        return first, last


class Part(NamedTuple):
    """A segment of the outputs: their number, what they read, and the padding left for it."""

    outputs: int
    region: Region
    padding: tuple[int, int]


def conv(grid: Grid, eqn: JaxprEqn, lhs: Pieces, rhs: Pieces) -> Pieces:
    (batch, feature, *spatial), kernel_spec, out_spec = eqn.params["dimension_numbers"]
    if len(rhs.blocks) > 1:
        raise Unshared("convolves with a kernel that varies from window to window")
    if len(lhs.factors[one_factor(lhs, feature)]) > 1:
        raise Unshared("convolves with a window axis as its features")
    batch_cuts = lhs.factors[one_factor(lhs, batch)]
    if eqn.params["batch_group_count"] > 1:
        if len(batch_cuts) > 1:
            raise Unshared("splits a window axis into groups")
        batch_cuts = (out_shapes(eqn)[0][out_spec[0]],)
    (kernel,) = rhs.blocks.values()
    alongs = [
        Along(kernel.shape[axis], *geometry)
        for axis, *geometry in zip(
            kernel_spec[2:],
            eqn.params["window_strides"],
            eqn.params["padding"],
            eqn.params["lhs_dilation"],
            eqn.params["rhs_dilation"],
            strict=True,
        )
    ]
    shape = out_shapes(eqn)[0]
    places = [one_factor(lhs, dim) for dim in spatial]
    parts = []
    for place, along, out in zip(places, alongs, out_spec[2:], strict=True):
        parts.append(_parts(grid, lhs, place, along, shape[out]))
        lhs = select(grid, lhs, place, [part.region for part in parts[-1]])
    blocks = {}
    for index, block in lhs.blocks.items():
        paddings = [own[index[place]].padding for own, place in zip(parts, places, strict=True)]
        moved = [0] * len(index)
        for out, dim in zip(out_spec, (batch, feature, *spatial), strict=True):
            moved[out] = index[dim]
        (blocks[tuple(moved)],) = rebind(grid, eqn, block, kernel, padding=tuple(paddings))
    cuts: dict[int, Cuts] = {out_spec[0]: batch_cuts, out_spec[1]: (shape[out_spec[1]],)}
    for out, own in zip(out_spec[2:], parts, strict=True):
        cuts[out] = tuple(part.outputs for part in own)
    return Pieces(tuple((cuts[i],) for i in range(len(shape))), blocks)


def reduce_window(grid: Grid, eqn: JaxprEqn, *values: Pieces) -> list[Pieces]:
    """For sums, maxima and minima, and with any function of one operand."""
    if len(eqn.outvars) > 1:
        raise Unshared("reduces windows of several values")
    value, *rest = values
    initial = [block for other in rest for block in other.blocks.values()]
    shape, params = out_shapes(eqn)[0], eqn.params
    parts = []
    for dim, geometry in enumerate(
        zip(
            params["window_dimensions"],
            params["window_strides"],
            params["padding"],
            params["base_dilation"],
            params["window_dilation"],
            strict=True,
        )
    ):
        place = one_factor(value, dim)
        parts.append(_parts(grid, value, place, Along(*geometry), shape[dim]))
        value = select(grid, value, place, [part.region for part in parts[-1]])
    blocks: dict[Index, Value] = {}
    for index in indices(value.factors):
        padding = tuple(own[i].padding for own, i in zip(parts, index, strict=True))
        if min(side for pair in padding for side in pair) < 0:
            raise Unshared("pads by more than its window")
        (blocks[index],) = rebind(grid, eqn, value.blocks[index], *initial, padding=padding)
    return [Pieces(tuple((tuple(p.outputs for p in own),) for own in parts), blocks)]


def _parts(grid: Grid, value: Pieces, factor: int, along: Along, outputs: int) -> list[Part]:
    """Where outputs read one shared segment only, they are shared; those between are not."""
    cuts = value.factors[factor]
    kinds = [kind(value, factor, i) for i in range(len(cuts))]
    if "shared" not in kinds:
        return [_part(cuts, along, 0, outputs, spread=False)]
    parts, done = [], 0
    for segment, (first, size) in enumerate(zip(starts(cuts), cuts, strict=True)):
        if kinds[segment] != "shared":
            continue
        inside = [
            out for out in range(done, outputs) if _reads_only(along, out, first, first + size)
        ]
        if not inside or not _worth_sharing(grid, value, factor, segment, along, len(inside)):
            continue
        begin, end = inside[0], inside[-1] + 1
        if done < begin:
            parts.append(_part(cuts, along, done, begin, spread=True))
        parts.append(_part(cuts, along, begin, end, spread=False))
        done = end
    if done < outputs:
        parts.append(_part(cuts, along, done, outputs, spread=True))
    return parts


def _reads_only(along: Along, out: int, first: int, stop: int) -> bool:
    """Whether an output reads nothing but zeros and elements of these."""
    start, last = along.reads(out, out + 1)
    base = along.base_dilation
    read = [place // base for place in range(start, last + 1, along.dilation) if not place % base]
    return all(first <= element < stop for element in read)


def _part(cuts: Cuts, along: Along, start: int, stop: int, *, spread: bool) -> Part:
    first, last = along.reads(start, stop)
    base, size = along.base_dilation, sum(cuts)
    begin = min(max(-(-first // base), 0), size - 1)
    end = max(min(last // base, size - 1), begin)
    region = Region(slices_of(cuts, begin, end + 1), spread)
    return Part(stop - start, region, (begin * base - first, last - end * base))


def _worth_sharing(
    grid: Grid, value: Pieces, factor: int, segment: int, along: Along, outputs: int
) -> bool:
    """Whether an array of all windows is smaller than that of each window's outputs."""
    atom = next(
        atom
        for index, block in value.blocks.items()
        if index[factor] == segment
        for atom in block.dims[factor]
        if atom.axis is not None
    )
    axis = axis_of(atom)
    out = window_atom(
        grid, outputs, axis, atom.pitch * along.stride * Fraction(1, along.base_dilation)
    )
    span = (grid.counts[axis] - 1) * grid.stride[axis] + (outputs - 1) * out.pitch
    return span // step(grid, out) + 1 < grid.counts[axis] * outputs
