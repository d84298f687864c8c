"""Writes linear.npz: the parity cases with PyTorch's results, and samples of its initializers.

Needs PyTorch (the `peers` extra): `python tests/golden/make_linear.py`.
"""

import sys
from pathlib import Path

import numpy as np
import torch

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "peers")]

from frameworks import torch_results  # noqa: E402
from parity import make_cases  # noqa: E402


def main() -> None:
    arrays = {}
    for case in make_cases():
        for name, array in case.arrays.items():
            arrays[f"{case.name}/in/{name}"] = array
        for name, array in torch_results(case).items():
            arrays[f"{case.name}/out/{name}"] = array

    torch.manual_seed(0)
    linear, bilinear = torch.nn.Linear(100, 1000), torch.nn.Bilinear(50, 20, 500)
    for kind, layer in (("linear", linear), ("bilinear", bilinear)):
        arrays[f"init/{kind}/weight"] = layer.weight.detach().numpy().ravel()[::50]
        arrays[f"init/{kind}/bias"] = layer.bias.detach().numpy()
    np.savez_compressed(Path(__file__).with_name("linear.npz"), **arrays)


if __name__ == "__main__":
    main()
