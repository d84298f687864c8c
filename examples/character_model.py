"""Train a character model, distill it into a smaller one, and fine-tune that by policy gradient.

The text is the language reference that Python's `help` prints. A network learns to predict its next
character. A smaller one learns from the probabilities of the first, and is then rewarded for doing
without the letter e, while a divergence keeps it close to what it was. The embedding is the output
layer too, and no step materializes logits. Run it with `python examples/character_model.py`;
`--help` explains the flags.
"""

import re
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import parser, positive, save_picture
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

import fclayers as fc

CONTEXT = 16  # characters that a prediction sees
BATCH_SIZE = 256
TEACHER, STUDENT = (48, 384), (24, 96)  # features and hidden units
UNWANTED = "e"
PROMPTS, GROUP, LENGTH = 16, 8, 48  # a batch: prompts, continuations of each, their characters
CLIP = 0.2
DIVERGENCE_WEIGHT = 0.1

LossFn = Callable[..., Any]
Curves = dict[str, np.ndarray]


class Model(NamedTuple):
    """A network that predicts a character from those before it."""

    embedding: jax.Array  # (characters, features)
    read: fc.LinearParams  # (CONTEXT, features) to hidden
    mix: fc.LinearParams  # hidden to hidden
    write: fc.LinearParams  # hidden to features


class Text(NamedTuple):
    """All characters, and windows of the text: CONTEXT numbers of characters, and the next one."""

    characters: np.ndarray
    train: np.ndarray
    test: np.ndarray


class Result(NamedTuple):
    """What the run measured: losses on unseen text, and per step, in nats per character."""

    teacher: float
    from_text: float
    from_teacher: float
    losses: dict[str, np.ndarray]
    policy: Curves
    before: list[str]
    after: list[str]


def read_text(seed: int) -> Text:
    """Reads the text; shuffles the windows of its first nine tenths."""
    text = " ".join(topics[name] for name in sorted(topics)).lower()
    text = re.sub("[^a-z,.]+", " ", text)
    characters, numbers = np.unique(list(text), return_inverse=True)
    windows = np.lib.stride_tricks.sliding_window_view(numbers.astype(np.int32), CONTEXT + 1)
    split = len(windows) * 9 // 10
    train = np.random.default_rng(seed).permutation(windows[:split])
    return Text(characters, train, windows[split + CONTEXT :: 5])


def init_model(key: jax.Array, characters: int, features: int, hidden: int) -> Model:
    """Draws the parameters."""
    keys = jax.random.split(key, 4)
    return Model(
        jax.random.normal(keys[0], (characters, features)) / features**0.5,
        fc.init_linear(keys[1], (CONTEXT, features), hidden),
        fc.init_linear(keys[2], hidden, hidden),
        fc.init_linear(keys[3], hidden, features),
    )


def encode(model: Model, contexts: jax.Array) -> jax.Array:
    """The head's input (..., features), from characters (..., CONTEXT)."""
    x = jax.nn.relu(fc.apply_linear(model.read, model.embedding[contexts], axis=(-2, -1)))
    x += jax.nn.relu(fc.apply_linear(model.mix, x))
    return fc.apply_linear(model.write, x)


def head(model: Model) -> fc.LinearParams:
    """The output layer: the embedding, used in place."""
    return fc.LinearParams(fc.Transposed(model.embedding), None)


