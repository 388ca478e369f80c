"""Training: the data stream, settings, both stages, interruptions, processes, and users' mistakes."""

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, few_images, make_dataset, mistake, run, run_two
from torch.utils._python_dispatch import TorchDispatchMode

import fid
import model
import prepare_data
import sample
import train
from model import Denoiser, ModelConfig, load_checkpoint, patchify
from prepare_data import STOP_SIGNALS, Images

CPU = torch.device("cpu")
SMALL = ModelConfig(image_size=16, dim=32, depth=2, heads=2)  # TINY's network
TUNE = TINY[4:]  # without the network, which a checkpoint brings with it
MASKED = ["--mask_ratio=0.5", "--mask_type=patch"]
PROC = pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="finds processes through /proc")


@pytest.fixture(autouse=True)
def handlers():
    """No signal is ignored, even if pytest runs under nohup; afterwards its own handlers come back."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def settings(*flags):
    return train.parse(["--device=cpu", "--batch_size=12", "--steps=10", *flags])[0]


def stream_of(folder, *flags, rank=0, world=1, **network):
    config = ModelConfig(**asdict(SMALL) | network)
    images = Images(str(folder), "train", 4)
    return train.Stream(images, len(images), settings("--hflip", *flags), config, CPU, rank, world)


def have_gpus(monkeypatch, number):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: number)


def flags_for(data, out, *flags):
    return [f"--data={data}", f"--out_dir={out}", "--batch_size=12", *flags]


def records(out):
    return [json.loads(line) for line in open(out / "log.jsonl")]


def losses(out, name="ft"):
    return {r["step"]: r["loss"] for r in records(out) if r["run"] == name and "images_per_s" in r}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def load(path):
    return load_checkpoint(str(path))


def same(a, b):
    """Whether two structures hold the same tensors and values."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def same_runs(a, b):
    a, b = load(a), load(b)
    return all(same(a[k], b[k]) for k in ("model", "ema", "optimizer"))


def finite(checkpoint):
    return all(t.isfinite().all() for k in ("model", "ema") for t in checkpoint[k].values())


def starts_at(capsys):
    """The step at which the last run started, by what it said."""
    return int(re.findall(r"starts at step (\d+)", capsys.readouterr().err)[-1])


# ---- The data stream.


def test_an_epoch_shows_every_image_once_in_an_order_of_its_own(dataset):
    stream = stream_of(dataset)
    first, second = (np.concatenate([stream.index(step) for step in steps]).tolist() for steps in ((0, 1), (2, 3)))
    assert sorted(first) == sorted(second) == list(range(24)) and first != second


def test_a_step_of_the_stream_does_not_depend_on_the_steps_before(dataset):
    walked = stream_of(dataset, *MASKED)
    for step in range(6):
        batch = walked.load(step)
    assert same(batch, stream_of(dataset, *MASKED).load(5))


def test_processes_share_one_global_batch(labelled):
    whole = stream_of(labelled, *MASKED, num_classes=3).load(3)
    assert sorted(whole) == ["clean", "labels", "noise", "sigma", "visible", "weight"]
    for rank in range(3):
        part = stream_of(labelled, *MASKED, num_classes=3, rank=rank, world=3).load(3)
        # Every third image: all processes have their part of each kind.
        assert same(part, {name: tensor[rank::3] for name, tensor in whole.items()})


def test_the_stream_gives_the_visible_patches_scaled_to_one(dataset):
    stream = stream_of(dataset, *MASKED, "--no-hflip")
    batch = stream.load(0)
    whole = patchify(torch.from_numpy(np.load(dataset / "train.npy")[stream.index(0)]), 4).float() / 255 * 2 - 1
    expected = torch.stack([image[visible] for image, visible in zip(whole, batch["visible"])])
    assert torch.allclose(batch["clean"], expected, atol=1e-6)


def test_half_of_the_images_are_mirrored(dataset):
    stream = stream_of(dataset, "--batch_size=240")
    whole = torch.from_numpy(np.load(dataset / "train.npy")[stream.index(0)]) / 127.5 - 1
    clean = stream.load(0)["clean"]
    plain, mirrored = (torch.isclose(clean, patchify(x, 4), atol=1e-6).all(dim=(1, 2)) for x in (whole, whole.flip(2)))
    assert torch.equal(plain, ~mirrored) and 90 < mirrored.sum() < 150


def test_stage_1_makes_no_full_size_image(dataset, monkeypatch):
    sizes, read = [], []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.is_floating_point():
                sizes.append(out.numel())
            return out

    original = Images.read
    monkeypatch.setattr(Images, "read", lambda *args: read.append(original(*args)) or read[-1])
    with Watch():
        stream_of(dataset, "--mask_ratio=0.75", "--mask_type=patch").load(0)
    visible_values = 12 * 4 * 48  # images x visible patches x values of a patch, a quarter of all
    assert max(sizes) == read[0].size == visible_values and read[0].dtype == np.uint8


@pytest.mark.parametrize("network", [dict(decoder_depth=1), dict(route=(0, 1))], ids=str)
def test_decoder_and_route_get_all_patches_and_the_visible_ones_marked(dataset, network):
    batch = stream_of(dataset, *MASKED, **network).load(0)
    assert batch["clean"].shape == batch["noise"].shape == (12, 16, 48)
    assert batch["visible"].shape == (12, 8)


def test_noise_levels_are_log_normal_and_labels_are_dropped_at_their_rate(labelled):
    stream = stream_of(labelled, "--batch_size=20000", num_classes=3)
    batch = stream.load(0)
    ln_sigma = batch["sigma"].log()
    assert abs(ln_sigma.mean() + 1.2) < 0.05 and abs(ln_sigma.std() - 1.2) < 0.05
    dropped = batch["labels"] == -1
    assert abs(dropped.float().mean() - 0.1) < 0.01
    labels = torch.from_numpy(np.load(labelled / "train_labels.npy")[stream.index(0)])
    assert torch.equal(batch["labels"][~dropped], labels[~dropped])


def test_latents_are_normalised_in_training_and_come_out_of_sampling_as_they_were(tmp_path):
    data = make_dataset(tmp_path / "latents", channels=4, dtype=np.float32)
    images = np.load(data / "train.npy") * [0.1, 1, 10, 100] + [5, 0, -3, 1000]
    np.save(data / "train.npy", images.astype(np.float32))
    latent = tuple(tuple(f(images, axis=(0, 1, 2)).tolist()) for f in (np.mean, np.std))
    stream = stream_of(data, "--batch_size=24", "--no-hflip", channels=4, latent=latent)
    batch = stream.load(0)  # one epoch
    channels = batch["clean"].reshape(-1, 4)
    assert torch.allclose(channels.mean(dim=0), torch.zeros(4), atol=1e-3)
    assert torch.allclose(channels.std(dim=0), torch.full((4,), 0.5), atol=1e-3)

    class Perfect(Denoiser):  # knows the images: so any sampler ends at them
        def forward(self, x, sigma, visible=None, labels=None):
            return batch["clean"][:2].to(x)

    (drawn,) = sample.generate(Perfect(stream.config), range(2), steps=3)
    expected = images[stream.index(0)[:2]].transpose(0, 3, 1, 2)
    assert np.allclose(drawn, expected, rtol=1e-3, atol=1e-3)


def test_validation_depends_on_the_data_alone_and_has_edms_noise_levels(dataset):
    images = Images(str(dataset), "val", 4)
    a, b = (train.fixed_batch(images, SMALL, CPU) for _ in range(2))
    assert sorted(a) == ["clean", "noise", "sigma"] and same(a, b)
    ln_sigma = a["sigma"].log().sort().values  # the quantiles of N(-1.2, 1.2^2)
    quantiles = torch.distributions.Normal(-1.2, 1.2).icdf((torch.arange(8) + 0.5) / 8)
    assert torch.allclose(ln_sigma, quantiles, atol=1e-4)


def test_processes_share_the_validation_images_out(labelled):
    images = Images(str(labelled), "val", 4)
    config = ModelConfig(**asdict(SMALL) | dict(num_classes=3))
    whole = train.fixed_batch(images, config, CPU)
    for world in (2, 3, 9):  # of 8 images: the last process has none
        shares = [train.fixed_batch(images, config, CPU, slice(rank, None, world)) for rank in range(world)]
        for name, tensor in whole.items():
            joined = torch.zeros_like(tensor)
            for rank, share in enumerate(shares):
                joined[rank::world] = share[name]
            assert torch.equal(joined, tensor) and sum(len(share[name]) for share in shares) == len(tensor)


def test_images_per_second_leave_out_the_first_step(dataset, tmp_path, monkeypatch):
    """It may compile, which takes a minute and more."""
    original, calls = train.accumulate_gradients, []

    def slow_at_first(*args):
        time.sleep(0 if calls else 2)
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(train, "accumulate_gradients", slow_at_first)
    train.main(flags_for(dataset, tmp_path, *TINY, "--steps=6", "--log_every=1"))
    rows = [r for r in records(tmp_path) if "images_per_s" in r]
    assert rows[0]["seconds"] > 2 and rows[-1]["images_per_s"] > 12 * 5 / 1
    assert rows[-1]["images_per_s"] == pytest.approx(12 * 5 / (rows[-1]["seconds"] - rows[0]["seconds"]))


