"""Writes cross_entropy.npz: PyTorch's results for the `cross_entropy_cases`.

Needs PyTorch (the `peers` extra): `python tests/golden/make_cross_entropy.py`.
"""

import sys
from pathlib import Path

import numpy as np

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "peers")]

from cross_entropy_cases import CASES  # noqa: E402
from frameworks import torch_losses  # noqa: E402


def main() -> None:
    results = {case.name: torch_losses(case) for case in CASES}
    arrays = {
        f"{case}/{part}": array for case, parts in results.items() for part, array in parts.items()
    }
    np.savez_compressed(Path(__file__).with_name("cross_entropy.npz"), **arrays)


if __name__ == "__main__":
    main()
