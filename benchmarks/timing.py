"""Side-by-side timing on a noisy machine: interleaved rounds, medians, ratios."""

import argparse
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

Times = dict[str, float]

# After another library's threads have run, a thread pool takes up to 0.1 s to find its cores again:
# until then the same call takes up to twice as long.
_WARM_UP = 0.15


def time_side_by_side(
    candidates: Mapping[str, Callable[[], Any]], *, rounds: int = 7, seconds: float = 0.04
) -> Times:
    """Returns each candidate's time in seconds: the median over rounds of a round's median call.

    Every candidate runs once per round, first for `_WARM_UP` seconds that are not counted, then for
    at least `seconds`. The order is reversed every other round.
    """
    for call in candidates.values():
        call()
    medians: dict[str, list[float]] = {name: [] for name in candidates}
    for round_number in range(rounds):
        names = list(candidates)[:: -1 if round_number % 2 else 1]
        for name in names:
            medians[name].append(_time_block(candidates[name], seconds))
    return {name: median(times) for name, times in medians.items()}


def run(
    cases: Mapping[str, Callable[[], Mapping[str, Callable[[], Any]]]], *, default_output: str
) -> None:
    """Times the cases one by one; prints a table of ratios to the first candidate, writes JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7, help="rounds per case")
    parser.add_argument("--only", default="", help="run the cases whose names contain this")
    parser.add_argument("--output", type=Path, default=Path(default_output), help="JSON file")
    args = parser.parse_args()

    chosen = [name for name in cases if args.only in name]
    if not chosen:
        parser.error(f"--only: no case contains {args.only!r}; one is {next(iter(cases))!r}")
    results: dict[str, Times] = {}
    for name in tqdm(chosen, unit="case"):
        results[name] = time_side_by_side(cases[name](), rounds=args.rounds)
    print(format_table(results))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=2) + "\n")
    print(f"\nSeconds per call are in {args.output.resolve()}")


def format_table(results: Mapping[str, Times]) -> str:
    """A Markdown table: the first candidate's time, and how many times as long the others take."""
    names = list(dict.fromkeys(name for times in results.values() for name in times))
    rows = [["case", f"{names[0]} (ms)", *(f"{name} ÷" for name in names[1:])]]
    for case, times in results.items():
        ratios = [times[name] / times[names[0]] if name in times else None for name in names[1:]]
        cells = ["-" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
        rows.append([case, f"{times[names[0]] * 1e3:.3g}", *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    lines = [
        " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    return "\n".join(f"| {line} |" for line in lines)


def _time_block(call: Callable[[], Any], seconds: float) -> float:
    end = time.perf_counter() + _WARM_UP
    while time.perf_counter() < end:
        call()
    times: list[float] = []
    while sum(times) < seconds or not times:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return median(times)
