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


@pytest.mark.parametrize("ratio, network", [(0.9, {}), (0, dict(num_classes=3)), (0.5, dict(decoder_depth=1)),
                                            (0.75, dict(route=(1, 2)))])
def test_a_plan_counts_what_a_real_step_computes_and_keeps(monkeypatch, ratio, network):
    config = model.ModelConfig(image_size=16, dim=64, depth=2, heads=2, **network)
    flops, kept = bench.count_step(config, ratio, 6)
    more = [bench.count_step(config, ratio, b) for b in (12, 18)]
    assert [2 * flops, 3 * flops] == [m[0] for m in more] and more[1][1] - more[0][1] == more[0][1] - kept
    monkeypatch.setattr(model, "attention", torch.nn.functional.scaled_dot_product_attention)
    denoiser, sizes = model.Denoiser(config), {}
    visible = model.sample_visible(6, config.grid, ratio, "block", 2)
    tokens = config.grid**2 if config.takes_all or visible is None else visible.shape[1]
    clean, noise = torch.randn(2, 6, tokens, config.token_dim)
    labels = torch.tensor([0, 1, 2, -1, 0, 0]) if config.num_classes else None
    weights = {p.data_ptr() for p in denoiser.parameters()}

    def keep(t):
        if t.data_ptr() not in weights:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            alive.append(t)  # or its memory would be given to another
        return t

    alive = []
    with FlopCounterMode(display=False) as counter, torch.autocast("cpu", torch.bfloat16):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss = model.diffusion_objective(denoiser, config, clean, noise, torch.ones(6), visible, labels)
        loss.mean().backward()
    assert counter.get_total_flops() == flops and sum(sizes.values()) == kept


def test_a_plan_adds_up(capsys):
    bench.plan(["--size=32", "--preset=dit-s", "--batch=64", "--gpus=4", "--memory=1e9", "--ratio=0"])
    out = capsys.readouterr().out
    with torch.device("meta"):
        n = sum(p.numel() for p in model.Denoiser(model.ModelConfig(image_size=32, **model.PRESETS["dit-s"])).parameters())
    assert f"{n / 1e6:.1f} M weights, 16 of 64 images on each of 4 GPUs" in out
    assert f"{2 * 3 / 4 * 4 * n / 1e6:.4g} MB a step over the network" in out and "does NOT fit in 1 GB" in out
    gb = [float(line.split()[0]) for line in out.splitlines() if " GB " in line]
    assert sum(gb[:5]) == pytest.approx(22 * n / 1e9, abs=0.03) and sum(gb[:6]) == pytest.approx(gb[6], abs=0.04)
    assert "the limit is" in out


ADAPTER = """
import torch
print("what other code prints")
CONFIG = dict(image_size=16, dim=32, depth=1, heads=1)

def make(size, channels, patch_size, dim, depth, heads, visible):
    assert (size, channels, patch_size, dim, depth, heads) == (16, 3, 4, 32, 1, 1)
    network = torch.nn.Linear(channels * size**2, 1000)

    def loss(images):
        assert images.shape[1:] == (3, 16, 16) and -1 <= images.min() < -0.9 and 0.9 < images.max() <= 1
        return network(images.flatten(1)).square().mean() * visible

    return network, loss
"""


def test_another_network_is_timed_in_turns_with_ours(tmp_path):
    (tmp_path / "other.py").write_text(ADAPTER)
    config = model.ModelConfig(**model.PRESETS["maskdm-64"] | dict(image_size=16, dim=32, depth=1, heads=1))
    rows = dict(bench.against(str(tmp_path / "other.py"), torch.float32, 1, "batch 8, ratio 0.5"))
    (values,) = rows.values()
    assert values["theirs_m_weights"] == pytest.approx((768 * 1000 + 1000) / 1e6)
    assert bench.against_table([values]).splitlines()[2].startswith(f"| other, 8 | {values['theirs_ms'] / 1e3:.3g} s, ours ")
    assert bench.factors_table([values]).splitlines()[2] == f"| other | {values['times_faster']:.2f} |"
    assert values["ours_m_weights"] == pytest.approx(sum(p.numel() for p in model.Denoiser(config).parameters()) / 1e6)
    assert values["times_faster"] == pytest.approx(values["theirs_ms"] / values["ours_ms"]) and values["ours_gb"] > 0.05
    (tmp_path / "broken.py").write_text("def make(*sizes):\n    raise ValueError('no')\nCONFIG = dict(dim=32, heads=1)\n")
    with pytest.raises(SystemExit, match="broken.py: the network of broken, batch 8, ratio 0.5 could not be made"):
        bench.against(str(tmp_path / "broken.py"), torch.float32, 1, "batch 8, ratio 0.5")


def test_our_step_beside_another_shows_and_learns_what_train_py_does(tmp_path):
    """The seen patches are K of N, in micro-batches as on a CPU, and the gradient is that of the whole batch."""
    (tmp_path / "other.py").write_text(ADAPTER)
    step, n = bench.stepper(str(tmp_path / "other.py"), "theirs", 8, 0.5, torch.float32)
    assert n == 769_000 and step() > 0
    step, n = bench.stepper(str(tmp_path / "other.py"), "ours", 8, 0.5, torch.float32)
    assert step() > 0
