"""Models of every framework, slid over an image, against the windows cut out one by one."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax import lax
from windows import KEY, assert_close, naive, shaken

import fclayers as fc

WINDOW = (20, 20)
OUTPUTS = 5
IMAGE = np.random.default_rng(0).standard_normal((26, 29, 3)).astype(np.float32)


class Case(NamedTuple):
    """A model of one window, and the image and its window axes that go with it."""

    fun: Callable[..., Any]
    params: Any
    image: np.ndarray = IMAGE
    axes: tuple[int, int] = (0, 1)


def primitives(jaxpr):
    """The names of all primitives, at any depth."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(inner):
                yield from primitives(inner)


def is_jaxpr(value):
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


def assert_shared(sliding, params, image):
    """Window by window, a step runs in a loop, on windows that are gathered."""
    used = set(primitives(jax.make_jaxpr(lambda image: sliding(params, image))(image)))
    assert "conv_general_dilated" in used
    assert not used & {"scan", "while", "gather", "dynamic_slice"}


class Linen(nn.Module):
    norm: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), padding="VALID")(x))
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = nn.Conv(12, (3, 3), strides=2, padding="VALID", use_bias=not self.norm)(x)
        if self.norm:
            x = nn.BatchNorm(use_running_average=True)(x)
        x = nn.relu(x).reshape(*x.shape[:-3], -1)
        return nn.Dense(OUTPUTS)(nn.relu(nn.Dense(16)(x)))


def linen(*, norm=False):
    model = Linen(norm)
    variables = jax.jit(model.init)(KEY, jnp.ones((*WINDOW, 3)))
    return Case(model.apply, shaken(variables) if norm else variables)


def linen_with_a_batch_axis():
    model = Linen()
    variables = jax.jit(model.init)(KEY, jnp.ones((1, *WINDOW, 3)))
    return Case(lambda variables, x: model.apply(variables, x[None])[0], variables)


def linen_on_a_batch():
    """The window keeps the batch axis of the image."""
    model = Linen()
    variables = jax.jit(model.init)(KEY, jnp.ones((2, *WINDOW, 3)))
    return Case(model.apply, variables, np.stack([IMAGE, 1 - IMAGE]), (1, 2))


class Nnx(nnx.Module):
    def __init__(self, rngs, norm):
        self.convs = nnx.List(
            [
                nnx.Conv(3, 8, (3, 3), padding="VALID", rngs=rngs),
                nnx.Conv(8, 12, (3, 3), strides=2, padding="VALID", rngs=rngs),
            ]
        )
        self.norm = nnx.BatchNorm(12, use_running_average=True, rngs=rngs) if norm else None
        self.head = nnx.List([nnx.Linear(192, 16, rngs=rngs), nnx.Linear(16, OUTPUTS, rngs=rngs)])

    def __call__(self, x):
        x = nnx.max_pool(nnx.relu(self.convs[0](x)), (2, 2), strides=(2, 2))
        x = self.convs[1](x)
        x = nnx.relu(x if self.norm is None else self.norm(x)).ravel()
        return self.head[1](nnx.relu(self.head[0](x)))


def nnx_model(*, norm=False):
    graph, state = nnx.split(Nnx(nnx.Rngs(KEY), norm))
    return Case(lambda state, x: nnx.merge(graph, state)(x), shaken(state) if norm else state)


class Equinox(eqx.Module):
    first: eqx.nn.Conv2d
    pool: eqx.nn.MaxPool2d
    second: eqx.nn.Conv2d
    norm: eqx.nn.BatchNorm | None
    head: eqx.nn.MLP

    def __init__(self, key, norm=False):
        keys = jax.random.split(key, 3)
        self.first = eqx.nn.Conv2d(3, 8, 3, key=keys[0])
        self.pool = eqx.nn.MaxPool2d(2, 2)
        self.second = eqx.nn.Conv2d(8, 12, 3, stride=2, key=keys[1])
        self.norm = eqx.nn.BatchNorm(12, "batch", mode="batch", inference=True) if norm else None
        self.head = eqx.nn.MLP(192, OUTPUTS, 16, 1, key=keys[2])

    def __call__(self, x, state=None):
        x = self.second(self.pool(jax.nn.relu(self.first(x))))
        if self.norm is not None:
            x, _ = self.norm(x, state)
        return self.head(jax.nn.relu(x).ravel())


