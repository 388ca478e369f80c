"""Consistency tuning on Gaussian data, where every function has a closed form."""

import json
import math
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY, make_dataset, mistake

import model
import sample
import train
from model import (Denoiser, ModelConfig, consistency_loss, consistency_objective, consistency_step, load_checkpoint,
                   posterior_mean)
from prepare_data import Images

MEAN, STD = 0.3, 0.7  # each coordinate ~ N(0.3, 0.7^2)
CONFIG = ModelConfig(image_size=4, channels=1, patch_size=2, dim=8, depth=1, heads=1, consistency=True)
PICTURES = replace(CONFIG, image_size=16, channels=3, patch_size=4)  # of conftest's data sets


def ode(x, t, s):
    """The probability-flow ODE from level t to level s: the distance to the mean shrinks."""
    return MEAN + (x - MEAN) * torch.sqrt((STD**2 + s**2) / (STD**2 + t**2))


class Exact:
    """D(x; t) of the exact consistency model: the end of the ODE."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, visible=None, labels=None):
        self.calls.append((t.clone(), torch.is_grad_enabled()))
        return ode(x, t.view(-1, 1, 1), torch.zeros(1, 1, 1, dtype=t.dtype))


def settings(**changes):
    usual = dict(steps=800, cm_stages=8, cm_q=2.0, cm_c=0.0, cm_weight="gap", decoder_depth=0)
    return Namespace(**usual | changes)


def loss_of(network, step, clean, noise, sigma, cfg=None, **batch):
    """The consistency loss of each image, (b,)."""
    batch |= dict(clean=clean, noise=noise, sigma=sigma)
    return consistency_objective(network, batch, cfg or settings(), step)["consistency"]


def draw(b=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    clean, noise = torch.randn(2, b, 4, 4, generator=g, dtype=torch.float64)
    return MEAN + STD * clean, noise


@pytest.mark.parametrize("weight", ["gap", "edm"])
@pytest.mark.parametrize("c", [0.0, 0.06])
def test_the_exact_consistency_function_has_no_loss_along_the_exact_ode(monkeypatch, weight, c):
    clean, noise = draw()
    for t in (0.01, 0.4, 3.0, 20.0, 79.0):
        t6 = torch.full((6,), t, dtype=torch.float64)
        x_t = clean + t * noise
        for stage in (0, 2, 6):
            r = consistency_step(t6, stage)
            x_r = ode(x_t, t6.view(-1, 1, 1), r.view(-1, 1, 1))
            # The one straight step that ends where the ODE does: towards this image.
            goal = x_t - (t6 / (r - t6)).view(-1, 1, 1) * (x_r - x_t)
            monkeypatch.setattr(model, "posterior_mean", lambda *a: goal)
            cfg = settings(cm_c=c, cm_weight=weight)
            loss = loss_of(Exact(), 100 * stage, clean, noise, t6, cfg, references=clean)
            assert (loss * (t6 - r)).max() < 1e-8


def residuals(monkeypatch, goals, t=2.0):
    """|f(x_t) - f(x_r)| as r comes closer to t, one row for each stage; goals(x_t) -> list of goals."""
    clean, noise = draw(1)
    sigma = torch.full((1,), t, dtype=torch.float64)
    rows = []
    for stage in (3, 4, 5, 6, 7):
        row = []
        for goal in goals(clean + t * noise):
            monkeypatch.setattr(model, "posterior_mean", lambda *a: goal)
            loss = loss_of(Exact(), 100 * stage, clean, noise, sigma, references=clean)
            row.append(loss.item() * t * 2.0 ** -(stage + 1))
        rows.append(row)
    return np.array(rows)


def test_with_the_analytic_posterior_mean_the_residual_is_of_second_order(monkeypatch):
    found = residuals(monkeypatch, lambda x: [(STD**2 * x + 4 * MEAN) / (STD**2 + 4)])[:, 0]
    order = np.polyfit(np.arange(5), np.log2(found), 1)[0]
    assert abs(order + 2) < 0.1


def test_ects_residual_is_of_first_order_and_vanishes_on_average_only():
    # p(y | x_t) is Gaussian and f linear: the two points mean +- deviation stand for the whole of it.
    x, t = torch.full((1, 1, 1), 1.7, dtype=torch.float64), 2.0
    mean, deviation = (STD**2 * x + t**2 * MEAN) / (STD**2 + t**2), STD * t / math.sqrt(STD**2 + t**2)
    single, average = [], []
    for stage in (3, 4, 5, 6, 7):
        r = t * (1 - 2.0 ** -(stage + 1))
        differences = [ode(x, torch.tensor(t), torch.tensor(0.0))
                       - ode(x + (r - t) / t * (x - y), torch.tensor(r), torch.tensor(0.0))
                       for y in (mean - deviation, mean + deviation)]
        single.append(abs(differences[0].item()))
        average.append(abs(sum(differences).item()) / 2)
    orders = [np.polyfit(np.arange(5), np.log2(v), 1)[0] for v in (single, average)]
    assert abs(orders[0] + 1) < 0.1 and abs(orders[1] + 2) < 0.1


@pytest.mark.parametrize("classes", [False, True])
def test_posterior_mean_equals_loops_over_images_and_references(classes):
    g = torch.Generator().manual_seed(0)
    y, noise = torch.randn(2, 3, 4, 5, generator=g)
    references = torch.randn(7, 4, 5, generator=g)
    sigma = torch.tensor([0.3, 1.0, 5.0])
    x = y + sigma.view(-1, 1, 1) * noise
    allowed = torch.rand(3, 7, generator=g) < 0.5 if classes else None
    ours = posterior_mean(x, y, sigma, references, allowed)
    for j in range(3):
        candidates = [y[j]] + [references[i] for i in range(7) if not classes or allowed[j, i]]
        logs = [-((x[j] - v).double() ** 2).sum().item() / (2 * sigma[j].item() ** 2) for v in candidates]
        weights = [math.exp(v - max(logs)) for v in logs]
        expected = sum(w * v for w, v in zip(weights, candidates)) / sum(weights)
        assert torch.allclose(ours[j], expected, atol=1e-5)


def test_the_reference_target_goes_from_ects_to_the_posterior_mean_and_its_variance_falls():
    g = torch.Generator().manual_seed(0)
    t, trials = 1.0, 400
    x = torch.full((trials, 1, 2), 0.9)
    mean, deviation = (STD**2 * x + t**2 * MEAN) / (STD**2 + t**2), STD * t / math.sqrt(STD**2 + t**2)
    y = mean + deviation * torch.randn(trials, 1, 2, generator=g)  # images that may lie behind x
    sigma, variance = torch.full((1,), t), {}
    for size in (1, 16, 256, 4096):
        targets = torch.cat([
            posterior_mean(x[:1], y[i : i + 1], sigma, MEAN + STD * torch.randn(size - 1, 1, 2, generator=g))
            for i in range(trials)])
        variance[size] = targets.var(dim=0).mean().item()
        if size == 1:
            assert torch.equal(targets, y)
        if size == 4096:
            assert (targets - mean).abs().mean() < 0.02
    values = list(variance.values())
    assert abs(values[0] / deviation**2 - 1) < 0.15  # ECT's: that of the posterior itself
    assert all(b < a / 4 for a, b in zip(values, values[1:]))


def test_schedule_and_weights_have_the_values_computed_by_hand():
    t = torch.tensor([0.002, 0.1, 1.0, 10.0, 80.0], dtype=torch.float64)
    # 8 sigmoid(-t) + 1 by hand: 4.996, 4.800167, 3.151531, 1.000363, 1
    wide = np.array([4.996, 4.800167, 3.151531, 1.000363, 1.0])
    for stage, gap in ((0, 0.5), (1, 0.25), (4, 0.03125), (8, 0.001953125)):
        expected = np.maximum(0, t.numpy() * (1 - gap * wide))
        assert np.allclose(consistency_step(t, stage), expected, rtol=1e-6, atol=1e-9)
        assert np.allclose(consistency_step(t, stage, k=0.0), t * (1 - gap))
        assert np.allclose(consistency_step(t, stage, q=4.0, k=0.0), t * (1 - gap**2))
    assert consistency_step(t, 0)[:3].tolist() == [0, 0, 0]
    zero, far = torch.zeros(5, 1, 4, dtype=torch.float64), torch.full((5, 1, 4), 2.0, dtype=torch.float64)
    r = t / 2  # the distance is |(2, 2, 2, 2)| = 4
    assert np.allclose(consistency_loss(far, zero, t, r), [4000, 80, 8, 0.8, 0.1])
    assert np.allclose(consistency_loss(far, zero, t, r, 3.0), [2000, 40, 4, 0.4, 0.05])  # sqrt(16 + 9) - 3
    assert np.allclose(consistency_loss(far, zero, t, r, 0.0, "edm"), 4 * np.array([250004, 104, 5, 4.01, 4.00015625]))


def test_the_network_is_asked_twice_and_the_target_gets_no_gradient():
    torch.manual_seed(0)
    denoiser = Denoiser(CONFIG).double()
    torch.nn.init.normal_(denoiser.net.final_linear.weight)
    clean, noise = draw()
    sigma = torch.linspace(0.5, 20, 6, dtype=torch.float64)
    calls = []

    def counted(x, t, visible=None, labels=None):
        calls.append(torch.is_grad_enabled())
        return denoiser(x, t, visible, labels)

    loss = loss_of(counted, 300, clean, noise, sigma).mean()
    assert sorted(calls) == [False, True]
    ours = torch.autograd.grad(loss, list(denoiser.parameters()))
    r = sigma * (1 - 2.0**-4 * (1 + 8 * torch.sigmoid(-sigma)))
    with torch.no_grad():
        target = denoiser(clean + r.view(-1, 1, 1) * noise, r)
    distance = (denoiser(clean + sigma.view(-1, 1, 1) * noise, sigma) - target).square().sum(dim=(1, 2)).sqrt()
    theirs = torch.autograd.grad((distance / (sigma - r)).mean(), list(denoiser.parameters()))
    for a, b in zip(ours, theirs):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-12)


MASKED = ["--mask_ratio=0.5", "--mask_type=patch"]


@pytest.mark.parametrize("extra", [
    [], ["--ref_batch=9", "--class_cond", "--hflip"], MASKED, [*MASKED, "--route=0,1"],
    ["--ref_batch=9", "--decoder_depth=1"], [*MASKED, "--preset=ect-imagenet64"]])
def test_tuning_runs_resumes_and_is_sampled_by_the_right_rule(labelled, tmp_path, extra):
    base = [f"--data={labelled}", f"--out_dir={tmp_path}", "--batch_size=12"]
    train.main(base + TINY + ["--steps=4"] + ["--class_cond"] * ("--class_cond" in extra))
    args = base + [*TINY[4:], "--loss=consistency", f"--init_from={tmp_path}/ft.pt", "--steps=6", *extra]
    train.main(args)
    whole = load_checkpoint(str(tmp_path / "cm.pt"))
    train.main(args + ["--keep_every=3", f"--out_dir={tmp_path}/b"])
    (tmp_path / "b/cm-0000003.pt").replace(tmp_path / "b/cm.pt")
    train.main(["--loss=consistency", f"--out_dir={tmp_path}/b", "--resume"])
    again = load_checkpoint(str(tmp_path / "b/cm.pt"))
    assert all(torch.equal(whole[k][n], again[k][n]) for k in ("model", "ema") for n in whole[k])
    for flags in [], ["--steps=2"]:
        sample.main(["--ckpt", f"{tmp_path}/cm.pt", "--num=4", f"--out={tmp_path}/x.npz", *flags])
    lines = [json.loads(line) for line in open(tmp_path / "log.jsonl")]
    assert math.isfinite([r["val_loss"] for r in lines if r["run"] == "cm" and "val_loss" in r][-1])


def test_references_are_for_whole_images(dataset, tmp_path):
    args = [f"--data={dataset}", f"--out_dir={tmp_path}", "--batch_size=12", "--loss=consistency", *TINY]
    assert "--mask_ratio" in mistake(train.main, *args, *MASKED, "--ref_batch=9")


def pretend(monkeypatch, device):
    monkeypatch.setattr(sample, "pick_device", lambda name: torch.device(device))


@pytest.mark.parametrize("preset", ["ect-cifar10", "ect-cifar10-1h", "ect-imagenet64"])
def test_pairs_end_as_close_as_in_the_papers_and_are_computed_in_float32(monkeypatch, preset):
    pretend(monkeypatch, "cuda")
    cfg, _, _ = train.parse(["--loss=consistency", f"--preset={preset}"])
    assert cfg.dtype == "float32"
    assert cfg.cm_q**-cfg.cm_stages == 1 / 256


def test_on_a_cpu_the_average_keeps_up_with_a_short_tuning(monkeypatch):
    pretend(monkeypatch, "cpu")
    cfg, _, _ = train.parse(["--loss=consistency"])
    assert cfg.ema ** (cfg.steps / cfg.cm_stages) < 0.3  # of what the average was when the last stage began
    assert train.parse(["--loss=consistency", "--ema=0.9"])[0].ema == 0.9


@pytest.mark.parametrize("preset, official", [
    ("ect-cifar10", dict(
        optimizer="radam", lr=1e-4, beta1=0.9, beta2=0.999, lr_schedule="constant", ema=0.9999, steps=200_000,
        p_mean=-1.1, p_std=2.0, cm_q=2, cm_c=0, cm_weight="gap", dropout=0.2, cm_stages=8)),
    ("ect-cifar10-1h", dict(
        optimizer="radam", lr=1e-4, beta1=0.9, beta2=0.999, lr_schedule="constant", ema=0.9993, steps=8000,
        p_mean=-1.1, p_std=2.0, cm_q=256, cm_c=0, cm_weight="gap", dropout=0.2, cm_stages=1)),
    ("ect-imagenet64", dict(
        optimizer="adamw", lr=1e-3, beta1=0.9, beta2=0.99, lr_schedule="rsqrt", ema=0.9999, steps=100_000,
        p_mean=-0.8, p_std=1.6, cm_q=4, cm_c=0.06, cm_weight="edm", dropout=0.4, cm_stages=4))])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_presets_are_the_settings_of_the_official_code(monkeypatch, preset, official, device):
    usual = dict(batch_size=128, weight_decay=0, grad_clip=0, warmup=0, hflip=False, class_cond=False)
    pretend(monkeypatch, device)
    cfg, _, _ = train.parse(["--loss=consistency", f"--preset={preset}"])
    assert vars(cfg).items() >= (official | usual).items()


def test_a_model_is_sampled_in_one_step_or_two_from_the_level_it_was_tuned_for(dataset, tmp_path, monkeypatch):
    args = [f"--data={dataset}", f"--out_dir={tmp_path}", "--loss=consistency", "--batch_size=12", "--steps=1", *TINY]
    train.main([*args, "--preset=ect-imagenet64"])
    asked = []
    monkeypatch.setitem(sample.SAMPLERS, "consistency",
                        lambda denoise, x, sigmas, draw: (asked.append(sigmas), x)[1])
    for flags in [], ["--steps=2"], ["--steps=2", "--mid_sigma=1.526"]:
        sample.main(["--ckpt", f"{tmp_path}/cm.pt", "--num=1", "--device=cpu", f"--out={tmp_path}/x.png", *flags])
    assert [pytest.approx(sigmas) for sigmas in asked] == [[80, 0], [80, 0.821, 0], [80, 1.526, 0]]


def stream_of(images, *flags, num_new=None, classes=0):
    cfg, _, _ = train.parse(["--loss=consistency", "--device=cpu", *flags])
    config = replace(PICTURES, num_classes=classes)
    return train.Stream(images, num_new or len(images), cfg, config, torch.device("cpu"))


def record_reads(stream, monkeypatch):
    """A list of the image numbers of each call to the stream's `read`."""
    read, numbers = stream.read, []
    monkeypatch.setattr(stream, "read", lambda index, *rest: (numbers.append(index), read(index, *rest))[1])
    return numbers


