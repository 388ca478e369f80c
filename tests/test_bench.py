"""The bench counts what it says it counts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench
import model


@pytest.mark.parametrize("ratio", [0, 0.9])
def test_flops_by_formula_are_those_that_torch_counts(ratio):
    config = model.ModelConfig(**model.PRESETS["demo"])
    denoiser, b, d = model.Denoiser(config), 3, config.dim
    visible = model.sample_visible(b, config.grid, ratio)
    k = config.grid**2 if visible is None else visible.shape[1]
    with FlopCounterMode(display=False) as counter:
        denoiser(torch.randn(b, k, config.token_dim), torch.rand(b) + 0.1, visible)
    per_image = 2 * (6 * d * d * config.depth + 2 * d * d + 2 * d * d)  # adaLN, last norm, time MLP
    assert counter.get_total_flops() == bench.token_flops(config, b * k, b) / 3 + b * per_image
