"""Large heads: losses, log-probabilities and samples without logits; int8 and low-rank layers.

`python benchmarks/heads.py` (the `peers` and `examples` extras). A cross-entropy is its mean over
all positions and its gradients with respect to weight, bias and input. jax-cce and Tokamax take no
bias. In PyTorch it is `cross_entropy` of the logits, `linear_cross_entropy`, and that with its
chunked options. The layers are one forward call; float32 is the plain layer.

The memory of a JAX function is what XLA reports for its temporaries, that of PyTorch the growth of
the process during its second call, without the gradients. It is printed and written to
`outputs/benchmarks/heads_memory.json`; `draw_heads.py` draws it against the times.
"""

import ctypes
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax_cce
import numpy as np
import optax
import timing
import tokamax
import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from absl import flags
from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions

import fclayers as fc

Candidates = Mapping[str, Callable[[], Any]]
Shape = tuple[int, int, int]  # positions, features, classes

SMALL, LARGE = (2048, 512, 32_768), (8192, 256, 131_072)
MEMORY_FILE = Path("outputs/benchmarks/heads_memory.json")
CHUNK_SIZES = (128, 4096)  # beside the default
# The other accumulation policies are for half precision, and slower.
OPTIONS = {
    "chunked": LinearCrossEntropyOptions(),
    "aspect ratio 1": LinearCrossEntropyOptions(chunking_method="aspect_ratio"),
    "512 rows": LinearCrossEntropyOptions(batch_chunk_size=512),
}


def named(what: str, shape: Shape) -> str:
    """The name of a case."""
    return f"{what} {shape[0]} × {shape[1]} → {shape[2]}"


def arrays(shape: Shape) -> tuple[fc.LinearParams, jax.Array, jax.Array]:
    """A head, its input, and labels."""
    positions, features, classes = shape
    params = fc.init_linear(jax.random.key(0), features, classes)
    x = jax.random.normal(jax.random.key(1), (positions, features))
    return params, x, jax.random.randint(jax.random.key(2), (positions,), 0, classes)


