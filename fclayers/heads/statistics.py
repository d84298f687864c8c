"""What a pass over the logits finds of every row: a few lines each."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree


class Tile(NamedTuple):
    """The logits of some rows and classes, `(rows, classes)`, and what goes along.

    All but the first three are `None` where no statistic needs them.

    Attributes:
        logits: One array per head.
        classes: The numbers of the classes, `(classes,)`.
        consecutive: Whether they are, and on one device.
        labels: Classes `(rows,)`, or probabilities `(rows, classes)`.
        class_weights: `(classes,)`.
        keys: Random keys `(rows,)`.
        log_sums: For every head the log-sum-exp of whole rows `(rows,)`.
    """

    logits: tuple[Array, ...]
    classes: Array
    consecutive: bool
    labels: Any
    class_weights: Array | None
    keys: Any
    log_sums: Any


class Statistic(NamedTuple):
    """A number, or several, of every row of logits.

    Attributes:
        of: `of(tile)` returns the statistic of the rows of a tile, as if it had all classes: a tree
            of arrays `(rows, ...)`.
        merge: `merge(values)` returns the statistic of disjoint sets of classes, in order, from
            those of each, stacked along the first axis.
        sums: `sums(tile, value)` returns sums over the classes of the tile, whose derivatives with
            respect to it, with the statistic of whole rows held fixed, are those of the statistic;
            `None` for arrays of integers.
        start: `start(rows, dtype)` returns the statistic of no classes.
    """

    of: Callable[[Tile], PyTree]
    merge: Callable[[PyTree], PyTree]
    sums: Callable[[Tile, Any], PyTree]
    start: Callable[[Any, Any], PyTree]


def together(*statistics: Statistic) -> Statistic:
    """Several statistics from one pass, as a tuple."""
    return Statistic(
        of=lambda tile: tuple(s.of(tile) for s in statistics),
        merge=lambda values: tuple(
            s.merge(value) for s, value in zip(statistics, values, strict=True)
        ),
        sums=lambda tile, values: tuple(
            s.sums(tile, value) for s, value in zip(statistics, values, strict=True)
        ),
        start=lambda rows, dtype: tuple(s.start(rows, dtype) for s in statistics),
    )


def _additive(function: Callable[[Tile], Array]) -> Statistic:
    """The sum over the classes of a function of each."""
    return Statistic(
        of=function,
        merge=lambda values: values.sum(0),
        sums=lambda tile, value: function(tile),
        start=jnp.zeros,
    )


def _shift(log_sum: Array) -> Array:
    """A log-sum-exp to subtract from logits; without any possible class they stay -inf."""
    return jnp.where(log_sum == -jnp.inf, 0, log_sum)


def _lowest(rows: Any, dtype: Any) -> Array:
    return jnp.full(rows, -jnp.inf, dtype)


def _log_sum_exp(head: int) -> Statistic:
    return Statistic(
        of=lambda tile: jax.nn.logsumexp(tile.logits[head], 1),
        merge=lambda values: jax.nn.logsumexp(values, 0),
        sums=lambda tile, value: _sum_of_exp(tile.logits[head], value),
        start=_lowest,
    )


def _sum_of_exp(logits: Array, log_sum: Array) -> Array:
    return jnp.exp(logits - _shift(log_sum)[:, None]).sum(1)


LOG_SUM_EXP = _log_sum_exp(0)
LOG_SUM_EXPS = together(LOG_SUM_EXP, _log_sum_exp(1))


class Softmax(NamedTuple):
    """The log-sum-exp, and the entropy of the probabilities, 0 if no class is possible."""

    log_sum: Array
    entropy: Array


def _softmax(tile: Tile) -> Softmax:
    (z,) = tile.logits
    largest = z.max(1, initial=-jnp.inf)
    largest = jnp.where(jnp.isfinite(largest), largest, 0)
    z = z - largest[:, None]
    e = jnp.exp(z)
    total = e.sum(1)
    log_total = jnp.log(total)
    mean = jnp.where(e > 0, e * z, 0).sum(1) / jnp.where(total > 0, total, 1)
    return Softmax(largest + log_total, _shift(log_total) - mean)


def _merge_softmax(values: Softmax) -> Softmax:
    log_sum = jax.nn.logsumexp(values.log_sum, 0)
    share = jnp.exp(values.log_sum - _shift(log_sum))
    surprise = jnp.where(share > 0, log_sum - values.log_sum, 0)
    return Softmax(log_sum, (share * (values.entropy + surprise)).sum(0))


def _sums_of_softmax(tile: Tile, value: Softmax) -> Softmax:
    (z,) = tile.logits
    shift = _shift(value.log_sum)[:, None]
    p = jnp.exp(z - shift)
    # The probability of minus infinity is 0, and so is its product with the logarithm.
    log_p = jnp.where(z == -jnp.inf, 0, z) - shift
    return Softmax(p.sum(1), -(p * (log_p + value.entropy[:, None] - 1)).sum(1))


SOFTMAX = Statistic(
    of=_softmax,
    merge=_merge_softmax,
    sums=_sums_of_softmax,
    start=lambda rows, dtype: Softmax(_lowest(rows, dtype), jnp.zeros(rows, dtype)),
)


def _logit_of_label(tile: Tile) -> Array:
    (z,) = tile.logits
    if not tile.consecutive or not z.shape[1]:
        return _of_label(tile, z)
    place = tile.labels - tile.classes[0]
    found = jnp.take_along_axis(z, place.clip(0, z.shape[1] - 1)[:, None], 1)[:, 0]
    return jnp.where((place >= 0) & (place < z.shape[1]), found, 0)


def _of_label(tile: Tile, values: Array) -> Array:
    return jnp.where(tile.labels[:, None] == tile.classes, values, 0).sum(1)


def _weighted(tile: Tile, values: Array) -> Array:
    if tile.class_weights is None:
        return values
    return values * tile.class_weights.astype(values.dtype)


def _dot_with_labels(tile: Tile) -> Array:
    (z,) = tile.logits
    # A class with probability 0 does not matter, even if it is impossible.
    z = jnp.where((tile.labels == 0) & (z == -jnp.inf), 0, z)
    return _weighted(tile, tile.labels.astype(z.dtype) * z).sum(1)


LOGIT_OF_LABEL = _additive(lambda tile: _of_label(tile, tile.logits[0]))._replace(
    of=_logit_of_label
)
WEIGHT_OF_LABEL = _additive(
    lambda tile: _of_label(tile, _weighted(tile, jnp.ones_like(tile.logits[0])))
)
SUM_OF_LOGITS = _additive(lambda tile: _weighted(tile, tile.logits[0]).sum(1))
SUM_OF_LABELS = _additive(
    lambda tile: _weighted(tile, tile.labels.astype(tile.logits[0].dtype)).sum(1)
)
DOT_WITH_LABELS = _additive(_dot_with_labels)


class Divergence(NamedTuple):
    """The log-sum-exp of p's and q's logits, and the Kullback-Leibler divergence of p from q."""

    log_sum_p: Array
    log_sum_q: Array
    divergence: Array


def divergence(p: int, q: int) -> Statistic:
    """The Kullback-Leibler divergence between the heads numbered `p` and `q`, Σ p log(p / q)."""

    def relative(tile: Tile, log_sum_p: Array, log_sum_q: Array, offset: Any) -> Array:
        """Σ p (log(p / q) - offset) over the possible classes of p."""
        possible = tile.logits[p] > -jnp.inf
        log_p = jnp.where(possible, tile.logits[p], 0) - _shift(log_sum_p)[:, None]
        log_q = jnp.where(possible, tile.logits[q], 0) - _shift(log_sum_q)[:, None]
        weights = jnp.where(possible, jnp.exp(log_p), 0)
        return jnp.where(possible, weights * (log_p - log_q - offset), 0).sum(1)

    def of(tile: Tile) -> Divergence:
        log_sum_p, log_sum_q = (jax.nn.logsumexp(tile.logits[i], 1) for i in (p, q))
        return Divergence(log_sum_p, log_sum_q, relative(tile, log_sum_p, log_sum_q, 0))

    def merge(values: Divergence) -> Divergence:
        log_sum_p, log_sum_q = (jax.nn.logsumexp(value, 0) for value in values[:2])
        share = jnp.exp(values.log_sum_p - _shift(log_sum_p))
        change = (values.log_sum_p - log_sum_p) - (values.log_sum_q - log_sum_q)
        change = jnp.where(share > 0, values.divergence + change, 0)
        return Divergence(log_sum_p, log_sum_q, (share * change).sum(0))

    def sums(tile: Tile, value: Divergence) -> Divergence:
        log_sum_p, log_sum_q, found = value
        sum_p = _sum_of_exp(tile.logits[p], log_sum_p)
        sum_q = _sum_of_exp(tile.logits[q], log_sum_q)
        rest = relative(tile, log_sum_p, log_sum_q, found[:, None] + 1)
        return Divergence(sum_p, sum_q, rest + sum_q)

    return Statistic(
        of=of,
        merge=merge,
        sums=sums,
        start=lambda rows, dtype: Divergence(
            _lowest(rows, dtype), _lowest(rows, dtype), jnp.zeros(rows, dtype)
        ),
    )


def _jensen_shannon(tile: Tile) -> Array:
    log_p, log_q = (
        z - _shift(log_sum)[:, None] for z, log_sum in zip(tile.logits, tile.log_sums, strict=True)
    )

    def to_mixture(log_p: Array, log_q: Array) -> Array:
        safe = jnp.where(log_p > -jnp.inf, log_p, 0)
        return jnp.exp(log_p) * (safe - jnp.logaddexp(safe, log_q) + jnp.log(2.0))

    return (to_mixture(log_p, log_q) + to_mixture(log_q, log_p)).sum(1) / 2


JENSEN_SHANNON = _additive(_jensen_shannon)


class Draw(NamedTuple):
    """The largest perturbed logit, its class, and the logit of that."""

    score: Any
    label: Any
    logit: Array


def _draw(tile: Tile) -> Draw:
    (z,) = tile.logits

    # Noise for every row and class by itself depends neither on the chunks nor on the shards.
    def noise(key: Array, number: Array) -> Array:
        return jax.random.gumbel(jax.random.fold_in(key, number), (), z.dtype, mode="high")

    scores = z + jax.vmap(jax.vmap(noise, (None, 0)), (0, None))(tile.keys, tile.classes)
    place = scores.argmax(1)
    score, logit = (jnp.take_along_axis(a, place[:, None], 1)[:, 0] for a in (scores, z))
    return Draw(score, tile.classes[place], logit)


DRAW = Statistic(
    of=_draw,
    merge=lambda values: Draw(
        *(jnp.take_along_axis(a, values.score.argmax(0)[None], 0)[0] for a in values)
    ),
    sums=lambda tile, value: Draw(
        jnp.zeros_like(value.score),
        None,
        _of_label(tile._replace(labels=value.label), tile.logits[0]),
    ),
    start=lambda rows, dtype: Draw(
        _lowest(rows, dtype), jnp.zeros(rows, jnp.int32), _lowest(rows, dtype)
    ),
)


class Largest(NamedTuple):
    """The largest logits, in order, and their classes, each `(rows, k)`."""

    logits: Array
    classes: Any


def largest(k: int, *, in_order: bool) -> Statistic:
    """The `k` largest logits; `in_order` if tiles of at least `k` classes come in their order."""
    nothing = 2**31 - 1

    def of(tile: Tile) -> Largest:
        (z,) = tile.logits
        logits, places = lax.top_k(z, min(k, z.shape[1]))
        return Largest(_fill(logits, -jnp.inf), _fill(tile.classes[places], nothing))

    def _fill(array: Array, value: Any) -> Array:
        return jnp.pad(array, ((0, 0), (0, k - array.shape[1])), constant_values=value)

    def merge(values: Largest) -> Largest:
        logits, classes = (
            jnp.moveaxis(a, 0, -2).reshape(*a.shape[1:-1], a.shape[0] * k) for a in values
        )
        if not in_order:
            order = classes.argsort(-1)
            logits, classes = (jnp.take_along_axis(a, order, -1) for a in (logits, classes))
        logits, places = lax.top_k(logits, k)
        best = Largest(logits, jnp.take_along_axis(classes, places, -1))
        if not in_order:
            return best
        # Minus infinity in place of nothing does not win over the first classes.
        none = values.classes[0] == nothing
        return Largest(*(jnp.where(none, a[1], b) for a, b in zip(values, best, strict=True)))

    def sums(tile: Tile, value: Largest) -> Largest:
        hits = value.classes[:, :, None] == tile.classes
        return Largest(jnp.where(hits, tile.logits[0][:, None], 0).sum(2), None)

    return Statistic(
        of=of,
        merge=merge,
        sums=sums,
        start=lambda rows, dtype: Largest(
            jnp.full((rows, k), -jnp.inf, dtype), jnp.full((rows, k), nothing, jnp.int32)
        ),
    )
