"""The samplers against exact solutions on Gaussian data; noise, labels and files as promised."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import TINY, mistake, run
from PIL import Image
from scipy.integrate import solve_ivp

import prepare_data
import sample
import train
from model import NETWORK, NOISE, Denoiser, ModelConfig, sampler_levels, save_checkpoint
from sample import SAMPLERS

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
        model=raw, ema={k: v * 0.5 for k, v in raw.items()}, architecture=asdict(config), step=7,
        config={"class_cond": classes > 0, "label_dropout": 0.1}, class_names=["cat", "dog", "ant"],
        noise=NOISE, network=NETWORK))
    return path


def draw(ckpt, out, *flags):
    """Runs sample.py's main on the CPU -> the arrays of the .npz file that it wrote."""
    sample.main(["--ckpt", str(ckpt), "--out", str(out), "--device=cpu", *flags])
    with np.load(out, allow_pickle=False) as f:
        return dict(f)


def test_schedule_is_edm_equation_5():
    sigmas = sampler_levels(18).tolist()
    assert len(sigmas) == 19 and sigmas[18] == 0
    assert math.isclose(sigmas[0], 80) and math.isclose(sigmas[17], 0.002)
    assert math.isclose(sigmas[5], (80 ** (1 / 7) + 5 / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7)
    assert sampler_levels(1).tolist() == pytest.approx([80, 0])


@pytest.mark.parametrize("sampler,order", [("euler", 1), ("heun", 2)])
def test_samplers_converge_to_the_exact_ode_solution_with_their_order(sampler, order):
    noise = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    errors = []
    for steps in (64, 128, 256):
        x = SAMPLERS[sampler](exact_denoiser, 80 * noise, sampler_levels(steps).tolist(), None)
        errors.append((x - exact_solution(80 * noise, 80)).abs().max().item())
    slopes = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert all(abs(slope - order) < 0.15 for slope in slopes), (errors, slopes)


@pytest.mark.parametrize("sampler, evaluations", [("euler", 18), ("heun", 35), ("consistency", 18)])
def test_evaluations_are_n_for_euler_and_2n_minus_1_for_heun(sampler, evaluations):
    calls = []

    def counted(x, sigma):
        calls.append(sigma)
        return exact_denoiser(x, sigma)

    x = torch.randn(4, dtype=torch.float64)
    SAMPLERS[sampler](counted, 80 * x, sampler_levels(18).tolist(), lambda: torch.randn_like(x))
    assert len(calls) == evaluations
    assert calls[0] == pytest.approx(80) and min(calls) > 0


def test_the_state_of_the_sampler_loses_nothing_between_far_noise_levels():
    class Exact(torch.nn.Module):  # answers in the precision of the state
        config = ModelConfig(image_size=4, channels=3, patch_size=4, latent=((0, 0, 0), (0.5, 0.5, 0.5)))

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x, sigma, labels=None):
            return exact_denoiser(x, sigma.view(-1, 1, 1))

    images, = sample.generate(Exact(), [3], steps=2)
    noise = torch.randn(4, 4, 3, generator=sample.seeded(0, 3)).permute(2, 0, 1).double()
    exact = sample.heun(exact_denoiser, 80 * noise, sampler_levels(2).tolist(), None)
    assert np.abs(images[0] - exact.numpy()).max() < 1e-5  # a state in float32: 2e-3


def test_one_consistency_step_is_one_evaluation_at_sigma_max():
    x = torch.randn(8, dtype=torch.float64)
    _, sigmas = sample.noise_levels(ModelConfig(consistency=True))
    out = sample.consistency(exact_denoiser, 80 * x, sigmas, None)
    assert torch.allclose(out, exact_denoiser(80 * x, 80.0))


class TwoGaussians(torch.nn.Module):
    """Exact denoiser of class 0 ~ N(-1, 1/4), class 1 ~ N(1, 1/4); none (-1): their even mixture."""

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
        return torch.where(label == -1, mixed, torch.where(label == 1, means[1], means[0]))


