"""Where one formulation becomes faster than another: the table every choice on CPUs reads.

Measured on two cores of an AMD EPYC (Zen 5) with 1 MB of second-level cache each;
`benchmarks/choose.py` measures the table on another machine and prints it.
"""

from typing import NamedTuple


class Crossovers(NamedTuple):
    """Sizes at which formulations change.

    Attributes:
        large_patches: Bytes of patches above which a direct convolution runs in tiles.
        tile_patches: Bytes of patches of such a tile.
        tiny_elements: A map with this many times the kernel's elements is one product.
        tiny_weights: Elements of that product's matrix at most.
        winograd_channels: Least number of channels, in and out, for fewer products.
        winograd_rows: Least number of rows of these products.
        winograd_gain: Least number of times as many products in a direct convolution.
        winograd_kernel: Bytes of the transformed kernel at most, unless patches have as many.
        winograd_tile: Bytes of the transformed inputs and outputs of a tile, if patches are large.
    """

    large_patches: int = 2**25
    tile_patches: int = 2**22
    tiny_elements: int = 2
    tiny_weights: int = 2**22
    winograd_channels: int = 32
    winograd_rows: int = 48
    winograd_gain: float = 2.5
    winograd_kernel: int = 2**24
    winograd_tile: int = 2**23


CROSSOVERS = Crossovers()
