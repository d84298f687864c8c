"""Writes interop.npz: the layers of `interop_cases` as every other framework stores them.

Needs the frameworks (the `peers` extra): `KERAS_BACKEND=jax python tests/golden/make_interop.py`.
"""

import sys
from pathlib import Path

import numpy as np

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "peers")]

from interop_cases import CASES, FRAMEWORKS  # noqa: E402
from layers import peer_layer  # noqa: E402


def main() -> None:
    arrays = {}
    for framework in FRAMEWORKS:
        for case in CASES:
            weights, y = peer_layer(framework, case)
            prefix = f"{framework}/{case.name}"
            arrays[f"{prefix}/y"] = y
            arrays |= {f"{prefix}/weights/{name}": array for name, array in weights.items()}
    np.savez_compressed(Path(__file__).with_name("interop.npz"), **arrays)


if __name__ == "__main__":
    main()
