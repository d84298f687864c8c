"""Which parameters are treated together, and how: by factors, formed, or by fallback."""

from collections.abc import Callable, Sequence
from math import prod
from typing import NamedTuple

from fclayers.per_example.factors import Pair, pair_up, sizes_of
from fclayers.per_example.program import Program, Site, Use

# Gradients this small are formed wherever the parameter is used.
_SMALL = 2**10
# Multiplications in the time of reading and writing a number.
_READING = 16


class Group(NamedTuple):
    """Parameters whose gradients are found together.

    Attributes:
        kind: `"factors"`: one parameter, whose gradients are products at sites. `"formed"`: every
            example's gradient is formed, from the factors or by the backward pass.
            `"fallback"`: the same by a backward pass of its own.
        leaves: The parameters.
        names: The known values by which they meet data.
        sites: Where they do so in products.
        pairs: For `"factors"`: the pairs of sites with an inner product.
        reason: Why a gradient is formed or falls back.
    """

    kind: str
    leaves: tuple[int, ...]
    names: tuple[int, ...]
    sites: tuple[Site, ...]
    pairs: tuple[Pair, ...]
    reason: str

    @property
    def tapped(self) -> tuple[int, ...]:
        """The known values whose gradients the backward pass forms."""
        at_sites = {site.name for site in self.sites}
        return tuple(name for name in self.names if name not in at_sites)


Keep = Callable[[Sequence[Site]], bool]


def group(program: Program, keep: Keep) -> list[Group]:
    """The groups of all parameters that meet data; those that fall back are one.

    `keep` says of the sites of a value whether the backward pass shall form its gradients.
    """
    groups = [_make_group(program, leaves, keep) for leaves in _components(program)]
    falling = [group for group in groups if group.kind == "fallback"]
    rest = [group for group in groups if group.kind != "fallback"]
    if not falling:
        return rest
    leaves = tuple(leaf for group in falling for leaf in group.leaves)
    names = tuple(name for group in falling for name in group.names)
    return [*rest, Group("fallback", leaves, names, (), (), falling[0].reason)]


def keep_none(sites: Sequence[Site]) -> bool:
    """For norms and inner products: what is formed is formed in chunks, from the factors."""
    return False


def keep_for_sums(sites: Sequence[Site]) -> bool:
    """Gradients of products that are smaller than their factors, which need no second product.

    None of convolutions: with a kernel for every example, XLA convolves slowly.
    """
    pairs = elements = numbers = 0
    for site in sites:
        s = sizes_of(site)
        pairs += s.blocks * s.positions**2 * (s.inputs + s.outputs)
        elements += s.blocks * s.inputs * s.outputs
        numbers += s.blocks * s.positions * (s.inputs + s.outputs)
    has_dots = all(site.eqn.primitive.name == "dot_general" for site in sites)
    one = sizes_of(sites[0])
    is_small = one.blocks * one.inputs * one.outputs <= 2 * numbers
    return has_dots and is_small and pairs > _READING * elements


def _components(program: Program) -> list[list[int]]:
    """Parameters that known values are computed from together."""
    components: list[set[int]] = []
    for name in program.uses:
        merged = set(program.sources[name])
        apart = [c for c in components if not c & merged]
        for component in components:
            if component & merged:
                merged |= component
        components = [*apart, merged]
    return sorted(map(sorted, components))


def _make_group(program: Program, leaves: Sequence[int], keep: Keep) -> Group:
    names = tuple(name for name in program.uses if program.sources[name] & set(leaves))
    sites: list[Site] = []
    reason = ""
    for name in names:
        uses = program.uses[name]
        elsewhere = [use for use in uses if use.site is None]
        own = [use.site for use in uses if use.site is not None]
        if not elsewhere:
            if keep(own):
                reason = "has fewer elements than what it meets"
            else:
                sites += own
            continue
        size, results = program.sizes[name], max(use.results for use in uses)
        if size > max(_SMALL, results):
            reason = f"goes into {_operation(elsewhere[0])}, which has no rule"
            return Group("fallback", tuple(leaves), names, (), (), reason)
        reason = f"is no larger than the result of {_operation(elsewhere[0])}"
    kind = "formed"
    pairs: list[Pair] | None = []
    at_sites = {site.name for site in sites}
    if at_sites.issuperset(names):
        if len(leaves) > 1:
            reason = "meets data as a function of several parameters"
        elif any(name not in program.views for name in names):
            reason = "meets data as a function that changes more than its layout"
        elif (pairs := pair_up(program, sites)) is None:
            reason = "meets data in overlapping parts"
        else:
            kind = "factors"
    return Group(kind, tuple(leaves), names, tuple(sites), tuple(pairs or ()), reason)


def pair_operations(group: Group, outs: int = 1) -> float:
    """Multiplications for the inner product of two examples' gradients, by factors."""
    total = 0.0
    for pair in group.pairs:
        a, b = (sizes_of(group.sites[i]) for i in (pair.one, pair.other))
        inputs = 0 if group.sites[pair.one].rule.sparse else a.inputs
        total += a.blocks * a.positions * b.positions * (inputs + outs**2 * a.outputs)
    return total


def forming_operations(group: Group, outs: int = 1) -> float:
    """Multiplications for forming one example's gradient from the factors."""
    total = 0.0
    for site in group.sites:
        s = sizes_of(site)
        inputs = 1 if site.rule.sparse else s.inputs
        total += outs * s.blocks * s.positions * inputs * s.outputs
    return total


def formed_norm_operations(program: Program, group: Group) -> float:
    """Multiplications for forming one example's gradients and taking their norms."""
    return forming_operations(group) + leaf_elements(program, group)


def leaf_elements(program: Program, group: Group) -> int:
    """Number of elements of a group's parameters."""
    return sum(prod(program.shapes[leaf].shape) for leaf in group.leaves)


def _operation(use: Use) -> str:
    return use.eqns[0].primitive.name if use.eqns else "the result"
