"""The parity cases live against PyTorch, Flax (Linen and NNX), Equinox and Haiku."""

import frameworks
import jax
import numpy as np
import pytest
import scipy.stats
import torch
from parity import assert_same, fclayers_results, make_cases

import fclayers as fc

CASES = make_cases()
LINEAR_CASES = [case for case in CASES if case.kind == "linear"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_forward_and_gradients_are_torchs(case):
    assert_same(fclayers_results(case), frameworks.torch_results(case))


@pytest.mark.parametrize("peer", ["linen", "nnx", "equinox", "haiku"])
@pytest.mark.parametrize("case", LINEAR_CASES, ids=lambda case: case.name)
def test_forward_and_gradients_are_the_peers(peer, case):
    assert_same(fclayers_results(case), getattr(frameworks, f"{peer}_results")(case))


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64"])
@pytest.mark.parametrize("in_features", [1, 30, 700])
def test_default_initializer_has_torchs_distribution(in_features, dtype):
    torch.manual_seed(0)
    layer = torch.nn.Linear(in_features, 2000, dtype=getattr(torch, dtype))
    with jax.enable_x64(dtype == "float64"):
        params = fc.init_linear(jax.random.key(0), in_features, 2000, dtype=dtype)
    for ours, theirs in ((params.weight, layer.weight), (params.bias, layer.bias)):
        ours, theirs = np.ravel(ours)[:2000], theirs.detach().numpy().ravel()[:2000]
        assert ours.dtype == theirs.dtype
        parts = (np.real, np.imag) if dtype == "complex64" else (np.real,)
        for part in parts:
            assert scipy.stats.ks_2samp(part(ours), part(theirs)).pvalue > 0.01


@pytest.mark.parametrize(("in_features", "out_features"), [(0, 3), (3, 0), (0, 0)])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_no_features_work_as_in_torch(in_features, out_features):
    layer = torch.nn.Linear(in_features, out_features)
    params = fc.init_linear(jax.random.key(0), in_features, out_features)
    x = np.ones((2, in_features), np.float32)
    expected = layer(torch.tensor(x)).detach().numpy()
    np.testing.assert_array_equal(fc.apply_linear(params, x), expected)