@pytest.mark.parametrize("limit", [0, 1e-3])
def test_gradients_are_multiplied_only_to_be_clipped(dataset, tmp_path, monkeypatch, limit):
    original, clipped = torch.nn.utils.clip_grads_with_norm_, []
    monkeypatch.setattr(torch.nn.utils, "clip_grads_with_norm_", lambda *a: clipped.append(a) or original(*a))
    norms = []
    step = train.ADAMW.func.step

    def watched(optimizer, *args):
        norms.append(sum(p.grad.square().sum() for group in optimizer.param_groups for p in group["params"]).sqrt().item())
        return step(optimizer, *args)

    monkeypatch.setattr(train.ADAMW.func, "step", watched)
    train.main(flags_for(dataset, tmp_path, *TINY, "--steps=2", "--log_every=1", f"--grad_clip={limit}"))
    logged = [r["grad_norm"] for r in records(tmp_path) if "grad_norm" in r]
    assert len(clipped) == (2 if limit else 0)
    assert norms == pytest.approx([limit] * 2 if limit else logged, rel=1e-3)


def test_validation_takes_512_images_evenly_from_a_large_set(dataset):
    class Large(Images):
        def __len__(self):
            return 1300

        def read(self, index, visible, flip):
            self.index = index
            return super().read(index % 8, visible, flip)

    images = Large(str(dataset), "val", 4)
    train.fixed_batch(images, SMALL, CPU)
    assert len(images.index) == 512 and images.index[0] == 0 and images.index[-1] == 1299
    assert set(np.diff(images.index)) == {2, 3}


def test_learning_rate_warms_up_and_follows_its_schedule():
    cfg = settings("--warmup=9", "--steps=109", "--lr_schedule=cosine")
    for step, share in ((0, 0.1), (9, 1.0), (59, 0.01 + 0.99 * 0.5), (109, 0.01)):
        assert train.learning_rate(cfg, step, 3.0) == pytest.approx(3 * share)
    cfg.lr_schedule = "constant"
    assert train.learning_rate(cfg, 80, 1.0) == 1.0
    cfg.lr_schedule = "rsqrt"
    assert train.learning_rate(cfg, 8000, 1.0) == pytest.approx(0.5)


# ---- Settings: typed > (with --resume) the run's > the preset's recipe for the stage > the default.


def place(path, step=1, config=(), **architecture):
    """A checkpoint of no real weights."""
    path.parent.mkdir(exist_ok=True)
    torch.save(dict(model=dict(w=torch.zeros(1)), ema={}, optimizer=[], step=step, config=dict(config),
                    class_names=None, noise=model.NOISE, network=model.NETWORK,
                    architecture=asdict(ModelConfig(**architecture))), path)
    return path


def test_what_is_typed_wins_then_the_resumed_run_the_recipe_and_the_default(tmp_path, monkeypatch):
    monkeypatch.setitem(train.RECIPES, "ft", "--seed=2")
    for name, dim, recipes in ("plain", 24, {}), ("own", 28, dict(ft="--seed=3", cm="--seed=4 --p_mean=-9")):
        network = f"--dim={dim} --depth=1 --heads=1 --patch_size=4"
        monkeypatch.setitem(train.PRESETS, name, dict(network=network, **recipes))
    out = f"--out_dir={tmp_path}/run", "--resume"
    place(tmp_path / "run/ft.pt", config=dict(preset="own", seed=5, dim=36, p_mean=-8.0), dim=36)
    start = f"--init_from={place(tmp_path / 'first.pt', config=dict(preset='own', seed=5, p_mean=-8.0), dim=40)}"

    def chosen(*flags):
        cfg = train.parse(["--device=cpu", *flags])[0]
        return cfg.preset, cfg.dim, cfg.seed, cfg.p_mean

    assert chosen("--preset=plain", "--mask_ratio=0.5") == ("plain", 24, 0, -1.2)  # the default
    assert chosen("--preset=plain") == ("plain", 24, 2, -1.2)  # the recipe of all presets
    assert chosen("--preset=own") == ("own", 28, 3, -1.2)  # the preset's
    assert chosen("--preset=own", "--loss=consistency") == ("own", 28, 4, -9.0)
    # A run that starts from a checkpoint takes its preset and its network, and nothing else.
    assert chosen(start) == ("own", 40, 3, -1.2)
    assert chosen(start, "--loss=consistency") == ("own", 40, 4, -9.0)
    assert chosen(start, "--preset=plain") == ("plain", 40, 2, -1.2)
    assert chosen(start, "--dim=44", "--seed=6") == ("own", 44, 6, -1.2)
    # One that goes on takes all its settings.
    assert chosen(*out) == ("own", 36, 5, -8.0)
    assert chosen(*out, start, "--seed=6", "--p_mean=-7", "--dim=44") == ("own", 44, 6, -7.0)


def test_classes_are_those_of_the_preset_or_the_checkpoint_unless_typed(tmp_path):
    def conditioned(*flags):
        return train.parse(["--device=cpu", *flags])[0].class_cond

    assert not conditioned("--preset=demo") and conditioned("--preset=maskdit-xl")
    assert not conditioned("--preset=maskdit-xl", "--no-class_cond")
    for classes in 0, 3:
        start = f"--init_from={place(tmp_path / f'{classes}.pt', num_classes=classes)}"
        assert conditioned(start) == (classes > 0)
        assert conditioned(start, "--class_cond") and not conditioned(start, "--no-class_cond")


COMMANDS = {
    "plain": [],
    "masked": ["--mask_ratio=0.9"],
    "preset": ["--preset=maskdit-xl", "--mask_ratio=0.5"],
    "second stage": ["--init_from=FIRST"],
    "consistency": ["--loss=consistency", "--init_from=FIRST"],
    "resumed": ["--out_dir=RUN", "--resume", "--route=0,1"],
    "nothing to resume": ["--out_dir=RUN", "--resume", "--mask_ratio=0.75"]}


def fill_in(flags, folder):
    """A command of COMMANDS with checkpoints to start from."""
    first = place(folder / "first.pt", config=dict(preset="dit-s"), dim=36, num_classes=3, route=(1, 2))
    run = place(folder / "run/ft.pt", config=dict(preset="dit-b", ema=0.5, replay="old"), dim=20).parent
    return ["--device=cpu", *[flag.replace("FIRST", str(first)).replace("RUN", str(run)) for flag in flags]]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_prints_the_settings_of_the_very_command(tmp_path, capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "200")
    flags = fill_in(COMMANDS[command], tmp_path)
    cfg, _, _ = train.parse(flags)
    for helped in [*flags, "--help"], ["-h", *flags]:
        with pytest.raises(SystemExit) as e:
            train.parse(helped)
        assert e.value.code == 0
        entries = capsys.readouterr().out.split("\n  --")[1:]
        printed = {re.match(r"\w+", entry)[0]: " ".join(entry.split()) for entry in entries}
        assert printed.keys() == vars(cfg).keys()
        for name, value in vars(cfg).items():
            assert printed[name].endswith(f" ({value})"), name


@pytest.mark.parametrize("command", ["plain", "masked", "second stage", "consistency", "resumed"])
def test_the_preset_of_a_new_run_is_all_that_depends_on_the_machine(tmp_path, monkeypatch, command):
    flags = fill_in(COMMANDS[command], tmp_path)[1:]

    def chosen(gpus, *more):
        have_gpus(monkeypatch, gpus)
        return train.parse([*flags, *more])[0]

    assert chosen(0, "--preset=demo") == chosen(1, "--preset=demo")
    if command in ("plain", "masked"):
        assert chosen(1) == chosen(0, "--preset=maskdm-64")
        assert chosen(0) == chosen(1, "--device=cpu", "--device=auto", "--preset=demo")
    else:
        assert chosen(0) == chosen(1)


def test_a_default_batch_is_divisible_by_the_processes(monkeypatch):
    for world, expected in ((1, 4), (3, 6), (8, 8)):
        monkeypatch.setattr(train, "WORLD_SIZE", world)
        assert train.parse(["--preset=demo"])[0].batch_size == expected  # that of stage 2 is 4
        assert train.parse(["--preset=demo", "--batch_size=5"])[0].batch_size == 5  # what is typed stays


def test_resume_continues_the_run_of_the_stage_that_is_described(tmp_path, capsys):
    for step, name in enumerate(("pt.prev", "pt", "cm", "ft.prev", "ft", "ft-0000900"), 1):
        place(tmp_path / f"{name}.pt", step)

    def found(*flags, folder=tmp_path):
        _, checkpoint, resumed = train.parse(["--device=cpu", f"--out_dir={folder}", "--resume", *flags])
        return checkpoint["step"] if resumed else None

    start = f"--init_from={tmp_path}/pt.pt"
    assert found() == found(start) == 5
    assert found("--mask_ratio=0.5") == 2
    assert found("--loss=consistency") == found(start, "--loss=consistency") == 3
    (tmp_path / "ft.pt").write_bytes((tmp_path / "ft.pt").read_bytes()[:-100])
    assert found() == found(start) == 4
    # A run whose checkpoints are all damaged does not begin anew by itself; one that has none does.
    (tmp_path / "ft.prev.pt").write_bytes(b"")
    assert "ft.prev.pt" in mistake(train.main, f"--out_dir={tmp_path}", "--resume", start)
    assert found(folder=tmp_path / "empty") is None


# ---- Runs.


