"""linear_cross_entropy live against PyTorch's, of which one also never holds all logits."""

import frameworks
import numpy as np
import pytest
import torch
from cross_entropy_cases import CASES, fclayers_losses


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cross_entropy_is_torchs(case):
    ours, theirs = fclayers_losses(case), frameworks.torch_losses(case)
    for name, array in ours.items():
        np.testing.assert_allclose(array, theirs[name], rtol=1e-12, atol=1e-12 * case.scale)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_losses_are_torchs_linear_cross_entropy(case):
    arrays = {name: torch.tensor(array) for name, array in case.arrays().items()}
    loss = torch.nn.functional.linear_cross_entropy(
        arrays["x"],
        arrays["weight"],
        arrays["labels"],
        linear_bias=arrays["bias"],
        ignore_index=-100,
        label_smoothing=case.smoothing,
        reduction=case.reduction,
    )
    np.testing.assert_allclose(fclayers_losses(case)["loss"], loss.numpy(), rtol=1e-12)