def test_guidance_is_the_stated_combination_and_skips_unused_branches():
    net = TwoGaussians()
    x, labels = torch.randn(6, 1, 3, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 0, 1])
    sigma = torch.full((6,), 0.8, dtype=torch.float64)
    d_label, d_null = net(x, sigma, labels), net(x, sigma, torch.full_like(labels, -1))
    net.evaluated.clear()
    assert torch.equal(sample.guided(net, labels, 1)(x, 0.8), d_label)
    assert torch.equal(sample.guided(net, labels, 0)(x, 0.8), d_null)
    assert net.evaluated == [6, 6]
    assert torch.allclose(sample.guided(net, labels, 3)(x, 0.8), d_null + 3 * (d_label - d_null))
    assert net.evaluated == [6, 6, 6, 6]


def test_guidance_by_a_worse_model_and_within_an_interval():
    net = TwoGaussians()
    worse = lambda x, sigma, labels: net(x, sigma, labels) * 0.5 + 0.1
    x, labels = torch.randn(6, 1, 3, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 0, 1])
    answer = net(x, torch.full((6,), 0.8, dtype=torch.float64), labels)
    bad = answer * 0.5 + 0.1
    for scale, expected in (1, answer), (0, bad), (2.5, bad + 2.5 * (answer - bad)):
        torch.testing.assert_close(sample.guided(net, labels, scale, guide=worse)(x, 0.8), expected)
    for interval, inside in ((0.8, 9), False), ((0.2, 0.8), True), ((0.79, 0.81), True), ((0.1, 0.7), False):
        for guide in None, worse:
            limited = sample.guided(net, labels, 3, interval, guide)(x, 0.8)
            everywhere = sample.guided(net, labels, 3, guide=guide)(x, 0.8)
            torch.testing.assert_close(limited, everywhere if inside else answer)


def test_a_model_without_classes_can_be_guided_by_an_earlier_version(tmp_path):
    ckpt, other = make_checkpoint(tmp_path / "a.pt"), make_checkpoint(tmp_path / "wide.pt", dim=64)
    half = torch.load(ckpt, weights_only=True)
    for tensor in half["ema"].values():
        tensor.mul_(0.5)
    torch.save(half, tmp_path / "half.pt")
    out = ["--num=2", "--steps=2", "--device=cpu", "--batch_size=2", "--out"]
    drawn = {}
    for name, flags in {
            "plain": [], "guided": ["--cfg_scale=3", "--guide_ckpt", tmp_path / "half.pt"],
            "only the guide": ["--cfg_scale=0", "--guide_ckpt", tmp_path / "half.pt"],
            "by another network": ["--cfg_scale=3", "--guide_ckpt", other],
            "nowhere": ["--cfg_scale=3", "--guide_ckpt", other, "--cfg_interval", "90", "99"]}.items():
        sample.main(["--ckpt", str(ckpt), *out, str(tmp_path / f"{name}.npz"), *map(str, flags)])
        drawn[name] = np.load(tmp_path / f"{name}.npz")["arr_0"].astype(int)
    sample.main(["--ckpt", str(tmp_path / "half.pt"), *out, str(tmp_path / "half.npz")])
    assert np.array_equal(drawn["only the guide"], np.load(tmp_path / "half.npz")["arr_0"])
    assert np.array_equal(drawn["nowhere"], drawn["plain"])
    assert all(np.abs(drawn["plain"] - drawn[name]).max() > 2 for name in ("guided", "by another network"))
    reversed_interval = ["--ckpt", ckpt, *out, tmp_path / "x.npz", "--guide_ckpt", other, "--cfg_scale=2"]
    assert "LOW below HIGH" in mistake(sample.main, *reversed_interval, "--cfg_interval", "3", "1")
    wrong = make_checkpoint(tmp_path / "classes.pt", classes=3)
    request = ["--ckpt", ckpt, *out, tmp_path / "x.npz", "--guide_ckpt"]
    assert "images, classes" in mistake(sample.main, *request, wrong, "--cfg_scale=2")
    assert "--cfg_scale" in mistake(sample.main, *request, other)


