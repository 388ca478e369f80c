"""The bench counts what it says it counts."""

import json

import pytest
import torch
from conftest import TINY, mistake

import bench
import model
import sample

DECODER = dict(decoder_depth=2, decoder_dim=64, decoder_heads=2)


def preset_config(preset, **more):
    return bench.parse([f"--preset={preset}"], **more)[1]


def flops_by_formula(config, k):
    """FLOPs of forward and backward of one image of which k tokens are visible. Products take twice as many backward,
    attention 2.5 times, because its scores are worked out again."""
    c, n = config, config.grid**2
    width = c.decoder_dim or c.dim  # of the last block

    def blocks(depth, tokens, width):
        scores = 4 * tokens**2 * width * 3.5 / 3
        return depth * (tokens * 2 * 12 * width**2 + scores + 2 * c.dim * 6 * width)

    routed = c.route[1] - c.route[0] if c.route else 0
    shown = n if c.route else k  # tokens of the blocks that are not routed
    embed = 2 * shown * c.token_dim * c.dim
    time = 2 * c.dim * c.dim  # of each of its two layers
    forward = embed + 2 * time + blocks(c.depth - routed, shown, c.dim) + blocks(routed, k, c.dim)
    if c.decoder_depth:
        forward += 2 * c.dim * 2 * c.dim + 2 * k * c.dim * width + blocks(c.decoder_depth, n, width)
    forward += 2 * c.dim * 2 * width + 2 * (n if c.takes_all else k) * width * c.token_dim
    return 3 * forward - embed - time  # what enters the network needs no gradient


@pytest.mark.parametrize("ratio", [0, 0.9])
@pytest.mark.parametrize("more", [{}, DECODER, dict(route=(1, 4)), dict(route=(0, 6))])
def test_counted_flops_are_those_of_the_formula(ratio, more):
    config = preset_config("demo", **more)
    weights, flops, *_ = bench.count(config, 3, ratio)
    assert flops == pytest.approx(3 * flops_by_formula(config, config.grid**2 - int(ratio * config.grid**2)), rel=1e-12)
    assert weights == sum(p.numel() for p in model.Denoiser(config).parameters())


@pytest.mark.parametrize("ratio, network", [(0.9, {}), (0, dict(num_classes=3)), (0.5, dict(decoder_depth=1)),
                                            (0.75, dict(route=(1, 2)))])
def test_a_plan_counts_what_a_real_step_keeps(monkeypatch, ratio, network):
    config = model.ModelConfig(image_size=16, dim=64, depth=2, heads=2, **network)
    (_, one, kept, _), *more = (bench.count(config, b, ratio, "block", 2) for b in (6, 12, 18))
    assert [2 * one, 3 * one] == [flops for _, flops, *_ in more]
    assert more[1][2] - more[0][2] == more[0][2] - kept
    monkeypatch.setattr(model, "attention", torch.nn.functional.scaled_dot_product_attention)
    denoiser = model.Denoiser(config)
    batch = bench.draw_batch(config, 6, ratio, "block", 2)
    weights = {p.data_ptr() for p in denoiser.parameters()}
    alive, sizes = [], {}

    def keep(t):
        if t.data_ptr() not in weights:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            alive.append(t)  # or its memory would be given to another
        return t

    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        bench.our_loss(denoiser, batch)
    assert sum(sizes.values()) == kept


def printed_times(out):
    lines = [line for line in out.splitlines() if " ms " in line and " ms loading" not in line]
    return {line.split(" ms ")[1]: float(line.split()[0]) for line in lines}


def test_a_plan_of_whole_images_at_256_px_is_half_attention(capsys):
    """Closed form: 4 images on each of 8 GPUs, 13 blocks of width 768 on 4096 tokens."""
    bench.main(["plan", "--size=256", "--preset=maskdm-256"])
    out = capsys.readouterr().out
    products = 4 * 13 * 3 * 4096 * 2 * 12 * 768**2
    scores = 4 * 13 * 3.5 * 4 * 4096**2 * 768
    tflop = (products + scores) / 1e12
    assert tflop == pytest.approx(18.4, abs=0.1) and scores / (products + scores) == pytest.approx(0.51, abs=0.01)
    assert f"{tflop:.3g} TFLOP" in out
    assert printed_times(out)["products and attention"] == pytest.approx(1e3 * tflop / 989 / 0.4, abs=0.4)