CHANNELS_FIRST = np.ascontiguousarray(np.moveaxis(IMAGE, -1, 0))


def equinox_channels_first():
    model = Equinox(KEY)
    return Case(lambda model, x: model(x), model, CHANNELS_FIRST, (1, 2))


def equinox_channels_last():
    model = Equinox(KEY)
    return Case(lambda model, x: model(jnp.moveaxis(x, -1, 0)), model)


def equinox_vmapped():
    images = np.stack([CHANNELS_FIRST, 1 - CHANNELS_FIRST])
    model = Equinox(KEY)
    return Case(lambda model, x: jax.vmap(model)(x), model, images, (2, 3))


def equinox_norm():
    model, state = eqx.nn.make_with_state(Equinox)(KEY, norm=True)
    norm = eqx.tree_at(lambda norm: (norm.weight, norm.bias), model.norm, replace_fn=shaken)
    model = eqx.tree_at(lambda model: model.norm, model, norm)
    return Case(
        lambda params, x: params[0](x, params[1]), (model, shaken(state)), CHANNELS_FIRST, (1, 2)
    )


def haiku(*, norm=False):
    def forward(x, is_training):
        x = jax.nn.relu(hk.Conv2D(8, 3, padding="VALID")(x[None]))
        x = hk.max_pool(x, (2, 2, 1), (2, 2, 1), "VALID")
        x = hk.Conv2D(12, 3, stride=2, padding="VALID")(x)
        if norm:
            x = hk.BatchNorm(True, True, 0.9)(x, is_training)
        return hk.nets.MLP([16, OUTPUTS])(hk.Flatten()(jax.nn.relu(x)))[0]

    model = hk.without_apply_rng(hk.transform_with_state(forward))
    init = jax.jit(model.init, static_argnums=2)
    variables = init(KEY, jnp.ones((*WINDOW, 3)), True)
    return Case(
        lambda variables, x: model.apply(*variables, x, False)[0],
        shaken(variables) if norm else variables,
    )


def plain_jax():
    rng = np.random.default_rng(0)
    shapes = [(3, 3, 3, 8), (3, 3, 8, 12), (192, 16), (16, OUTPUTS)]
    weights = [rng.standard_normal(shape) / np.sqrt(np.prod(shape[:-1])) for shape in shapes]

    def conv(x, weight, stride):
        layout = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x[None], weight, (stride, stride), "VALID", dimension_numbers=layout
        )[0]

    def forward(weights, x):
        first, second, third, fourth = weights
        x = jax.nn.relu(conv(x, first, 1))
        x = lax.reduce_window(x, -jnp.inf, lax.max, (2, 2, 1), (2, 2, 1), "VALID")
        x = jnp.tanh(conv(x, second, 2)).ravel()
        return jax.nn.log_softmax(jax.nn.gelu(x @ third) @ fourth)

    return Case(forward, [jnp.array(weight, jnp.float32) for weight in weights])


CASES = {
    "Linen": linen,
    "Linen, batch norm": lambda: linen(norm=True),
    "Linen, batch axis": linen_with_a_batch_axis,
    "Linen, batch of images": linen_on_a_batch,
    "NNX": nnx_model,
    "NNX, batch norm": lambda: nnx_model(norm=True),
    "Equinox": equinox_channels_first,
    "Equinox, channels last": equinox_channels_last,
    "Equinox, vmapped": equinox_vmapped,
    "Equinox, batch norm": equinox_norm,
    "Haiku": haiku,
    "Haiku, batch norm": lambda: haiku(norm=True),
    "plain JAX": plain_jax,
}


@functools.cache
def make_case(name):
    return CASES[name]()