def test_both_stages_and_samples(dataset, tmp_path):
    train.main(flags_for(dataset, tmp_path, *TINY, "--mask_ratio=0.75", "--mask_type=patch", "--steps=6"))
    train.main(flags_for(dataset, tmp_path, *TUNE, f"--init_from={tmp_path}/pt.pt", "--steps=6", "--eval_every=3",
                         "--sample_every=6"))
    pt, ft = load(tmp_path / "pt.pt"), load(tmp_path / "ft.pt")
    assert pt["architecture"] == ft["architecture"] and pt["step"] == ft["step"] == 6
    assert not any("module." in k or "_orig_mod" in k for k in ft["model"])
    assert (tmp_path / "ft_0000006.png").stat().st_size > 0
    validation = {r["step"]: r["val_loss"] for r in records(tmp_path) if r["run"] == "ft" and "val_loss" in r}
    assert list(validation) == [3, 6]
    # It is the mean of EDM's loss of the averaged weights on whole images.
    denoiser, _ = sample.load_denoiser(str(tmp_path / "ft.pt"))
    v = train.fixed_batch(Images(str(dataset), "val", 4), denoiser.config, CPU)
    clean, sigma = v["clean"], v["sigma"].view(-1, 1, 1)
    error = (denoiser(clean + sigma * v["noise"], v["sigma"]) - clean) ** 2
    loss = ((sigma**2 + 0.25) / (0.5 * sigma) ** 2 * error).mean().item()
    assert validation[6] == pytest.approx(loss, rel=1e-5)


def test_stage_2_starts_from_the_raw_weights_of_stage_1_or_their_average(dataset, tmp_path):
    train.main(flags_for(dataset, tmp_path, *TINY, *MASKED, "--steps=4"))
    pt = load(tmp_path / "pt.pt")
    assert not same(pt["ema"], pt["model"])
    still = ["--steps=1", "--lr=0", "--force", f"--init_from={tmp_path}/pt.pt"]
    for flags, key in (["--init_weights=ema"], "ema"), (["--init_weights=raw"], "model"), ([], "model"):
        train.main(flags_for(dataset, tmp_path, *TUNE, *still, *flags))
        ft = load(tmp_path / "ft.pt")
        assert same(ft["model"], pt[key]) and same(ft["ema"], pt[key])


def test_training_learns(dataset, tmp_path):
    train.main(flags_for(dataset, tmp_path, "--steps=250", "--log_every=1", *TINY, "--lr=1e-2"))
    curve = list(losses(tmp_path).values())
    assert len(curve) == 250 and np.mean(curve[-10:]) < 0.55 * np.mean(curve[:10])


@pytest.mark.parametrize("first, second, constant", [
    ([], ["--loss=consistency"], True),  # ECT, SCT
    (["--decoder_depth=1"], [], True),  # MaskDiT
    ([], [], False)])
def test_the_averaged_weights_of_a_second_stage_have_one_decay_or_warm_up(dataset, tmp_path, first, second, constant):
    train.main(flags_for(dataset, tmp_path, "--steps=2", *TINY, *MASKED, *first))
    start = load(tmp_path / "pt.pt")["ema"]
    train.main(flags_for(dataset, tmp_path, "--steps=40", *TUNE, f"--init_from={tmp_path}/pt.pt", "--ema=0.9999",
                         *second))
    end = load(tmp_path / ("cm.pt" if second else "ft.pt"))
    way, moved = (math.sqrt(sum((end[k][n] - w).square().sum() for n, w in start.items())) for k in ("model", "ema"))
    assert 0 < moved < 0.01 * way if constant else moved > 0.5 * way


def test_the_averaged_weights_start_fast_and_reach_their_decay(dataset, tmp_path):
    train.main(flags_for(dataset, tmp_path, "--steps=6", "--ema=0.3", "--keep_every=1", *TINY))
    for step in range(1, 6):  # the decay warms up: 1/10, 2/11, ..., until it reaches 0.3
        a, b = (load(tmp_path / f"ft-{n:07d}.pt") for n in (step, step + 1))
        d = min(0.3, (1 + step) / (10 + step))
        for n, ema in b["ema"].items():
            assert torch.allclose(ema, d * a["ema"][n] + (1 - d) * b["model"][n], atol=1e-6), n


def test_a_gradient_is_clipped_to_its_largest_norm(dataset, tmp_path, monkeypatch):
    train.main(flags_for(dataset, tmp_path, "--steps=1", *TINY))
    before = load(tmp_path / "ft.pt")["model"]
    monkeypatch.setattr(train, "configure_optimizers", lambda denoiser, cfg: [
        torch.optim.SGD(denoiser.named_parameters(), lr=1.0)])  # a step moves the weights by the gradient
    moved = []
    for clip in 0, 1e-3, 1e9:
        out = tmp_path / f"{clip}"
        train.main(flags_for(dataset, out, "--steps=1", "--log_every=1", *TUNE, "--warmup=0", f"--grad_clip={clip}",
                             f"--init_from={tmp_path}/ft.pt"))
        after = load(out / "ft.pt")["model"]
        moved.append(math.sqrt(sum((after[name] - weight).square().sum() for name, weight in before.items())))
        (norm,) = [r["grad_norm"] for r in records(out) if "grad_norm" in r]  # before it is clipped
    assert moved == pytest.approx([norm, 1e-3, norm], rel=1e-2) and norm > 2e-3


@pytest.mark.parametrize("shapes", [[(24, 16)] * 3, [(16, 24), (40, 16), (16, 16)]])
def test_muon_is_that_of_torch(shapes):
    """torch computes it in bfloat16, hence to three digits of the largest entry."""
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    a = model.Muon(ours, dict(lr=0.1, weight_decay=0.03))
    b = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.03, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for p, q in zip(ours, theirs):
            q.grad = torch.randn(q.shape) * 10.0 ** torch.randint(-6, 3, ())
            p.grad = q.grad.clone()
        a.step(), b.step()
    moved = max((p - q).abs().max() for p, q in zip(ours, theirs))
    assert 0 < moved < 4e-3 and all(p.isfinite().all() for p in ours)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_muon_computes_in_float32_whatever_the_network_does(dataset, tmp_path, monkeypatch, dtype):
    original, seen = model.newton_schulz, []

    def watched(x):
        out = original(x)
        seen.append((x.dtype, out.dtype, torch.is_autocast_enabled("cpu"), torch.get_float32_matmul_precision()))
        return out

    monkeypatch.setattr(model, "newton_schulz", watched)
    train.main(flags_for(dataset, tmp_path, *TINY, "--steps=1", "--optimizer=muon", f"--dtype={dtype}"))
    assert set(seen) == {(torch.float32, torch.float32, False, "highest")} and len(seen) == 8


def test_muon_has_the_matrices_of_all_blocks_and_adamw_the_rest():
    denoiser = Denoiser(ModelConfig(**asdict(SMALL) | dict(decoder_depth=1, decoder_dim=16, num_classes=3)))
    adamw, muon = train.configure_optimizers(denoiser, settings("--optimizer=muon", "--lr=0.5"))
    (matrices,), (others,) = ([group["param_names"] for group in o.param_groups] for o in (muon, adamw))
    assert sorted(matrices) == sorted(
        f"net.{block}.{layer}.weight" for block in ("blocks.0", "blocks.1", "decoder.0")
        for layer in ("qkv", "proj", "fc1", "fc2"))
    assert sorted(matrices + others) == sorted(name for name, _ in denoiser.named_parameters())
    assert adamw.param_groups[0]["lr"] == muon.param_groups[0]["lr"] == 0.5
    assert len(train.configure_optimizers(denoiser, settings("--optimizer=adamw"))) == 1


def test_stage_1_with_everything_visible_is_stage_2(dataset, tmp_path, monkeypatch):
    common = ["--steps=5", "--micro_batch=12", "--lr_schedule=cosine", *TINY]
    train.main(flags_for(dataset, tmp_path / "whole", *common))

    def everything(mask_type, grid, mask_ratio, block_size):
        return grid**2, lambda batch, generator, rows: torch.arange(grid**2).expand(batch, -1)[rows]

    monkeypatch.setattr(train, "make_mask", everything)
    train.main(flags_for(dataset, tmp_path / "shown", *common, "--mask_ratio=0.5"))
    assert same_runs(tmp_path / "whole/ft.pt", tmp_path / "shown/pt.pt")


class InMemory:
    """Stands in for prepare_data.Images: no folder, no arrays on disk, read by patchify."""

    sets = {}

    def __init__(self, folders, split="train", patch_size=1, class_names=()):
        self.pixels, self.labels = self.sets[folders, split]
        self.patch_size = patch_size
        names = [*class_names, "class 0", "class 1", "class 2"]
        self.meta = dict(size=16, channels=3, class_names=[*dict.fromkeys(names)], latent=None)

    def __len__(self):
        return len(self.pixels)

    def read(self, index, visible, flip):
        images = torch.from_numpy(self.pixels[index])
        images[flip] = images[flip].flip(2)
        patches = patchify(images, self.patch_size)
        if visible is not None:
            patches = torch.stack([patches[i][visible[i]] for i in range(len(index))])
        return patches.numpy()


def test_any_class_with_len_labels_meta_and_read_can_be_trained_on(labelled, tmp_path, monkeypatch):
    common = ["--steps=4", "--class_cond", "--hflip", *MASKED, *TINY]
    train.main(flags_for(labelled, tmp_path / "folder", *common))
    for split in ("train", "val"):
        InMemory.sets["memory", split] = [np.load(labelled / f"{split}{end}.npy") for end in ("", "_labels")]
    monkeypatch.setattr(train, "Images", InMemory)
    train.main(flags_for("memory", tmp_path / "memory", *common))
    assert same_runs(tmp_path / "folder/pt.pt", tmp_path / "memory/pt.pt")


