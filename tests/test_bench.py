"""The bench counts what it says it counts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench
import model


@pytest.mark.parametrize("ratio", [0, 0.9])
@pytest.mark.parametrize("decoder", [{}, dict(decoder_depth=2, decoder_dim=64, decoder_heads=2),
                                     dict(route=(1, 4)), dict(route=(0, 6))])
def test_flops_by_formula_are_those_that_torch_counts(ratio, decoder):
    config = model.ModelConfig(**model.PRESETS["demo"], **decoder)
    denoiser, b, d = model.Denoiser(config), 3, config.dim
    visible = model.sample_visible(b, config.grid, ratio)
    k = config.grid**2 if visible is None else visible.shape[1]
    with FlopCounterMode(display=False) as counter:
        shown = config.grid**2 if decoder else k
        denoiser(torch.randn(b, shown, config.token_dim), torch.rand(b) + 0.1, visible)
    width = config.decoder_dim or d
    modulations = 6 * d * (config.depth * d + config.decoder_depth * width) + 2 * d * width
    modulations += 2 * d * d if config.decoder_depth else 0  # the layer by which the decoder is entered
    per_image = 2 * (modulations + 2 * d * d)  # and the time MLP
    assert counter.get_total_flops() == b * (bench.token_flops(config, k) / 3 + per_image)