@pytest.mark.parametrize("flags, peak", [(["--dtype=bfloat16"], 989e12 * 0.4), (["--dtype=float32"], 67e12 * 0.75),
                                         (["--dtype=float32", "--tf32"], 494e12 * 0.4)])
def test_a_consistency_plan_has_a_forward_pass_more_and_its_dtype(capsys, flags, peak):
    bench.main(["plan", "--size=32", "--preset=ect-cifar10", "--loss=consistency", "--batch_size=128", *flags])
    config = preset_config("ect-cifar10", image_size=32)
    flops = 16 * flops_by_formula(config, 256) * 4 / 3
    out = capsys.readouterr().out
    assert printed_times(out)["products and attention"] == pytest.approx(1e3 * flops / peak, abs=0.06)
    rate = float(out.split(" images/s")[0].split()[-1])
    weights = sum(p.numel() for p in model.Denoiser(config).parameters())
    limit = max(flops / peak + 44 * weights / 3.35e12, printed_times(out)["launches"] / 1e3)
    assert rate == pytest.approx(128 / limit, rel=0.02)


@pytest.mark.parametrize("more, blocks", [({}, 6), (DECODER, 8), (dict(route=(1, 4)), 6)])
def test_launches_grow_by_a_compiled_block_each(more, blocks):
    config = preset_config("demo", **more)
    around = bench.count_launches(config, 0.5) - bench.COMPILED_BLOCK * blocks
    assert 60 < around < 250 and around == bench.count_launches(preset_config("demo", depth=1), 0.5) - 44


def test_muon_takes_five_iterations_of_three_products():
    matrices, flops = bench.muon_flops(preset_config("demo"))
    d = 128
    one = lambda n, m: 5 * (2 * n * n * m + 2 * n**3 + 2 * n * n * m)
    assert (matrices, flops) == (24, 6 * (one(d, 3 * d) + one(d, d) + 2 * one(d, 4 * d)))


@pytest.mark.parametrize("gpus, speed", [(8, 350e9), (16, 50e9)])
def test_inside_a_node_gradients_travel_fast(capsys, gpus, speed):
    bench.main(["plan", "--preset=dit-b", "--size=32", "--mask_ratio=0.9", f"--gpus={gpus}"])
    n = sum(p.numel() for p in model.Denoiser(preset_config("dit-b", image_size=32)).parameters())
    expected = 1e3 * 2 * (gpus - 1) / gpus * 4 * n / speed
    assert printed_times(capsys.readouterr().out)["network"] == pytest.approx(expected, abs=0.06)


def test_loading_for_a_gpu_draws_no_noise_on_the_cpu(dataset, monkeypatch):
    cfg, _, _ = bench.train.parse(["--device=cpu", "--preset=demo", "--mask_ratio=0.5", "--batch_size=8"])
    config = preset_config("demo", image_size=16)
    drawn = []
    randn = torch.randn
    def watched(*shape, **how):
        if how.get("device") != torch.device("meta"):  # which has no memory
            drawn.append(shape)
        return randn(*shape, **how)

    monkeypatch.setattr(torch, "randn", watched)
    assert bench.load_seconds(config, cfg, 2) > 0
    assert set(drawn) == {(8,)}  # noise levels alone


