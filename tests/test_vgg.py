"""VGG-16: its size, its two forms, its weights by torchvision's names. The whole network's results
are held against PyTorch's in `tests/peers`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fclayers as fc

KEY = jax.random.key(0)
SHAPES = jax.eval_shape(fc.models.vgg.init_vgg16, KEY)


def test_the_fully_connected_layers_hold_89_percent():
    def count(tree):
        return sum(leaf.size for leaf in jax.tree.leaves(tree))

    assert count(SHAPES) == 138_357_544
    assert count(SHAPES.classifier) == 123_642_856
    lines = str(fc.summarize(SHAPES)).splitlines()
    shares = [float(line.split()[-1][:-1]) for line in lines if "classifier" in line]
    assert 89 <= sum(shares) < 90
    assert "138,357,544" in lines[-1]


def slim():
    """The network with an eighth of every width."""

    def shrink(layer):
        *kernel, inputs, outputs = layer.weight.shape
        inputs = 3 if inputs == 3 else inputs // 8
        rng = np.random.default_rng(outputs)
        scale = np.sqrt(2 / (np.prod(kernel) * inputs))
        weight = scale * rng.standard_normal((*kernel, inputs, outputs // 8))
        return type(layer)(jnp.array(weight, jnp.float32), jnp.zeros(outputs // 8))

    def is_layer(node):
        return isinstance(node, (fc.LinearParams, fc.ConvParams))

    return jax.tree.map(shrink, SHAPES, is_leaf=is_layer)


@pytest.mark.slow
def test_the_score_map_is_the_network_at_every_position_of_its_last_feature_map():
    params = slim()
    images = np.random.default_rng(0).standard_normal((1, 224, 256, 3)).astype(np.float32)
    scores = fc.models.vgg.vgg16_score_map(params, images)
    assert scores.shape == (1, 1, 2, 125)
    maps = jnp.asarray(images)
    for block in params.features:
        for conv in block:
            maps = jax.nn.relu(fc.apply_conv(conv, maps, padding="SAME"))
        maps = jax.lax.reduce_window(
            maps, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"
        )
    for column in range(2):
        window = maps[:, :, column : column + 7].reshape(1, -1)
        expected = fc.apply_mlp(params.classifier, window)
        np.testing.assert_allclose(scores[:, 0, column], expected, rtol=1e-4, atol=1e-5)
    single = fc.models.vgg.vgg16_score_map(params, images[0, :, :224])[0, 0]
    np.testing.assert_allclose(
        fc.models.vgg.apply_vgg16(params, images[0, :, :224]), single, rtol=1e-4, atol=1e-5
    )


def test_dropout_needs_a_key():
    images = jax.ShapeDtypeStruct((224, 224, 3), jnp.float32)
    with pytest.raises(ValueError, match=r"dropout_rate=0\.5 needs a key"):
        jax.eval_shape(
            lambda p, x: fc.models.vgg.apply_vgg16(p, x, dropout_rate=0.5), SHAPES, images
        )


def state_dict(num_classes=1000):
    """Zeros under torchvision's names, which take no memory until they are written to."""
    indices = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    widths = (3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
    arrays = {}
    for index, inputs, outputs in zip(indices, widths[:-1], widths[1:], strict=True):
        arrays[f"features.{index}.weight"] = np.zeros((outputs, inputs, 3, 3), np.float32)
        arrays[f"features.{index}.bias"] = np.zeros(outputs, np.float32)
    sizes = (25088, 4096, 4096, num_classes)
    for index, inputs, outputs in zip((0, 3, 6), sizes[:-1], sizes[1:], strict=True):
        arrays[f"classifier.{index}.weight"] = np.zeros((outputs, inputs), np.float32)
        arrays[f"classifier.{index}.bias"] = np.zeros(outputs, np.float32)
    return arrays


def test_weights_by_torchvisions_names_in_any_order():
    arrays = state_dict(num_classes=7)
    arrays["features.14.bias"][3] = 1
    arrays["classifier.0.weight"][5, 2 * 49 + 3 * 7 + 4] = 2  # channel 2, row 3, column 4
    params = fc.interop.vgg16_from_torch(dict(reversed(arrays.items())))
    shapes = jax.eval_shape(lambda key: fc.models.vgg.init_vgg16(key, num_classes=7), KEY)
    assert jax.tree.structure(params) == jax.tree.structure(shapes)
    assert [x.shape for x in jax.tree.leaves(params)] == [x.shape for x in jax.tree.leaves(shapes)]
    assert params.features[2][2].bias[3] == 1
    weight = np.asarray(params.classifier[0].weight)
    assert weight[(3 * 7 + 4) * 512 + 2, 5] == weight.sum() == 2


def test_all_that_is_wrong_with_a_state_dict_is_named():
    arrays = state_dict()
    del arrays["features.5.bias"]
    arrays["features.30.weight"] = np.zeros(3)
    arrays["classifier.3.weight"] = np.zeros((4096, 25088))[:, :1]
    message = (
        r"(?s)vgg16_from_torch: nothing was loaded, because of\s+"
        r"missing: features\.5\.bias of shape \(128,\)\s+"
        r"extra: features\.30\.weight of shape \(3,\)\s+"
        r"classifier\.3\.weight should be of shape \(4096, 4096\), is of shape \(4096, 1\)$"
    )
    with pytest.raises(ValueError, match=message):
        fc.interop.vgg16_from_torch(arrays)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: fc.models.vgg.apply_vgg16(SHAPES, jnp.ones((256, 288, 3))),
            ValueError,
            r"apply_vgg16: expected images of shape .* got \(256, 288, 3\); vgg16_score_map",
        ),
        (
            lambda: fc.models.vgg.vgg16_score_map(SHAPES, jnp.ones((200, 288, 3))),
            ValueError,
            r"vgg16_score_map: expected images of at least 224×224 pixels, got shape \(200, 288",
        ),
        (
            lambda: fc.models.vgg.vgg16_score_map(SHAPES, jnp.ones((3, 256, 256))),
            ValueError,
            r"vgg16_score_map: expected images of shape .* got \(3, 256, 256\)",
        ),
        (
            lambda: fc.models.vgg.apply_vgg16(SHAPES.classifier, jnp.ones((224, 224, 3))),
            TypeError,
            "apply_vgg16: expected params to be Vgg16Params, got tuple",
        ),
        (
            lambda: fc.models.vgg.init_vgg16(KEY, num_classes=-1),
            ValueError,
            "init_vgg16: num_classes must be an integer >= 0, got -1",
        ),
        (
            lambda: fc.interop.vgg16_from_torch([1]),
            TypeError,
            "vgg16_from_torch: expected a mapping of names to arrays, got list",
        ),
    ],
)
def test_error(call, error, message):
    with pytest.raises(error, match=message):
        jax.eval_shape(call)
