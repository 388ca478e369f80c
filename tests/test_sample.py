"""The samplers against exact solutions on Gaussian data; noise, labels and files as promised."""

import json
import math
import zipfile
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import mistake, run
from PIL import Image
from scipy.integrate import solve_ivp

import sample
from model import Denoiser, ModelConfig, save_checkpoint

MEAN, STD = 0.3, 0.7  # Gaussian data N(0.3, 0.7^2), each coordinate alone


def exact_denoiser(x, sigma):
    """E[y | x] for Gaussian data."""
    return (STD**2 * x + sigma**2 * MEAN) / (STD**2 + sigma**2)


def exact_solution(x, sigma):
    """The ODE dx/ds = (x - D)/s from (x, sigma) to 0: (x - mean) shrinks with sqrt(std^2 + s^2)."""
    return MEAN + (x - MEAN) * STD / math.sqrt(STD**2 + sigma**2)


def make_checkpoint(path, classes=0, **changes):
    torch.manual_seed(0)
    config = ModelConfig(**{**dict(image_size=16, dim=32, depth=2, heads=2, num_classes=classes), **changes})
    denoiser = Denoiser(config)
    for p in denoiser.parameters():
        torch.nn.init.normal_(p, std=0.1)
    raw = denoiser.state_dict()
    save_checkpoint(str(path), dict(
        model=raw, ema={k: v * 0.5 for k, v in raw.items()}, architecture=asdict(config),
        config={"class_cond": classes > 0, "label_dropout": 0.1}, step=7, run_id="test", optimizer={}))
    return path


def test_schedule_is_edm_equation_5():
    sigmas = sample.edm_sigmas(18).tolist()
    assert len(sigmas) == 19 and sigmas[18] == 0
    assert math.isclose(sigmas[0], 80) and math.isclose(sigmas[17], 0.002)
    assert math.isclose(sigmas[5], (80 ** (1 / 7) + 5 / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7)
    assert sample.edm_sigmas(1).tolist() == pytest.approx([80, 0])


@pytest.mark.parametrize("sampler,order", [("euler", 1), ("heun", 2)])
def test_samplers_converge_to_the_exact_ode_solution_with_their_order(sampler, order):
    noise = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = exact_solution(noise * 80, 80)
    errors = [(sample.sample_loop(exact_denoiser, noise, sample.edm_sigmas(n), sampler) - expected)
              .abs().max().item() for n in (64, 128, 256)]
    slopes = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert all(abs(slope - order) < 0.15 for slope in slopes), (errors, slopes)


def test_evaluations_are_n_for_euler_and_2n_minus_1_for_heun():
    for sampler, expected in (("euler", 18), ("heun", 35), ("churn", 35), ("consistency", 18)):
        calls = []

        def counted(x, sigma):
            calls.append(sigma)
            return exact_denoiser(x, sigma)

        x = torch.randn(4, dtype=torch.float64)
        sample.sample_loop(counted, x, sample.edm_sigmas(18), sampler, lambda: torch.randn_like(x))
        assert len(calls) == expected, sampler


def test_the_stochastic_sampler_draws_the_data_distribution():
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(100_000, generator=g, dtype=torch.float64)
    x = sample.sample_loop(exact_denoiser, noise, sample.edm_sigmas(128), "churn", s_noise=1.0,
                           draw=lambda: torch.randn(100_000, generator=g, dtype=torch.float64))
    assert abs(x.mean() - MEAN) < 0.01 and abs(x.std() - STD) < 0.01
    correlation = torch.corrcoef(torch.stack([x, noise]))[0, 1]
    assert abs(correlation) < 0.5  # it forgets its start, unlike the ODE, whose correlation is 1


def test_one_consistency_step_is_one_evaluation_at_sigma_max():
    x = torch.randn(8, dtype=torch.float64)
    out = sample.sample_loop(exact_denoiser, x, sample.edm_sigmas(1), "consistency")
    assert torch.equal(out, exact_denoiser(80 * x, 80.0)) or torch.allclose(out, exact_denoiser(80 * x, 80.0))


class TwoGaussians(torch.nn.Module):
    """Exact denoiser of class 0 ~ N(-1, 1/4), class 1 ~ N(1, 1/4); null (2): their even mixture."""

    config = ModelConfig(num_classes=2)

    def __init__(self):
        super().__init__()
        self.evaluated = []

    def forward(self, x, sigma, labels):
        self.evaluated.append(len(x))
        s2 = sigma.view(-1, *[1] * (x.dim() - 1)) ** 2
        means = [(0.25 * x + s2 * m) / (0.25 + s2) for m in (-1.0, 1.0)]
        # posterior of class 1 under the mixture: a logistic in x
        p = torch.sigmoid(2 * x / (0.25 + s2))
        mixed = p * means[1] + (1 - p) * means[0]
        label = labels.view(-1, *[1] * (x.dim() - 1))
        return torch.where(label == 2, mixed, torch.where(label == 1, means[1], means[0]))


def test_guidance_is_the_stated_combination_and_skips_unused_branches():
    net = TwoGaussians()
    x, labels = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 0, 1])
    sigma = torch.full((6,), 0.8, dtype=torch.float64)
    d_label, d_null = net(x, sigma, labels), net(x, sigma, torch.full_like(labels, 2))
    net.evaluated.clear()
    assert torch.equal(sample.guided(net, labels, 1)(x, 0.8), d_label)
    assert torch.equal(sample.guided(net, labels, 0)(x, 0.8), d_null)
    assert net.evaluated == [6, 6]
    assert torch.allclose(sample.guided(net, labels, 3)(x, 0.8), d_null + 3 * (d_label - d_null))
    assert net.evaluated == [6, 6, 12]


