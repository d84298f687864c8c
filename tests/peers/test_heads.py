"""Heads live against PyTorch, and against the libraries on JAX that do without logits, too."""

from functools import partial

import jax
import jax.numpy as jnp
import jax_cce
import numpy as np
import pytest
import tokamax
import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from absl import flags
from hypothesis import given
from hypothesis import strategies as st

import fclayers as fc

flags.FLAGS(["pytest"])  # else Tokamax parses the command line

DIRECTIONS = ("forward", "reverse", "jensen_shannon")


@st.composite
def heads(draw):
    """Arrays of a head in float64, with the weight as PyTorch stores it, and chunk sizes."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    positions, features, classes = (draw(st.integers(1, size)) for size in (6, 5, 20))
    scale = draw(st.sampled_from([0.1, 1.0, 30.0]))
    arrays = {
        "weight": scale * rng.standard_normal((classes, features)),
        "bias": rng.standard_normal(classes),
        "x": rng.standard_normal((positions, features)),
    }
    chunks = {
        name: draw(st.none() | st.integers(1, 25)) for name in ("chunk_size", "row_chunk_size")
    }
    return rng, arrays, chunks


def in_jax(function, arrays):
    """What a function of weight, bias, x, … returns, and the gradients of its sum."""
    with jax.enable_x64(True):
        value, pull = jax.vjp(function, *map(jnp.asarray, arrays))
        gradients = pull(jax.tree.map(jnp.ones_like, value))
        return [np.asarray(a) for a in (*jax.tree.leaves(value), *gradients)]


def in_torch(function, arrays):
    """The same in PyTorch."""
    tensors = [torch.tensor(array, requires_grad=True) for array in arrays]
    value = function(*tensors)
    values = value if isinstance(value, tuple) else (value,)
    sum(v.sum() for v in values).backward()
    return [*(v.detach().numpy() for v in values), *(t.grad.numpy() for t in tensors)]


def head(weight, bias):
    return fc.LinearParams(fc.Transposed(weight), bias)


def assert_same(ours, theirs, tolerance=1e-12):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1, np.abs(b).max()))


@given(
    case=heads(),
    probabilities=st.booleans(),
    weighted=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    reduction=st.sampled_from(["none", "sum", "mean"]),
)
def test_cross_entropy_is_torchs(case, probabilities, weighted, smoothing, reduction):
    rng, arrays, chunks = case
    positions, classes = len(arrays["x"]), len(arrays["bias"])
    inputs = [*arrays.values()]
    labels = rng.integers(0, classes, positions)
    if probabilities:
        inputs.append(rng.dirichlet(np.ones(classes), positions))
    weights = rng.uniform(0.1, 2, classes) if weighted else None

    def ours(weight, bias, x, labels=labels):
        return fc.linear_cross_entropy(
            head(weight, bias),
            x,
            labels,
            class_weights=weights,
            label_smoothing=smoothing,
            reduction=reduction,
            **chunks,
        )

    def theirs(weight, bias, x, *soft):
        return F.cross_entropy(
            F.linear(x, weight, bias),
            soft[0] if soft else torch.tensor(labels),
            weight=None if weights is None else torch.tensor(weights),
            label_smoothing=smoothing,
            reduction=reduction,
        )

    assert_same(in_jax(ours, inputs), in_torch(theirs, inputs))


@given(case=heads(), weighted=st.booleans(), reduction=st.sampled_from(["none", "sum", "mean"]))
def test_masks_are_torchs_ignore_index(case, weighted, reduction):
    rng, arrays, chunks = case
    classes = len(arrays["bias"])
    labels = rng.integers(0, classes, len(arrays["x"]))
    labels[rng.random(len(labels)) < 0.4] = -100
    labels[0] = 0  # the mean over no position is NaN in PyTorch, 0 here
    weights = rng.uniform(0.1, 2, classes) if weighted else None

    def ours(weight, bias, x):
        return fc.linear_cross_entropy(
            head(weight, bias),
            x,
            labels,
            class_weights=weights,
            where=labels != -100,
            reduction=reduction,
            **chunks,
        )

    def theirs(weight, bias, x):
        return F.cross_entropy(
            F.linear(x, weight, bias),
            torch.tensor(labels),
            weight=None if weights is None else torch.tensor(weights),
            reduction=reduction,
        )

    assert_same(in_jax(ours, arrays.values()), in_torch(theirs, arrays.values()))


@given(case=heads(), temperature=st.sampled_from([0.5, 1.0, 3.0]))
def test_log_probabilities_and_entropies_are_torchs(case, temperature):
    rng, arrays, chunks = case
    labels = rng.integers(0, len(arrays["bias"]), len(arrays["x"]))

    def ours(weight, bias, x):
        return fc.linear_log_prob(head(weight, bias), x, labels, temperature=temperature, **chunks)

    def theirs(weight, bias, x):
        logits = F.linear(x, weight, bias) / temperature
        distribution = torch.distributions.Categorical(logits=logits)
        return distribution.log_prob(torch.tensor(labels)), distribution.entropy()

    assert_same(in_jax(ours, arrays.values()), in_torch(theirs, arrays.values()), 1e-11)


@pytest.mark.parametrize("direction", DIRECTIONS)
@given(case=heads(), temperature=st.sampled_from([0.5, 1.0, 3.0]), mean=st.booleans())
def test_divergences_are_torchs_kl_div(direction, case, temperature, mean):
    rng, arrays, chunks = case
    positions, classes = len(arrays["x"]), len(arrays["bias"])
    width = int(rng.integers(1, 6))
    inputs = [
        *arrays.values(),
        rng.standard_normal((classes, width)),
        rng.standard_normal(classes),
        rng.standard_normal((positions, width)),
    ]

    def ours(weight, bias, x, weight_of_teacher, bias_of_teacher, x_teacher):
        return fc.linear_distillation(
            head(weight, bias),
            head(weight_of_teacher, bias_of_teacher),
            x,
            x_teacher,
            direction=direction,
            temperature=temperature,
            reduction="mean" if mean else "none",
            **chunks,
        )

    def theirs(weight, bias, x, weight_of_teacher, bias_of_teacher, x_teacher):
        student = F.log_softmax(F.linear(x, weight, bias) / temperature, -1)
        teacher = F.log_softmax(
            F.linear(x_teacher, weight_of_teacher, bias_of_teacher) / temperature, -1
        )
        mixture = torch.logaddexp(student, teacher) - np.log(2)
        # kl_div(q, p) is the divergence of p from q.
        divergence = partial(F.kl_div, reduction="none", log_target=True)
        losses = {
            "forward": lambda: divergence(student, teacher),
            "reverse": lambda: divergence(teacher, student),
            "jensen_shannon": lambda: (
                (divergence(mixture, teacher) + divergence(mixture, student)) / 2
            ),
        }[direction]().sum(-1)
        return losses.mean() if mean else losses

    assert_same(in_jax(ours, inputs), in_torch(theirs, inputs), 1e-11)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_cross_entropy_is_torchs_linear_cross_entropy(reduction, chunked):
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal(shape) for shape in ((40, 3), (40,), (16, 3))]
    labels, weights = rng.integers(0, 40, 16), rng.uniform(0.1, 2, 40)

    def ours(weight, bias, x):
        return fc.linear_cross_entropy(
            head(weight, bias), x, labels, class_weights=weights, reduction=reduction, chunk_size=7
        )

    def theirs(weight, bias, x):
        return F.linear_cross_entropy(
            x,
            weight,
            torch.tensor(labels),
            linear_bias=bias,
            weight=torch.tensor(weights),
            reduction=reduction,
            options=torch.nn.LinearCrossEntropyOptions() if chunked else None,
        )

    assert_same(in_jax(ours, inputs), in_torch(theirs, inputs))


# Both return float32 whatever comes in.
ON_JAX = {
    "jax-cce": lambda x, weight, labels: jax_cce.linear_cross_entropy(
        x, weight, labels, chunk_size=16
    ),
    "tokamax": lambda x, weight, labels: tokamax.linear_softmax_cross_entropy_loss(
        x, labels, weight.T, reduction="mean"
    ),
}


@pytest.mark.parametrize("library", ON_JAX)
def test_cross_entropy_is_that_of_libraries_on_jax(library):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (64, 32))
    weight = jax.random.normal(keys[1], (100, 32)) / 5
    labels = jax.random.randint(keys[2], (64,), 0, 100)

    def ours(x, weight, labels):
        return fc.linear_cross_entropy(head(weight, None), x, labels, reduction="mean")

    results = [
        jax.jit(jax.value_and_grad(loss, (0, 1)))(x, weight, labels)
        for loss in (ours, ON_JAX[library])
    ]
    assert_same(*map(jax.tree.leaves, results), 1e-5)