def cross_entropy(model: Model, windows: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """Mean loss of the last characters of windows, in nats."""
    x = encode(model, windows[:, :-1])
    return fc.linear_cross_entropy(head(model), x, windows[:, -1], reduction="mean")


def distillation(teacher: Model) -> LossFn:
    """A loss: the divergence of a student from the teacher, whatever the last characters are."""

    def loss_fn(student: Model, windows: jax.Array, key: jax.Array) -> tuple[jax.Array, Any]:
        x, x_teacher = (encode(model, windows[:, :-1]) for model in (student, teacher))
        heads = head(student), head(teacher)
        divergence = fc.linear_distillation(*heads, x, x_teacher, reduction="mean")
        return divergence, {"cross_entropy": cross_entropy(student, windows)}

    return loss_fn


def write(model: Model, key: jax.Array, prompts: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Continues prompts (N, CONTEXT): LENGTH characters each, and their log-probabilities."""

    def step(context: jax.Array, key: jax.Array) -> tuple[jax.Array, Any]:
        drawn, log_prob = fc.linear_sample(key, head(model), encode(model, context))
        return jnp.concatenate([context[:, 1:], drawn[:, None]], axis=1), (drawn, log_prob)

    _, (written, log_prob) = jax.lax.scan(step, prompts, jax.random.split(key, LENGTH))
    return written.T, log_prob.T


def policy_gradient(reference: Model, unwanted: int) -> LossFn:
    """A loss: PPO's objective with GRPO's advantages, and the divergence from a reference."""

    def loss_fn(model: Model, prompts: jax.Array, key: jax.Array) -> tuple[jax.Array, Any]:
        prompts = jnp.repeat(prompts, GROUP, axis=0)
        written, old = write(jax.lax.stop_gradient(model), key, prompts)
        share = (written == unwanted).mean(1)
        rewards = -share.reshape(-1, GROUP)
        advantages = rewards - rewards.mean(1, keepdims=True)
        advantages /= rewards.std(1, keepdims=True) + 1e-4
        advantages = advantages.reshape(-1, 1)  # of every character of a continuation

        text = jnp.concatenate([prompts, written], axis=1)
        contexts = text[:, jnp.arange(LENGTH)[:, None] + jnp.arange(CONTEXT)]
        x, x_reference = encode(model, contexts), encode(reference, contexts)
        log_prob, entropy = fc.linear_log_prob(head(model), x, written)
        ratio = jnp.exp(log_prob - old)
        clipped = jnp.clip(ratio, 1 - CLIP, 1 + CLIP)
        objective = jnp.minimum(ratio * advantages, clipped * advantages).mean()
        divergence = fc.linear_distillation(
            head(model), head(reference), x, x_reference, direction="reverse", reduction="mean"
        )
        metrics = {"share": share.mean(), "divergence": divergence, "entropy": entropy.mean()}
        return DIVERGENCE_WEIGHT * divergence - objective, metrics

    return loss_fn


def train(
    model: Model,
    data: np.ndarray,
    loss_fn: LossFn,
    key: jax.Array,
    learning_rate: float,
    batch_size: int = BATCH_SIZE,
) -> tuple[Model, Curves]:
    """Trains by one pass over the data; returns the metrics of every step, too."""
    schedule = optax.cosine_decay_schedule(learning_rate, len(data) // batch_size)
    optimizer = optax.adamw(schedule, weight_decay=1e-2)
    state = fc.train.init_state(model, optimizer, key)
    state, history = fc.train.fit(state, data, loss_fn, optimizer, epochs=1, batch_size=batch_size)
    return state.params, history.steps


def plot(path: Path, result: Result) -> None:
    """Draws losses, the fine-tuning, and what is written before and after it."""
    figure = Figure(figsize=(12, 6.6), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(2.2, 1))
    left, middle = upper.subplots(1, 2)
    unseen = (result.from_text, result.from_teacher, result.teacher)
    for (name, curve), test in zip(result.losses.items(), unseen, strict=True):
        window = max(1, len(curve) // 25)
        smooth = np.convolve(curve, np.ones(window) / window, mode="valid")
        left.plot(np.arange(len(smooth)) + window / 2, smooth, label=f"{name}: {test:.2f}")
    title = "Cross-entropy of the batches (numbers: of unseen text)"
    left.set(xlabel="step", ylabel="nats per character", title=title)
    left.legend()
    left.grid(alpha=0.2)

    middle.plot(result.policy["share"], color="tab:red", label=f"share of {UNWANTED}")
    middle.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    middle.set(
        xlabel="step",
        ylabel=f"share of {UNWANTED}",
        title=f"Fine-tuning to write without {UNWANTED}",
    )
    right = middle.twinx()
    right.plot(result.policy["divergence"], color="tab:gray", label="divergence")
    right.set(ylabel="divergence from the student, in nats")
    middle.legend(handles=[*middle.lines, *right.lines], loc="center right")
    middle.grid(alpha=0.2)

    for axes, name, texts in zip(
        lower.subplots(1, 2), ("before", "after"), (result.before, result.after), strict=True
    ):
        axes.set(xlim=(0, CONTEXT + LENGTH), ylim=(len(texts), 0))
        axes.set_title(f"Written {name} fine-tuning (prompts in gray)")
        axes.set_axis_off()
        for row, text in enumerate(texts):
            for column, character in enumerate(text):
                color = "black" if character != UNWANTED else "tab:red"
                color = "gray" if column < CONTEXT else color
                place = (column + 0.5, row + 0.5)
                axes.text(*place, character, color=color, family="monospace", ha="center")
    save_picture(figure, path)


def main(argv: list[str] | None = None) -> Result:
    """Trains, distills, fine-tunes, draws; returns what it measured."""
    flags = parser(__doc__, "outputs/character_model.png")
    flags.add_argument("--steps", type=positive, default=800, help="of the teacher")
    flags.add_argument("--student-steps", type=positive, default=600, help="of each student")
    flags.add_argument("--policy-steps", type=positive, default=60, help="of fine-tuning")
    args = flags.parse_args(argv)

    text = read_text(args.seed)
    for name in ("steps", "student_steps", "policy_steps"):
        most = len(text.train) // BATCH_SIZE
        if getattr(args, name) > most:
            flags.error(f"--{name.replace('_', '-')} must be at most {most}")
    keys = jax.random.split(jax.random.key(args.seed), 6)
    teacher, untrained = (
        init_model(key, len(text.characters), *sizes)
        for key, sizes in ((keys[0], TEACHER), (keys[1], STUDENT))
    )

    print("Training the teacher", flush=True)
    windows = text.train[: args.steps * BATCH_SIZE]
    teacher, of_teacher = train(teacher, windows, cross_entropy, keys[2], 3e-3)
    print("Training a student from the text", flush=True)
    windows = text.train[: args.student_steps * BATCH_SIZE]
    alone, of_alone = train(untrained, windows, cross_entropy, keys[3], 5e-3)
    print("Training the same student from the teacher", flush=True)
    student, of_student = train(untrained, windows, distillation(teacher), keys[3], 5e-3)
    print(f"Fine-tuning it to write without {UNWANTED}", flush=True)
    loss_fn = policy_gradient(student, int(np.flatnonzero(text.characters == UNWANTED)[0]))
    prompts = text.train[: args.policy_steps * PROMPTS, :-1]
    tuned, policy = train(student, prompts, loss_fn, keys[4], 1e-3, batch_size=PROMPTS)

    test = jax.jit(cross_entropy)
    prompts = text.test[:: len(text.test) // 5][:5, :-1]

    def continued(model: Model) -> list[str]:
        written, _ = jax.jit(write)(model, keys[5], jnp.asarray(prompts))
        rows = np.concatenate([prompts, written], axis=1)
        return ["".join(text.characters[row]) for row in rows]

    result = Result(
        teacher=float(test(teacher, text.test)),
        from_text=float(test(alone, text.test)),
        from_teacher=float(test(student, text.test)),
        losses={
            "student, from the text": of_alone["loss"],
            "student, from the teacher": of_student["cross_entropy"],
            "teacher": of_teacher["loss"],
        },
        policy=policy,
        before=continued(student),
        after=continued(tuned),
    )
    print("\nOn unseen text, in nats per character")
    sizes = [sum(a.size for a in jax.tree.leaves(model)) for model in (teacher, student)]
    print(f"Teacher                    {result.teacher:.3f}  {sizes[0]:7,} parameters")
    print(f"Student, from the text     {result.from_text:.3f}  {sizes[1]:7,}")
    print(f"Student, from the teacher  {result.from_teacher:.3f}")
    first, last = policy["share"][0], policy["share"][-10:].mean()
    print(f"Share of {UNWANTED}  {first:.1%} before fine-tuning, {last:.1%} in its last steps")
    print(f"Divergence  {policy['divergence'][-10:].mean():.2f} nats per character")
    plot(args.output, result)
    return result


if __name__ == "__main__":
    main()