def test_the_parts_of_a_loss_are_logged_by_name_and_sum_to_it(dataset, tmp_path):
    common = ["--steps=4", "--log_every=1", *TINY, *MASKED, "--decoder_depth=1"]
    rows = {}
    for weight in 0.1, 0:
        train.main(flags_for(dataset, tmp_path / f"{weight}", *common, f"--mae_weight={weight}"))
        rows[weight] = [r for r in records(tmp_path / f"{weight}") if "loss" in r]
        assert len(rows[weight]) == 4
        for r in rows[weight]:
            assert r["loss"] == pytest.approx(r["denoising"] + r["reconstruction"])
    assert all(r["reconstruction"] > 0 for r in rows[0.1]) and not any(r["reconstruction"] for r in rows[0])
    assert rows[0.1][0]["denoising"] == rows[0][0]["denoising"]  # before any step they are the same
    # With one part, that is the loss.
    train.main(flags_for(dataset, tmp_path / "plain", "--steps=1", "--log_every=1", *TINY))
    (row,) = [r for r in records(tmp_path / "plain") if "loss" in r]
    assert row["loss"] == row["denoising"] and "reconstruction" not in row


def test_the_reconstruction_loss_has_its_weight(dataset):
    stream = stream_of(dataset, *MASKED, "--decoder_depth=1", "--mae_weight=3", decoder_depth=1)
    denoiser = Denoiser(stream.config)
    torch.nn.init.normal_(denoiser.net.final_linear.weight)
    batch = stream.load(0)
    parts = model.objective(denoiser, batch, stream.cfg, 0)
    noisy = batch["clean"] + batch["sigma"].view(-1, 1, 1) * batch["noise"]
    denoised = denoiser(noisy, batch["sigma"], batch["visible"])
    error = model.reconstruction_loss(denoised, noisy, batch["visible"])
    assert torch.allclose(parts["reconstruction"], 3 * error, rtol=1e-4)


def named(folder, names, **how):
    """A prepared set whose classes have these names."""
    make_dataset(folder, classes=len(names), **how)
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | dict(class_names=names)))
    return folder


def tune(capsys, data, first, *flags):
    """Start from a checkpoint with --lr=0 -> the names of what starts afresh, and the new checkpoint."""
    out = first.parent / "out"
    capsys.readouterr()
    train.main(flags_for(data, out, "--steps=1", *TUNE, "--lr=0", "--force", f"--init_from={first}", *flags))
    said = re.findall("start from random weights: (.*)", capsys.readouterr().err)
    (path,) = out.glob("??.pt")
    return re.findall(r"[\w.]+", *said or [""]), load(path)


def test_a_model_keeps_the_classes_it_knows_by_name(dataset, tmp_path, capsys, monkeypatch):
    ab, bc = named(tmp_path / "ab", ["a", "b"]), named(tmp_path / "bc", ["b", "c"], seed=1)
    train.main(flags_for(ab, tmp_path, *TINY, "--steps=1", "--class_cond"))
    first = load(tmp_path / "ft.pt")
    # What the network is told about the images is recorded.
    load_batch, seen = train.Stream.load, []

    def watched(stream, step):
        batch = load_batch(stream, step)
        seen.append((stream.index(step), batch["labels"].numpy()))
        return batch

    with monkeypatch.context() as patch:
        patch.setattr(train.Stream, "load", watched)
        fresh, second = tune(capsys, bc, tmp_path / "ft.pt", "--label_dropout=0")
    assert fresh == ["c"] and second["class_names"] == ["a", "b", "c"] and second["architecture"]["num_classes"] == 3
    old, new = (c["model"]["net.label_embed.weight"] for c in (first, second))
    assert torch.equal(new[[0, 1, 3]], old) and new[2].abs().sum() > 0  # a, b and "no class"
    for index, labels in seen:
        assert np.array_equal(labels, np.load(bc / "train_labels.npy")[index] + 1)
    # Without classes in the data, or without --class_cond, it goes on all the same.
    assert tune(capsys, dataset, tmp_path / "ft.pt")[1]["class_names"] == ["a", "b"]
    assert tune(capsys, dataset, tmp_path / "ft.pt", "--no-class_cond")[1]["architecture"]["num_classes"] == 0


def test_a_model_of_classes_starts_one_of_another_width(labelled, tmp_path, capsys):
    train.main(flags_for(labelled, tmp_path, "--steps=1", *TINY, "--class_cond"))
    assert "label_embed.weight" in tune(capsys, labelled, tmp_path / "ft.pt", "--dim=48")[0]


def test_tuning_at_another_size_and_with_another_network_names_what_starts_afresh(dataset, tmp_path, capsys):
    train.main(flags_for(dataset, tmp_path, "--steps=1", *TINY))
    path = tmp_path / "ft.pt"
    first = load(path)["model"]
    fresh, second = tune(capsys, make_dataset(tmp_path / "big", size=32), path)
    assert not fresh and second["architecture"]["image_size"] == 32 and same(second["model"], first)
    fresh, _ = tune(capsys, make_dataset(tmp_path / "grey", channels=1), path)
    assert fresh == ["final_linear.bias", "final_linear.weight", "patch_embed.weight"]
    fresh, second = tune(capsys, dataset, path, "--depth=3")
    assert {name.split(".")[1] for name in fresh} == {"2"}  # the third block
    assert all(torch.equal(second["model"][n], first[n]) for n in first)


@pytest.mark.parametrize("network", [["--decoder_depth=1", "--decoder_dim=16"], ["--depth=3", "--route=1,2"]])
def test_masked_runs_with_a_decoder_or_a_route_learn_are_tuned_and_sampled(labelled, tmp_path, network):
    train.main(flags_for(labelled, tmp_path, *TINY, "--steps=150", "--lr=4e-3", "--class_cond", *MASKED, *network))
    curve = list(losses(tmp_path, "pt").values())
    assert np.mean(curve[-3:]) < 0.85 * np.mean(curve[:2])
    train.main(flags_for(labelled, tmp_path, *TUNE, "--steps=3", f"--init_from={tmp_path}/pt.pt"))
    before, after = (load(tmp_path / name)["architecture"] for name in ("pt.pt", "ft.pt"))
    assert before == after and after["num_classes"] == 3
    sample.main(["--ckpt", f"{tmp_path}/ft.pt", "--out", f"{tmp_path}/x.npz", "--steps=2", "--num=4", "--cfg_scale=2"])
    assert np.load(tmp_path / "x.npz")["arr_0"].shape == (4, 16, 16, 3)


def test_a_decoder_can_be_dropped_or_added_when_tuning(dataset, tmp_path, capsys):
    train.main(flags_for(dataset, tmp_path, *TINY, "--steps=2", *MASKED, "--decoder_depth=1"))
    wide = load(tmp_path / "pt.pt")["model"]
    fresh, plain = tune(capsys, dataset, tmp_path / "pt.pt", "--decoder_depth=0")
    assert not fresh and "net.mask_token" in wide and "net.mask_token" not in plain["model"]
    assert all(torch.equal(weight, wide[name]) for name, weight in plain["model"].items())
    (tmp_path / "out/ft.pt").rename(tmp_path / "plain.pt")
    fresh, added = tune(capsys, dataset, tmp_path / "plain.pt", "--decoder_depth=2", *MASKED)
    names = {"decoder_adaLN.bias", "decoder_adaLN.weight", "decoder_embed.bias", "decoder_embed.weight", "mask_token"}
    assert {name for name in fresh if not name.startswith("decoder.")} == names
    assert added["architecture"]["decoder_depth"] == 2
    assert all(torch.equal(added["model"][name], weight) for name, weight in plain["model"].items())


@pytest.mark.parametrize("flags, tokens", [([], 16), (MASKED, 8), ([*MASKED, "--decoder_depth=1"], 16),
                                           ([*MASKED, "--route=0,1"], 16)])
def test_the_images_of_a_pass_go_by_the_tokens_that_the_network_takes(dataset, tmp_path, monkeypatch, flags, tokens):
    asked = []

    def four(num_images, num_tokens, config, device):
        asked.append((num_images, num_tokens))
        return 4

    monkeypatch.setattr(sample, "images_per_pass", four)
    train.main(flags_for(dataset, tmp_path, "--steps=1", *TINY, *flags))
    assert asked == [(12, tokens), (64, 16)]  # training, evaluation


def test_a_cpu_takes_half_a_quarter_or_less_at_once_if_caches_have_no_room():
    """2**20 values fit."""
    wide = ModelConfig(image_size=16, dim=1024, heads=1)
    for images, tokens, expected in (96, 4, 96), (96, 16, 48), (64, 16, 64), (96, 40, 24), (97, 16, 97):
        assert sample.images_per_pass(images, tokens, wide, CPU) == expected
    assert sample.images_per_pass(96, 4096, wide, torch.device("cuda")) == 96


# ---- Interruptions.


@pytest.mark.parametrize("extra", [
    [], ["--optimizer=adamw"], [*MASKED, "--class_cond", "--hflip"], [*MASKED, "--route=0,1", "--optimizer=radam"]],
    ids=str)
def test_resuming_is_bit_identical_to_never_stopping(labelled, tmp_path, extra):
    name = "pt.pt" if MASKED[0] in extra else "ft.pt"
    common = ["--batch_size=10", "--lr_schedule=constant", *TINY, *extra]
    train.main(flags_for(labelled, tmp_path / "whole", *common, "--steps=9"))
    train.main(flags_for(labelled, tmp_path / "parts", *common, "--steps=4"))
    stage = MASKED[:1] if name == "pt.pt" else []
    train.main([f"--out_dir={tmp_path}/parts", "--resume", "--steps=9", *stage])
    assert same_runs(tmp_path / "whole" / name, tmp_path / "parts" / name)