@pytest.mark.parametrize("batch, references", [(10, 61), (40, 9), (7, 8)])
def test_references_are_of_the_classes_in_the_batch(tmp_path, monkeypatch, batch, references):
    sets = [str(make_dataset(tmp_path / name, n=300, classes=n)) for name, n in (("new", 50), ("old", 3))]
    images = Images(",".join(sets), "train", 4)
    stream = stream_of(images, f"--batch_size={batch}", f"--ref_batch={references}", "--replay_frac=0.3",
                       "--label_dropout=0", "--replay=old", "--hflip", num_new=300, classes=50)
    read = record_reads(stream, monkeypatch)
    for step in range(30):
        read.clear()
        loaded = stream.load(step)
        index, chosen = read
        assert np.array_equal(index, stream.index(step))
        own, of_references = set(images.labels[index]), images.labels[chosen]
        assert len(chosen) == references - 1 and set(of_references) <= own
        if references > batch:  # then every image has some of its own class
            assert set(of_references) == own
        assert np.array_equal(loaded["reference_labels"], of_references)
        assert loaded["references"].shape == (references - 1, 16, 48)


def test_references_of_a_batch_of_one_class_are_of_that_class(tmp_path, monkeypatch):
    images = Images(str(make_dataset(tmp_path / "set", n=60, classes=3)), "train", 4)
    stream = stream_of(images, "--batch_size=8", "--ref_batch=31", classes=3)
    for label in range(3):
        monkeypatch.setattr(stream, "index", lambda step: np.flatnonzero(images.labels == label)[:8])
        assert stream.references(0)["reference_labels"].tolist() == [label] * 30


