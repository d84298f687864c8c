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
        winograd_channels: Least number of channels, in and out.
        winograd_rows: Least number of rows of the products.
        winograd_gain: Least ratio of the direct convolution's products to Winograd's.
        winograd_tile: Bytes of the transformed inputs and outputs of a tile.
    """

    large_patches: int = 2**25
    tile_patches: int = 2**22
    tiny_elements: int = 2
    tiny_weights: int = 2**22
    winograd_channels: int = 16
    winograd_rows: int = 64
    winograd_gain: float = 1.5
    winograd_tile: int = 2**23


CROSSOVERS = Crossovers()
