"""Draws time against memory of a large head into `docs/images`.

Run it with `python docs/draw_heads.py` after `python benchmarks/heads.py`, whose results it reads;
it needs the `examples` extra.
"""

import json
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

IMAGES = Path(__file__).parent / "images"
RESULTS = Path("outputs/benchmarks")
SHAPE = "2048 × 512 → 32768"
CASE = f"cross-entropy {SHAPE}"
INK, BLUE, BROWN, GREEN = "#222222", "#1f4e79", "#a8400c", "#3c7d3c"
FAMILIES = {("fclayers", "chunks of"): BLUE, ("torch",): BROWN}
# Where names would overlap: their distances in points, and their alignment.
SIDES = {
    "fclayers": (0, -14, "center"),
    "chunks of 4096": (0, 9, "right"),
    "jax-cce": (0, 9, "left"),
    "torch 512 rows": (-2, -14, "left"),
    "plain jax": (-6, -14, "right"),
    "torch": (-2, 9, "right"),
    "torch linear": (4, 9, "left"),
    "tokamax": (2, -14, "left"),
}

Numbers = dict[str, float]


def draw(times: Numbers, memory: Numbers) -> Figure:
    """Draws a point for every candidate, and a line through the chunk sizes of fclayers."""
    figure = Figure(figsize=(8.2, 4.4), layout="constrained")
    axes = figure.subplots()
    places = {name: (memory[name] / 1e6, time) for name, time in times.items()}
    ours = sorted(place for name, place in places.items() if _color(name) == BLUE)
    axes.plot(*zip(*ours, strict=True), color=BLUE, alpha=0.4)
    for name, place in places.items():
        axes.plot(*place, "o", color=_color(name))
        *offset, align = SIDES.get(name, (6, 4, "left"))
        text = {"xytext": offset, "textcoords": "offset points", "ha": align}
        axes.annotate(name, place, color=_color(name), **text)
    axes.set_xscale("log")
    axes.set(
        xlim=(2, 3000),
        ylim=(0, 1.05 * max(times.values())),
        xlabel="temporaries in MB",
        ylabel="seconds",
    )
    axes.set_title(f"Cross-entropy and gradients, {SHAPE}, float32, two cores")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.2)
    return figure


def _color(name: str) -> str:
    return next((color for start, color in FAMILIES.items() if name.startswith(start)), GREEN)


def main() -> None:
    """Draws it from the files of results."""
    mpl.rcParams.update({"font.size": 9, "text.color": INK, "svg.hashsalt": "fclayers"})
    times = json.loads((RESULTS / "heads.json").read_text())[CASE]
    memory = json.loads((RESULTS / "heads_memory.json").read_text())[CASE]
    draw(times, memory).savefig(IMAGES / "large_heads.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