@pytest.mark.parametrize("scale", [0, 1, 2, 4])
def test_guidance_moves_samples_of_two_gaussians_as_the_closed_form_says(scale):
    # With D_label = mean of N(m, 1/4) given x, D_null that of the even mixture of m = -1, 1, guidance
    # adds (g - 1) s^2/(s^2 + 1/4) (m - tanh(x/(s^2 + 1/4))) to D_label: scipy integrates that ODE.
    noise = torch.linspace(-2.5, 2.5, 11, dtype=torch.float64)
    labels = torch.ones(11, dtype=torch.long)
    denoise = sample.guided(TwoGaussians(), labels, scale)
    x = sample.heun(denoise, 80 * noise.view(11, 1, 1), sampler_levels(400).tolist(), None).flatten()

    def slope(s, x):
        shrink = s**2 / (s**2 + 0.25)
        denoised = (0.25 * x + s**2) / (s**2 + 0.25) + (scale - 1) * shrink * (1 - np.tanh(x / (s**2 + 0.25)))
        return (x - denoised) / s

    exact = solve_ivp(slope, (80, 1e-3), 80 * noise.numpy(), rtol=1e-9, atol=1e-9).y[:, -1]
    assert np.abs(x.numpy() - exact).max() < 0.01
    if scale == 1:  # the ODE of one Gaussian: mean 1, deviation 1/2 exactly
        assert np.abs(exact - (1 + (80 * noise.numpy() - 1) * 0.5 / math.sqrt(80**2 + 0.25))).max() < 0.01


def test_noise_of_an_image_is_bit_identical_for_any_batch_size(tmp_path, monkeypatch):
    denoiser, _ = sample.load_denoiser(make_checkpoint(tmp_path / "ft.pt"))
    noises = []

    def spy(denoise, x, *rest):
        noises.append(x.clone())
        return sample.heun(denoise, x, *rest)

    monkeypatch.setitem(SAMPLERS, "heun", spy)
    seen = {}
    for size in (1, 7, 32):
        noises.clear()
        images = list(sample.generate(denoiser, range(32), steps=4, batch_size=size))
        seen[size] = torch.cat(noises), np.concatenate(images).astype(int)
    for size in (7, 32):
        assert torch.equal(seen[size][0], seen[1][0])
        assert np.abs(seen[size][1] - seen[1][1]).max() <= 1
    assert seen[1][0].std() == pytest.approx(80, abs=1.6)
    alone = next(sample.generate(denoiser, [20], steps=4))[0].astype(int)
    assert np.abs(alone - seen[1][1][20]).max() <= 1
    assert not np.array_equal(seen[1][1][0], seen[1][1][1])


def test_labels_are_cycled_over_the_image_indices(tmp_path):
    denoiser, _ = sample.load_denoiser(make_checkpoint(tmp_path / "ft.pt", classes=3))
    cycled = dict(zip(range(6), np.concatenate(
        list(sample.generate(denoiser, range(6), steps=2, labels=[2, 0])))))
    for i in range(6):
        alone = next(sample.generate(denoiser, [i], steps=2, labels=[[2, 0][i % 2]]))[0]
        assert np.abs(alone.astype(int) - cycled[i]).max() <= 1


def test_command_line_writes_grid_folder_and_npz(tmp_path):
    ckpt = make_checkpoint(tmp_path / "ft.pt", classes=3)
    base = ["--ckpt", str(ckpt), "--steps", "2", "--num", "10", "--batch_size", "4"]
    sample.main(base + ["--out", str(tmp_path / "grid.png")])
    assert Image.open(tmp_path / "grid.png").size == (1 + 4 * 17, 1 + 3 * 17)
    sample.main(base + ["--out", str(tmp_path / "pngs")])
    drawn = draw(ckpt, tmp_path / "all.npz", *base[2:])
    assert drawn["arr_0"].shape == (10, 16, 16, 3) and drawn["arr_0"].dtype == np.uint8
    assert drawn["arr_1"].tolist() == [0, 1, 2] * 3 + [0]
    assert drawn["class_names"].tolist() == ["cat", "dog", "ant"]
    pngs = sorted((tmp_path / "pngs").glob("*.png"))
    assert [p.name for p in pngs] == [f"{i:06d}.png" for i in range(10)]
    assert all(np.array_equal(np.asarray(Image.open(p)), x) for p, x in zip(pngs, drawn["arr_0"]))
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob("*.parts"))


def test_a_grid_shows_every_image_with_a_gap(tmp_path):
    images = np.stack([np.full((8, 8, 1), i, np.uint8) for i in range(5)])
    sample.save_grid(str(tmp_path / "grid.png"), images)
    sheet = np.asarray(Image.open(tmp_path / "grid.png"))
    assert sheet.shape == (2 * 9 + 1, 3 * 9 + 1)
    assert [(sheet == i).sum() for i in range(5)] == [64] * 5