def test_a_plan_adds_up(capsys):
    bench.main(["plan", "--size=32", "--preset=dit-s", "--batch_size=64", "--gpus=4", "--memory=1e9"])
    out = capsys.readouterr().out
    n = sum(p.numel() for p in model.Denoiser(preset_config("dit-s", image_size=32)).parameters())
    assert f"{n / 1e6:.1f} M weights, 16 of 64 images on each of 4 GPUs" in out
    assert f"{2 * 3 / 4 * 4 * n / 1e6:.4g} MB over the network" in out and "does NOT fit in 1 GB" in out
    gb = [float(line.split()[0]) for line in out.splitlines() if " GB " in line]
    assert sum(gb[:5]) == pytest.approx(22 * n / 1e9, abs=0.03) and sum(gb[:6]) == pytest.approx(gb[6], abs=0.04)
    ms = printed_times(out)
    ms["the GPU"] = ms.pop("products and attention") + ms.pop("optimizer and average")
    assert f"the limit is {max(ms, key=ms.get)}: " in out
    assert "--nonsense" in mistake(bench.main, "plan", "--nonsense=1")


def test_what_the_demo_leaves_can_be_drawn_from(dataset, tmp_path):
    bench.train.main([f"--data={dataset}", f"--out_dir={tmp_path}/out", "--batch_size=12", "--steps=3", "--log_every=1", *TINY])
    (tmp_path / "out/samples.png").write_bytes(b"a picture")
    (tmp_path / "kept").mkdir()
    bench.keep_demo(f"{tmp_path}/out", tmp_path / "kept")
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {"samples.png", "demo-loss.png", "demo.pt"}
    kept, whole = ((sample.load_denoiser(str(path))[0]) for path in (tmp_path / "kept/demo.pt", tmp_path / "out/ft.pt"))
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(kept.state_dict()[name], weight, rtol=1e-3, atol=1e-6)


ADAPTER = """
import torch
print("what other code prints")
CONFIG = dict(image_size=16, dim=32, depth=1, heads=1)

def make(size, channels, patch_size, dim, depth, heads, visible):
    assert (size, channels, patch_size, dim, depth, heads, visible) == (16, 3, 4, 32, 1, 1, 8)
    network = torch.nn.Linear(channels * size**2, 1000)

    def loss(images):
        assert images.shape[1:] == (3, 16, 16) and -1 <= images.min() < -0.9 and 0.9 < images.max() <= 1
        return network(images.flatten(1)).square().mean() * visible

    return network, loss
"""


def test_another_network_is_timed_in_turns_with_ours(tmp_path):
    other = tmp_path / "other.py"
    other.write_text(ADAPTER)
    found = tmp_path / "found.json"
    bench.main(["steps", f"--against={other}", "--only=batch 8, ratio 0.5", "--repeats=1", f"--json={found}"])
    stored = json.loads(found.read_text())
    assert stored["command"].startswith("python tests/tools/bench.py steps --against=other.py '--only=batch 8, ")
    (r,) = stored["results"]
    config = preset_config("maskdm-64", image_size=16, dim=32, depth=1, heads=1)
    assert r["ours_m_weights"] == sum(p.numel() for p in model.Denoiser(config).parameters()) / 1e6
    assert r["theirs_m_weights"] == (768 * 1000 + 1000) / 1e6
    assert r["times_faster"] == pytest.approx(r["theirs_ms"] / r["ours_ms"]) and r["ours_gb"] > 0.05
    row = bench.against_table([r]).splitlines()[2]
    assert row.startswith(f"| other, 8 | {r['theirs_ms'] / 1e3:.3g} s, ours ")
    other.write_text("def make(*sizes):\n    raise ValueError('no')\nCONFIG = dict(dim=32, heads=1)\n")
    with pytest.raises(ValueError, match="no"):
        bench.main(["steps", "--against", str(other), "--only=batch 8, ratio 0.5"])


def test_our_step_sees_the_visible_patches_in_micro_batches(monkeypatch):
    case = dict(preset="demo", batch=8, ratio=0.5, changes=dict(image_size=16, dim=32, depth=1, heads=1))
    our_loss = bench.our_loss
    seen = []

    def watched(network, batch):
        seen.append((*batch["clean"].shape, batch["visible"].shape[1]))
        return our_loss(network, batch)

    monkeypatch.setattr(bench, "our_loss", watched)
    monkeypatch.setattr(sample, "images_per_pass", lambda *_: 4)
    step, _ = bench.make_step(case)
    assert step() > 0 and seen == 2 * [(4, 8, 48, 8)]