def test_guidance_outside_its_interval_is_the_conditional_model():
    net = TwoGaussians()
    x, labels = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 0, 1])
    limited, plain, full = (sample.guided(net, labels, scale, interval)
                            for scale, interval in ((3, (0.5, 2)), (1, (0, math.inf)), (3, (0, math.inf))))
    for sigma, same in ((0.5, plain), (0.51, full), (2.0, full), (2.01, plain)):
        net.evaluated.clear()
        assert torch.equal(limited(x, sigma), same(x, sigma))
        assert net.evaluated == [6, 6] if same is plain else [12, 12]


@pytest.mark.parametrize("scale", [0, 1, 2, 4])
def test_guidance_moves_samples_of_two_gaussians_as_the_closed_form_says(scale):
    # With D_label = mean of N(m, 1/4) given x, D_null that of the even mixture of m = -1, 1, guidance
    # adds (g - 1) s^2/(s^2 + 1/4) (m - tanh(x/(s^2 + 1/4))) to D_label: scipy integrates that ODE.
    noise = torch.linspace(-2.5, 2.5, 11, dtype=torch.float64)
    labels = torch.ones(11, dtype=torch.long)
    denoise = sample.guided(TwoGaussians(), labels, scale)
    x = sample.sample_loop(denoise, noise, sample.edm_sigmas(400), "heun")

    def slope(s, x):
        shrink = s**2 / (s**2 + 0.25)
        denoised = (0.25 * x + s**2) / (s**2 + 0.25) + (scale - 1) * shrink * (1 - np.tanh(x / (s**2 + 0.25)))
        return (x - denoised) / s

    exact = solve_ivp(slope, (80, 1e-3), 80 * noise.numpy(), rtol=1e-9, atol=1e-9).y[:, -1]
    assert np.abs(x.numpy() - exact).max() < 0.01
    if scale == 1:  # the ODE of one Gaussian: mean 1, deviation 1/2 exactly
        assert np.abs(exact - (1 + (80 * noise.numpy() - 1) * 0.5 / math.sqrt(80**2 + 0.25))).max() < 0.01


