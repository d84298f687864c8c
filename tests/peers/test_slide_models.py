"""Models of every framework that pad as they do by default, slid over an image, and cut out."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from padded_models import FRAMEWORKS, averages, resnet, unet, vgg
from windows import assert_close, naive

import fclayers as fc

# A network, its window, and the product of the strides inside.
NETWORKS = {
    "VGG": (vgg, (19, 22), 8),
    "ResNet": (resnet, (17, 20), 4),
    "U-Net": (unet, (32, 28), 4),
    "learned U-Net": (partial(unet, learned=True), (28, 32), 4),
    "average pools": (averages, (17, 20), 2),
}
# Deeper, and with padding and pools that are not the defaults.
OPTIONS = [
    ("Linen", "U-Net", {"convs": 2}),
    ("Linen", "average pools", {"count_include_pad": False}),
    ("NNX", "average pools", {"count_include_pad": False, "padding": ((1, 1), (0, 2))}),
    ("Equinox", "average pools", {"use_ceil": True}),
    ("Equinox", "VGG", {"padding_mode": "REFLECT"}),
]
CASES = [(framework, name, {}) for framework in FRAMEWORKS for name in NETWORKS] + OPTIONS
# Of one pixel, and the product of the strides inside: in turn, so that a network and a framework
# meet both.
STRIDED = [i % 2 == 1 for i in range(len(CASES))]


@pytest.mark.parametrize(
    ("framework", "name", "options", "strided"),
    [(*case, strided) for case, strided in zip(CASES, STRIDED, strict=True)],
)
def test_a_padded_model_at_every_window(framework, name, options, strided):
    network, window, product = NETWORKS[name]
    model = FRAMEWORKS[framework](partial(network, **options), window)
    stride = product if strided else 1
    shape = [size + stride * steps for size, steps in zip(window, (2, 1), strict=True)]
    shape.insert(0 if model.axes == (1, 2) else 2, 3)
    image = 4 * np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    y = jax.jit(fc.slide(model.fun, window, stride=stride, axes=model.axes))(model.params, image)
    expected = naive(model.fun, window, stride=stride, axes=model.axes)(model.params, image)
    assert y.shape[:2] == (3, 2)
    assert_close(y, expected)


@pytest.mark.parametrize(
    ("framework", "name", "window", "stride", "share"),
    [
        *((framework, "VGG", (48, 48), 1, 1) for framework in FRAMEWORKS),
        ("Haiku", "U-Net", (32, 36), 4, 0.5),
        ("NNX", "learned U-Net", (32, 36), 4, 0.5),
    ],
)
def test_windows_share_what_lies_between_their_borders(framework, name, window, stride, share):
    """As long as a window has a middle: all the way, or for the first half of the network."""
    network, *_ = NETWORKS[name]
    model = FRAMEWORKS[framework](network, window)
    shape = [size + 24 for size in window]
    shape.insert(0 if model.axes == (1, 2) else 2, 3)
    explain = fc.explain_slide(model.fun, window, stride=stride, axes=model.axes)
    rows = explain(model.params, jax.ShapeDtypeStruct(tuple(shape), jnp.float32)).rows
    first = rows[: int(len(rows) * share)]
    assert [row for row in first if row.kind == "per window"] == []
