"""Training: the data stream, both stages, processes, resuming, and mistakes on the command line."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, make_dataset, mistake, run, run_two
from test_continual import few_images
from torch.utils._python_dispatch import TorchDispatchMode

import model
import sample
import train
from model import Denoiser, ModelConfig, load_checkpoint, patchify, reconstruction_loss
from model import Images

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def handlers():
    """A run leaves its signal handlers behind; pytest's own come back."""
    before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    for number, handler in before:
        signal.signal(number, handler)


def settings(*flags):
    return train.parse(["--device=cpu", "--batch_size=12", "--steps=10", *flags])[0]


def stream_of(folder, *flags, rank=0, world=1, **network):
    config = ModelConfig(**dict(image_size=16, dim=32, depth=2, heads=2) | network)
    images = Images(str(folder), "train", 4)
    return train.Stream(images, len(images), settings("--hflip", *flags), config,
                        CPU, rank, world)


def records(out_dir):
    return [json.loads(line) for line in open(out_dir / "log.jsonl")]


def losses(out_dir, name="ft"):
    return {r["step"]: r["loss"] for r in records(out_dir) if r["run"] == name and "images_per_s" in r}


def same(a, b):
    """Whether two structures hold the same tensors and values."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def same_runs(a, b, keys=("model", "ema", "optimizer")):
    a, b = load_checkpoint(str(a)), load_checkpoint(str(b))
    return all(same(a[k], b[k]) for k in keys)


def finite(checkpoint):
    return all(t.isfinite().all() for k in ("model", "ema") for t in checkpoint[k].values())


# -- the data stream ------------------------------------------------------------------------------


@pytest.mark.parametrize("flipped", [False, True])
def test_patches_that_are_read_are_those_of_the_mirrored_image(dataset, flipped):
    images = np.load(dataset / "train.npy")
    index, visible = np.array([3, 0, 3]), np.array([[0, 5, 15], [1, 2, 3], [4, 8, 12]])
    got = Images(str(dataset), "train", 4).read(index, visible, np.full(3, flipped))
    for b in range(3):
        image = images[index[b]][:, ::-1] if flipped else images[index[b]]
        for k in range(3):
            row, col = divmod(visible[b, k], 4)
            patch = image[row * 4 : row * 4 + 4, col * 4 : col * 4 + 4]
            assert np.array_equal(got[b, k], patch.reshape(-1))


def test_an_epoch_shows_every_image_once_in_an_order_of_its_own(dataset):
    stream = stream_of(dataset)
    first = [i for step in (0, 1) for i in stream.load(step)["index"]]
    second = [i for step in (2, 3) for i in stream.load(step)["index"]]
    assert sorted(first) == sorted(second) == list(range(24)) and first != second


def test_a_step_of_the_stream_does_not_depend_on_the_steps_before(dataset):
    walked = stream_of(dataset, "--mask_ratio=0.5", "--mask_type=patch")
    for step in range(6):
        batch = walked.load(step)
    direct = stream_of(dataset, "--mask_ratio=0.5", "--mask_type=patch").load(5)
    for key in ("clean", "noise", "visible", "sigma"):
        assert torch.equal(batch[key], direct[key])


def test_processes_share_one_global_batch(dataset):
    masked = "--mask_ratio=0.5", "--mask_type=patch"
    whole = stream_of(dataset, *masked).load(3)
    parts = [stream_of(dataset, *masked, rank=rank, world=3).load(3) for rank in range(3)]
    for key in ("clean", "noise", "sigma", "visible"):
        for rank, part in enumerate(parts):  # every third image: all have their part of each kind
            assert torch.equal(part[key], whole[key][rank::3]), key


def test_the_stream_gives_the_visible_patches_scaled_to_one(dataset):
    batch = stream_of(dataset, "--mask_ratio=0.5", "--mask_type=patch", "--no-hflip").load(0)
    images = np.load(dataset / "train.npy")[batch["index"]]
    whole = patchify(torch.from_numpy(images), 4).float() / 255 * 2 - 1
    expected = torch.stack([whole[b][batch["visible"][b]] for b in range(12)])
    assert torch.allclose(batch["clean"], expected, atol=1e-6)


def test_stage_1_makes_no_full_size_image(dataset, monkeypatch):
    sizes, read = [], []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.is_floating_point():
                sizes.append(out.numel())
            return out

    original = Images.read
    monkeypatch.setattr(Images, "read", lambda *a: read.append(original(*a)) or read[-1])
    with Watch():
        stream_of(dataset, "--mask_ratio=0.75", "--mask_type=patch").load(0)
    visible_values = 12 * 4 * 48  # images x visible patches x values of a patch, a quarter of all
    assert max(sizes) == read[0].size == visible_values and read[0].dtype == np.uint8


@pytest.mark.parametrize("network", [dict(decoder_depth=1), dict(route=(0, 1))], ids=str)
def test_decoder_and_route_get_all_patches_and_the_visible_ones_marked(dataset, network):
    batch = stream_of(dataset, "--mask_ratio=0.5", "--mask_type=patch", **network).load(0)
    assert batch["clean"].shape == batch["noise"].shape == (12, 16, 48)
    assert batch["visible"].shape == (12, 8)


def test_noise_levels_are_log_normal_and_labels_are_dropped_at_their_rate(labelled):
    batch = stream_of(labelled, "--batch_size=20000", num_classes=3).load(0)
    ln_sigma = batch["sigma"].log()
    assert abs(ln_sigma.mean() + 1.2) < 0.05 and abs(ln_sigma.std() - 1.2) < 0.05
    dropped = batch["labels"] == -1
    assert abs(dropped.float().mean() - 0.1) < 0.01
    kept, labels = ~dropped.numpy(), np.load(labelled / "train_labels.npy")
    assert np.array_equal(batch["labels"].numpy()[kept], labels[batch["index"]][kept])


def test_latents_are_normalised_in_training_and_come_out_of_sampling_as_they_were(tmp_path):
    data = make_dataset(tmp_path / "latents", size=16, channels=4, dtype=np.float32)
    images = np.load(data / "train.npy") * [0.1, 1, 10, 100] + [5, 0, -3, 1000]
    np.save(data / "train.npy", images.astype(np.float32))
    latent = tuple(tuple(f(images, axis=(0, 1, 2)).tolist()) for f in (np.mean, np.std))
    meta = json.loads((data / "meta.json").read_text())
    (data / "meta.json").write_text(json.dumps(meta | dict(latent=latent)))

    network = dict(channels=4, latent=latent)
    batch = stream_of(data, "--batch_size=24", "--no-hflip", **network).load(0)  # one epoch
    channels = batch["clean"].reshape(-1, 4)
    assert torch.allclose(channels.mean(dim=0), torch.zeros(4), atol=1e-3)
    assert torch.allclose(channels.std(dim=0), torch.full((4,), 0.5), atol=1e-3)

    class Perfect(Denoiser):  # knows the image: so any sampler ends at it
        def forward(self, x, sigma, visible=None, labels=None):
            return batch["clean"][:2].to(x)

    perfect = Perfect(ModelConfig(image_size=16, dim=32, depth=2, heads=2, **network))
    ((_, drawn),) = sample.generate(perfect, range(2), steps=3)
    assert np.allclose(drawn, images[batch["index"][:2]].transpose(0, 3, 1, 2), rtol=1e-3, atol=1e-3)


def test_validation_depends_on_the_data_alone(dataset):
    config = ModelConfig(image_size=16, dim=32, depth=2, heads=2)
    a, b = (train.validation_set([Images(str(dataset), "val", 4)], config, -1.2, 1.2) for _ in range(2))
    assert all(torch.equal(a[k], b[k]) for k in ("clean", "noise", "sigma"))
    ln_sigma = a["sigma"].log().sort().values  # the quantiles of N(-1.2, 1.2^2)
    quantiles = torch.distributions.Normal(-1.2, 1.2).icdf((torch.arange(8) + 0.5) / 8)
    assert torch.allclose(ln_sigma, quantiles, atol=1e-4)


def test_learning_rate_warms_up_and_follows_its_schedule():
    cfg = settings("--warmup=9", "--steps=109", "--lr_schedule=cosine")
    for step, share in ((0, 0.1), (9, 1.0), (59, 0.01 + 0.99 * 0.5), (109, 0.01)):
        assert train.learning_rate(cfg, step, 3.0) == pytest.approx(3 * share)
    cfg.lr_schedule = "constant"
    assert train.learning_rate(cfg, 80, 1.0) == 1.0
    cfg.lr_schedule = "rsqrt"
    assert train.learning_rate(cfg, 8000, 1.0) == pytest.approx(0.5)


# -- settings -------------------------------------------------------------------------------------


def place(path, when, config=(), **architecture):
    """A checkpoint without weights, last written at `when`."""
    torch.save(dict(model={}, ema={}, optimizer=[], step=1, noise=model.NOISE,
                    config=dict(optimizer="muon") | dict(config), class_names=None,
                    architecture=asdict(ModelConfig(**architecture))), path)
    os.utime(path, (when, when))
    return path


def test_what_is_typed_wins_then_the_checkpoint_the_preset_the_table_and_the_default(tmp_path, monkeypatch):
    monkeypatch.setitem(train.DEFAULTS, ("ft", False), dict(seed=5, dim=20))
    monkeypatch.setitem(train.DEFAULTS, ("cm", False), dict(p_mean=3.0, seed=6))
    monkeypatch.setitem(train.CONSISTENCY, "cifar10", dict(p_mean=4.0))
    (tmp_path / "run").mkdir()
    first = place(tmp_path / "first.pt", 1, config=dict(seed=7, dim=99), dim=48)
    place(tmp_path / "run/ft.pt", 1, config=dict(seed=8, dim=56), dim=56)

    def chosen(*flags):
        cfg = train.parse(["--device=cpu", *flags])[0]
        return cfg.seed, cfg.dim

    assert chosen("--mask_ratio=0.5") == (0, 128)  # the defaults: this stage's table names neither
    assert chosen() == (5, 128)  # the table wins, but the demo's preset has a word on dim
    assert chosen("--preset=dit-s") == (5, 384)
    start = f"--init_from={first}"  # only the architecture of a checkpoint that is tuned counts
    assert chosen("--preset=dit-s", start) == (5, 48)
    assert chosen("--preset=dit-s", start, "--dim=64", "--seed=9") == (9, 64)
    resume = f"--out_dir={tmp_path}/run", "--resume"  # all settings of one that goes on do
    assert chosen("--preset=dit-s", *resume) == (8, 56)
    assert chosen("--preset=dit-s", *resume, "--dim=64", "--seed=9") == (9, 64)
    tuned = train.parse(["--device=cpu", "--loss=consistency", start])[0]
    assert (tuned.p_mean, tuned.seed) == (4.0, 6)  # the preset of consistency wins over the table


def test_resume_takes_the_newest_readable_checkpoint_of_the_run_that_is_described(tmp_path):
    out = f"--out_dir={tmp_path}", "--device=cpu"
    for when, name in enumerate(("pt.prev", "pt", "cm", "ft.prev", "ft"), 1):
        stage = dict(pt=dict(mask_ratio=0.5), cm=dict(loss="consistency")).get(name[:2], {})
        place(tmp_path / f"{name}.pt", when, config=stage)
    place(tmp_path / "ft-0000900.pt", 9)  # a kept one is not what a run goes on with
    place(tmp_path / "ft.old.pt", 9)

    def found(*flags):
        source = train.parse([*out, "--resume", *flags])[1]
        return source and os.path.basename(source)

    start = f"--init_from={tmp_path}/pt.pt"
    assert found() == found(start) == "ft.pt"
    assert found("--mask_ratio=0.5") == "pt.pt"
    assert found(start, "--loss=consistency") == found("--loss=consistency") == "cm.pt"
    assert found("auto", "--mask_ratio=0.5") == "pt.pt" and found("auto", start) == "ft.pt"
    os.utime(tmp_path / "pt.pt", (20, 20))
    assert found() == "pt.pt" and found(start) == "ft.pt"
    (tmp_path / "ft.pt").write_bytes((tmp_path / "ft.pt").read_bytes()[:-100])
    assert found("auto", start) == "ft.prev.pt"
    (tmp_path / "ft.prev.pt").write_bytes(b"")
    for how in ([], ["auto"]):  # a run whose checkpoints are all damaged is not begun anew by itself
        assert "ft" in mistake(train.main, *out, "--resume", *how, start)
    (tmp_path / "empty").mkdir()
    empty = f"--out_dir={tmp_path}/empty"
    assert found("auto", empty) is None and "empty" in mistake(train.main, *out, "--resume", empty)


# -- runs -----------------------------------------------------------------------------------------


def test_both_stages_and_samples(dataset, tmp_path):
    common = [f"--data={dataset}", f"--out_dir={tmp_path}", "--batch_size=12", "--log_every=1"]
    train.main(common + TINY + ["--mask_ratio=0.75", "--mask_type=patch", "--steps=6"])
    train.main(common + [*TINY[4:], f"--init_from={tmp_path}/pt.pt", "--steps=6", "--eval_every=3",
                         "--sample_every=6"])
    pt, ft = (load_checkpoint(str(tmp_path / f"{n}.pt")) for n in ("pt", "ft"))
    assert pt["architecture"] == ft["architecture"] and pt["step"] == ft["step"] == 6
    assert not any("module." in k or "_orig_mod" in k for k in ft["model"])
    assert (tmp_path / "ft_0000006.png").stat().st_size > 0
    validation = {r["step"]: r["val_loss"] for r in records(tmp_path) if r["run"] == "ft" and "val_loss" in r}
    assert list(validation) == [3, 6]
    # It is the mean of EDM's loss of the averaged weights on whole images, with their noise.
    denoiser, _ = sample.load_denoiser(str(tmp_path / "ft.pt"))
    v = train.validation_set([Images(str(dataset), "val", 4)], denoiser.config, -1.2, 1.2)
    clean, sigma = v["clean"], v["sigma"].view(-1, 1, 1)
    error = (denoiser(clean + sigma * v["noise"], v["sigma"]) - clean) ** 2
    loss = ((sigma**2 + 0.25) / (0.5 * sigma) ** 2 * error).mean().item()
    assert validation[6] == pytest.approx(loss, rel=1e-5)


def test_stage_2_starts_from_the_raw_weights_of_stage_1_or_their_average(dataset, tmp_path):
    common = [f"--data={dataset}", f"--out_dir={tmp_path}", "--batch_size=12"]
    train.main(common + TINY + ["--mask_ratio=0.5", "--steps=4", "--block_size=1"])
    pt = load_checkpoint(str(tmp_path / "pt.pt"))
    assert not same(pt["ema"], pt["model"])
    for flags, key in (["--init_weights=ema"], "ema"), (["--init_weights=raw"], "model"), ([], "model"):
        train.main(common + TINY[4:] + [f"--init_from={tmp_path}/pt.pt", "--steps=1", "--lr=0", *flags])
        ft = load_checkpoint(str(tmp_path / "ft.pt"))
        assert same(ft["model"], pt[key]) and same(ft["ema"], pt[key])


def test_training_learns(dataset, tmp_path):
    train.main([f"--data={dataset}", f"--out_dir={tmp_path}", "--batch_size=24", "--steps=250",
                "--log_every=1"] + TINY + ["--lr=1e-2"])
    curve = losses(tmp_path)
    first, last = (np.mean([curve[s] for s in r]) for r in (range(1, 11), range(241, 251)))
    assert last < 0.5 * first


@pytest.mark.parametrize("first, second, constant", [
    ([], ["--loss=consistency"], True),  # ECT, SCT
    (["--decoder_depth=1"], [], True),  # MaskDiT
    ([], [], False)])
def test_the_averaged_weights_of_a_second_stage_have_one_decay_or_warm_up(dataset, tmp_path, first, second, constant):
    args = [f"--data={dataset}", f"--out_dir={tmp_path}", "--batch_size=12"]
    train.main([*args, "--steps=2", *TINY, "--mask_ratio=0.5", *first])
    start = load_checkpoint(str(tmp_path / "pt.pt"))["ema"]
    train.main([*args, "--steps=40", *TINY[4:], f"--init_from={tmp_path}/pt.pt", "--ema=0.9999", *second])
    end = load_checkpoint(str(tmp_path / ("cm.pt" if "--loss=consistency" in second else "ft.pt")))
    way, moved = (math.sqrt(sum((end[k][n] - w).square().sum() for n, w in start.items())) for k in ("model", "ema"))
    assert 0 < moved < 0.01 * way if constant else moved > 0.5 * way


@pytest.mark.parametrize("shapes", [[(24, 16)] * 3, [(16, 24), (40, 16), (16, 16)]])
def test_muon_is_that_of_torch_for_all_matrices_at_once(shapes):
    """torch computes it in bfloat16, hence to three digits of the largest entry."""
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    a = model.Muon([dict(params=ours)], dict(lr=0.1, weight_decay=0.03))
    b = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.03, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for p, q in zip(ours, theirs):
            q.grad = torch.randn(q.shape) * 10.0 ** torch.randint(-6, 3, ())
            p.grad = q.grad.clone()
        a.step(), b.step()
    moved = max((p - q).abs().max() for p, q in zip(ours, theirs))
    assert 0 < moved < 4e-3 and all(p.isfinite().all() for p in ours)


def test_muon_has_the_matrices_of_all_blocks_and_adamw_the_rest(dataset, tmp_path):
    config = ModelConfig(image_size=16, dim=32, depth=2, heads=2, decoder_depth=1, decoder_dim=16, num_classes=3)
    denoiser = model.Denoiser(config)
    cfg = settings("--optimizer=muon", "--lr=0.5")
    muon, adamw = train.configure_optimizers(denoiser, cfg)
    names = {id(p): name for name, p in denoiser.named_parameters()}
    mine = sorted(names[id(p)] for group in muon.param_groups for p in group["params"])
    assert mine == sorted(f"net.{part}.{i}.{layer}.weight" for part, i in (("blocks", 0), ("blocks", 1), ("decoder", 0))
                          for layer in ("qkv", "proj", "fc1", "fc2"))
    assert len(mine) + len(adamw.param_groups[0]["params"]) == len(names)
    assert all(group["initial_lr"] == 0.5 for optimizer in (muon, adamw) for group in optimizer.param_groups)
    assert len(train.configure_optimizers(denoiser, settings("--optimizer=adamw"))) == 1
    # And a run with it resumes exactly.
    args = [f"--data={dataset}", f"--out_dir={tmp_path}/a", "--batch_size=12", "--steps=6", "--optimizer=muon", *TINY]
    train.main(args)
    train.main([*args, "--save_every=3", f"--out_dir={tmp_path}/b"])
    (tmp_path / "b/ft.prev.pt").replace(tmp_path / "b/ft.pt")
    train.main([f"--out_dir={tmp_path}/b", "--resume"])
    whole, again = (load_checkpoint(f"{tmp_path}/{name}/ft.pt") for name in "ab")
    assert same(whole["model"], again["model"]) and same(whole["ema"], again["ema"])


def test_the_averaged_weights_start_fast_and_reach_their_decay(dataset, tmp_path):
    train.main([f"--data={dataset}", f"--out_dir={tmp_path}", "--batch_size=12", "--steps=6", "--ema=0.3",
                "--keep_every=1"] + TINY)
    for step in range(1, 6):  # the decay warms up: 1/10, 2/11, ..., until it reaches 0.3
        a, b = (load_checkpoint(str(tmp_path / f"ft-{n:07d}.pt")) for n in (step, step + 1))
        d = min(0.3, (1 + step) / (10 + step))
        for n, ema in b["ema"].items():
            assert torch.allclose(ema, d * a["ema"][n] + (1 - d) * b["model"][n], atol=1e-6), n


def test_stage_1_with_everything_visible_is_stage_2(dataset, tmp_path, monkeypatch):
    common = [f"--data={dataset}", "--batch_size=12", "--steps=5", "--micro_batch=12"] + TINY
    train.main(common + [f"--out_dir={tmp_path}/whole"])

    def everything(batch, grid, *rest, **named):
        return torch.arange(grid**2).expand(batch, -1)

    monkeypatch.setattr(train, "sample_visible", everything)
    train.main(common + [f"--out_dir={tmp_path}/shown", "--mask_ratio=0.5", "--lr_schedule=cosine"])
    assert same_runs(tmp_path / "whole/ft.pt", tmp_path / "shown/pt.pt")


@pytest.mark.parametrize("extra", [[], ["--mask_ratio=0.5", "--mask_type=patch", "--class_cond", "--hflip"],
                                   ["--mask_ratio=0.5", "--mask_type=patch", "--route=0,1", "--optimizer=radam"]])
def test_resuming_is_bit_identical_to_never_stopping(labelled, tmp_path, extra):
    name = "pt.pt" if extra else "ft.pt"
    common = [f"--data={labelled}", "--batch_size=10", "--lr_schedule=constant"] + TINY + extra
    train.main(common + [f"--out_dir={tmp_path}/whole", "--steps=9"])
    train.main(common + [f"--out_dir={tmp_path}/parts", "--steps=4"])
    train.main([f"--out_dir={tmp_path}/parts", "--resume", "--steps=9"])
    assert same_runs(tmp_path / "whole" / name, tmp_path / "parts" / name)


def test_two_optimizers_of_different_kinds_resume_exactly(dataset, tmp_path, monkeypatch):
    def configure(denoiser, cfg):  # matrices and the rest, each at a rate of its own
        parts = [[p for p in denoiser.parameters() if (p.dim() == 2) == matrix] for matrix in (True, False)]
        groups = [[dict(params=part, initial_lr=lr)] for part, lr in zip(parts, (cfg.lr, 0.1 * cfg.lr))]
        return [torch.optim.AdamW(groups[0], lr=cfg.lr), torch.optim.SGD(groups[1], lr=cfg.lr, momentum=0.9)]

    monkeypatch.setattr(train, "configure_optimizers", configure)
    common = [f"--data={dataset}", "--batch_size=12", "--lr_schedule=cosine", "--warmup=2"] + TINY
    train.main(common + [f"--out_dir={tmp_path}/whole", "--steps=6"])
    train.main(common + [f"--out_dir={tmp_path}/parts", "--steps=6", "--keep_every=3"])
    (tmp_path / "parts/ft-0000003.pt").replace(tmp_path / "parts/ft.pt")
    train.main([f"--out_dir={tmp_path}/parts", "--resume"])
    assert same_runs(tmp_path / "whole/ft.pt", tmp_path / "parts/ft.pt")
    states = load_checkpoint(str(tmp_path / "whole/ft.pt"))["optimizer"]
    assert ["exp_avg" in s["state"][0] for s in states] == [True, False]
    rates = [s["param_groups"][0]["lr"] for s in states]  # both follow the schedule of --lr
    assert rates[1] == pytest.approx(0.1 * rates[0])


class InMemory:
    """Stands in for model.Images: no folder, no arrays on disk, read by patchify."""

    def __init__(self, sets, split="train", patch_size=1, class_names=()):
        self.pixels, self.labels = SETS[sets, split]
        self.patch_size, names = patch_size, [*class_names, "class 0", "class 1", "class 2"]
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


SETS = {}


def test_any_class_with_len_labels_meta_and_read_can_be_trained_on(labelled, tmp_path, monkeypatch):
    args = ["--batch_size=12", "--steps=4", "--class_cond", "--hflip", "--mask_ratio=0.5", "--mask_type=patch",
            *TINY]
    train.main(args + [f"--data={labelled}", f"--out_dir={tmp_path}/folder"])
    for split in ("train", "val"):
        SETS["memory", split] = [np.load(labelled / f"{split}{end}.npy") for end in ("", "_labels")]
    monkeypatch.setattr(train, "Images", InMemory)
    train.main(args + ["--data=memory", f"--out_dir={tmp_path}/memory"])
    assert same_runs(tmp_path / "folder/pt.pt", tmp_path / "memory/pt.pt")


def interrupt(monkeypatch, step, number):
    """A signal comes in the middle of a step."""
    original, sent = train.learning_rate, []

    def interrupted(cfg, at, lr):
        if at == step and not sent:
            sent.append(signal.raise_signal(number))
        return original(cfg, at, lr)

    monkeypatch.setattr(train, "learning_rate", interrupted)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_resumed_run_is_the_undisturbed_one(dataset, tmp_path, monkeypatch, number, code):
    args = [f"--data={dataset}", "--batch_size=12", "--steps=7", "--lr_schedule=constant"] + TINY
    train.main(args + [f"--out_dir={tmp_path}/whole"])
    interrupt(monkeypatch, 3, number)
    with pytest.raises(SystemExit) as e:
        train.main(args + [f"--out_dir={tmp_path}/parts"])
    assert e.value.code == code and load_checkpoint(str(tmp_path / "parts/ft.pt"))["step"] == 4
    train.main([f"--out_dir={tmp_path}/parts", "--resume"])
    assert same_runs(tmp_path / "whole/ft.pt", tmp_path / "parts/ft.pt")


def test_a_damaged_checkpoint_is_kept_and_the_one_before_goes_on(dataset, tmp_path, capsys):
    args = [f"--data={dataset}", "--batch_size=12", "--steps=6"] + TINY + ["--save_every=2"]
    train.main(args + [f"--out_dir={tmp_path}/whole"])
    train.main(args + [f"--out_dir={tmp_path}/parts"])
    ckpt = tmp_path / "parts/ft.pt"
    damaged = bytearray(ckpt.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    ckpt.write_bytes(damaged)
    capsys.readouterr()
    train.main([f"--out_dir={tmp_path}/parts", "--resume"])
    assert "resumed from step 4" in capsys.readouterr().err
    assert same_runs(tmp_path / "whole/ft.pt", ckpt)
    assert (tmp_path / "parts/ft.old.pt").read_bytes() == damaged


def test_a_scheduler_may_give_the_commands_of_both_stages_again_and_again(dataset, tmp_path, capsys):
    common = [f"--data={dataset}", f"--out_dir={tmp_path}", "--batch_size=12", "--resume=auto"]
    one = common + TINY + ["--mask_ratio=0.5", "--mask_type=patch", "--steps=3"]
    two = common + TINY[4:] + [f"--init_from={tmp_path}/pt.pt", "--steps=4", "--save_every=2"]

    def step_resumed(args):
        capsys.readouterr()
        train.main(args)
        said = capsys.readouterr().err
        return int(said.split("resumed from step ")[1].split()[0]) if "resumed" in said else None

    assert step_resumed(one) is None and step_resumed(one) == 3
    first = (tmp_path / "pt.pt").read_bytes()
    assert step_resumed(two) is None  # although there is a checkpoint of the other stage
    whole = load_checkpoint(str(tmp_path / "ft.pt"))
    (tmp_path / "ft.prev.pt").replace(tmp_path / "ft.pt")  # as if it had been killed after step 2
    assert step_resumed(one) == 3 and step_resumed(two) == 2
    assert same(whole["model"], load_checkpoint(str(tmp_path / "ft.pt"))["model"])
    assert (tmp_path / "pt.pt").read_bytes() == first and not list(tmp_path.glob("*.old.pt"))


def test_a_run_does_not_become_the_other_stage_when_it_is_resumed(dataset, tmp_path):
    args = [f"--data={dataset}", f"--out_dir={tmp_path}", "--batch_size=12", "--steps=1"] + TINY
    train.main(args + ["--mask_ratio=0.5", "--mask_type=patch"])
    assert "pt.pt" in mistake(train.main, f"--out_dir={tmp_path}", "--resume", "--mask_ratio=0", "--steps=2")


def test_a_fresh_run_keeps_the_checkpoints_whose_names_it_takes(dataset, tmp_path):
    args = [f"--data={dataset}", f"--out_dir={tmp_path}", "--batch_size=12"] + TINY
    train.main(args + ["--steps=2", "--save_every=1"])
    train.main(args + ["--steps=3"])
    found = {f.name: load_checkpoint(str(f))["step"] for f in tmp_path.glob("*.pt")}
    assert found == {"ft.pt": 3, "ft.old.pt": 2, "ft.prev.old.pt": 1}  # none of it to be resumed


def test_a_checkpoint_that_the_run_reads_is_not_written_over(dataset, tmp_path):
    args = [f"--data={dataset}", f"--out_dir={tmp_path}", "--batch_size=12", "--steps=1"]
    train.main(args + TINY)
    before = (tmp_path / "ft.pt").read_bytes()
    for flag in ("init_from", "anchor", "distill_from"):
        more = dict(anchor=["--l2=1"], distill_from=[f"--replay={dataset}"]).get(flag, [])
        said = mistake(train.main, *args, *TINY, *more, f"--{flag}={tmp_path}/../{tmp_path.name}/ft.pt")
        assert "another --out_dir" in said
    assert (tmp_path / "ft.pt").read_bytes() == before and not (tmp_path / "ft.old.pt").exists()
    for name in ("ft.old.pt", "ft.prev.old.pt"):  # ft.pt would be moved over it
        (tmp_path / name).write_bytes(before)
        assert name in mistake(train.main, *args, *TINY[4:], f"--init_from={tmp_path}/{name}")
        assert (tmp_path / name).read_bytes() == before


def named(folder, names, **how):
    """A prepared set whose classes have these names."""
    make_dataset(folder, classes=len(names), **how)
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | dict(class_names=names)))
    return folder


def test_a_model_keeps_the_classes_it_knows_by_name(dataset, tmp_path, capsys, monkeypatch):
    base = [f"--out_dir={tmp_path}", "--batch_size=12", "--steps=1"]
    train.main(base + TINY + [f"--data={named(tmp_path / 'ab', ['a', 'b'])}", "--class_cond"])
    (tmp_path / "ft.pt").rename(tmp_path / "first.pt")
    capsys.readouterr()
    tune = [*base, *TINY[4:], f"--init_from={tmp_path}/first.pt", "--lr=0"]
    train.main(tune + [f"--data={named(tmp_path / 'bc', ['b', 'c'], seed=1)}"])
    assert "begins afresh: c\n" in capsys.readouterr().err
    first, second = (load_checkpoint(str(tmp_path / f"{n}.pt")) for n in ("first", "ft"))
    assert second["class_names"] == ["a", "b", "c"] and second["architecture"]["num_classes"] == 3
    old, new = (c["model"]["net.labels.weight"] for c in (first, second))
    assert torch.equal(new[[0, 1, 3]], old) and new[2].abs().sum() > 0  # a, b and "no class"
    # The labels that the network is given are numbered likewise.
    load, seen = train.Stream.load, []

    def watched(*args):
        batch = load(*args)
        seen.append((batch["index"], batch["labels"].numpy()))
        return batch

    monkeypatch.setattr(train.Stream, "load", watched)
    train.main(tune + [f"--data={tmp_path}/bc", "--label_dropout=0"])
    monkeypatch.undo()
    for index, labels in seen:
        assert np.array_equal(labels, np.load(tmp_path / "bc/train_labels.npy")[index] + 1)
    # Without classes in the data, or without --class_cond, it goes on all the same.
    train.main(tune + [f"--data={dataset}"])
    assert load_checkpoint(str(tmp_path / "ft.pt"))["class_names"] == ["a", "b"]
    train.main(tune + [f"--data={dataset}", "--no-class_cond"])
    assert load_checkpoint(str(tmp_path / "ft.pt"))["architecture"]["num_classes"] == 0


def test_a_model_of_classes_starts_one_of_another_width(labelled, tmp_path, capsys):
    base = [f"--data={labelled}", f"--out_dir={tmp_path}", "--batch_size=12", "--steps=1", "--class_cond", *TINY[1:]]
    train.main([*base, "--dim=32", "--mask_ratio=0.5"])
    train.main([*base, "--dim=48", f"--init_from={tmp_path}/pt.pt"])
    assert "labels.weight" in capsys.readouterr().err.split("begins afresh")[1]


def test_tuning_at_another_size_and_with_another_network_names_what_begins_afresh(dataset, tmp_path, capsys):
    base = [f"--out_dir={tmp_path}", "--batch_size=12", "--steps=1", "--lr=0"]
    train.main(base + TINY[:-2] + [f"--data={dataset}", "--lr=0"])
    (tmp_path / "ft.pt").rename(tmp_path / "first.pt")
    first = load_checkpoint(str(tmp_path / "first.pt"))["ema"]

    def tune(*flags, data=dataset):
        capsys.readouterr()
        train.main(base + TINY[4:-2] + [f"--data={data}", f"--init_from={tmp_path}/first.pt", *flags])
        said = capsys.readouterr().err.split("begins afresh: ")[1].splitlines()[0]
        return said, load_checkpoint(str(tmp_path / "ft.pt"))

    said, second = tune(data=make_dataset(tmp_path / "big", size=32))
    assert said == "nothing" and second["architecture"]["image_size"] == 32 and same(second["model"], first)
    said, second = tune(data=make_dataset(tmp_path / "grey", channels=1))
    assert said == "embed.weight, head.bias, head.weight"
    said, second = tune("--depth=3")
    assert {name.split(".")[1] for name in said.split(", ")} == {"2"}  # the third block
    assert all(torch.equal(second["model"][n], first[n]) for n in first)


@pytest.mark.parametrize("network", [["--decoder_depth=1", "--decoder_dim=16"], ["--depth=3", "--route=1,2"]])
def test_masked_runs_with_a_decoder_or_a_route_learn_go_on_and_are_sampled(labelled, tmp_path, network):
    args = [f"--data={labelled}", f"--out_dir={tmp_path}", "--batch_size=12"]
    train.main(args + TINY + ["--steps=150", "--lr=4e-3", "--mask_ratio=0.5", "--mask_type=patch", "--class_cond",
                              *network])
    curve = list(losses(tmp_path, "pt").values())
    assert np.mean(curve[-3:]) < 0.85 * np.mean(curve[:2])
    train.main(args + TINY[4:] + ["--steps=3", f"--init_from={tmp_path}/pt.pt"])
    before, after = (load_checkpoint(str(tmp_path / f"{n}.pt"))["architecture"] for n in ("pt", "ft"))
    assert before == after and after["num_classes"] == 3
    sample.main(["--ckpt", f"{tmp_path}/ft.pt", "--out", f"{tmp_path}/x.npz", "--steps=2", "--num=4",
                 "--cfg_scale=2"])
    assert np.load(tmp_path / "x.npz")["arr_0"].shape == (4, 16, 16, 3)


def test_a_decoder_can_be_dropped_or_added_when_tuning(dataset, tmp_path, capsys):
    args = [f"--data={dataset}", f"--out_dir={tmp_path}", "--batch_size=12"] + TINY
    masked = ["--mask_ratio=0.5", "--mask_type=patch"]
    train.main(args + ["--steps=2", *masked, "--decoder_depth=1"])
    capsys.readouterr()
    train.main(args + ["--steps=1", "--lr=0", f"--init_from={tmp_path}/pt.pt", "--decoder_depth=0"])
    assert "begins afresh: nothing" in capsys.readouterr().err
    wide, plain = (load_checkpoint(str(tmp_path / f"{n}.pt")) for n in ("pt", "ft"))
    assert "net.mask_token" not in plain["model"] and "net.mask_token" in wide["model"]
    for name in plain["model"]:
        assert torch.equal(plain["model"][name], wide["model"][name]), name
    train.main(args + ["--steps=1", "--lr=0", f"--init_from={tmp_path}/ft.pt", "--decoder_depth=2", *masked])
    assert "decoder_embed.weight, decoder_modulation.bias, decoder_modulation.weight, mask_token" in capsys.readouterr().err
    added = load_checkpoint(str(tmp_path / "pt.pt"))
    assert added["architecture"]["decoder_depth"] == 2
    assert torch.equal(added["model"]["net.embed.weight"], plain["model"]["net.embed.weight"])


def test_the_reconstruction_loss_has_its_weight(dataset):
    config = ModelConfig(image_size=16, dim=32, depth=2, heads=2, decoder_depth=1)
    denoiser = Denoiser(config)
    torch.nn.init.normal_(denoiser.net.head.weight)
    batch = stream_of(dataset, "--mask_ratio=0.5", "--mask_type=patch", decoder_depth=1).load(0)
    del batch["index"]
    none, one, two = (model.diffusion_objective(denoiser, config, **batch, mae_weight=w) for w in (0, 1, 2))
    assert torch.allclose(two - none, 2 * (one - none), rtol=1e-4)
    noisy = batch["clean"] + batch["sigma"].view(-1, 1, 1) * batch["noise"]
    denoised = denoiser(noisy, batch["sigma"], batch["visible"])
    assert torch.allclose(one - none, reconstruction_loss(denoised, noisy, batch["visible"]), rtol=1e-4)


# -- steps that fail ------------------------------------------------------------------------------


def test_steps_that_are_not_finite_are_skipped_and_logged_with_their_images(tmp_path):
    data = make_dataset(tmp_path / "poison", size=8, channels=4, dtype=np.float32)
    images = np.load(data / "train.npy")
    images[0] = np.nan
    np.save(data / "train.npy", images)
    args = [f"--data={data}", f"--out_dir={tmp_path}", "--batch_size=6"] + TINY
    order = [train.Stream(Images(str(data), "train", 4), len(Images(str(data))), settings("--batch_size=6"), ModelConfig(
        image_size=8, channels=4, latent=json.loads((data / "meta.json").read_text())["latent"]), CPU).index(n)
        for n in range(16)]
    sick = [n for n in range(16) if 0 in order[n]]  # one of four batches holds image 0
    last = next(n for n in range(12, 16) if n not in sick)
    train.main(args + [f"--steps={last + 1}"])
    assert finite(load_checkpoint(str(tmp_path / "ft.pt")))
    skipped = [r for r in records(tmp_path) if r.get("event") == "skipped"]
    assert [r["step"] for r in skipped] == [n for n in sick if n <= last]
    assert all(0 in r["index"] for r in skipped)


def test_a_skipped_step_names_the_images_of_all_processes(tmp_path):
    """The sick image is with the second process, and the first one writes the log."""
    data = make_dataset(tmp_path / "poison", size=8, channels=4, dtype=np.float32, n=40)
    latent = json.loads((data / "meta.json").read_text())["latent"]
    stream = train.Stream(Images(str(data), "train", 4), 40, settings("--batch_size=8"),
                          ModelConfig(image_size=8, channels=4, latent=latent), CPU)
    batch, images = stream.index(1), np.load(data / "train.npy")
    images[batch[3]] = np.nan
    np.save(data / "train.npy", images)
    run_two(tmp_path, "train", f"--data={data}", f"--out_dir={tmp_path}/out", "--batch_size=8", "--steps=3", *TINY)
    (skipped,) = [r for r in records(tmp_path / "out") if r.get("event") == "skipped"]
    assert skipped["step"] == 1 and skipped["index"] == batch.tolist()


def test_a_run_whose_last_step_is_skipped_is_saved_all_the_same(dataset, tmp_path, monkeypatch):
    honest = train.diffusion_objective
    calls = []

    def sick(*args, **kwargs):
        calls.append(kwargs)
        return honest(*args, **kwargs) * (math.nan if len(calls) == 5 else 1)

    monkeypatch.setattr(train, "diffusion_objective", sick)
    train.main([f"--data={dataset}", f"--out_dir={tmp_path}", "--batch_size=12", "--steps=5", *TINY])
    last = load_checkpoint(str(tmp_path / "ft.pt"))
    assert last["step"] == 5 and finite(last)


def test_nothing_is_saved_while_steps_are_skipped_and_ten_end_the_run(dataset, tmp_path, monkeypatch):
    args = [f"--data={dataset}", "--batch_size=12", "--lr_schedule=constant", *TINY]
    train.main(args + [f"--out_dir={tmp_path}/short", "--steps=4"])
    honest, calls = train.diffusion_objective, []

    def sick(*args, **kwargs):
        calls.append(kwargs)
        return honest(*args, **kwargs) * (math.nan if len(calls) > 4 else 1)

    monkeypatch.setattr(train, "diffusion_objective", sick)
    with pytest.raises(SystemExit) as e:
        train.main(args + [f"--out_dir={tmp_path}/long", "--steps=100", "--save_every=1", "--keep_every=1"])
    assert e.value.code == 3 and len(calls) == 14
    assert load_checkpoint(str(tmp_path / "long/ft.pt"))["step"] == 4
    assert same_runs(tmp_path / "short/ft.pt", tmp_path / "long/ft.pt")
    assert len(list((tmp_path / "long").glob("ft-*.pt"))) == 4


def test_a_run_that_blows_up_leaves_finite_weights(dataset, tmp_path):
    with pytest.raises(SystemExit) as e:
        train.main([f"--data={dataset}", f"--out_dir={tmp_path}", "--batch_size=12", "--steps=100",
                    "--mask_ratio=0.5", "--block_size=1", *TINY, "--lr=1e12", "--warmup=0", "--grad_clip=0",
                    "--save_every=1"])
    assert e.value.code == 3
    last = load_checkpoint(str(tmp_path / "pt.pt"))
    assert last["step"] >= 1 and finite(last)


def test_a_full_disk_ends_the_run_with_a_sentence_and_the_last_checkpoint_whole(dataset, tmp_path, monkeypatch):
    args = [f"--data={dataset}", "--batch_size=12", "--steps=6", *TINY, "--save_every=2"]
    train.main(args + [f"--out_dir={tmp_path}/whole"])
    write, written = torch.save, []

    def full(content, file):
        written.append(content["step"])
        if len(written) == 2:
            file.write(b"the beginning")
            raise OSError(28, "No space left on device")
        write(content, file)

    monkeypatch.setattr(torch, "save", full)
    assert "No space left" in mistake(train.main, *args, f"--out_dir={tmp_path}/parts")
    assert sorted(f.name for f in (tmp_path / "parts").iterdir()) == ["ft.pt", "log.jsonl"]
    assert load_checkpoint(str(tmp_path / "parts/ft.pt"))["step"] == 2
    train.main([f"--out_dir={tmp_path}/parts", "--resume"])  # there is room again
    assert same_runs(tmp_path / "whole/ft.pt", tmp_path / "parts/ft.pt")


# -- mistakes -------------------------------------------------------------------------------------


def test_a_default_batch_is_divisible_by_the_processes(monkeypatch, dataset, tmp_path):
    for world, expected in ((1, 4), (3, 6), (8, 8)):
        monkeypatch.setenv("WORLD_SIZE", str(world))
        assert settings_of("--device=cpu").batch_size == expected  # that of stage 2 is 4
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert settings_of("--device=cpu", "--batch_size=4").batch_size == 4  # what is typed stays


def settings_of(*flags):
    return train.parse(list(flags))[0]


def test_a_mistake_is_told_by_one_process_of_each_machine(monkeypatch, tmp_path):
    for rank, told in (("0", str), ("1", int)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        for mistake_of in (["--data=nowhere"], ["--dat=x"], ["--patch_size=5"], [f"--init_from={tmp_path}"]):
            with pytest.raises(SystemExit) as e:
                train.main([*mistake_of, "--device=cpu", f"--out_dir={tmp_path}"])
            assert isinstance(e.value.code, told) and e.value.code != 0


def test_more_processes_than_gpus_get_a_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert "4 processes for 2 GPUs" in mistake(lambda _: sample.pick_device("auto", 0))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert sample.pick_device("auto", 1) == torch.device("cuda", 1)


def test_a_gpu_that_torch_cannot_use_is_told(monkeypatch, capsys):
    exists = os.path.exists
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(os.path, "exists", lambda path: "nvidia" in str(path) or exists(path))
    assert sample.pick_device("auto").type == "cpu" and "driver" in capsys.readouterr().err


def test_mistakes_on_the_command_line_get_a_sentence(dataset, tmp_path):
    base = [f"--data={dataset}", f"--out_dir={tmp_path}/out", "--batch_size=12", "--steps=1"] + TINY

    def says(*flags):
        return mistake(train.main, *base, *flags)

    assert "nowhere" in says(f"--data={tmp_path}/nowhere")
    assert "mask_ratio" in says("--mask_ratio=1.0") and "mask_ratio" in says("--mask_ratio=-0.5")
    assert "16 of 16 patches" in says("--mask_ratio=0.01")
    assert "not divisible by patch_size" in says("--patch_size=5")
    assert "not divisible by 1 processes x micro_batch 5" in says("--micro_batch=5")
    assert "no labels" in says("--class_cond")
    assert "none.pt" in says(f"--init_from={tmp_path}/none.pt")
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04 cut off")
    assert "cut.pt" in says(f"--init_from={tmp_path}/cut.pt")
    assert "--mask_ratio?" in says("--mask_ration=0.5") and "--mask_ratio?" in says("--mask-ratio=0.5")
    assert "--steps" in says("--steps=many") and "cosine" in says("--lr_schedule=stairs")
    assert not (tmp_path / "out").exists()


def test_a_mistake_on_the_command_line_has_exit_code_1_and_no_traceback(tmp_path):
    result = run("train.py", f"--data={tmp_path}/nowhere", f"--out_dir={tmp_path}")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


# -- two processes and their ends -----------------------------------------------------------------

MASKED = ["--mask_ratio=0.5", "--mask_type=patch"]
PAIRS = {  # name: flags, flags of the run with two processes alone
    "masked": ([*MASKED, "--class_cond"], []),
    "decoder": ([*MASKED, "--class_cond", "--decoder_depth=1"], ["--micro_batch=2"]),
    "route": ([*MASKED, "--route=0,1"], ["--micro_batch=3"]),
    "continual": ([*MASKED, "--replay=OLD", "--replay_frac=0.25", "--replay_coef=0.3", "--distill_from=FIRST",
                   "--init_from=FIRST", "--ewc=10", "--l2=0.1"], ["--micro_batch=2"]),
    "consistency": (["--loss=consistency", "--init_from=FIRST", "--ref_batch=9"], ["--micro_batch=3"]),
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
    old, base = make_dataset(folder / "old", seed=7, classes=3), ["--batch_size=12", f"--data={labelled}"]
    train.main([*base, f"--out_dir={folder}", "--steps=4", "--class_cond", *TINY])
    sockets = [socket.create_server(("localhost", 0)) for _ in PAIRS]
    alone, together = [], []
    for (name, (flags, more)), free in zip(PAIRS.items(), sockets):
        flags = [f.replace("OLD", str(old)).replace("FIRST", f"{folder}/ft.pt") for f in flags]
        command = [*base, *(TINY[4:] if f"--init_from={folder}/ft.pt" in flags else TINY), "--steps=8",
                   "--log_every=1", "--lr_schedule=constant", "--grad_clip=0", "--keep_every=1", *flags]
        alone.append((None, [*command, f"--out_dir={folder}/{name}-1"]))
        together.append((free.getsockname()[1], [*command, *more, f"--out_dir={folder}/{name}-2"]))
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
    a, b = ([state.get("momentum", state.get("exp_avg")) for stored in load_checkpoint(
        str(pairs / f"{name}-{n}/{stage}-0000001.pt"))["optimizer"] for state in stored["state"].values()] for n in (1, 2))
    assert len(a) == len(b) > 20
    for one, two in zip(a, b):
        assert (one - two).abs().max() <= 1e-4 * one.abs().max()
    norms = [[r["grad_norm"] for r in records(pairs / f"{name}-{n}") if "grad_norm" in r] for n in (1, 2)]
    assert np.allclose(*norms, rtol=1e-3)


def start_two(dataset, out):
    """torchrun with two processes in the middle of training; returns it and the processes' ids."""
    launcher = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d",
         "--rdzv_endpoint=localhost:0", str(ROOT / "train.py"), f"--data={dataset}", f"--out_dir={out}",
         "--batch_size=12", "--steps=100000", *TINY], stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not (out / "log.jsonl").exists() or not losses(out):
        assert launcher.poll() is None, launcher.stderr.read()
        time.sleep(0.1)
    children = open(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read().split()
    return launcher, [int(c) for c in children if b"train.py" in open(f"/proc/{c}/cmdline", "rb").read()]


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="finds the processes through /proc")
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


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="finds the processes through /proc")
def test_sigterm_to_torchrun_saves_once_on_all_processes(dataset, tmp_path, capsys):
    launcher, _ = start_two(dataset, tmp_path)
    launcher.send_signal(signal.SIGTERM)
    _, errors = launcher.communicate(timeout=60)
    assert launcher.returncode != 0 and errors.count("go on with --resume") == 1
    step = load_checkpoint(str(tmp_path / "ft.pt"))["step"]
    assert step > 0 and not (tmp_path / "ft.prev.pt").exists()
    train.main([f"--out_dir={tmp_path}", "--resume", f"--steps={step + 1}"])
    assert f"resumed from step {step}" in capsys.readouterr().err


