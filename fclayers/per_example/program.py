"""A function of parameters and one example, taken apart where the two meet.

What depends on the parameters alone is computed once for all examples: the known values, also those
inside of loops, which are moved out and stacked. The rest is a list of steps on data.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn, Literal, Var
from jaxtyping import ArrayLike

from fclayers._util.jaxprs import AnyJaxpr, aval, bind, called_jaxpr, open_jaxpr, scan_counts
from fclayers.per_example.sites import Rule, find_rule
from fclayers.per_example.views import View, follow, whole

Flags = tuple[bool, ...]
Shape = tuple[int, ...]


class Ref(NamedTuple):
    """A value: known, or data. In each of the loops around, a known value may be stacked."""

    name: int
    known: bool
    stacked: Flags = ()


class Node(NamedTuple):
    """How known values are computed from others, under `vmap` for the loops around."""

    run: Callable[..., list[Any]]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    loops: tuple[Flags, ...]


class Site(NamedTuple):
    """Where a known value meets data in a product, in loops of these lengths."""

    number: int
    name: int
    eqn: JaxprEqn
    operand: int
    rule: Rule
    lengths: Shape
    stacked: Flags


class Use(NamedTuple):
    """Where a known value meets data: at a site, or elsewhere, with so many results.

    After the equation, there are those of the calls around it; of the function's result, none.
    """

    eqns: tuple[JaxprEqn, ...]
    site: Site | None
    results: int


class Step(NamedTuple):
    """An equation on data."""

    eqn: JaxprEqn
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    site: Site | None


class Loop(NamedTuple):
    """A scan whose body meets data."""

    length: int
    reverse: bool
    carry: tuple[tuple[int, int, int], ...]  # the names before, inside, and after one pass
    carried: tuple[int, ...]  # the names of the results
    xs: tuple[tuple[int, int], ...]  # the names outside and inside
    ys: tuple[tuple[int, int], ...]  # the names inside and outside
    known: tuple[int, ...]  # stacked known values that are used inside
    steps: tuple["Step | Loop", ...]
    sites: tuple[int, ...]


Steps = tuple[Step | Loop, ...]


@dataclass
class Program:
    """A function taken apart; filled while its jaxpr is followed."""

    shapes: list[jax.core.ShapedArray]
    nodes: list[Node] = field(default_factory=list)
    constants: dict[int, ArrayLike] = field(default_factory=dict)
    steps: Steps = ()
    outs: tuple[int, ...] = ()
    sites: list[Site] = field(default_factory=list)
    uses: dict[int, list[Use]] = field(default_factory=dict)
    views: dict[int, View] = field(default_factory=dict)
    sources: dict[int, frozenset[int]] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)
    names: int = 0

    def name(self) -> int:
        """A new name."""
        self.names += 1
        return self.names - 1


def take_apart(
    jaxpr: AnyJaxpr, leaves: Sequence[jax.core.ShapedArray], num_examples: int
) -> Program:
    """The program of a jaxpr of the parameters' leaves, then the example's.

    Names count from 0: first the parameters, then the example.
    """
    program = Program(list(leaves))
    inputs = []
    for i, leaf in enumerate(leaves):
        name = program.name()
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            program.sources[name] = frozenset([i])
            if jnp.issubdtype(leaf.dtype, jnp.floating):
                program.views[name] = whole(i, leaf.shape)
        inputs.append(Ref(name, True))
    inputs += [Ref(program.name(), False) for _ in range(num_examples)]
    walk = _Walk(program, (), (), ())
    outer, _ = open_jaxpr(jaxpr)
    outs = walk.run(jaxpr, inputs, [True] * len(outer.outvars))
    for out, var in zip(outs, outer.outvars, strict=True):
        size = aval(var).size
        walk.use(out, size, None, size)
    program.steps, program.outs = tuple(walk.steps), tuple(out.name for out in outs)
    return program


class _Walk:
    """Follows a jaxpr in loops of these lengths, and collects its steps."""

    def __init__(
        self,
        program: Program,
        lengths: Shape,
        slices: tuple[dict[int, None], ...],
        callers: tuple[JaxprEqn, ...],
    ) -> None:
        self.program, self.lengths, self.slices = program, lengths, slices
        self.callers = callers
        self.steps: list[Step | Loop] = []

    def run(self, jaxpr: AnyJaxpr, inputs: Sequence[Ref], needed: Sequence[bool]) -> list[Ref]:
        inner, consts = open_jaxpr(jaxpr)
        env = dict(zip(inner.constvars, map(self.constant, consts), strict=True))
        env |= dict(zip(inner.invars, inputs, strict=True))

        def read(atom: Var | Literal) -> Ref:
            if isinstance(atom, Literal):
                return self.constant(np.asarray(atom.val, aval(atom).dtype))
            return env[atom]

        for eqn, wanted in _live(inner.eqns, inner.outvars, needed):
            results = self.equation(eqn, [read(atom) for atom in eqn.invars], wanted)
            env.update(zip(eqn.outvars, results, strict=True))
        unneeded = Ref(-1, True)
        return [
            read(atom) if want or isinstance(atom, Literal) else env.get(atom, unneeded)
            for atom, want in zip(inner.outvars, needed, strict=True)
        ]

    def constant(self, value: ArrayLike) -> Ref:
        name = self.program.name()
        self.program.constants[name] = value
        return Ref(name, True, (False,) * len(self.lengths))

    def equation(self, eqn: JaxprEqn, inputs: Sequence[Ref], needed: Sequence[bool]) -> list[Ref]:
        call, first = called_jaxpr(eqn)
        # Where no parameter enters, the formulation for the platform is kept.
        depends = any(ref.name in self.program.sources for ref in inputs)
        if call is not None and (depends or eqn.primitive.name != "cond"):
            inner = _Walk(self.program, self.lengths, self.slices, (eqn, *self.callers))
            inner.steps = self.steps
            return inner.run(call, inputs[first:], needed)
        if all(ref.known for ref in inputs) and not (depends and _spreads(eqn)):
            return self.known(eqn, inputs)
        if eqn.primitive.name == "scan" and eqn.params["length"]:
            return self.loop(eqn, inputs)
        return self.step(eqn, inputs)

    def known(self, eqn: JaxprEqn, inputs: Sequence[Ref]) -> list[Ref]:
        program = self.program
        outs = self.node(partial(bind, eqn), inputs, len(eqn.outvars))
        sources: frozenset[int] = frozenset()
        if eqn.primitive.name != "stop_gradient":
            sources = frozenset().union(*(program.sources.get(r.name, ()) for r in inputs))
        for out, var in zip(outs, eqn.outvars, strict=True):
            if sources and jnp.issubdtype(aval(var).dtype, jnp.inexact):
                program.sources[out.name] = sources
        viewed = [i for i, ref in enumerate(inputs) if ref.name in program.views]
        depending = [ref for ref in inputs if ref.name in program.sources]
        if len(viewed) == len(depending) == 1 and sources:
            (i,) = viewed
            views = follow(eqn, i, program.views[inputs[i].name], sum(inputs[i].stacked))
            for out, view in zip(outs, views or (), strict=False):
                program.views[out.name] = view
        return outs

    def node(
        self, run: Callable[..., list[Any]], inputs: Sequence[Ref], num_outputs: int
    ) -> list[Ref]:
        """Computes known values for all passes of the loops."""
        stacked = tuple(any(flags) for flags in zip(*(ref.stacked for ref in inputs), strict=True))
        if not inputs:
            stacked = (False,) * len(self.lengths)
        loops = tuple(
            tuple(ref.stacked[i] for ref in inputs) for i, any_ in enumerate(stacked) if any_
        )
        outs = [Ref(self.program.name(), True, stacked) for _ in range(num_outputs)]
        names = tuple(ref.name for ref in inputs), tuple(ref.name for ref in outs)
        self.program.nodes.append(Node(run, *names, loops))
        return outs

    def use(
        self,
        ref: Ref,
        size: int,
        eqn: JaxprEqn | None,
        results: int,
        site: Site | None = None,
    ) -> None:
        """Notes that a step on data reads a value."""
        if not ref.known:
            return
        for slices, is_stacked in zip(self.slices, ref.stacked, strict=True):
            if is_stacked:
                slices[ref.name] = None
        if ref.name in self.program.sources:
            lengths = [
                n for n, is_stacked in zip(self.lengths, ref.stacked, strict=True) if is_stacked
            ]
            self.program.sizes[ref.name] = size * prod(lengths)
            eqns = (eqn, *self.callers) if eqn else ()
            use = Use(eqns, site, results * prod(self.lengths))
            self.program.uses.setdefault(ref.name, []).append(use)

    def step(self, eqn: JaxprEqn, inputs: Sequence[Ref]) -> list[Ref]:
        program = self.program
        depending = [i for i, ref in enumerate(inputs) if ref.name in program.sources]
        site = self.site(eqn, depending[0], inputs) if len(depending) == 1 else None
        results = sum(aval(var).size for var in eqn.outvars)
        for i, ref in enumerate(inputs):
            self.use(ref, aval(eqn.invars[i]).size, eqn, results, site if i in depending else None)
        outs = [Ref(program.name(), False) for _ in eqn.outvars]
        names = tuple(ref.name for ref in inputs), tuple(ref.name for ref in outs)
        self.steps.append(Step(eqn, *names, site))
        return outs

    def site(self, eqn: JaxprEqn, operand: int, inputs: Sequence[Ref]) -> Site | None:
        program, ref = self.program, inputs[operand]
        view, ndim = program.views.get(ref.name), aval(eqn.invars[operand]).ndim
        order = view.order[sum(ref.stacked) :] if view else tuple(range(ndim))
        rule = find_rule(eqn, operand, order)
        if rule is None or jnp.issubdtype(aval(eqn.outvars[0]).dtype, jnp.complexfloating):
            return None
        site = Site(len(program.sites), ref.name, eqn, operand, rule, self.lengths, ref.stacked)
        program.sites.append(site)
        return site

    def loop(self, eqn: JaxprEqn, inputs: Sequence[Ref]) -> list[Ref]:
        program, params = self.program, eqn.params
        num_consts, num_carry = scan_counts(eqn)
        slices: dict[int, None] = {}
        inner = _Walk(
            program, (*self.lengths, params["length"]), (*self.slices, slices), (eqn, *self.callers)
        )
        first_site = len(program.sites)
        arguments = [
            ref._replace(stacked=(*ref.stacked, False)) if ref.known else ref
            for ref in inputs[:num_consts]
        ]
        carry = inputs[num_consts : num_consts + num_carry]
        for ref, outvar in zip(carry, eqn.outvars, strict=False):
            self.use(ref, aval(outvar).size, eqn, aval(outvar).size)
        carried = [Ref(program.name(), False) for _ in carry]
        xs: list[tuple[int, int]] = []
        scanned: list[Ref] = []
        for ref in inputs[num_consts + num_carry :]:
            if ref.known and ref.name in program.sources:
                # A name of its own: the same value may be used as a whole as well.
                (alias,) = self.node(lambda x: [x], [ref], 1)
                program.sources[alias.name] = program.sources[ref.name]
                if ref.name in program.views:
                    program.views[alias.name] = program.views[ref.name]
                scanned.append(alias._replace(stacked=(*alias.stacked, True)))
            else:
                self.use(ref, 0, eqn, 0)
                scanned.append(Ref(program.name(), False))
                xs.append((ref.name, scanned[-1].name))
        body, _ = open_jaxpr(params["jaxpr"])
        needed = [True] * len(body.outvars)
        outs = inner.run(params["jaxpr"], [*arguments, *carried, *scanned], needed)
        for ref, var in zip(outs, body.outvars, strict=True):
            inner.use(ref, aval(var).size, eqn, aval(var).size)
        results = [Ref(program.name(), False) for _ in outs]
        triples = zip(carry, carried, outs, strict=False)
        self.steps.append(
            Loop(
                params["length"],
                params["reverse"],
                tuple((before.name, inside.name, after.name) for before, inside, after in triples),
                tuple(ref.name for ref in results[:num_carry]),
                tuple(xs),
                tuple(
                    (inside.name, outside.name)
                    for inside, outside in zip(outs[num_carry:], results[num_carry:], strict=True)
                ),
                tuple(slices),
                tuple(inner.steps),
                tuple(range(first_site, len(program.sites))),
            )
        )
        return results


def _live(
    eqns: Sequence[JaxprEqn], outvars: Sequence[Var | Literal], needed: Sequence[bool]
) -> list[tuple[JaxprEqn, list[bool]]]:
    """The equations that needed results depend on, and which of their results are."""
    wanted: set[Var | Literal] = {
        atom
        for atom, want in zip(outvars, needed, strict=True)
        if want and not isinstance(atom, Literal)
    }
    kept = []
    for eqn in reversed(eqns):
        flags = [var in wanted for var in eqn.outvars]
        if any(flags):
            wanted.update(atom for atom in eqn.invars if not isinstance(atom, Literal))
            kept.append((eqn, flags))
    return kept[::-1]


def _spreads(eqn: JaxprEqn) -> bool:
    """Whether it only repeats elements: its gradient is summed where it is found."""
    grows = aval(eqn.outvars[0]).size > aval(eqn.invars[0]).size
    return grows and eqn.primitive.name == "broadcast_in_dim"
