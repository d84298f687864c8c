"""The table of crossovers between formulations, measured on this machine.

`python benchmarks/choose.py` times two formulations side by side for growing sizes, prints how many
times as fast the second is, and at the end the table for `fclayers/kernels/crossovers.py`. `--only
winograd` measures the entries whose names contain that.
"""

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import timing

from fclayers.kernels import convolution, pooling, shifted, winograd
from fclayers.kernels.crossovers import CROSSOVERS, Crossovers
from fclayers.kernels.grouped import merged_groups
from fclayers.kernels.unrolled import unrolled_convolve
from fclayers.kernels.windows import Geometry, positions

# A formulation is chosen where it is faster by more than the noise.
_MARGIN = 1.1
_UNLIMITED = 2**60

Pair = tuple[Callable[[], Any], Callable[[], Any]]


class Ladder(NamedTuple):
    """Sizes, for each of which the present and another formulation are timed.

    The entry is the least of `values` from which on the other is faster, or, with `most`, the
    largest up to which it is.
    """

    values: Mapping[float, Callable[[], Pair]]
    most: bool = False


class Conv(NamedTuple):
    """A convolution of square maps."""

    size: int
    kernel: int
    channels: int
    features: int
    groups: int = 1
    batch: int = 1
    padded: bool = True

    def operands(self) -> tuple[jax.Array, jax.Array, Geometry]:
        """A map, a kernel, and their geometry, with `SAME` padding if `padded`."""
        rng = np.random.default_rng(0)
        map_shape = (self.batch, self.size, self.size, self.channels)
        kernel = (self.kernel, self.kernel)
        weight_shape = (*kernel, self.channels // self.groups, self.features)
        reach = self.kernel - 1 if self.padded else 0
        padding = ((reach // 2, reach - reach // 2),) * 2
        x, weight = (rng.standard_normal(shape, np.float32) for shape in (map_shape, weight_shape))
        return jnp.asarray(x), jnp.asarray(weight), Geometry(kernel, (1, 1), padding, (1, 1))


def race(conv: Conv, *formulations: Callable[..., jax.Array]) -> Pair:
    x, weight, geometry = conv.operands()
    first, second = (
        partial(_ready, jax.jit(partial(function, geometry=geometry)), x, weight)
        for function in formulations
    )
    return first, second


def plain(x: jax.Array, weight: jax.Array, geometry: Geometry) -> jax.Array:
    groups = x.shape[-1] // weight.shape[-2]
    return convolution._plain(x, weight, geometry, groups, None)


def in_tiles(x: jax.Array, weight: jax.Array, geometry: Geometry, tile: float) -> jax.Array:
    small = CROSSOVERS._replace(tile_patches=int(tile))
    with mock.patch.object(convolution, "CROSSOVERS", small):
        return convolution._in_tiles(x, weight, geometry, None)


def with_one_more_row(x: jax.Array, weight: jax.Array, geometry: Geometry) -> jax.Array:
    return convolution._with_one_more_row(x, weight, geometry, None)


def at_once(x: jax.Array, weight: jax.Array, geometry: Geometry) -> jax.Array:
    return convolution._product_of_patches(x, weight, geometry, None)


def direct(x: jax.Array, weight: jax.Array, geometry: Geometry) -> jax.Array:
    """As `convolve` without the formulations with fewer products."""
    with mock.patch.object(convolution, "winograd_wins", return_value=False):
        return convolution._fastest(x, weight, geometry, 1, None)


def fewer_products(
    x: jax.Array, weight: jax.Array, geometry: Geometry, tile: float = CROSSOVERS.winograd_tile
) -> jax.Array:
    with mock.patch.object(winograd, "CROSSOVERS", CROSSOVERS._replace(winograd_tile=int(tile))):
        return winograd.winograd_convolve(x, weight, geometry)


def shifted_sums(
    x: jax.Array, weight: jax.Array, geometry: Geometry, terms: int = CROSSOVERS.bordered_terms
) -> jax.Array:
    with mock.patch.object(shifted, "CROSSOVERS", CROSSOVERS._replace(bordered_terms=terms)):
        return shifted.shifted_convolve(x, weight, geometry, x.shape[-1] // weight.shape[-2])


def gradient_of_merged(
    x: jax.Array, weight: jax.Array, geometry: Geometry, channels: int
) -> tuple[jax.Array, jax.Array]:
    groups = x.shape[-1] // weight.shape[-2]

    def loss(x: jax.Array, weight: jax.Array) -> jax.Array:
        fewer = merged_groups(weight.shape, groups, channels)
        y = convolution._in_merged_groups(x, weight, geometry, groups, fewer, None)
        return 0.5 * jnp.mean(y**2)

    gradients: tuple[jax.Array, jax.Array] = jax.grad(loss, (0, 1))(x, weight)
    return gradients


def split(x: jax.Array, weight: jax.Array, geometry: Geometry) -> jax.Array:
    groups = x.shape[-1] // weight.shape[-2]
    table = CROSSOVERS._replace(split_groups=groups, grouped_terms=0)
    with (
        mock.patch.object(convolution, "CROSSOVERS", table),
        mock.patch.object(shifted, "CROSSOVERS", table),
    ):
        return convolution._fastest(x, weight, geometry, groups, None)


def unrolled(x: jax.Array, weight: jax.Array, geometry: Geometry) -> jax.Array:
    return unrolled_convolve(x, weight, geometry, None)


def patch_bytes(x_shape: Any, weight_shape: Any, geometry: Geometry) -> int:
    rows = int(np.prod(positions(x_shape[1:-1], geometry))) * x_shape[0]
    return rows * int(np.prod(weight_shape[:-1])) * 4


def sum_gradient(size: int) -> Pair:
    x = jnp.ones((1, 224 // size * size, 224 // size * size, 64))
    pool = pooling.Pool((1, size, size, 1), (1, size, size, 1), ((0, 0),) * 4, (1,) * 4)

    def gradient(most: int) -> Callable[[], Any]:
        step = jax.jit(jax.grad(lambda x: 0.5 * jnp.mean(reduce_windows(x, "sum", pool) ** 2)))
        table = CROSSOVERS._replace(broadcast_window=most)
        with mock.patch.object(pooling, "CROSSOVERS", table):
            return partial(_ready, step.lower(x).compile(), x)

    return gradient(0), gradient(_UNLIMITED)


def kernel_bytes(conv: Conv) -> int:
    axes = winograd._axes((conv.size, conv.size), conv.operands()[2])
    return int(np.prod([axis.points for axis in axes])) * conv.channels * conv.features * 4


def winograd_rows(conv: Conv) -> int:
    axes = winograd._axes((conv.size, conv.size), conv.operands()[2])
    return conv.batch * int(np.prod([axis.blocks for axis in axes]))


def winograd_gain(conv: Conv) -> float:
    axes = winograd._axes((conv.size, conv.size), conv.operands()[2])
    points = int(np.prod([axis.points for axis in axes]))
    return conv.size**2 * conv.kernel**2 / (winograd_rows(conv) * points)


def ladders() -> dict[str, Ladder]:
    """What decides each entry."""

    def convs(
        key: Callable[[Conv], float], cases: list[Conv], *pair: Callable[..., jax.Array]
    ) -> dict[float, Callable[[], Pair]]:
        return {key(conv): partial(race, conv, *pair) for conv in cases}

    def patches(conv: Conv) -> int:
        x, weight, geometry = conv.operands()
        return patch_bytes(x.shape, weight.shape, geometry)

    def tiles(conv: Conv, function: Callable[..., jax.Array], sizes: range) -> Any:
        first = partial(function, tile=2.0 ** sizes[0])
        return {2.0**n: partial(race, conv, first, partial(function, tile=2.0**n)) for n in sizes}

    return {
        "large_patches": Ladder(
            convs(
                patches,
                [Conv(n, 3, 24, 24, padded=False) for n in (56, 112, 224, 448)],
                plain,
                with_one_more_row,
            )
        ),
        "tile_patches": Ladder(tiles(Conv(224, 5, 24, 24), in_tiles, range(20, 26))),
        "least_patches": Ladder(
            convs(patches, [Conv(n, 3, 20, 64) for n in (14, 28, 56, 112)], plain, at_once)
        ),
        "product_patches": Ladder(
            convs(patches, [Conv(n, 3, 20, 64) for n in (56, 112, 160, 224)], plain, at_once),
            most=True,
        ),
        "product_terms": Ladder(
            convs(
                lambda conv: conv.kernel**2 * conv.channels,
                [Conv(40, 3, n, 64) for n in (16, 32, 64, 128)],
                plain,
                at_once,
            ),
            most=True,
        ),
        "product_features": Ladder(
            convs(
                lambda conv: conv.features,
                [Conv(80, 3, 16, n) for n in (8, 16, 32, 64, 128)],
                plain,
                at_once,
            )
        ),
        "winograd_channels": Ladder(
            convs(
                lambda conv: conv.channels,
                [Conv(56, 3, n, n) for n in (8, 16, 32, 64, 128)],
                direct,
                fewer_products,
            )
        ),
        "winograd_rows": Ladder(
            convs(
                winograd_rows, [Conv(n, 3, 64, 64) for n in (8, 16, 28, 56)], direct, fewer_products
            )
        ),
        "winograd_gain": Ladder(
            convs(
                winograd_gain, [Conv(28, k, 64, 64) for k in (2, 7, 3, 5)], direct, fewer_products
            )
        ),
        "winograd_kernel": Ladder(
            convs(
                kernel_bytes,
                [Conv(28, 3, n, n) for n in (64, 128, 256, 512)],
                direct,
                fewer_products,
            ),
            most=True,
        ),
        "winograd_tile": Ladder(tiles(Conv(224, 5, 48, 48), fewer_products, range(20, 26))),
        "grouped_terms": Ladder(
            convs(
                lambda conv: conv.kernel**2 * conv.channels // conv.groups,
                [Conv(28, 3, 32 * n, 32 * n, groups=32) for n in (1, 2, 4, 8, 16)],
                split,
                shifted_sums,
            ),
            most=True,
        ),
        # Larger kernels would be faster as well, but take three to four times as long to compile.
        "bordered_terms": Ladder(
            convs(
                lambda conv: conv.kernel**2,
                [Conv(56, n, 128, 128, groups=128) for n in (2, 3)],
                partial(shifted_sums, terms=0),
                partial(shifted_sums, terms=_UNLIMITED),
            ),
            most=True,
        ),
        "shifted_terms": Ladder(
            convs(
                lambda conv: conv.kernel**2 * conv.channels,
                [Conv(112, 3, n, 32) for n in (1, 2, 3, 4, 8)],
                plain,
                shifted_sums,
            ),
            most=True,
        ),
        "shifted_features": Ladder(
            convs(
                lambda conv: conv.features,
                [Conv(112, 4, 1, n) for n in (16, 32, 64, 128, 256)],
                plain,
                shifted_sums,
            ),
            most=True,
        ),
        "shifted_rows": Ladder(
            convs(
                lambda conv: conv.size**2,
                [Conv(n, 3, 3, 32) for n in (8, 16, 32, 64, 128)],
                plain,
                shifted_sums,
            )
        ),
        "merged_channels": Ladder(
            {
                n: partial(
                    race,
                    Conv(56, 3, 128, 128, groups=32),
                    partial(gradient_of_merged, channels=n // 2),
                    partial(gradient_of_merged, channels=n),
                )
                for n in (8, 16, 32)
            },
            most=True,
        ),
        "split_groups": Ladder(
            convs(
                lambda conv: conv.groups,
                [Conv(28, 3, 16 * n, 16 * n, groups=n) for n in (2, 8, 32)],
                plain,
                split,
            ),
            most=True,
        ),
        "broadcast_window": Ladder(
            {n * n: partial(sum_gradient, n) for n in (2, 3, 4, 7)}, most=True
        ),
        "tiny_elements": Ladder(
            convs(
                lambda conv: conv.size**2 / conv.kernel**2,
                [Conv(n, 3, 8, 8, batch=4096) for n in (2, 3, 4, 5)],
                plain,
                unrolled,
            ),
            most=True,
        ),
    }


def decide(ladder: Ladder, *, rounds: int) -> tuple[float | None, dict[float, float]]:
    """The entry, if the ladder has one, and how many times as fast the other formulation is."""
    gains = {}
    for value, pair in sorted(ladder.values.items()):
        present, other = pair()
        times = timing.time_side_by_side({"present": present, "other": other}, rounds=rounds)
        gains[value] = times["present"] / times["other"]
    wins = [value for value, gain in gains.items() if gain >= _MARGIN]
    losses = [value for value, gain in gains.items() if gain < _MARGIN]
    if ladder.most:
        kept = [value for value in wins if not losses or value < min(losses)]
        return (max(kept) if kept else None), gains
    kept = [value for value in wins if not losses or value > max(losses)]
    return (min(kept) if kept else None), gains


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="the entries whose names contain this")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    measured = {}
    for name, ladder in ladders().items():
        if args.only not in name:
            continue
        value, gains = decide(ladder, rounds=args.rounds)
        if name in ("tile_patches", "winograd_tile"):
            value = max(gains, key=lambda size: gains[size])
        print(f"{name}: " + ", ".join(f"{key:g}: {gain:.2f}" for key, gain in gains.items()))
        if value is not None:
            measured[name] = value
    print("\nThe other entries were not measured, or one formulation was faster throughout:\n")
    for name in Crossovers._fields:
        kept = "" if name in measured else "  # as it was"
        print(f"    {name} = {measured.get(name, getattr(CROSSOVERS, name)):g}{kept}")


def _ready(call: Callable[..., Any], *args: Any) -> Any:
    return jax.block_until_ready(call(*args))


if __name__ == "__main__":
    main()