def test_references_of_a_model_without_classes_are_of_all_images(tmp_path, monkeypatch):
    """The mean is over all images that may lie behind the noise, whatever labels the data set has."""
    images = Images(str(make_dataset(tmp_path / "set", n=300, classes=50)), "train", 4)
    stream = stream_of(images, "--batch_size=4", "--ref_batch=101")
    read = record_reads(stream, monkeypatch)
    stream.references(0)
    assert len(set(images.labels[read[0]])) > 20


def test_references_have_the_batchs_share_of_old_images(tmp_path, monkeypatch):
    """The mean is over what is trained on: a small buffer that is half of each batch is half of it."""
    sets = [str(make_dataset(tmp_path / f"of{n}", n=n)) for n in (300, 20)]
    images = Images(",".join(sets), "train", 4)
    stream = stream_of(images, "--batch_size=8", "--ref_batch=101", "--replay=of20", num_new=300)
    read = record_reads(stream, monkeypatch)
    stream.references(0)
    assert sum(read[0] >= 300) == pytest.approx(50, abs=20)


def test_references_are_drawn_evenly_from_a_class(tmp_path, monkeypatch):
    images = Images(str(make_dataset(tmp_path / "set", n=40, classes=2)), "train", 4)
    stream = stream_of(images, "--batch_size=8", "--ref_batch=401", classes=2)
    monkeypatch.setattr(stream, "read", lambda index, *rest: index)
    counts = np.zeros(40)
    for step in range(100):
        np.add.at(counts, stream.references(step)["references"], 1)
    # 40,000 draws, 1,000 of each image: a deviation of 3 %, and that of the classes' shares.
    assert abs(counts / 1000 - 1).max() < 0.15