# -- what a resumed or a fresh run must not take over ---------------------------------------------


@pytest.mark.parametrize("extra, parts", [([], 1), (["--decoder_depth=1", "--decoder_dim=32", "--decoder_heads=1"], 2),
                                          (["--route=0,1"], 2)])
def test_a_cpu_takes_at_once_what_all_tokens_of_an_image_leave_room_for(dataset, tmp_path, monkeypatch, extra, parts):
    """4 of 16 patches are visible, and 2**20 values fit: all 96 images, or 48 where a decoder or route takes all tokens."""
    sizes, objective = [], train.diffusion_objective

    def recorded(*args, **batch):
        if torch.is_grad_enabled():
            sizes.append(len(batch["clean"]))
        return objective(*args, **batch)

    monkeypatch.setattr(train, "diffusion_objective", recorded)
    train.main([f"--data={dataset}", f"--out_dir={tmp_path}", "--batch_size=96", "--steps=1", *TINY, "--mask_ratio=0.75",
                "--mask_type=patch", "--dim=1024", "--depth=1", "--heads=1", *extra])
    assert sizes == [96 // parts] * parts


@pytest.mark.parametrize("first, then", [("muon", "adamw"), ("adamw", "muon"), ("adamw", "radam")])
def test_the_state_of_one_optimizer_is_not_given_to_another(dataset, tmp_path, first, then):
    args = [f"--data={dataset}", f"--out_dir={tmp_path}", "--batch_size=12"]
    train.main([*args, *TINY, "--steps=2", f"--optimizer={first}"])
    before = (tmp_path / "ft.pt").read_bytes()
    assert "--init_from" in mistake(train.main, *args, "--steps=4", "--resume", f"--optimizer={then}")
    assert (tmp_path / "ft.pt").read_bytes() == before


def test_optimizer_settings_changed_at_resume_take_effect(dataset, tmp_path):
    args = [f"--data={dataset}", f"--out_dir={tmp_path}", "--batch_size=12"] + TINY
    train.main(args + ["--steps=1"])
    train.main([f"--out_dir={tmp_path}", "--resume", "--steps=2", "--weight_decay=0.5", "--beta2=0.9", "--lr=0.25",
                "--warmup=0", "--lr_schedule=constant"])
    muon, adamw = (state["param_groups"][0] for state in load_checkpoint(str(tmp_path / "ft.pt"))["optimizer"])
    assert tuple(adamw["betas"]) == (0.9, 0.9)
    assert all(group["weight_decay"] == 0.5 and group["lr"] == 0.25 for group in (muon, adamw))


def test_a_moved_run_goes_on_where_it_is_now(dataset, tmp_path):
    args = [f"--data={dataset}", f"--out_dir={tmp_path}/here", "--batch_size=12", "--steps=1"] + TINY
    train.main(args)
    (tmp_path / "here").rename(tmp_path / "there")
    train.main([f"--out_dir={tmp_path}/there", "--resume", "--steps=2"])
    assert not (tmp_path / "here").exists()
    assert load_checkpoint(str(tmp_path / "there/ft.pt"))["step"] == 2
    for line in open(tmp_path / "there/log.jsonl"):
        json.loads(line, parse_constant=lambda c: pytest.fail(f"{c} is no JSON"))