def test_noise_of_an_image_is_bit_identical_for_any_batch_size(tmp_path):
    denoiser, _ = sample.load_denoiser(make_checkpoint(tmp_path / "ft.pt"))
    seen = {}
    original = sample.sample_loop
    for size in (1, 7, 64):
        noises = []

        def spy(denoise, x, *rest):
            noises.append(x.clone())
            return original(denoise, x, *rest)

        sample.sample_loop = spy
        try:
            images = [x for _, x in sample.generate(denoiser, range(64), steps=4, batch_size=size)]
        finally:
            sample.sample_loop = original
        seen[size] = torch.cat(noises), np.concatenate(images).astype(int)
    for size in (7, 64):
        assert torch.equal(seen[size][0], seen[1][0])
        assert np.abs(seen[size][1] - seen[1][1]).max() <= 1
    assert seen[1][0].std() == pytest.approx(1, abs=0.01)
    alone = next(sample.generate(denoiser, [40], steps=4))[1][0].astype(int)
    assert np.abs(alone - seen[1][1][40]).max() <= 1
    assert not np.array_equal(seen[1][1][0], seen[1][1][1])


def test_labels_are_cycled_over_the_image_indices(tmp_path):
    denoiser, _ = sample.load_denoiser(make_checkpoint(tmp_path / "ft.pt", classes=3))
    cycled = dict(zip(range(6), np.concatenate(
        [x for _, x in sample.generate(denoiser, range(6), steps=2, labels=[2, 0])])))
    for i in range(6):
        alone = next(sample.generate(denoiser, [i], steps=2, labels=[[2, 0][i % 2]]))[1][0]
        assert np.abs(alone.astype(int) - cycled[i]).max() <= 1


def test_command_line_writes_grid_folder_and_npz(tmp_path):
    ckpt = make_checkpoint(tmp_path / "ft.pt", classes=3)
    base = ["--ckpt", str(ckpt), "--steps", "2", "--num", "10", "--batch_size", "4"]
    sample.main(base + ["--out", str(tmp_path / "grid.png")])
    assert Image.open(tmp_path / "grid.png").size == (1 + 3 * 17, 1 + 4 * 17)  # a column for each class
    sample.main(base + ["--out", str(tmp_path / "pngs")])
    sample.main(base + ["--out", str(tmp_path / "s.npz"), "--labels", "0,2"])
    with np.load(tmp_path / "s.npz", allow_pickle=False) as f:
        assert f["arr_0"].shape == (10, 16, 16, 3) and f["arr_0"].dtype == np.uint8
        assert f["arr_1"].tolist() == [0, 2] * 5
    sample.main(base + ["--out", str(tmp_path / "all.npz")])
    images = np.load(tmp_path / "all.npz")["arr_0"]
    pngs = sorted((tmp_path / "pngs").glob("*.png"))
    assert [p.name for p in pngs] == [f"{i:06d}.png" for i in range(10)]
    assert all(np.array_equal(np.asarray(Image.open(p)), image) for p, image in zip(pngs, images))
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob("*.parts"))


def test_ema_and_raw_weights_differ_and_latents_go_out_as_they_came(tmp_path):
    ckpt = make_checkpoint(tmp_path / "ft.pt", channels=4, sigma_data=1.5)
    for weights in ("ema", "raw"):
        sample.main(["--ckpt", str(ckpt), "--num=3", "--steps=2", "--weights", weights,
                     "--out", str(tmp_path / f"{weights}.npy")])
    ema, raw = (np.load(tmp_path / f"{w}.npy", allow_pickle=False) for w in ("ema", "raw"))
    assert ema.shape == (3, 4, 16, 16) and ema.dtype == np.float32 and not np.allclose(ema, raw)