def plain_loss(params: fc.LinearParams, x: jax.Array, labels: jax.Array) -> jax.Array:
    logits = fc.apply_linear(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


mean_loss = partial(fc.linear_cross_entropy, reduction="mean")


def jax_losses(shape: Shape) -> dict[str, Callable[[], Any]]:
    """The cross-entropy with its gradients, by libraries on JAX."""
    params, x, labels = arrays(shape)
    weight = params.weight
    tokamax_loss = partial(tokamax.linear_softmax_cross_entropy_loss, reduction="mean")
    inputs = (params, x, labels)
    losses = {
        "fclayers": (mean_loss, inputs, (0, 1)),
        "plain jax": (plain_loss, inputs, (0, 1)),
        "jax-cce": (jax_cce.linear_cross_entropy, (x, weight.T, labels), (0, 1)),
        "tokamax": (tokamax_loss, (x, labels, weight), (0, 2)),
    }
    for size in CHUNK_SIZES if shape == SMALL else ():
        losses[f"chunks of {size}"] = (partial(mean_loss, chunk_size=size), inputs, (0, 1))
    case = named("cross-entropy", shape)
    return {name: compiled(case, name, *arguments) for name, arguments in losses.items()}


def torch_losses(shape: Shape) -> dict[str, Callable[[], Any]]:
    """The cross-entropy with its gradients, by PyTorch's functions."""
    params, x, labels = arrays(shape)
    weight, bias, inputs = (
        torch.tensor(np.asarray(array), requires_grad=True)
        for array in (params.weight.T, params.bias, x)
    )
    targets = torch.tensor(np.asarray(labels), dtype=torch.int64)
    losses = {
        "torch": lambda: F.cross_entropy(F.linear(inputs, weight, bias), targets),
        "torch linear": lambda: F.linear_cross_entropy(inputs, weight, targets, linear_bias=bias),
    }
    for name, options in OPTIONS.items():
        losses[f"torch {name}"] = partial(
            F.linear_cross_entropy, inputs, weight, targets, linear_bias=bias, options=options
        )

    def clear() -> None:
        for tensor in (weight, bias, inputs):
            tensor.grad = None

    def backward(loss: Callable[[], torch.Tensor]) -> None:
        clear()
        loss().backward()

    results = sum(tensor.nbytes for tensor in (weight, bias, inputs))
    case = named("cross-entropy", shape)
    return {
        name: measured(case, name, partial(backward, loss), clear, results)
        for name, loss in losses.items()
    }


def all_losses(shape: Shape) -> Candidates:
    return {**jax_losses(shape), **torch_losses(shape)}


def beside_torch(shape: Shape) -> Candidates:
    """Half of the candidates, for a case that takes minutes."""
    return {"fclayers": jax_losses(shape)["fclayers"], **torch_losses(shape)}


def log_prob(shape: Shape) -> Candidates:
    """A policy gradient's log-probabilities and entropies, beside the loss alone."""

    def objective(params: fc.LinearParams, x: jax.Array, labels: jax.Array) -> jax.Array:
        log_prob, entropy = fc.linear_log_prob(params, x, labels)
        return -(log_prob + 0.01 * entropy).mean()

    def plain(params: fc.LinearParams, x: jax.Array, labels: jax.Array) -> jax.Array:
        log_probs = jax.nn.log_softmax(fc.apply_linear(params, x))
        entropy = -(jnp.exp(log_probs) * log_probs).sum(-1)
        log_prob = jnp.take_along_axis(log_probs, labels[:, None], axis=-1)[:, 0]
        return -(log_prob + 0.01 * entropy).mean()

    case, inputs = named("log-probability and entropy", shape), arrays(shape)
    functions = {"fclayers": objective, "loss alone": mean_loss, "plain jax": plain}
    return {
        name: compiled(case, name, function, inputs, (0, 1)) for name, function in functions.items()
    }


def distillation(shape: Shape) -> Candidates:
    """The divergence from a teacher of the same size, with the student's gradients."""
    params, x, _ = arrays(shape)
    teacher = fc.init_linear(jax.random.key(3), *shape[1:])

    def plain(student: fc.LinearParams, x: jax.Array, teacher: fc.LinearParams) -> jax.Array:
        p, q = (jax.nn.log_softmax(fc.apply_linear(head, x)) for head in (teacher, student))
        return (jnp.exp(p) * (p - q)).sum(-1).mean()

    def ours(student: fc.LinearParams, x: jax.Array, teacher: fc.LinearParams) -> jax.Array:
        x_teacher = jax.lax.stop_gradient(x)
        return fc.linear_distillation(student, teacher, x, x_teacher, reduction="mean")

    case, inputs = named("distillation", shape), (params, x, teacher)
    return {
        "fclayers": compiled(case, "fclayers", ours, inputs, (0, 1)),
        "plain jax": compiled(case, "plain jax", plain, inputs, (0, 1)),
    }


def sample(shape: Shape) -> Candidates:
    """One draw for every position."""
    params, x, _ = arrays(shape)

    def plain(key: jax.Array, params: fc.LinearParams, x: jax.Array) -> jax.Array:
        return jax.random.categorical(key, fc.apply_linear(params, x))

    case, inputs = named("sample", shape), (jax.random.key(3), params, x)
    return {
        "fclayers": compiled(case, "fclayers", fc.linear_sample, inputs),
        "plain jax": compiled(case, "plain jax", plain, inputs),
    }


def compiled(
    case: str,
    name: str,
    function: Callable[..., Any],
    inputs: tuple[Any, ...],
    differentiated: tuple[int, ...] = (),
) -> Callable[[], Any]:
    """A call of the compiled function, or of its value and gradients; notes its temporaries."""
    if differentiated:
        function = jax.value_and_grad(function, differentiated)
    program = jax.jit(function).lower(*inputs).compile()
    note_memory(case, name, program.memory_analysis().temp_size_in_bytes)
    return partial(_ready, program, *inputs)


def measured(
    case: str, name: str, call: Callable[[], Any], clear: Callable[[], Any], results: int
) -> Callable[[], Any]:
    """A call that notes by how much its second run lets the process grow, without its results."""
    runs = 0

    def counted() -> None:
        nonlocal runs
        runs += 1
        if runs != 2:
            call()
            return
        clear()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = _kilobytes("VmRSS")
        call()
        note_memory(case, name, max(0, 1024 * (_kilobytes("VmHWM") - before) - results))

    return counted


def note_memory(case: str, name: str, size: int) -> None:
    """Prints bytes, and puts them into `MEMORY_FILE`."""
    print(f"{case}, {name}: {size / 1e6:.1f} MB")
    notes = json.loads(MEMORY_FILE.read_text()) if MEMORY_FILE.exists() else {}
    notes.setdefault(case, {})[name] = size
    MEMORY_FILE.parent.mkdir(parents=True, exist_ok=True)
    MEMORY_FILE.write_text(json.dumps(notes, indent=2) + "\n")


def _kilobytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])