def test_files_may_be_named_in_capitals(tmp_path):
    ckpt = make_checkpoint(tmp_path / "ft.pt")
    assert len(draw(ckpt, tmp_path / "X.NPZ", "--num=2", "--steps=1")["arr_0"]) == 2
    sample.main(["--ckpt", str(ckpt), "--num=2", "--steps=1", f"--out={tmp_path}/G.PNG"])
    assert Image.open(tmp_path / "G.PNG").format == "PNG"


def test_labels_are_names_that_are_drawn_in_turn(tmp_path):
    ckpt = make_checkpoint(tmp_path / "ft.pt", classes=3)
    named = draw(ckpt, tmp_path / "named.npz", "--num=4", "--steps=2", "--labels=ant,cat")
    assert named["arr_1"].tolist() == [2, 0, 2, 0]
    every = draw(ckpt, tmp_path / "every.npz", "--num=3", "--steps=2")["arr_0"]
    assert np.abs(named["arr_0"][0].astype(int) - every[0]).max() > 1  # an ant is not the cat of this noise
    assert sample.class_numbers("9,0", ["9", "7", "0"]) == [0, 2]  # names may be numbers


def test_a_class_that_is_named_twice_has_twice_the_share(tmp_path):
    ckpt = make_checkpoint(tmp_path / "ft.pt", classes=3)
    drawn = draw(ckpt, tmp_path / "x.npz", "--num=7", "--steps=1", "--labels=dog,cat,dog")
    assert drawn["arr_1"].tolist() == [1, 0, 1, 1, 0, 1, 1]
    assert draw(ckpt, tmp_path / "y.npz", "--num=5", "--steps=1")["arr_1"].tolist() == [0, 1, 2, 0, 1]


def test_samples_with_classes_become_a_data_set_with_the_same_class_names(tmp_path):
    ckpt = make_checkpoint(tmp_path / "ft.pt", classes=3)
    drawn = draw(ckpt, tmp_path / "s.npz", "--num=10", "--steps=2", "--labels=ant,cat")
    prepare_data.main([str(tmp_path / "s.npz"), f"--out={tmp_path}/set"])
    names = json.loads((tmp_path / "set/meta.json").read_text())["class_names"]
    assert names == ["cat", "ant"]  # in the model's order, and no dog was drawn
    said = {image.tobytes(): ["cat", "dog", "ant"][n] for image, n in zip(drawn["arr_0"], drawn["arr_1"])}
    count = 0
    for split in "train", "val":
        images, labels, _ = prepare_data.open_folder(tmp_path / "set", split)
        assert [said[image.tobytes()] for image in images] == [names[n] for n in labels]
        count += len(images)
    assert len(said) == count == 10


def test_ema_and_raw_weights_differ_and_latents_go_out_on_their_own_scale(tmp_path):
    size, unit = dict(channels=2, image_size=8), ((0.0, 0.0), (0.5, 0.5))  # what is drawn inside
    mean, deviation = (3.0, -40.0), (2.0, 0.1)
    drawn = {}
    for name, latent, weights in [
            ("unit", unit, "ema"), ("own", (mean, deviation), "ema"), ("raw", unit, "raw")]:
        ckpt = make_checkpoint(tmp_path / f"{name}.pt", latent=latent, **size)
        how = "--num=3", "--steps=2", "--weights", weights
        drawn[name] = draw(ckpt, tmp_path / f"{name}.npz", *how)["arr_0"]
    assert drawn["unit"].shape == (3, 2, 8, 8) and drawn["unit"].dtype == np.float32
    assert not np.allclose(drawn["unit"], drawn["raw"])
    moved = [drawn["unit"][:, i] / 0.5 * deviation[i] + mean[i] for i in (0, 1)]
    np.testing.assert_allclose(drawn["own"], np.stack(moved, axis=1), rtol=1e-5, atol=1e-5)