def test_an_interrupted_run_goes_on_and_makes_the_same_file(tmp_path):
    ckpt = make_checkpoint(tmp_path / "ft.pt")
    args = ["--ckpt", str(ckpt), "--steps=2", "--num=10", "--batch_size=3", "--out"]
    sample.main(args + [str(tmp_path / "whole.npz")])
    denoiser, _ = sample.load_denoiser(ckpt)
    original, made = sample.generate, []

    def interrupted(denoiser, indices, **kwargs):
        made.append(list(indices))
        if len(made) == 3:
            raise KeyboardInterrupt
        return original(denoiser, indices, **kwargs)

    sample.generate = interrupted
    try:
        with pytest.raises(KeyboardInterrupt):
            sample.main(args + [str(tmp_path / "s.npz")])
        assert not (tmp_path / "s.npz").exists()
        sample.main(args + [str(tmp_path / "s.npz")])
    finally:
        sample.generate = original
    assert made == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [6, 7, 8], [9]]  # nothing is drawn twice
    assert np.array_equal(np.load(tmp_path / "s.npz")["arr_0"], np.load(tmp_path / "whole.npz")["arr_0"])


def test_samples_of_another_recipe_are_not_mixed(tmp_path):
    ckpt = make_checkpoint(tmp_path / "ft.pt")
    args = ["--ckpt", ckpt, "--num=4", "--steps=2", "--out", tmp_path / "pngs"]
    sample.main([str(a) for a in args])
    assert "another recipe" in mistake(sample.main, *args, "--seed=1")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "holiday.png").write_bytes(b"precious")
    assert "other files" in mistake(sample.main, *args[:-1], tmp_path / "mine")
    assert (tmp_path / "mine" / "holiday.png").read_bytes() == b"precious"


def test_two_processes_make_the_images_of_one(tmp_path):
    ckpt = make_checkpoint(tmp_path / "ft.pt")
    args = ["--ckpt", ckpt, "--num=11", "--steps=3", "--batch_size=2", "--device=cpu", "--out"]
    result = run("sample.py", *args, tmp_path / "two.npz", processes=2)
    assert result.returncode == 0, result.stderr
    sample.main([str(a) for a in args] + [str(tmp_path / "one.npz")])
    one, two = (np.load(tmp_path / f"{n}.npz")["arr_0"].astype(int) for n in ("one", "two"))
    assert one.shape == two.shape and np.abs(one - two).max() <= 1
    assert zipfile.ZipFile(tmp_path / "two.npz").namelist() == ["arr_0.npy"]


def test_bad_requests_get_a_sentence(tmp_path):
    ckpt, cond = make_checkpoint(tmp_path / "a.pt"), make_checkpoint(tmp_path / "b.pt", classes=3)
    out = ["--out", tmp_path / "x.png"]
    assert "no checkpoint at" in mistake(sample.main, "--ckpt", tmp_path / "none.pt", *out)
    assert "0 to 2" in mistake(sample.main, "--ckpt", cond, "--labels", "0,3", *out)
    assert "without classes" in mistake(sample.main, "--ckpt", ckpt, "--labels", "0", *out)
    assert "expected whole numbers, such as" in mistake(sample.main, "--ckpt", cond, "--labels", "cat", *out)
    assert "needs a model with classes" in mistake(sample.main, "--ckpt", ckpt, "--cfg_scale", "2", *out)
    assert "at least 1" in mistake(sample.main, "--ckpt", ckpt, "--num", "0", *out)
    assert "low then high" in mistake(sample.main, "--ckpt", cond, "--cfg_interval", "5,1", *out)
    state = torch.load(cond, weights_only=True)
    save_checkpoint(str(cond), state | {"config": state["config"] | {"label_dropout": 0.0}})
    assert "label_dropout" in mistake(sample.main, "--ckpt", cond, "--cfg_scale", "2", *out)
    assert json.dumps([p.name for p in tmp_path.iterdir()]).count("x.png") == 0
