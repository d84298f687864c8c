"""VGG-16, whole, against PyTorch's: the same random weights, no download."""

import jax
import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import fclayers as fc

WIDTHS = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")


@pytest.fixture(scope="module")
def model():
    """As torchvision builds it, initializers included."""
    torch.manual_seed(0)
    features, channels = [], 3
    for width in WIDTHS:
        if width == "M":
            features.append(nn.MaxPool2d(2))
        else:
            features += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            nn.init.kaiming_normal_(features[-2].weight, mode="fan_out", nonlinearity="relu")
            channels = width
    model = nn.Module()
    model.features = nn.Sequential(*features)
    model.classifier = nn.Sequential(
        *(nn.Linear(512 * 7 * 7, 4096), nn.ReLU(), nn.Dropout()),
        *(nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout()),
        nn.Linear(4096, 1000),
    )
    return model.eval()


@pytest.fixture(scope="module")
def params(model):
    return fc.interop.vgg16_from_torch(model.state_dict())


def images(height, width):
    return np.random.default_rng(0).standard_normal((2, height, width, 3)).astype(np.float32)


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_class_scores_are_torchs(model, params):
    x = images(224, 224)
    with torch.no_grad():
        maps = model.features(torch.tensor(x).movedim(-1, 1))
        expected = model.classifier(maps.flatten(1)).numpy()
    assert_close(fc.models.vgg.apply_vgg16(params, x), expected)
    assert_close(fc.models.vgg.vgg16_score_map(params, x)[:, 0, 0], expected)


def test_score_map_is_torchs_converted_network(model, params):
    x = images(256, 288)
    first, second, third = (model.classifier[i] for i in (0, 3, 6))
    with torch.no_grad():
        maps = model.features(torch.tensor(x).movedim(-1, 1))
        maps = F.relu(F.conv2d(maps, first.weight.view(4096, 512, 7, 7), first.bias))
        maps = F.relu(F.conv2d(maps, second.weight.view(4096, 4096, 1, 1), second.bias))
        maps = F.conv2d(maps, third.weight.view(1000, 4096, 1, 1), third.bias)
        expected = maps.movedim(1, -1).numpy()
    assert expected.shape == (2, 2, 3, 1000)
    assert_close(fc.models.vgg.vgg16_score_map(params, x), expected)


def test_names_and_shapes_are_torchs(model):
    params = jax.eval_shape(fc.models.vgg.init_vgg16, jax.random.key(0))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == sum(leaf.size for leaf in jax.tree.leaves(params)) == 138_357_544