def test_the_scale_of_latents_changes_neither_training_nor_samples(tmp_path):
    z = np.random.default_rng(0).normal(size=(40, 4, 16, 16)).cumsum(axis=3).astype(np.float32)
    z *= np.array([1, 3, 0.2, 1], np.float32)[:, None, None]
    maps = {"z": (1, 0), "eleven": (11, 0), "moved": (0.5, 5)}
    losses, drawn = [], []
    for name, (a, b) in maps.items():
        np.save(tmp_path / f"{name}.npy", a * z + b)
        prepare_data.main([f"{tmp_path}/{name}.npy", f"--out={tmp_path}/{name}"])
        train.main([f"--data={tmp_path}/{name}", f"--out_dir={tmp_path}/{name}/out", "--batch_size=8",
                    "--steps=6", "--log_every=1", *TINY])
        lines = map(json.loads, open(tmp_path / name / "out/log.jsonl"))
        losses.append([r.get("loss", r.get("val_loss")) for r in lines if {"loss", "val_loss"} & {*r}])
        samples = draw(tmp_path / name / "out/ft.pt", tmp_path / f"{name}.npz", "--num=4", "--steps=4")
        drawn.append((samples["arr_0"] - b) / a)
    assert len(losses[0]) == 7 and losses[0][0] != losses[0][5]
    np.testing.assert_allclose(losses[1:], [losses[0]] * 2, rtol=1e-5)
    scale = drawn[0].std()
    np.testing.assert_allclose(drawn[1:], [drawn[0]] * 2, atol=1e-4 * scale, rtol=1e-4)


def images_at(path):
    """The images of an .npz or of a folder of PNGs, (N, H, W, C)."""
    if path.is_dir():
        return np.stack([np.asarray(Image.open(file)) for file in sorted(path.glob("*.png"))])
    with np.load(path) as file:
        return file["arr_0"]


@pytest.mark.parametrize("name", ["s.npz", "pngs"])
def test_an_interrupted_run_goes_on_and_other_samples_are_not_mixed_into_it(tmp_path, monkeypatch, name):
    ckpt = make_checkpoint(tmp_path / "ft.pt")
    out = tmp_path / name
    args = ["--ckpt", str(ckpt), "--steps=2", "--num=10", "--batch_size=3", "--out"]
    uninterrupted = []
    for flags in [], ["--seed=1"]:
        sample.main([*args, f"{tmp_path}/whole{len(flags)}.npz", *flags])
        uninterrupted.append(images_at(tmp_path / f"whole{len(flags)}.npz"))
    original, made = sample.generate, []

    def interrupted(denoiser, indices, **how):
        made.append(list(indices))
        if len(made) == 3:
            raise KeyboardInterrupt
        return original(denoiser, indices, **how)

    monkeypatch.setattr(sample, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sample.main([*args, str(out)])
    assert not out.exists()
    sample.main([*args, str(out), "--seed=1"])  # another recipe, in between
    assert np.array_equal(images_at(out), uninterrupted[1])
    out.rename(tmp_path / f"of_seed_1_{name}")
    made[3:] = []
    sample.main([*args, str(out)])
    assert made == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [6, 7, 8], [9]]  # nothing is drawn twice
    assert np.array_equal(images_at(out), uninterrupted[0])
    assert not list(tmp_path.glob("*.parts"))


@pytest.mark.parametrize("changed", ["ft.pt", "guide.pt"])
def test_what_another_model_in_the_same_place_drew_is_not_taken_over(tmp_path, monkeypatch, changed):
    ckpt, guide = make_checkpoint(tmp_path / "ft.pt"), make_checkpoint(tmp_path / "guide.pt")
    args = ["--ckpt", str(ckpt), "--guide_ckpt", str(guide), "--cfg_scale=3", "--steps=2", "--num=4", "--batch_size=2"]
    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", lambda *_, **__: 1 / 0)  # all are drawn, but not yet put together
        with pytest.raises(ZeroDivisionError):
            sample.main([*args, f"--out={tmp_path}/s.npz"])
    make_checkpoint(tmp_path / changed, depth=1)
    sample.main([*args, f"--out={tmp_path}/s.npz"])
    sample.main([*args, f"--out={tmp_path}/fresh.npz"])
    assert np.array_equal(images_at(tmp_path / "s.npz"), images_at(tmp_path / "fresh.npz"))


def test_a_folder_that_is_there_is_left_alone(tmp_path):
    ckpt = make_checkpoint(tmp_path / "ft.pt")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "holiday.png").write_bytes(b"precious")
    assert str(mine) in mistake(sample.main, "--ckpt", ckpt, "--num=4", "--steps=2", "--out", mine)
    assert [file.name for file in mine.iterdir()] == ["holiday.png"]
    assert (mine / "holiday.png").read_bytes() == b"precious"


@pytest.mark.parametrize("name", ["new", "new/", "in/new", "./in/new/"])
def test_a_folder_may_be_named_with_a_slash_at_the_end(tmp_path, name, monkeypatch):
    ckpt = make_checkpoint(tmp_path / "ft.pt")
    monkeypatch.chdir(tmp_path)
    sample.main(["--ckpt", str(ckpt), "--num=2", "--steps=1", f"--out={name}"])
    assert sorted(file.name for file in (tmp_path / name).iterdir()) == ["000000.png", "000001.png"]


