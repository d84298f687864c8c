"""Where one formulation becomes faster than another: the table every choice on CPUs reads.

Measured on two cores of an AMD EPYC (Zen 5) with 1 MB of second-level cache each;
`benchmarks/choose.py` measures the table on another machine and prints it.
"""

from typing import NamedTuple


class Crossovers(NamedTuple):
    """Sizes at which formulations change.

    Attributes:
        large_patches: Bytes of patches above which tiles or one more row are used.
        tile_patches: Bytes of patches of a tile of a direct convolution.
        least_patches: Least bytes of patches that are made and multiplied at once.
        product_patches: Bytes of them at most.
        product_terms: Most terms of an output for it.
        product_features: Least number of output channels for it.
        grouped_terms: Most terms of an output (elements of the kernel times inputs of a group) for
            sums of shifted inputs, if there are groups.
        shifted_terms: The same without groups.
        shifted_channels: Most input channels without groups.
        shifted_features: Most output channels without groups.
        shifted_rows: Least number of outputs per channel without groups.
        bordered_terms: Most terms of depthwise sums that pad only the borders of the map.
        merged_channels: Most channels of a merged group, in derivatives of such sums.
        split_groups: Most groups that are convolved one by one.
        broadcast_window: Elements of a window at most, if the gradient of its sum is a broadcast.
        tiny_elements: A map with this many times the kernel's elements is one product.
        tiny_weights: Elements of that product's matrix at most.
        winograd_channels: Least number of channels, in and out, for fewer products.
        winograd_rows: Least number of rows of these products.
        winograd_gain: Least number of times as many products in a direct convolution.
        winograd_kernel: Bytes of the transformed kernel at most, unless patches have as many.
        winograd_tile: Bytes of the transformed inputs and outputs of a tile, if patches are large.
        strip_bytes: Bytes of the largest map of `slide`; more positions are computed in strips.
    """

    large_patches: int = 2**25
    tile_patches: int = 2**22
    least_patches: int = 3 * 2**19
    product_patches: int = 2**23
    product_terms: int = 640
    product_features: int = 32
    grouped_terms: int = 72
    shifted_terms: int = 27
    shifted_channels: int = 3
    shifted_features: int = 64
    shifted_rows: int = 1024
    bordered_terms: int = 9
    merged_channels: int = 16
    split_groups: int = 32
    broadcast_window: int = 16
    tiny_elements: int = 2
    tiny_weights: int = 2**22
    winograd_channels: int = 32
    winograd_rows: int = 48
    winograd_gain: float = 2.5
    winograd_kernel: int = 2**24
    winograd_tile: int = 2**23
    strip_bytes: int = 2**23


CROSSOVERS = Crossovers()
