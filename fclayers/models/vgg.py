"""VGG-16 as functions: thirteen convolutions and a head of three fully connected layers."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.nn import initializers
from jax.typing import DTypeLike
from jaxtyping import Array, Key, Num

from fclayers._util.checks import check_array, check_count, check_key, describe
from fclayers._util.errors import BadType, BadValue, public
from fclayers._util.jit import jit
from fclayers.conv import ConvParams, apply_conv, init_conv
from fclayers.convert import mlp_to_conv
from fclayers.linear import LinearParams
from fclayers.mlp import apply_mlp, init_mlp
from fclayers.pool import max_pool

__all__ = ["Vgg16Params", "apply_vgg16", "init_vgg16", "vgg16_score_map"]


class Vgg16Params(NamedTuple):
    """The parameters of VGG-16: five blocks of convolutions, three fully connected layers."""

    features: tuple[tuple[ConvParams, ...], ...]
    classifier: tuple[LinearParams, ...]  # the first on a flattened (7, 7, 512) map


@public
def init_vgg16(
    key: Key[Array, ""], *, num_classes: int = 1000, dtype: DTypeLike = jnp.float32
) -> Vgg16Params:
    """Makes the parameters of VGG-16, 138,357,544 of them for 1000 classes.

    Args:
        key: A key from `jax.random.key`.
        num_classes: Number of classes.
        dtype: As in `init_linear`.

    Returns:
        `Vgg16Params`, drawn as torchvision does: convolutions He-normal by fan-out, fully connected
        weights normal with standard deviation 0.01, biases zero.

    Raises:
        TypeError: `key` is not a random key.
        ValueError: `num_classes` is not an integer >= 0, or `dtype` is an integer dtype.

    Example: see `apply_vgg16`.

    Source: configuration D of
    `Simonyan and Zisserman 2015 <https://arxiv.org/abs/1409.1556>`_.
    """
    check_key(key)
    check_count("num_classes", num_classes)
    features_key, classifier_key = jax.random.split(key)
    he_normal = initializers.variance_scaling(2.0, "fan_out", "normal")
    drawn: dict[str, Any] = {"bias_init": initializers.zeros, "dtype": dtype}
    blocks, channels = [], 3
    for i, (width, depth) in enumerate(_BLOCKS):
        block = []
        for conv_key in jax.random.split(jax.random.fold_in(features_key, i), depth):
            conv = init_conv(conv_key, (3, 3), channels, width, weight_init=he_normal, **drawn)
            block.append(conv)
            channels = width
        blocks.append(tuple(block))
    sizes = [7 * 7 * channels, 4096, 4096, num_classes]
    normal = initializers.normal(0.01)
    return Vgg16Params(tuple(blocks), init_mlp(classifier_key, sizes, weight_init=normal, **drawn))


@jit("dropout_rate", "dtype")
def apply_vgg16(
    params: Vgg16Params,
    images: Num[Array, "*batch 224 224 3"],
    *,
    dropout_rate: float = 0.0,
    key: Key[Array, ""] | None = None,
    dtype: DTypeLike | None = None,
) -> Num[Array, "*batch classes"]:
    """Classifies images of 224×224 pixels.

    Args:
        params: The network.
        images: Images, channels last, any number of batch axes. Pretrained weights expect them
            as torchvision normalizes them.
        dropout_rate: As in `apply_mlp`, in the classifier; 0.5 where the network was trained.
        key: A random key, required by dropout.
        dtype: Compute dtype, as in `apply_linear`.

    Returns:
        Logits of shape `(*batch, classes)`.

    Raises:
        TypeError: `params` is not a `Vgg16Params`, or `images` not an array.
        ValueError: The images are of another size; `vgg16_score_map` takes larger ones.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import fclayers as fc
        >>> params = jax.eval_shape(fc.models.vgg.init_vgg16, jax.random.key(0))
        >>> sum(leaf.size for leaf in jax.tree.leaves(params))
        138357544
        >>> images = jax.ShapeDtypeStruct((8, 224, 224, 3), jnp.float32)
        >>> jax.eval_shape(fc.models.vgg.apply_vgg16, params, images).shape
        (8, 1000)
        >>> images = jax.ShapeDtypeStruct((256, 288, 3), jnp.float32)
        >>> jax.eval_shape(fc.models.vgg.vgg16_score_map, params, images).shape
        (2, 3, 1000)
    """
    _check(params, images)
    if images.shape[-3:-1] != (224, 224):
        raise BadValue(
            f"expected images of shape (*batch, 224, 224, 3), got {images.shape}; "
            "vgg16_score_map takes larger ones"
        )
    maps = _feature_map(params, images, dtype)
    flat = maps.reshape(*maps.shape[:-3], -1)
    return apply_mlp(params.classifier, flat, dropout_rate=dropout_rate, key=key, dtype=dtype)


@jit("dtype")
def vgg16_score_map(
    params: Vgg16Params,
    images: Num[Array, "*batch height width 3"],
    *,
    dtype: DTypeLike | None = None,
) -> Num[Array, "*batch rows columns classes"]:
    """Classifies images of any size, fully convolutionally: one row of logits every 32 pixels.

    The classifier's layers become convolutions with kernels of 7×7 and 1×1. The padding of the
    convolutions before them stays at the image's border, as in the paper's dense evaluation.

    Args:
        params: The network, the same as for `apply_vgg16`.
        images: Images, channels last, at least 224 pixels high and wide.
        dtype: As in `apply_vgg16`.

    Returns:
        Logits of shape `(*batch, height // 32 - 6, width // 32 - 6, classes)`. With 224×224 pixels
        they are `apply_vgg16`'s.

    Raises:
        TypeError: As in `apply_vgg16`.
        ValueError: The images are smaller than 224 pixels.

    Example: see `apply_vgg16`.

    Source: section 3.2 of the paper that `init_vgg16` names.
    """
    _check(params, images)
    if min(images.shape[-3:-1]) < 224:
        raise BadValue(f"expected images of at least 224×224 pixels, got shape {images.shape}")
    x = _feature_map(params, images, dtype)
    *hidden_layers, last_layer = mlp_to_conv(params.classifier, (7, 7))
    for layer in hidden_layers:
        x = jax.nn.relu(apply_conv(layer, x, dtype=dtype))
    return apply_conv(last_layer, x, dtype=dtype)


# Configuration D: width and depth of each block; a max pool follows every block.
_BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))


def _feature_map(params: Vgg16Params, images: Array, dtype: DTypeLike | None) -> Array:
    x = images
    for block in params.features:
        for conv in block:
            x = jax.nn.relu(apply_conv(conv, x, padding=1, dtype=dtype))
        x = max_pool(x, (2, 2))
    return x


def _check(params: Any, images: Any) -> None:
    if not isinstance(params, Vgg16Params):
        raise BadType(f"expected params to be Vgg16Params, got {describe(params)}")
    check_array("images", images)
    if images.ndim < 3 or images.shape[-1] != 3:
        raise BadValue(f"expected images of shape (*batch, height, width, 3), got {images.shape}")