def test_two_processes_make_the_images_of_one_and_leave_no_parts(tmp_path):
    ckpt = make_checkpoint(tmp_path / "ft.pt")
    args = ["--ckpt", ckpt, "--num=11", "--steps=3", "--batch_size=2", "--device=cpu", "--out"]
    result = run("sample.py", *args, tmp_path / "two.npz", processes=2)
    assert result.returncode == 0, result.stderr
    one = draw(ckpt, tmp_path / "one.npz", "--num=11", "--steps=3", "--batch_size=2")["arr_0"].astype(int)
    with np.load(tmp_path / "two.npz") as f:
        assert f.files == ["arr_0"]
        assert one.shape == f["arr_0"].shape and np.abs(one - f["arr_0"]).max() <= 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ft.pt", "one.npz", "two.npz"]


def test_bad_requests_get_a_sentence(tmp_path):
    ckpt, cond = make_checkpoint(tmp_path / "a.pt"), make_checkpoint(tmp_path / "b.pt", classes=3)
    out = ["--out", tmp_path / "x.png"]
    assert "none.pt" in mistake(sample.main, "--ckpt", tmp_path / "none.pt", *out)
    for wrong in "3", "owl", "-1", "0;1", "":
        assert f"no class {{'{wrong}'}}" in mistake(sample.main, "--ckpt", cond, f"--labels=cat,{wrong}", *out)
    # The names of the data are no classes of a model without any.
    assert "it has []" in mistake(sample.main, "--ckpt", ckpt, "--labels", "0", *out)
    assert "with --class_cond and --label_dropout" in mistake(sample.main, "--ckpt", ckpt, "--cfg_scale", "2", *out)
    state = torch.load(cond, weights_only=True)
    save_checkpoint(str(cond), state | {"config": state["config"] | {"label_dropout": 0.0}})
    assert "with --class_cond and --label_dropout" in mistake(sample.main, "--ckpt", cond, "--cfg_scale", "2", *out)
    for flag in "--num=0", "--batch_size=0", "--steps=0":
        assert ">= 1" in mistake(sample.main, "--ckpt", ckpt, flag, *out)
    assert not list(tmp_path.glob("x*"))


@pytest.mark.parametrize("name", ["x.npy", "x.pt", "x.tar", "x.0"])
def test_a_name_with_an_unknown_suffix_is_not_made_a_folder(tmp_path, name):
    ckpt = make_checkpoint(tmp_path / "ft.pt")
    assert name in mistake(sample.main, "--ckpt", ckpt, "--num=1", "--steps=1", "--out", tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == ["ft.pt"]


def test_latents_are_written_as_an_array_but_not_as_pictures(tmp_path):
    ckpt = make_checkpoint(tmp_path / "ft.pt", latent=((0.0,) * 3, (1.0,) * 3))
    args = ["--ckpt", ckpt, "--num=2", "--steps=1", "--out"]
    for picture in "pngs", "grid.png":
        assert "makes latents" in mistake(sample.main, *args, tmp_path / picture)
        assert not (tmp_path / picture).exists()
    assert draw(ckpt, tmp_path / "x.npz", "--num=2", "--steps=1")["arr_0"].dtype == np.float32


@pytest.mark.parametrize("processor, dtype", [
    # Measured: half as fast in bfloat16.
    (dict(cpu_name="Intel Xeon", avx512_bf16=True, amx_bf16=False), torch.float32),
    (dict(cpu_name="Intel Xeon", avx512_bf16=True, amx_bf16=True), torch.bfloat16),
    (dict(cpu_name="AMD EPYC", avx512_bf16=True, amx_bf16=False), torch.bfloat16),
    (dict(cpu_name="AMD EPYC", avx512_bf16=False), torch.float32),
    (dict(architecture="arm64"), torch.float32)])
def test_products_are_in_bfloat16_where_the_processor_gains_by_it(monkeypatch, processor, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: processor)
    assert sample.pick_dtype("auto", torch.device("cpu")) == dtype
    assert sample.pick_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16
    for there in (False, True):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: there)
        assert (sample.pick_dtype("auto", torch.device("cuda")) == torch.bfloat16) == there
