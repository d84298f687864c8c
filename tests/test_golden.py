"""PyTorch parity without PyTorch: its outputs, gradients and initializers as stored arrays."""

from pathlib import Path

import jax
import numpy as np
import pytest
import scipy.stats
from parity import Case, assert_same, fclayers_results, make_cases

import fclayers as fc

GOLDEN = np.load(Path(__file__).parent / "golden" / "linear.npz")


@pytest.mark.parametrize("case", make_cases(), ids=lambda case: case.name)
def test_forward_and_gradients_are_torchs(case):
    def stored(part):
        prefix = f"{case.name}/{part}/"
        return {
            name.removeprefix(prefix): GOLDEN[name] for name in GOLDEN if name.startswith(prefix)
        }

    assert_same(fclayers_results(Case(case.name, case.kind, stored("in"))), stored("out"))


@pytest.mark.parametrize("part", ["weight", "bias"])
@pytest.mark.parametrize("kind", ["linear", "bilinear"])
def test_default_initializers_have_torchs_distribution(kind, part):
    key = jax.random.key(0)
    if kind == "linear":
        params = fc.init_linear(key, 100, 1000)
    else:
        params = fc.init_bilinear(key, 50, 20, 500)
    ours, theirs = np.ravel(getattr(params, part)), GOLDEN[f"init/{kind}/{part}"]
    assert scipy.stats.ks_2samp(ours, theirs).pvalue > 0.01