@pytest.mark.parametrize(
    ("name", "stride"),
    [*((name, 1) for name in CASES), ("Linen", 3), ("Equinox, batch norm", 2), ("Haiku", 5)],
)
def test_a_model_at_every_window(name, stride):
    case = make_case(name)
    sliding = fc.slide(case.fun, WINDOW, stride=stride, axes=case.axes)
    y = eqx.filter_jit(sliding)(case.params, case.image)
    expected = naive(case.fun, WINDOW, stride=stride, axes=case.axes)
    assert_close(y, expected(case.params, case.image))
    assert_shared(sliding, case.params, case.image)


@pytest.mark.parametrize("name", ["Linen", "Equinox", "Haiku, batch norm"])
def test_a_batch_of_images_by_vmap(name):
    case = make_case(name)
    images = np.stack([case.image, 1 - case.image])

    def batched(function):
        return eqx.filter_jit(
            lambda params, images: jax.vmap(lambda x: function(params, x))(images)
        )

    sliding = batched(fc.slide(case.fun, WINDOW, axes=case.axes))
    expected = batched(naive(case.fun, WINDOW, axes=case.axes))
    assert_close(sliding(case.params, images), expected(case.params, images))


@pytest.mark.parametrize("name", ["Linen", "Linen, batch norm", "Equinox"])
def test_gradients(name):
    case = make_case(name)
    weights = np.random.default_rng(1).standard_normal((7, 10, OUTPUTS))

    def gradients(function):
        @eqx.filter_jit
        @eqx.filter_grad
        def compute(inputs):
            return jnp.vdot(function(*inputs), weights)

        return compute((case.params, jnp.array(case.image)))

    ours = gradients(fc.slide(case.fun, WINDOW, axes=case.axes))
    theirs = gradients(naive(case.fun, WINDOW, axes=case.axes))
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for actual, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert_close(actual, expected)


class Block(nn.Module):
    """The basic block of a residual network."""

    width: int
    stride: int = 1

    @nn.compact
    def __call__(self, x):
        def conv(x, size, stride):
            padding = size // 2
            x = nn.Conv(self.width, (size, size), stride, padding, use_bias=False)(x)
            return nn.BatchNorm(use_running_average=True)(x)

        y = conv(nn.relu(conv(x, 3, self.stride)), 3, 1)
        return nn.relu(y + (x if x.shape == y.shape else conv(x, 1, self.stride)))


class ResNet18(nn.Module):
    """Narrow, the layers, paddings and strides those of torchvision's."""

    def setup(self):
        self.stem = nn.Conv(4, (7, 7), 2, 3, use_bias=False)
        self.norm = nn.BatchNorm(use_running_average=True)
        widths = (4, 4, 8, 8, 16, 16, 32, 32)
        self.blocks = [Block(width, 2 if i in (2, 4, 6) else 1) for i, width in enumerate(widths)]
        self.head = nn.Dense(OUTPUTS)

    def features(self, x):
        x = nn.relu(self.norm(self.stem(x)))
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for block in self.blocks:
            x = block(x)
        return x

    def __call__(self, x):
        return self.head(self.features(x).mean((-3, -2)))

    def fully_convolutional(self, x, pool):
        """For an image of any size: the mean becomes a pool of the window's final map."""
        return self.head(nn.avg_pool(self.features(x), pool))


@pytest.fixture(scope="module")
def resnet():
    model = ResNet18()
    return model, shaken(jax.jit(model.init)(KEY, jnp.ones((64, 64, 3))))


LARGE = np.random.default_rng(2).standard_normal((96, 128, 3)).astype(np.float32)


def test_resnet_pads_every_window(resnet):
    model, variables = resnet
    y = jax.jit(fc.slide(model.apply, (64, 64), stride=32))(variables, LARGE)
    expected = naive(model.apply, (64, 64), stride=32)(variables, LARGE)
    assert_close(y, expected)


def test_resnet_is_fully_convolutional(resnet):
    model, variables = resnet
    sliding = fc.slide(model.apply, (64, 64), stride=32, edges="image")
    assert_shared(sliding, variables, LARGE)
    sliding = jax.jit(sliding)
    single = LARGE[:64, :64]
    assert_close(sliding(variables, single)[0, 0], jax.jit(model.apply)(variables, single))
    score_map = jax.jit(
        lambda variables, x: model.apply(variables, x, (2, 2), method=model.fully_convolutional)
    )
    y = sliding(variables, LARGE)
    assert y.shape == (2, 3, OUTPUTS)
    assert_close(y, score_map(variables, LARGE))