@pytest.mark.parametrize("q, stages", [(2, 8), (4, 4), (2, 4), (256, 1)])
def test_the_gap_of_the_last_stage_is_q_to_the_minus_stages(q, stages):
    t = torch.full((6,), 1e4, dtype=torch.float64)  # where the sigmoid is nothing
    network = Exact()
    loss_of(network, 799, *draw(), t, settings(cm_stages=stages, cm_q=float(q)))
    r = network.calls[0][0]
    assert (1 - r / 1e4).tolist() == pytest.approx([q**-stages] * 6, rel=1e-3)


def test_consistency_sampling_of_one_and_two_steps():
    asked = []

    def denoise(x, sigma):
        asked.append((sigma, x))
        return torch.full_like(x, 0.5)

    noise = torch.ones(3)
    for steps, mid, levels in ((None, 0.821, [80.0]), (2, 0.821, [80.0, 0.821]), (2, 3.0, [80.0, 3.0]),
                               (3, 0.8, [80.0, 8.0, 0.8])):
        asked.clear()
        kind, sigmas = sample.noise_levels(ModelConfig(consistency=True), None, steps, mid)
        assert kind == "consistency"
        x = sample.consistency(denoise, 80 * noise, sigmas, lambda: noise)
        assert np.allclose([sigma for sigma, _ in asked], levels)
        # What is denoised after the first step is its answer with fresh noise of that level.
        assert all(torch.allclose(given, 0.5 + sigma * noise) for sigma, given in asked[1:])
        assert torch.equal(x, 0.5 * noise)
    kind, sigmas = sample.noise_levels(ModelConfig())
    assert kind == "heun" and len(sigmas) == 19


def test_mistakes_get_a_sentence(dataset, tmp_path):
    args = [f"--data={dataset}", f"--out_dir={tmp_path}", "--batch_size=12", "--steps=2"]
    train.main(args + TINY)
    tune = [*args, *TINY[4:], "--loss=consistency", f"--init_from={tmp_path}/ft.pt"]
    guided = ["--ckpt", tmp_path / "ft.pt", "--num=2", "--steps=2", "--out", tmp_path / "x.png", "--cfg_scale=2"]
    assert "--class_cond" in mistake(sample.main, *guided)
    train.main(tune)
    tuned = ["--ckpt", tmp_path / "cm.pt", "--num=2", "--out", tmp_path / "y.png"]
    assert "a sampler of its own" in mistake(sample.main, *tuned, "--sampler=heun")


def test_tuning_and_its_samplers_refuse_another_kind_of_noise(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "NOISE", "flow")  # they are derived for EDM's
    assert "flow" in mistake(train.main, f"--data={dataset}", f"--out_dir={tmp_path}", "--loss=consistency", *TINY)
    assert "flow" in mistake(lambda _: sample.noise_levels(replace(CONFIG, consistency=False), "consistency"))