def int8(batch: int, in_features: int, out_features: int) -> Candidates:
    layer = fc.init_linear(jax.random.key(0), in_features, out_features)
    x = jax.random.normal(jax.random.key(1), (batch, in_features))
    quantized, in_blocks = fc.quantize(layer), fc.quantize(layer, block_size=64)

    @jax.jit
    def plain(params: fc.LinearParams, x: jax.Array) -> jax.Array:
        return (x @ params.weight.values.astype(x.dtype)) * params.weight.scale[0] + params.bias

    module = torch.nn.Linear(in_features, out_features)
    module.load_state_dict({k: torch.from_numpy(a) for k, a in fc.interop.to_torch(layer).items()})
    inputs = torch.tensor(np.asarray(x))
    return {
        "fclayers": partial(_ready, fc.apply_linear, quantized, x),
        "in blocks": partial(_ready, fc.apply_linear, in_blocks, x),
        "float32": partial(_ready, fc.apply_linear, layer, x),
        "plain jax": partial(_ready, plain, quantized, x),
        "torch": torch.no_grad()(partial(module, inputs)),
    }


def low_rank(batch: int, rank: int) -> Candidates:
    x = jax.random.normal(jax.random.key(1), (batch, 4096))
    layer = fc.init_linear(jax.random.key(0), 4096, 4096)
    factors = fc.LinearParams(fc.LowRank(layer.weight[:, :rank], layer.weight[:rank]), layer.bias)
    return {
        "fclayers": partial(_ready, fc.apply_linear, factors, x),
        "float32": partial(_ready, fc.apply_linear, layer, x),
    }


def _ready(function: Callable[..., Any], *args: Any) -> Any:
    return jax.block_until_ready(function(*args))


CASES = {
    named("cross-entropy", SMALL): partial(all_losses, SMALL),
    named("log-probability and entropy", SMALL): partial(log_prob, SMALL),
    named("distillation", SMALL): partial(distillation, SMALL),
    named("sample", SMALL): partial(sample, SMALL),
    f"{named('cross-entropy', LARGE)}, JAX": partial(jax_losses, LARGE),
    f"{named('cross-entropy', LARGE)}, PyTorch": partial(beside_torch, LARGE),
    **{
        f"int8 ({batch}, {inputs}) → 4096": partial(int8, batch, inputs, 4096)
        for inputs in (4096, 25088)
        for batch in (1, 8)
    },
    **{
        f"1/{2048 // rank} of the parameters ({batch}, 4096) → 4096": partial(low_rank, batch, rank)
        for rank in (512, 128)
        for batch in (1, 8, 512)
    },
}

if __name__ == "__main__":
    flags.FLAGS(["heads.py"])  # else Tokamax parses the command line
    timing.run(CASES, default_output="outputs/benchmarks/heads.json")