@jax.jit
def narrow_vgg(key):
    """VGG-16 with an eighth of every width."""
    keys = iter(jax.random.split(key, 14))
    he = jax.nn.initializers.he_normal()
    features, channels = [], 3
    for width, depth in ((8, 2), (16, 2), (32, 3), (64, 3), (64, 3)):
        block = []
        for _ in range(depth):
            block.append(fc.init_conv(next(keys), (3, 3), channels, width, weight_init=he))
            channels = width
        features.append(tuple(block))
    head = fc.init_mlp(next(keys), [7 * 7 * channels, 512, 512, OUTPUTS], weight_init=he)
    return fc.models.vgg.Vgg16Params(tuple(features), head)


VGG_IMAGE = np.random.default_rng(3).standard_normal((224, 288, 3)).astype(np.float32)


def test_vgg_pads_every_window():
    image = VGG_IMAGE[:, :256]
    params = narrow_vgg(KEY)
    y = jax.jit(fc.slide(fc.models.vgg.apply_vgg16, (224, 224), stride=32))(params, image)
    expected = naive(fc.models.vgg.apply_vgg16, (224, 224), stride=32)(params, image)
    assert_close(y, expected)


def test_vgg_is_its_score_map():
    params = narrow_vgg(KEY)
    sliding = fc.slide(fc.models.vgg.apply_vgg16, (224, 224), stride=32, edges="image")
    assert_shared(sliding, params, VGG_IMAGE)
    sliding = jax.jit(sliding)
    single = VGG_IMAGE[:, 32:256]
    assert_close(sliding(params, single)[0, 0], fc.models.vgg.apply_vgg16(params, single))
    y = sliding(params, VGG_IMAGE)
    assert y.shape == (1, 3, OUTPUTS)
    assert_close(y, fc.models.vgg.vgg16_score_map(params, VGG_IMAGE))


def test_a_padded_network_is_torchs_fully_convolutional_one():
    torch.manual_seed(0)
    features = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(8, 12, 5, stride=2, padding=2),
        torch.nn.ReLU(),
        torch.nn.AvgPool2d(3, stride=1, padding=1),
    )
    hidden, last = torch.nn.Linear(12 * 5 * 5, 16), torch.nn.Linear(16, OUTPUTS)
    model = torch.nn.Sequential(
        *features, torch.nn.Flatten(), hidden, torch.nn.ReLU(), last
    ).requires_grad_(False)
    layers = list(fc.interop.from_torch(model.state_dict(), flattened=(12, 5, 5)).values())

    def forward(layers, x):
        first, second, *head = layers
        x = fc.max_pool(jax.nn.relu(fc.apply_conv(first, x, padding=1)), (2, 2))
        x = jax.nn.relu(fc.apply_conv(second, x, stride=2, padding=2))
        return fc.apply_mlp(head, fc.avg_pool(x, (3, 3), stride=1, padding=1).ravel())

    image = np.random.default_rng(4).standard_normal((28, 40, 3)).astype(np.float32)
    x = torch.from_numpy(image).movedim(-1, 0)[None]
    maps = torch.nn.functional.conv2d(
        features(x), hidden.weight.view(16, 12, 5, 5), hidden.bias
    ).relu()
    maps = torch.nn.functional.conv2d(maps, last.weight.view(OUTPUTS, 16, 1, 1), last.bias)
    sliding = fc.slide(forward, WINDOW, stride=4, edges="image")
    assert_close(jax.jit(sliding)(layers, image), maps[0].movedim(0, -1))
    assert_shared(sliding, layers, image)
    cut_out = jnp.stack([image[:20, :20], image[8:, 20:]])
    single = jax.vmap(lambda x: sliding(layers, x)[0, 0])(cut_out)
    theirs = model(torch.from_numpy(np.array(cut_out)).movedim(-1, 1))
    assert_close(single, theirs)
