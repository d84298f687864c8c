"""Networks that pad, in every framework with its own layers and its own padding.

An architecture is written once, as `network(layers, x)` for one window, with a framework's
`Layers`. `FRAMEWORKS[name](network, window_shape)` makes the model as that framework's users do.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import keras
from flax import nnx
from windows import KEY, shaken

OUTPUTS = 5


class Model(NamedTuple):
    """A function of parameters and one window, and the window axes of its images."""

    fun: Callable[..., Any]
    params: Any
    axes: tuple[int, int] = (0, 1)


class Layers(NamedTuple):
    """The layers of a framework; `resize` makes a map twice as large, and so does `transpose`."""

    conv: Callable[..., Any]  # conv(x, width, size=3, stride=1)
    norm: Callable[[Any], Any]
    max_pool: Callable[[Any], Any]
    avg_pool: Callable[..., Any]  # avg_pool(x, stride, **options), padded, of size 3
    transpose: Callable[[Any, int], Any]
    resize: Callable[[Any], Any]
    dense: Callable[[Any, int], Any]
    relu: Callable[[Any], Any] = jax.nn.relu
    concatenate: Callable[[list[Any]], Any] = functools.partial(jnp.concatenate, axis=-1)
    flatten: Callable[[Any], Any] = jnp.ravel
    mean: Callable[[Any], Any] = functools.partial(jnp.mean, axis=(-3, -2))


def vgg(layers, x, **options):
    for width, depth in ((4, 2), (6, 2), (8, 1)):
        for _ in range(depth):
            x = layers.relu(layers.norm(layers.conv(x, width, **options)))
        x = layers.max_pool(x)
    return layers.dense(layers.relu(layers.dense(layers.flatten(x), 8)), OUTPUTS)


def resnet(layers, x):
    """Six blocks; where the shape changes, the shortcut is a 1×1 convolution."""
    x = layers.relu(layers.norm(layers.conv(x, 4)))
    before = 4
    for width, stride in ((4, 1), (4, 1), (6, 2), (6, 1), (8, 2), (8, 1)):
        y = layers.relu(layers.norm(layers.conv(x, width, 3, stride)))
        y = layers.norm(layers.conv(y, width))
        is_same = width == before and stride == 1
        shortcut = x if is_same else layers.norm(layers.conv(x, width, 1, stride))
        x, before = layers.relu(y + shortcut), width
    return layers.dense(layers.mean(x), OUTPUTS)


def unet(layers, x, *, convs=1, learned=False):
    """Of depth three; the way down and up is by pools and resizing, or by learned convolutions."""

    def block(x, width):
        for _ in range(convs):
            x = layers.relu(layers.conv(x, width))
        return x

    skips = []
    for width in (4, 6):
        skips.append(block(x, width))
        x = layers.conv(skips[-1], width, 3, 2) if learned else layers.max_pool(skips[-1])
    x = block(x, 8)
    for width, skip in zip((6, 4), reversed(skips), strict=True):
        up = layers.transpose(x, width) if learned else layers.resize(x)
        x = block(layers.concatenate([up, skip]), width)
    return layers.conv(x, OUTPUTS, 1)


def averages(layers, x, **options):
    """Average pools, whose padding counts or does not, by `options` or by default."""
    x = layers.avg_pool(layers.relu(layers.conv(x, 4)), 2, **options)
    x = layers.avg_pool(layers.relu(layers.conv(x, 6)), 1, **options)
    return layers.dense(layers.flatten(x), OUTPUTS)


def flax_pools(module):
    """Max pools in Flax are "VALID" by default, average pools count the zeros of "SAME"."""

    def avg_pool(x, stride, padding="SAME", **options):
        return module.avg_pool(x, (3, 3), (stride, stride), padding, **options)

    return {
        "max_pool": lambda x: module.max_pool(x, (2, 2), (2, 2)),
        "avg_pool": avg_pool,
    }


def twice(x, method, first=0):
    """Resizes two axes, of which `first` is one, to twice their sizes."""
    shape = list(x.shape)
    for axis in (first, first + 1):
        shape[axis] *= 2
    return jax.image.resize(x, shape, method)


LINEN = Layers(
    conv=lambda x, width, size=3, stride=1: nn.Conv(width, (size, size), stride)(x),
    norm=lambda x: nn.BatchNorm(use_running_average=True)(x),
    transpose=lambda x, width: nn.ConvTranspose(width, (3, 3), (2, 2))(x),
    resize=functools.partial(twice, method="bilinear"),
    dense=lambda x, width: nn.Dense(width)(x),
    **flax_pools(nn),
)


def linen(network, window_shape):
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            return network(LINEN, x)

    model = Network()
    return Model(model.apply, shaken(jax.jit(model.init)(KEY, jnp.ones((*window_shape, 3)))))


HAIKU = Layers(
    conv=lambda x, width, size=3, stride=1: hk.Conv2D(width, size, stride)(x),
    norm=lambda x: hk.BatchNorm(True, True, 0.9)(x, hk.running_init()),
    max_pool=lambda x: hk.MaxPool((2, 2, 1), (2, 2, 1), "SAME")(x),
    avg_pool=lambda x, stride: hk.AvgPool((3, 3, 1), (stride, stride, 1), "SAME")(x),
    transpose=lambda x, width: hk.Conv2DTranspose(width, 2, 2)(x),
    resize=functools.partial(twice, method="nearest", first=1),
    dense=lambda x, width: hk.Linear(width)(x),
    flatten=lambda x: hk.Flatten()(x),
)


def haiku(network, window_shape):
    model = hk.without_apply_rng(hk.transform_with_state(lambda x: network(HAIKU, x[None])[0]))
    variables = jax.jit(model.init)(KEY, jnp.ones((*window_shape, 3)))
    return Model(lambda variables, x: model.apply(*variables, x)[0], shaken(variables))


def recorded(call, channel_axis):
    """Modules that are made before they are called: a list of them, and what fills it.

    The function is `layer(x, make)`: it makes a module for the channels of `x`, and calls it.
    """
    made = []

    def layer(x, make):
        made.append(make(x.shape[channel_axis]))
        return call(made[-1], x)

    return made, layer


def replayed(made, call):
    """`layer(x, make)` that calls the modules made before, in their order."""
    modules = iter(made)
    return lambda x, make: call(next(modules), x)


def nnx_layers(layer, rngs=None):
    def conv(x, width, size=3, stride=1):
        return layer(x, lambda n: nnx.Conv(n, width, (size, size), stride, rngs=rngs))

    return Layers(
        conv=conv,
        norm=lambda x: layer(x, lambda n: nnx.BatchNorm(n, use_running_average=True, rngs=rngs)),
        transpose=lambda x, width: layer(
            x, lambda n: nnx.ConvTranspose(n, width, (2, 2), (2, 2), rngs=rngs)
        ),
        resize=lambda x: x.repeat(2, axis=0).repeat(2, axis=1),
        dense=lambda x, width: layer(x, lambda n: nnx.Linear(n, width, rngs=rngs)),
        **flax_pools(nnx),
    )


def nnx_model(network, window_shape):
    def call(module, x):
        return module(x)

    class Network(nnx.Module):
        def __init__(self, rngs):
            made, layer = recorded(call, -1)
            network(nnx_layers(layer, rngs), jnp.ones((*window_shape, 3)))
            self.modules_in_order = nnx.List(made)

        def __call__(self, x):
            return network(nnx_layers(replayed(self.modules_in_order, call)), x)

    graph, state = nnx.split(Network(nnx.Rngs(KEY)))
    return Model(lambda state, x: nnx.merge(graph, state)(x), shaken(state))


def equinox_layers(layer):
    def conv(x, width, size=3, stride=1, **options):
        options = {"padding": size // 2, "key": KEY} | options
        return layer(x, lambda n: eqx.nn.Conv2d(n, width, size, stride, **options))

    def norm(x):
        return layer(x, lambda n: eqx.nn.BatchNorm(n, "batch", mode="batch", inference=True))

    def transpose(x, width):
        options = {"padding": 1, "output_padding": 1, "key": KEY}
        return layer(x, lambda n: eqx.nn.ConvTranspose2d(n, width, 3, 2, **options))

    return Layers(
        conv=conv,
        norm=norm,
        max_pool=eqx.nn.MaxPool2d(2, 2, use_ceil=True),
        avg_pool=lambda x, stride, **options: eqx.nn.AvgPool2d(3, stride, 1, **options)(x),
        transpose=transpose,
        resize=functools.partial(twice, method="bilinear", first=1),
        dense=lambda x, width: layer(x, lambda n: eqx.nn.Linear(n, width, key=KEY)),
        concatenate=functools.partial(jnp.concatenate, axis=0),
        mean=functools.partial(jnp.mean, axis=(1, 2)),
    )


def equinox(network, window_shape):
    """Channels first; its convolutions do not pad unless told to."""

    def call(module, x, state):
        is_norm = isinstance(module, eqx.nn.BatchNorm)
        return module(x, state or eqx.nn.State(module))[0] if is_norm else module(x)

    class Network(eqx.Module):
        modules: list[Any]

        def __init__(self):
            self.modules, layer = recorded(functools.partial(call, state=None), 0)
            network(equinox_layers(layer), jnp.ones((3, *window_shape)))

        def __call__(self, x, state):
            call_with_state = functools.partial(call, state=state)
            return network(equinox_layers(replayed(self.modules, call_with_state)), x)

    model, state = eqx.nn.make_with_state(Network)()
    params, rest = eqx.partition((model, state), eqx.is_array)

    def apply(params, x):
        model, state = eqx.combine(params, rest)
        return model(x, state)

    return Model(apply, shaken(params), (1, 2))


KERAS = Layers(
    conv=lambda x, width, size=3, stride=1: keras.layers.Conv2D(
        width, size, stride, padding="same"
    )(x),
    norm=lambda x: keras.layers.BatchNormalization()(x),
    max_pool=lambda x: keras.layers.MaxPooling2D(2, padding="same")(x),
    avg_pool=lambda x, stride: keras.layers.AveragePooling2D(3, stride, padding="same")(x),
    transpose=lambda x, width: keras.layers.Conv2DTranspose(width, 3, 2, padding="same")(x),
    resize=lambda x: keras.layers.UpSampling2D(interpolation="bilinear")(x),
    dense=lambda x, width: keras.layers.Dense(width)(x),
    relu=keras.ops.relu,
    concatenate=lambda xs: keras.layers.Concatenate()(xs),
    flatten=lambda x: keras.layers.Flatten()(x),
    mean=lambda x: keras.layers.GlobalAveragePooling2D()(x),
)


def keras_model(network, window_shape):
    """A functional model, called by `stateless_call` with its variables as arrays."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((*window_shape, 3))
    model = keras.Model(inputs, network(KERAS, inputs))
    variables = (model.trainable_variables, model.non_trainable_variables)
    params = jax.tree.map(lambda variable: variable.value, variables)
    return Model(
        lambda params, x: model.stateless_call(*params, x[None], training=False)[0][0],
        shaken(params),
    )


FRAMEWORKS = {
    "Linen": linen,
    "NNX": nnx_model,
    "Haiku": haiku,
    "Equinox": equinox,
    "Keras": keras_model,
}