def interrupt(monkeypatch, step, number):
    """A signal comes in the middle of a step."""
    original, sent = train.learning_rate, []

    def interrupted(cfg, at, peak):
        if at == step and not sent:
            sent.append(signal.raise_signal(number))
        return original(cfg, at, peak)

    monkeypatch.setattr(train, "learning_rate", interrupted)


@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129), ("SIGUSR1", 138)])
def test_a_signal_saves_and_the_resumed_run_is_the_undisturbed_one(dataset, tmp_path, monkeypatch, name, code):
    if not hasattr(signal, name):
        pytest.skip("not on this system")
    common = ["--steps=7", "--lr_schedule=constant", *TINY]
    train.main(flags_for(dataset, tmp_path / "whole", *common))
    interrupt(monkeypatch, 3, getattr(signal, name))
    with pytest.raises(SystemExit) as e:
        train.main(flags_for(dataset, tmp_path / "parts", *common))
    assert e.value.code == code and load(tmp_path / "parts/ft.pt")["step"] == 4
    train.main([f"--out_dir={tmp_path}/parts", "--resume"])
    assert same_runs(tmp_path / "whole/ft.pt", tmp_path / "parts/ft.pt")


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_under_nohup_a_run_goes_on_when_the_terminal_is_closed(dataset, tmp_path, monkeypatch):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    interrupt(monkeypatch, 1, signal.SIGHUP)
    train.main(flags_for(dataset, tmp_path, "--steps=3", *TINY))
    assert load(tmp_path / "ft.pt")["step"] == 3


def test_a_damaged_checkpoint_is_told_and_the_one_before_goes_on(dataset, tmp_path, capsys):
    common = ["--steps=6", *TINY, "--save_every=2"]
    train.main(flags_for(dataset, tmp_path / "whole", *common))
    train.main(flags_for(dataset, tmp_path / "parts", *common))
    ckpt = tmp_path / "parts/ft.pt"
    damaged = bytearray(ckpt.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    ckpt.write_bytes(damaged)
    capsys.readouterr()
    train.main([f"--out_dir={tmp_path}/parts", "--resume"])
    said = capsys.readouterr().err
    assert str(ckpt) in said and "trying the one before" in said and "starts at step 4" in said
    assert same_runs(tmp_path / "whole/ft.pt", ckpt)


def test_a_scheduler_may_give_the_commands_of_both_stages_again_and_again(dataset, tmp_path, capsys):
    one = flags_for(dataset, tmp_path, "--resume", *TINY, *MASKED, "--steps=3")
    two = flags_for(dataset, tmp_path, "--resume", *TUNE, f"--init_from={tmp_path}/pt.pt", "--steps=4",
                    "--save_every=2")

    def first_step(args):
        capsys.readouterr()
        train.main(args)
        return starts_at(capsys)

    assert first_step(one) == 0 and first_step(one) == 3
    first = (tmp_path / "pt.pt").read_bytes()
    assert first_step(two) == 0  # although there is a checkpoint of the other stage
    whole = load(tmp_path / "ft.pt")
    (tmp_path / "ft.prev.pt").replace(tmp_path / "ft.pt")  # as if it had been killed after step 2
    assert first_step(one) == 3 and first_step(two) == 2
    assert same(whole["model"], load(tmp_path / "ft.pt")["model"])
    assert (tmp_path / "pt.pt").read_bytes() == first


def test_optimizer_settings_changed_at_resume_take_effect(dataset, tmp_path):
    train.main(flags_for(dataset, tmp_path, *TINY, "--steps=1"))
    train.main([f"--out_dir={tmp_path}", "--resume", "--steps=2", "--weight_decay=0.5", "--beta2=0.9", "--lr=0.25",
                "--warmup=0", "--lr_schedule=constant"])
    adamw, muon = (state["param_groups"][0] for state in load(tmp_path / "ft.pt")["optimizer"])
    assert tuple(adamw["betas"]) == (0.9, 0.9)
    assert all(group["weight_decay"] == 0.5 and group["lr"] == 0.25 for group in (muon, adamw))


def test_a_moved_run_goes_on_where_it_is_now(dataset, tmp_path):
    train.main(flags_for(dataset, tmp_path / "here", "--steps=1", *TINY))
    (tmp_path / "here").rename(tmp_path / "there")
    train.main([f"--out_dir={tmp_path}/there", "--resume", "--steps=2"])
    assert not (tmp_path / "here").exists()
    assert load(tmp_path / "there/ft.pt")["step"] == 2


# ---- What a resumed run must not take over.


def groups_of(*kinds):
    """A fork's configure_optimizers: optimizers of these kinds, one for matrices, one for the rest."""

    def configure(denoiser, cfg):
        rates = cfg.lr, 0.1 * cfg.lr
        parts = [[], []]
        for name, p in denoiser.named_parameters():
            parts[p.dim() != 2].append((name, p))
        return [kind(part, lr) for kind, part, lr in zip(kinds, parts, rates)]

    return configure


def momentum(parameters, lr):
    return torch.optim.SGD(parameters, lr, momentum=0.9)


def one_group(denoiser, cfg):
    return [torch.optim.AdamW(denoiser.named_parameters(), cfg.lr)]


def another_kind(denoiser, cfg):
    return [momentum(denoiser.named_parameters(), cfg.lr)]


def two_groups(denoiser, cfg):
    named = list(denoiser.named_parameters())
    return [torch.optim.AdamW([dict(params=named[:3]), dict(params=named[3:])], cfg.lr)]


def reversed_order(denoiser, cfg):
    return [torch.optim.AdamW(reversed(list(denoiser.named_parameters())), cfg.lr)]


two_kinds = groups_of(torch.optim.AdamW, momentum)


def swapped(denoiser, cfg):
    return two_kinds(denoiser, cfg)[::-1]


def test_two_optimizers_of_different_kinds_resume_exactly(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "configure_optimizers", two_kinds)
    common = ["--steps=6", "--lr_schedule=cosine", *TINY]
    train.main(flags_for(dataset, tmp_path / "whole", *common))
    train.main(flags_for(dataset, tmp_path / "parts", *common, "--keep_every=3"))
    (tmp_path / "parts/ft-0000003.pt").replace(tmp_path / "parts/ft.pt")
    train.main([f"--out_dir={tmp_path}/parts", "--resume"])
    assert same_runs(tmp_path / "whole/ft.pt", tmp_path / "parts/ft.pt")
    states = load(tmp_path / "whole/ft.pt")["optimizer"]
    assert ["exp_avg" in s["state"][0] for s in states] == [True, False]
    rates = [s["param_groups"][0]["lr"] for s in states]  # both follow the schedule of --lr
    assert rates[1] == pytest.approx(0.1 * rates[0])


@pytest.mark.parametrize("first, then", [
    (one_group, two_groups), (two_groups, one_group), (one_group, reversed_order), (two_kinds, swapped),
    (two_kinds, one_group), (one_group, another_kind), ("muon", "adamw"), ("adamw", "muon"), ("adamw", "radam")],
    ids=lambda f: getattr(f, "__name__", f))
def test_the_state_of_other_optimizers_groups_or_orders_is_refused(dataset, tmp_path, monkeypatch, first, then):
    def begin(how, *flags):
        if callable(how):
            monkeypatch.setattr(train, "configure_optimizers", how)
        else:
            flags = *flags, f"--optimizer={how}"
        return flags_for(dataset, tmp_path, *TINY, *flags)

    train.main(begin(first, "--steps=2"))
    before = contents(tmp_path)
    assert "another optimizer" in mistake(train.main, *begin(then, "--steps=4", "--resume"))
    assert (tmp_path / "ft.pt").read_bytes() == before["ft.pt"]


def test_a_run_is_not_resumed_with_another_network_or_other_data(labelled, tmp_path):
    train.main(flags_for(labelled, tmp_path, *TINY, "--steps=1", "--class_cond"))
    before = contents(tmp_path)
    sets = dict(image_size=make_dataset(tmp_path / "big", size=32, classes=3),
                channels=make_dataset(tmp_path / "grey", channels=1, classes=3),
                num_classes=named(tmp_path / "more", ["class 0", "ant"]))
    wrong = {"dim": "--dim=48", "depth": "--depth=3", "num_classes": "--no-class_cond"}
    for field, flag in [*wrong.items(), *[(field, f"--data={folder}") for field, folder in sets.items()]]:
        said = mistake(train.main, f"--out_dir={tmp_path}", "--resume", "--steps=2", flag)
        assert f"'{field}'" in said and "--init_from" in said
    assert (tmp_path / "ft.pt").read_bytes() == before["ft.pt"]


@pytest.mark.parametrize("missing", ["optimizer", "ema", "config", "step"])
def test_a_stripped_checkpoint_is_not_resumed_but_can_be_started_from(dataset, tmp_path, missing):
    train.main(flags_for(dataset, tmp_path, *TINY, "--steps=1"))
    whole = torch.load(tmp_path / "ft.pt", weights_only=True)
    torch.save({name: value for name, value in whole.items() if name != missing}, tmp_path / "ft.pt")
    again = flags_for(dataset, tmp_path, *TUNE, "--steps=2")
    said = mistake(train.main, *again, "--resume")
    assert f"'{missing}'" in said and "--init_from" in said
    train.main(flags_for(dataset, tmp_path / "new", *TUNE, "--steps=2", "--lr=0", f"--init_from={tmp_path}/ft.pt"))
    assert same(load(tmp_path / "new/ft.pt")["model"], whole["model"])


# ---- What is in out_dir already.


def test_without_force_nothing_of_an_earlier_run_is_touched(dataset, tmp_path):
    out = tmp_path / "out"
    again = flags_for(dataset, out, *TINY, "--steps=3")
    train.main([*again, "--save_every=1"])
    before = contents(out)
    assert before.keys() == {"ft.pt", "ft.prev.pt", "log.jsonl"}
    (tmp_path / "cut.pt").write_bytes(before["ft.pt"][:-100])
    (tmp_path / "bad").mkdir()

    def untouched():
        after = contents(out)
        log = after.pop("log.jsonl")
        return log.startswith(before["log.jsonl"]) and after == {k: v for k, v in before.items() if k != "log.jsonl"}

    for flags, said in [
            ([], "--force"),
            ([f"--init_from={tmp_path}/cut.pt"], "cut.pt"),
            (["--force", f"--init_from={tmp_path}/none.pt"], "none.pt"),
            (["--force", f"--init_from={tmp_path}/cut.pt"], "cut.pt"),
            (["--force", f"--data={tmp_path}/nowhere"], "nowhere"),
            (["--force", f"--data={tmp_path}/bad"], "bad"),
            (["--force", "--class_cond"], "no labels"),
            (["--force", "--stepz=3"], "--stepz"),
            (["--force", "--heads=3"], "3 heads"),
            (["--force", "--micro_batch=5"], "micro_batch"),
            (["--force", "--ewc=1"], "--init_from"),
            (["--resume", f"--data={tmp_path}/nowhere"], "nowhere"),
            (["--resume", "--dim=48"], "'dim'")]:
        assert said in mistake(train.main, *again, *flags), flags
        assert untouched(), flags
    # Nor is a run of which only the checkpoint before is left.
    (out / "ft.pt").rename(tmp_path / "ft.pt")
    assert "ft.prev.pt" in mistake(train.main, *again)
    (tmp_path / "ft.pt").rename(out / "ft.pt")
    # A run of another stage is none of these.
    train.main([*again, *MASKED])
    assert untouched() is False and (out / "ft.pt").read_bytes() == before["ft.pt"]


def test_with_force_a_run_is_replaced_and_the_one_before_stays(dataset, tmp_path):
    again = flags_for(dataset, tmp_path, *TINY)
    train.main([*again, "--steps=3", "--save_every=1"])
    before = contents(tmp_path)
    train.main([*again, "--steps=2", "--force"])
    assert load(tmp_path / "ft.pt")["step"] == 2
    after = contents(tmp_path)
    assert after.keys() == before.keys() and after["ft.prev.pt"] == before["ft.pt"]
    assert after["log.jsonl"].startswith(before["log.jsonl"])


@pytest.mark.parametrize("spelling", ["{0}/{1}", "{0}//{1}", "{0}/../{0.name}/{1}", "{0}/link/{1}"])
def test_a_checkpoint_that_the_run_reads_is_not_written_over(dataset, tmp_path, spelling):
    train.main(flags_for(dataset, tmp_path, *TINY, "--steps=2", "--save_every=1", "--keep_every=1"))
    (tmp_path / "link").symlink_to(".")
    before = {name: (tmp_path / name).read_bytes() for name in ("ft.pt", "ft.prev.pt", "ft-0000001.pt")}
    for name in before:
        path = spelling.format(tmp_path, name)
        for reads in [f"--init_from={path}"], [f"--distill_from={path}", f"--replay={dataset}"]:
            for more in [], ["--force"]:
                said = mistake(train.main, *flags_for(dataset, tmp_path, *TUNE, "--steps=1", *reads, *more))
                assert "may be lost: change --out_dir" in said
    assert all((tmp_path / name).read_bytes() == content for name, content in before.items())


def start(*args):
    """A process of train.py; returns it when it is in the middle of training."""
    process = subprocess.Popen([sys.executable, *map(str, args), "--steps=100000", "--log_every=1", *TINY],
                               stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    (out,) = (Path(arg.split("=")[1]) for arg in map(str, args) if arg.startswith("--out_dir="))
    while not (out / "log.jsonl").exists() or not losses(out):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    return process


@pytest.mark.skipif(train.fcntl is None, reason="needs flock")
def test_a_second_run_in_the_same_folder_is_refused_until_the_first_ends(dataset, tmp_path):
    first = start(ROOT / "train.py", *flags_for(dataset, tmp_path))
    before = len(losses(tmp_path))
    for more in [], ["--force"], MASKED, ["--resume"]:
        said = mistake(train.main, *flags_for(dataset, tmp_path, *TINY, "--steps=1", *more))
        assert str(tmp_path) in said and "another" in said
    while len(losses(tmp_path)) < before + 3:  # the first goes on
        assert first.poll() is None
        time.sleep(0.01)
    first.kill()
    first.communicate(timeout=60)
    assert not list(tmp_path.glob("*.pt"))
    train.main(flags_for(dataset, tmp_path, *TINY, "--steps=1"))
    assert load(tmp_path / "ft.pt")["step"] == 1


def test_runs_that_srun_starts_side_by_side_are_refused(dataset, tmp_path, monkeypatch):
    args = flags_for(dataset, tmp_path / "out", *TINY, "--steps=1")
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert "torchrun" in mistake(train.main, *args)
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("RANK", "0")  # torchrun, started by srun
    train.main(args)
    monkeypatch.delenv("RANK")
    monkeypatch.setenv("SLURM_NTASKS", "1")  # a shell inside of a job
    train.main([*args, "--force"])


# ---- Steps, disks and logs that fail.


def spoil(monkeypatch, spoilt):
    """The loss of the calls n = 1, 2, ... with spoilt(n) is NaN."""
    honest, calls = train.objective, []

    def sick(*args):
        calls.append(args)
        return {name: loss * (math.nan if spoilt(len(calls)) else 1) for name, loss in honest(*args).items()}

    monkeypatch.setattr(train, "objective", sick)


def poisoned(folder, number, **how):
    """A set of latents, 8 x 8, of which one image is NaN."""
    data = make_dataset(folder, size=8, channels=4, dtype=np.float32, **how)
    images = np.load(data / "train.npy")
    images[number] = np.nan
    np.save(data / "train.npy", images)
    return data


def order_of(data, step, *flags):
    """The images of a step."""
    latent = json.loads((data / "meta.json").read_text())["latent"]
    images = Images(str(data), "train", 4)
    config = ModelConfig(image_size=8, channels=4, latent=latent)
    return train.Stream(images, len(images), settings(*flags), config, CPU).index(step).tolist()


def test_steps_that_are_not_finite_are_skipped_and_logged_with_their_images(tmp_path):
    data = poisoned(tmp_path / "poison", 0)
    order = [order_of(data, step, "--batch_size=6") for step in range(16)]
    sick = [step for step in range(16) if 0 in order[step]]  # one of four batches holds image 0
    last = next(step for step in range(12, 16) if step not in sick)
    train.main(flags_for(data, tmp_path, "--batch_size=6", f"--steps={last + 1}", *TINY))
    assert finite(load(tmp_path / "ft.pt"))
    skipped = {r["step"]: r["index"] for r in records(tmp_path) if r.get("event") == "skipped"}
    assert skipped == {step: order[step] for step in sick if step <= last}
    for line in open(tmp_path / "log.jsonl"):
        json.loads(line, parse_constant=lambda c: pytest.fail(f"{c} is no JSON"))


def test_a_skipped_step_names_the_images_of_all_processes(tmp_path):
    """The sick image is with the second process, and the first one writes the log."""
    data = make_dataset(tmp_path / "whole", size=8, channels=4, dtype=np.float32, n=40)
    batch = order_of(data, 1, "--batch_size=8")
    data = poisoned(tmp_path / "poison", batch[3], n=40)
    run_two(tmp_path, "train", *flags_for(data, tmp_path / "out", "--batch_size=8", "--steps=3", *TINY))
    (skipped,) = [r for r in records(tmp_path / "out") if r.get("event") == "skipped"]
    assert skipped["step"] == 1 and skipped["index"] == batch


def test_a_run_whose_last_step_is_skipped_is_saved_all_the_same(dataset, tmp_path, monkeypatch):
    spoil(monkeypatch, lambda n: n == 5)
    train.main(flags_for(dataset, tmp_path, "--steps=5", *TINY))
    last = load(tmp_path / "ft.pt")
    assert last["step"] == 5 and finite(last)


@pytest.mark.parametrize("steps", [100, 14])
def test_nothing_is_saved_while_steps_are_skipped_and_ten_end_the_run(dataset, tmp_path, monkeypatch, steps):
    common = ["--lr_schedule=constant", *TINY]
    train.main(flags_for(dataset, tmp_path / "short", *common, "--steps=4"))
    spoil(monkeypatch, lambda n: n > 4)
    with pytest.raises(SystemExit) as e:
        train.main(flags_for(dataset, tmp_path / "long", *common, f"--steps={steps}", "--save_every=1",
                             "--keep_every=1"))
    assert e.value.code == 3
    assert [r["step"] for r in records(tmp_path / "long") if r.get("event") == "skipped"] == list(range(4, 14))
    assert load(tmp_path / "long/ft.pt")["step"] == 4
    assert same_runs(tmp_path / "short/ft.pt", tmp_path / "long/ft.pt")
    assert len(list((tmp_path / "long").glob("ft-*.pt"))) == 4


def test_a_run_that_blows_up_leaves_finite_weights(dataset, tmp_path):
    with pytest.raises(SystemExit) as e:
        train.main(flags_for(dataset, tmp_path, "--steps=100", *MASKED, *TINY, "--lr=1e12", "--warmup=0",
                             "--grad_clip=0", "--save_every=1"))
    assert e.value.code == 3
    last = load(tmp_path / "pt.pt")
    assert last["step"] >= 1 and finite(last)


def test_a_full_disk_ends_the_run_with_a_sentence_and_the_last_checkpoint_whole(dataset, tmp_path, monkeypatch):
    common = ["--steps=6", *TINY, "--save_every=2"]
    train.main(flags_for(dataset, tmp_path / "whole", *common))
    write, written = torch.save, []

    def full(content, file):
        written.append(content["step"])
        if len(written) == 2:
            file.write(b"the beginning")
            raise OSError(28, "No space left on device")
        write(content, file)

    monkeypatch.setattr(torch, "save", full)
    assert "No space left" in mistake(train.main, *flags_for(dataset, tmp_path / "parts", *common))
    assert sorted(f.name for f in (tmp_path / "parts").iterdir()) == ["ft.pt", "log.jsonl"]
    assert load(tmp_path / "parts/ft.pt")["step"] == 2
    train.main([f"--out_dir={tmp_path}/parts", "--resume"])  # there is room again
    assert same_runs(tmp_path / "whole/ft.pt", tmp_path / "parts/ft.pt")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_log_that_cannot_be_written_costs_a_warning_and_not_the_run(dataset, tmp_path):
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")  # as in a script: each text once
        train.main(flags_for(dataset, tmp_path, "--steps=3", "--log_every=1", *TINY))
    (said,) = [str(w.message) for w in caught if "log.jsonl" in str(w.message)]
    assert "No space left" in said
    assert load(tmp_path / "ft.pt")["step"] == 3


def test_too_little_memory_gets_a_sentence_that_names_the_micro_batch(dataset, tmp_path, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    monkeypatch.setattr(train, "objective", full)
    said = mistake(train.main, *flags_for(dataset, tmp_path, "--steps=1", "--micro_batch=6", *TINY))
    assert "--micro_batch" in said and "6" in said and "memory" in said


# ---- Mistakes on the command line.


@pytest.mark.parametrize("flags, words", [
    (["--heads=3"], ["32", "3 heads"]),
    (["--dim=30", "--heads=2"], ["30", "divisible by 4"]),
    (["--decoder_depth=1", "--decoder_dim=18"], ["18"]),
    (["--patch_size=5"], ["patch_size 5"]),
    (["--patch_size=0"], ["--patch_size"]),
    (["--batch_size=-4"], ["--batch_size"]),
    (["--batch_size=12.5"], ["--batch_size"]),
    (["--micro_batch=5"], ["micro_batch 5"]),
    (["--lr=-0.1"], ["--lr"]),
    (["--lr=nan"], ["--lr"]),
    (["--lr=inf"], ["--lr"]),
    (["--cm_stages=0"], ["--cm_stages"]),
    (["--seed=-1"], ["--seed"]),
    (["--steps=0"], ["--steps"]),
    (["--steps=many"], ["--steps"]),
    (["--mask_ratio=1"], ["--mask_ratio"]),
    (["--mask_ratio=-0.5"], ["--mask_ratio"]),
    (["--mask_ratio=0.01"], ["16 of 16 patches"]),
    (["--mask_ratio=0.5", "--mask_type=block", "--block_size=3"], ["block_size"]),
    (["--ema=1"], ["--ema"]),
    (["--route=1"], ["route", "(1,)"]),
    (["--route=3,1"], ["route", "(3, 1)"]),
    (["--route=a,b"], ["--route"]),
    (["--lr_schedule=stairs"], ["--lr_schedule", "cosine"]),
    (["--preset=huge"], ["--preset", "dit-xl"]),
    (["--mask_ration=0.5"], ["--mask_ration"]),
    (["--mask-ratio=0.5"], ["--mask-ratio"]),
    (["--mask=0.5"], ["--mask"]),
    (["--class_cond"], ["no labels", "--no-class_cond"]),
    (["--replay_frac=2", "--replay=SET"], ["--replay", "24"]),
    (["--init_from=none.pt"], ["none.pt"]),
    (["--data=nowhere"], ["nowhere", "prepare_data.py"]),
    (["--out_dir=FILE"], ["FILE"]),
    (["--out_dir=FILE/out"], ["FILE"])], ids=str)
def test_a_mistake_on_the_command_line_of_train_gets_a_sentence(dataset, tmp_path, flags, words):
    (tmp_path / "FILE").write_text("a file")
    places = dict(SET=dataset, FILE=tmp_path / "FILE")
    for name, path in places.items():
        flags = [flag.replace(name, str(path)) for flag in flags]
    said = mistake(train.main, *flags_for(dataset, tmp_path / "out", "--steps=1", *TINY, *flags))
    assert all(word in said for word in words), said
    assert not list(tmp_path.rglob("*.pt"))


OUT_OF_RANGE = {
    sample: "--num=0 --steps=0 --batch_size=-4 --seed=-1 --cfg_scale=nan --mid_sigma=-1",
    fid: "--num=0 --num=1 --steps=0 --batch_size=0 --seed=-1 --kid_size=1",
    prepare_data: "--num=0 --val_frac=2 --val_frac=nan --seed=-1 --size=0 --channels=2"}


@pytest.mark.parametrize("script", OUT_OF_RANGE, ids=lambda script: script.__name__)
def test_numbers_out_of_range_get_a_sentence_from_every_script(tmp_path, monkeypatch, script):
    monkeypatch.chdir(tmp_path)
    sources = ["a", "b"] if script is fid else []
    for flag in OUT_OF_RANGE[script].split():
        assert flag.split("=")[0] in mistake(script.main, *sources, flag)
    assert not list(tmp_path.iterdir())


def test_a_batch_smaller_than_the_number_of_processes_gets_a_sentence(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "WORLD_SIZE", 4)
    monkeypatch.setattr(train, "setup", lambda cfg: (CPU, torch.autocast("cpu", enabled=False)))  # they have met
    monkeypatch.setattr(train, "wrap", lambda cfg, denoiser, ema, device: denoiser)
    said = mistake(train.main, *flags_for(dataset, tmp_path, *TINY, "--steps=1", "--batch_size=2"))
    assert "batch_size 2" in said and "4 processes" in said


def test_a_mistake_is_told_once_on_each_machine(monkeypatch, tmp_path, capsys):
    for local_rank, lines in ("0", 1), ("1", 0):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        for wrong in "--data=nowhere", "--dat=x", "--steps=0", f"--init_from={tmp_path}":
            monkeypatch.setattr(sys, "argv", ["train.py", wrong, "--device=cpu", f"--out_dir={tmp_path}"])
            with pytest.raises(SystemExit) as e:
                prepare_data.run_script(train.main)
            said = capsys.readouterr()
            assert e.value.code == 1 and len(said.err.splitlines()) == lines and not said.out


def test_a_mistake_has_exit_code_1_and_no_traceback_and_a_bug_has_one(tmp_path):
    result = run("train.py", f"--data={tmp_path}/nowhere", f"--out_dir={tmp_path}")
    assert result.returncode == 1 and len(result.stderr.strip().splitlines()) == 1
    with pytest.raises(ValueError, match="math"):
        prepare_data.run_script(lambda argv: math.sqrt(-1))


@pytest.mark.parametrize("flag", ["--tf32", "--no-tf32"])
def test_tf32_is_asked_for_and_cudnns_attention_kept_away(monkeypatch, flag):
    matmul, cudnn_was_on = torch.backends.cuda.matmul, torch.backends.cuda.cudnn_sdp_enabled()
    monkeypatch.setattr(sample, "pick_device", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    try:
        train.setup(settings(flag, "--dtype=float32"))
        assert matmul.allow_tf32 == (flag == "--tf32") and not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        matmul.allow_tf32 = False
        torch.backends.cuda.enable_cudnn_sdp(cudnn_was_on)
    assert not settings().tf32


def test_without_a_compiler_the_way_out_is_told(monkeypatch, tmp_path):
    find_spec = train.importlib.util.find_spec
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: name == "triton" or find_spec(name))
    compiled = []
    monkeypatch.setattr(model.Block, "compile", lambda block, **how: compiled.append(how))
    monkeypatch.setattr(train.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    denoiser, gpu = Denoiser(SMALL), torch.device("cuda", 0)
    wrap = lambda flags: train.wrap(settings(*flags), denoiser, denoiser, gpu)
    for tools in ({}, {"cc": "/usr/bin/cc"}):  # no Python.h either
        monkeypatch.setattr(train.shutil, "which", tools.get)
        assert "--no-compile" in mistake(wrap, "--steps=3")
    assert wrap(["--no-compile"]) is denoiser and not compiled
    (tmp_path / "Python.h").touch()
    assert wrap([]) is denoiser and len(compiled) == SMALL.depth
    monkeypatch.setattr(train.shutil, "which", {}.get)
    assert "--no-compile" in mistake(wrap, "--steps=3")


def test_all_blocks_share_one_compiled_graph():
    from torch._dynamo.utils import counters
    counters.clear()
    denoiser = Denoiser(ModelConfig(**asdict(SMALL) | dict(depth=10, decoder_depth=9, decoder_dim=16)))
    for block in denoiser.modules():
        if isinstance(block, model.Block):
            block.compile(dynamic=False, backend="aot_eager")
    for _ in range(2):
        denoiser(torch.randn(2, 16, 48), torch.ones(2), torch.arange(4).expand(2, 4)).sum().backward()
    torch._dynamo.reset()
    assert counters["stats"]["unique_graphs"] == 2  # one of each width


def test_more_processes_than_gpus_get_a_sentence(monkeypatch):
    have_gpus(monkeypatch, 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for local_rank in 0, 1:
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        assert sample.pick_device("auto") == sample.pick_device("cuda") == torch.device("cuda", local_rank)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")  # told by all of them, of which the first one prints it
    for local_rank in 0, 1, 2:
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        assert "3 processes for the 2 GPUs" in mistake(lambda _: sample.pick_device("auto"))
    assert sample.pick_device("cpu") == CPU
    have_gpus(monkeypatch, 0)
    assert sample.pick_device("auto") == CPU
    assert "0 GPUs" in mistake(lambda _: sample.pick_device("cuda"))


# ---- Two processes and their ends.

PAIRS = {  # name: flags, flags of the run with two processes alone
    "masked": ([*MASKED, "--class_cond"], []),
    "decoder": ([*MASKED, "--class_cond", "--decoder_depth=1"], ["--micro_batch=2"]),
    "route": ([*MASKED, "--route=0,1"], ["--micro_batch=3"]),
    "continual": ([*MASKED, "--replay=OLD", "--replay_frac=0.25", "--replay_coef=0.3", "--distill_from=FIRST",
                   "--init_from=FIRST", "--ewc=10", "--l2=0.1"], ["--micro_batch=2"]),
    "consistency": (["--loss=consistency", "--init_from=FIRST", "--ref_batch=9", "--dropout=0"], ["--micro_batch=3"]),
}


def run_all(commands):
    """Runs one after another in this process, which may be one of two; each pair meets at its port."""
    with few_images():
        for port, command in commands:
            if port:
                os.environ["MASTER_PORT"] = str(port)
            train.main(command)
            assert not torch.distributed.is_initialized()


@pytest.fixture(scope="module")
def pairs(labelled, tmp_path_factory):
    """A folder with the runs of PAIRS, each by one process, NAME-1, and by two, NAME-2."""
    folder = tmp_path_factory.mktemp("pairs")
    old = make_dataset(folder / "old", seed=7, classes=3)
    train.main(flags_for(labelled, folder, "--steps=4", "--class_cond", *TINY))
    sockets = [socket.create_server(("localhost", 0)) for _ in PAIRS]
    alone, together = [], []
    for (name, (flags, more)), free in zip(PAIRS.items(), sockets):
        flags = [f.replace("OLD", str(old)).replace("FIRST", f"{folder}/ft.pt") for f in flags]
        command = [*(TUNE if f"--init_from={folder}/ft.pt" in flags else TINY), "--steps=8", "--log_every=1",
                   "--lr_schedule=constant", "--grad_clip=0", "--keep_every=1", *flags]
        alone.append((None, flags_for(labelled, folder / f"{name}-1", *command)))
        together.append((free.getsockname()[1], flags_for(labelled, folder / f"{name}-2", *command, *more)))
        free.close()
    script = f"import test_train; test_train.run_all({together!r})"
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    both = [subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True, env=os.environ | dict(
        RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", OMP_NUM_THREADS="1", PYTHONPATH=path))
        for rank in range(2)]
    run_all(alone)
    errors = [process.communicate(timeout=240)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    return folder


@pytest.mark.parametrize("name", PAIRS)
def test_two_processes_give_the_loss_curve_and_gradients_of_one(pairs, name):
    stage = next((pairs / f"{name}-1").glob("??.pt")).stem
    one, two = (losses(pairs / f"{name}-{n}", stage) for n in (1, 2))
    assert list(one) == list(two) == list(range(1, 9))
    assert np.allclose(list(one.values()), list(two.values()), rtol=1e-4)
    # The optimizers hide errors of scale; their first moment after one step is a share of the gradient.
    moments = []
    for n in 1, 2:
        states = [s["state"].values() for s in load(pairs / f"{name}-{n}/{stage}-0000001.pt")["optimizer"]]
        moments.append([state.get("momentum", state.get("exp_avg")) for values in states for state in values])
    assert len(moments[0]) == len(moments[1]) > 20
    for one, two in zip(*moments):
        assert (one - two).abs().max() <= 1e-4 * one.abs().max()
    norms = [[r["grad_norm"] for r in records(pairs / f"{name}-{n}") if "grad_norm" in r] for n in (1, 2)]
    assert np.allclose(*norms, rtol=1e-3)


def start_two(dataset, out):
    """torchrun with two processes in the middle of training; returns it and the processes' ids."""
    launcher = start("-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d",
                     "--rdzv_endpoint=localhost:0", ROOT / "train.py", *flags_for(dataset, out))
    children = open(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read().split()
    return launcher, [int(c) for c in children if b"train.py" in open(f"/proc/{c}/cmdline", "rb").read()]


@PROC
def test_a_killed_process_ends_the_others(dataset, tmp_path):
    launcher, children = start_two(dataset, tmp_path)
    assert len(children) == 2
    os.kill(children[1], signal.SIGKILL)
    _, errors = launcher.communicate(timeout=60)
    assert launcher.returncode != 0
    assert str(children[1]) in errors and "SIGKILL" in errors  # torchrun names the one that failed
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)


@PROC
def test_sigterm_to_torchrun_saves_once_on_all_processes(dataset, tmp_path, capsys):
    launcher, _ = start_two(dataset, tmp_path)
    launcher.send_signal(signal.SIGTERM)
    _, errors = launcher.communicate(timeout=60)
    assert launcher.returncode != 0 and errors.count("continue with --resume") == 1
    step = load(tmp_path / "ft.pt")["step"]
    assert step > 0 and not (tmp_path / "ft.prev.pt").exists()
    train.main([f"--out_dir={tmp_path}", "--resume", f"--steps={step + 1}"])
    assert starts_at(capsys) == step


# ---- Dropout: by (seed, step, part, process).
def dropped(monkeypatch):
    """Records which values every dropout leaves out."""
    seen = []
    original = torch.nn.functional.dropout

    def watched(h, p, training):
        out = original(h, p, training)
        if training and p:
            seen.append((out == 0) & (h != 0))
        return out

    monkeypatch.setattr(torch.nn.functional, "dropout", watched)
    return seen


def test_dropout_leaves_out_its_share_and_both_evaluations_of_a_pair_the_same(dataset, tmp_path, monkeypatch):
    seen = dropped(monkeypatch)
    train.main(flags_for(dataset, tmp_path, *TINY, "--loss=consistency", "--steps=2", "--dropout=0.3", "--micro_batch=6"))
    assert len(seen) == 2 * 2 * 2 * 2  # steps, parts, evaluations of a pair, blocks; none in validation
    parts = [seen[i : i + 4] for i in range(0, 16, 4)]  # two blocks for f_r, two for f_t
    for first, second, *again in parts:
        assert torch.equal(first, again[0]) and torch.equal(second, again[1]) and not torch.equal(first, second)
    assert not any(torch.equal(a[0], b[0]) for i, a in enumerate(parts) for b in parts[:i])
    share = torch.cat([mask.flatten() for mask in seen]).float().mean().item()
    assert share == pytest.approx(0.3, abs=0.01)


def test_dropout_goes_on_as_if_nothing_had_happened_and_processes_differ(dataset, tmp_path, monkeypatch):
    flags = [*TINY, "--dropout=0.2", "--log_every=1"]
    train.main(flags_for(dataset, tmp_path / "a", *flags, "--steps=6"))
    train.main(flags_for(dataset, tmp_path / "b", *flags, "--steps=3"))
    torch.manual_seed(5)  # whatever else is drawn
    train.main([f"--out_dir={tmp_path}/b", "--resume", "--steps=6"])
    a, b = (load_checkpoint(str(tmp_path / name / "ft.pt"))["model"] for name in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)
    train.main(flags_for(dataset, tmp_path / "none", *TINY, "--steps=6", "--log_every=1"))
    assert losses(tmp_path / "none") != losses(tmp_path / "a")
    seeds = []
    monkeypatch.setattr(train, "objective", lambda model, chunk, cfg, step: (seeds.append(chunk["seed"]), dict(
        x=model(chunk["clean"], chunk["sigma"]).square().mean((1, 2))))[1])
    denoiser = Denoiser(SMALL)
    cfg = settings("--dropout=0.2")
    for rank in 0, 1:
        monkeypatch.setattr(train, "RANK", rank)
        batch = stream_of(dataset, rank=rank, world=2).load(4)
        train.accumulate_gradients(denoiser, None, batch, cfg, 4, 3, 6)
    assert len(set(seeds)) == 4


def test_dropout_is_of_this_run_and_not_of_the_network(dataset, tmp_path):
    train.main(flags_for(dataset, tmp_path, *TINY, "--steps=2", "--dropout=0.9"))
    denoiser, checkpoint = sample.load_denoiser(str(tmp_path / "ft.pt"))
    assert "dropout" not in checkpoint["architecture"] and checkpoint["config"]["dropout"] == 0.9
    x = torch.randn(2, 16, 48)
    assert torch.equal(denoiser(x, torch.ones(2)), denoiser(x, torch.ones(2)))
    cfg, _, _ = train.parse([f"--init_from={tmp_path}/ft.pt", "--device=cpu"])
    assert cfg.dropout == 0


def test_a_set_without_validation_images_trains_without_validation(tmp_path):
    data = make_dataset(tmp_path / "set", n_val=0)
    train.main(flags_for(data, tmp_path / "out", *TINY, "--steps=2", "--eval_every=1", "--log_every=1"))
    assert (tmp_path / "out/ft.pt").exists() and not any("val_loss" in r for r in records(tmp_path / "out"))
    assert "--val_frac" in mistake(fid.main, data, tmp_path / "out/ft.pt", "--metrics=bpd", "--device=cpu")
