"""Training: the data stream, both stages, processes, resuming, and mistakes on the command line."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, make_dataset, mistake, run
from torch.utils._python_dispatch import TorchDispatchMode

import prepare_data
import sample
import train
from model import Denoiser, ModelConfig, load_checkpoint, patchify, reconstruction_loss


def config_for(**changes):
    settings = dict(batch_size=12, steps=10, lr=1e-3, hflip=True, **changes)
    return train.Config(**settings), ModelConfig(image_size=16, dim=32, depth=2, heads=2)


def losses(out_dir, name="ft"):
    lines = [json.loads(line) for line in open(out_dir / "log.jsonl")]
    return {r["step"]: r["loss"] for r in lines if r["run"] == name and "images_per_s" in r}


def same_weights(a, b, keys=("model", "ema")):
    a, b = load_checkpoint(str(a)), load_checkpoint(str(b))
    return all(torch.equal(a[k][n], b[k][n]) for k in keys for n in a[k])


# -- the data stream ------------------------------------------------------------------------------


@pytest.mark.parametrize("flipped", [False, True])
def test_gathered_patches_are_those_of_the_mirrored_image(flipped):
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    index, visible = np.array([3, 0, 3]), np.array([[0, 5, 15], [1, 2, 3], [4, 8, 12]])
    got = prepare_data.gather([images], index, visible, 4, np.full(3, flipped))
    for b in range(3):
        image = images[index[b]][:, ::-1] if flipped else images[index[b]]
        for k in range(3):
            row, col = divmod(visible[b, k], 4)
            patch = image[row * 4 : row * 4 + 4, col * 4 : col * 4 + 4]
            assert np.array_equal(got[b, k], patch.reshape(-1))


def test_an_epoch_shows_every_image_once_in_an_order_of_its_own(dataset):
    images = np.load(dataset / "train.npy", mmap_mode="r")
    cfg, config = config_for()
    stream = train.Stream(images, None, cfg, config)
    first = [i for step in (0, 1) for i in stream.load(step)["index"]]
    second = [i for step in (2, 3) for i in stream.load(step)["index"]]
    assert sorted(first) == sorted(second) == list(range(24)) and first != second


def test_a_step_of_the_stream_does_not_depend_on_the_steps_before(dataset):
    images = np.load(dataset / "train.npy", mmap_mode="r")
    cfg, config = config_for(mask_ratio=0.5, mask_type="patch")
    walked = train.Stream(images, None, cfg, config)
    for step in range(6):
        batch = walked.load(step)
    direct = train.Stream(images, None, cfg, config).load(5)
    for key in ("clean", "noise", "visible", "sigma"):
        assert torch.equal(batch[key], direct[key])


def test_processes_share_one_global_batch(dataset):
    images = np.load(dataset / "train.npy", mmap_mode="r")
    cfg, config = config_for(mask_ratio=0.5, mask_type="patch")
    whole = train.Stream(images, None, cfg, config)
    whole = whole.load(3)
    parts = [train.Stream(images, None, cfg, config, torch.device("cpu"), r, 3).load(3) for r in range(3)]
    for key in ("clean", "noise", "sigma", "visible"):
        for rank, part in enumerate(parts):  # every third image, so that all have their part of each kind
            assert torch.equal(part[key], whole[key][rank::3]), key


def test_the_stream_gives_the_visible_patches_scaled_to_one(dataset):
    images = np.load(dataset / "train.npy", mmap_mode="r")
    cfg, config = config_for(mask_ratio=0.5, mask_type="patch")
    cfg.hflip = False
    batch = train.Stream(images, None, cfg, config).load(0)
    whole = patchify(torch.from_numpy(images[batch["index"]]), 4).float() / 255 * 2 - 1
    expected = torch.stack([whole[b][batch["visible"][b]] for b in range(12)])
    assert torch.allclose(batch["clean"], expected, atol=1e-6)


def test_stage_1_makes_no_full_size_image(dataset, monkeypatch):
    images = np.load(dataset / "train.npy", mmap_mode="r")
    cfg, config = config_for(mask_ratio=0.75, mask_type="patch")
    sizes, gathered = [], []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.is_floating_point():
                sizes.append(out.numel())
            return out

    original = train.gather
    monkeypatch.setattr(train, "gather", lambda *a: gathered.append(original(*a)) or gathered[-1])
    with Watch():
        train.Stream(images, None, cfg, config).load(0)
    visible_values = 12 * 4 * 48  # images x visible patches x values of a patch, a quarter of all
    assert max(sizes) == gathered[0].size == visible_values and gathered[0].dtype == np.uint8


def test_the_mask_ratio_follows_its_schedule_in_six_stairs():
    def ratios(**settings):
        return train.mask_ratios(train.Config(**settings))

    assert ratios(mask_ratio=0.7) == [0.7]
    x = np.arange(6) / 5
    kinds = dict(linear=1 - x, cosine=np.cos(np.pi * x / 2), cosine2=np.cos(np.pi * x / 2) ** 2,
                 cosine4=np.cos(np.pi * x / 2) ** 4)
    for name, shape in kinds.items():
        got = ratios(mask_ratio=0.5, mask_ratio_end=0.0, mask_schedule=name, mask_type="patch")
        assert np.allclose(got, 0.5 * shape, atol=1e-12)
    up = ratios(mask_ratio=0.25, mask_ratio_end=0.75, mask_schedule="linear", mask_type="patch")
    assert np.allclose(up, 0.25 + 0.1 * np.arange(6))


def test_the_stream_shows_the_scheduled_number_of_patches(dataset):
    images = np.load(dataset / "train.npy", mmap_mode="r")
    cfg, config = config_for(mask_ratio=0.5, mask_ratio_end=0.0, mask_schedule="linear", mask_type="patch")
    cfg.steps = 12
    stream = train.Stream(images, None, cfg, config)
    batches = [stream.load(step) for step in range(14)]
    hidden = [16 - b["clean"].shape[1] for b in batches]
    assert hidden == [8, 8, 6, 6, 4, 4, 3, 3, 1, 1, 0, 0, 0, 0]
    assert batches[-1]["visible"] is None


def test_a_decoder_gets_all_patches_and_the_visible_ones_marked(dataset):
    images = np.load(dataset / "train.npy", mmap_mode="r")
    cfg, config = config_for(mask_ratio=0.5, mask_type="patch")
    config.decoder_depth = 1
    batch = train.Stream(images, None, cfg, config).load(0)
    assert batch["clean"].shape == batch["noise"].shape == (12, 16, 48)
    assert batch["visible"].shape == (12, 8)


def test_noise_levels_are_log_normal_and_labels_are_dropped_at_their_rate(labelled):
    images, labels = (np.load(labelled / f"train{x}.npy") for x in ("", "_labels"))
    cfg, _ = config_for()
    cfg.batch_size = 20_000
    config = ModelConfig(image_size=16, dim=32, depth=2, heads=2, num_classes=3)
    batch = train.Stream(images, labels, cfg, config).load(0)
    ln_sigma = batch["sigma"].log()
    assert abs(ln_sigma.mean() + 1.2) < 0.05 and abs(ln_sigma.std() - 1.2) < 0.05
    dropped = batch["labels"] == 3
    assert abs(dropped.float().mean() - 0.1) < 0.01
    kept = ~dropped.numpy()
    assert np.array_equal(batch["labels"].numpy()[kept], labels[batch["index"]][kept])


def test_validation_depends_on_the_data_alone(dataset):
    images = np.load(dataset / "val.npy")
    config = ModelConfig(image_size=16, dim=32, depth=2, heads=2)
    a, b = (train.validation_set(images, None, config) for _ in range(2))
    assert all(torch.equal(a[k], b[k]) for k in ("clean", "noise", "sigma"))
    ln_sigma = a["sigma"].log().sort().values  # the quantiles of N(-1.2, 1.2^2)
    quantiles = torch.distributions.Normal(-1.2, 1.2).icdf((torch.arange(8) + 0.5) / 8)
    assert torch.allclose(ln_sigma, quantiles, atol=1e-4)


def test_ema_starts_fast_and_reaches_its_decay():
    model, ema = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    expected = ema.weight.item()
    for step in range(200):
        torch.nn.init.constant_(model.weight, step)
        train.update_ema(ema, model, 0.9, step)
        d = min(0.9, (1 + step) / (10 + step))
        expected = d * expected + (1 - d) * step
    assert math.isclose(ema.weight.item(), expected, rel_tol=1e-4)


def test_learning_rate_warms_up_and_follows_the_cosine():
    cfg = train.Config(lr=1.0, warmup=9, steps=109, lr_schedule="cosine")
    assert train.learning_rate(cfg, 0) == pytest.approx(0.1)
    assert train.learning_rate(cfg, 9) == pytest.approx(1.0)
    assert train.learning_rate(cfg, 59) == pytest.approx(0.01 + 0.99 * 0.5)
    assert train.learning_rate(cfg, 109) == pytest.approx(0.01)
    cfg.lr_schedule = "constant"
    assert train.learning_rate(cfg, 80) == 1.0


# -- runs -----------------------------------------------------------------------------------------


def test_both_stages_and_samples(dataset, tmp_path):
    common = [f"--data={dataset}", f"--out_dir={tmp_path}", "--batch_size=12", "--log_every=1"]
    train.main(common + TINY + ["--mask_ratio=0.75", "--mask_type=patch", "--steps=6"])
    train.main(common + ["--device=cpu", f"--init_from={tmp_path}/pt.pt", "--steps=6", "--eval_every=3",
                         "--sample_every=6", "--lr=1e-3"])
    pt, ft = (load_checkpoint(str(tmp_path / f"{n}.pt")) for n in ("pt", "ft"))
    assert pt["architecture"] == ft["architecture"] and pt["step"] == ft["step"] == 6
    assert not any("module." in k or "_orig_mod" in k for k in ft["model"])
    assert (tmp_path / "ft_0000006.png").stat().st_size > 0
    lines = [json.loads(line) for line in open(tmp_path / "log.jsonl")]
    assert [r["step"] for r in lines if r["run"] == "ft" and "val_loss" in r] == [3, 6]


def test_stage_2_starts_from_the_ema_of_stage_1(dataset, tmp_path):
    common = [f"--data={dataset}", f"--out_dir={tmp_path}", "--batch_size=12"]
    train.main(common + TINY + ["--mask_ratio=0.5", "--steps=4", "--block_size=1"])
    for weights, key in (("ema", "ema"), ("raw", "model")):
        train.main(common + ["--device=cpu", f"--init_from={tmp_path}/pt.pt", "--steps=0",
                             f"--init_weights={weights}"])
        pt, ft = (load_checkpoint(str(tmp_path / f"{n}.pt")) for n in ("pt", "ft"))
        assert all(torch.equal(ft["model"][n], pt[key][n]) for n in pt[key])


def test_training_learns(dataset, tmp_path):
    train.main([f"--data={dataset}", f"--out_dir={tmp_path}", "--batch_size=24", "--steps=150",
                "--log_every=1"] + TINY + ["--lr=5e-3"])
    curve = losses(tmp_path)
    first, last = (np.mean([curve[s] for s in r]) for r in (range(1, 11), range(141, 151)))
    assert last < 0.5 * first


def test_stage_1_with_everything_visible_is_stage_2(dataset, tmp_path, monkeypatch):
    common = [f"--data={dataset}", "--batch_size=12", "--steps=5"] + TINY
    train.main(common + [f"--out_dir={tmp_path}/whole"])
    def everything(batch, grid, *rest, **named):
        return torch.arange(grid**2).expand(batch, -1)

    monkeypatch.setattr(train, "sample_visible", everything)
    monkeypatch.setattr(train, "count_visible", lambda grid, *rest, **named: grid**2)
    train.main(common + [f"--out_dir={tmp_path}/shown", "--mask_ratio=0.5", "--lr_schedule=cosine"])
    assert same_weights(tmp_path / "whole/ft.pt", tmp_path / "shown/pt.pt")


@pytest.mark.parametrize("extra", [[], ["--mask_ratio=0.5", "--mask_type=patch", "--class_cond", "--hflip"]])
def test_resuming_is_bit_identical_to_never_stopping(labelled, tmp_path, extra):
    name = "pt.pt" if extra else "ft.pt"
    common = [f"--data={labelled}", "--batch_size=10", "--lr_schedule=constant"] + TINY + extra
    train.main(common + [f"--out_dir={tmp_path}/whole", "--steps=9"])
    train.main(common + [f"--out_dir={tmp_path}/parts", "--steps=4"])
    train.main([f"--out_dir={tmp_path}/parts", "--resume", "--steps=9"])
    assert same_weights(tmp_path / "whole" / name, tmp_path / "parts" / name)
    a, b = (load_checkpoint(str(tmp_path / d / name))["optimizer"] for d in ("whole", "parts"))
    assert all(torch.equal(a["state"][i][k], b["state"][i][k]) for i in a["state"] for k in a["state"][i])


def test_sigterm_saves_and_the_resumed_run_is_the_undisturbed_one(dataset, tmp_path):
    args = [f"--data={dataset}", "--batch_size=12", "--steps=400", "--lr_schedule=constant"] + TINY
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        out = tmp_path / str(code)
        process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *args, f"--out_dir={out}"],
                                   stderr=subprocess.PIPE, text=True)
        while not (out / "log.jsonl").exists() or not losses(out):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(240) == code
        assert 0 < load_checkpoint(str(out / "ft.pt"))["step"] < 400
        train.main([f"--out_dir={out}", "--resume"])
    assert same_weights(tmp_path / "143/ft.pt", tmp_path / "130/ft.pt")


def test_a_second_signal_ends_a_long_step_at_once(dataset, tmp_path):
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), f"--data={dataset}", f"--out_dir={tmp_path}", *TINY,
         "--batch_size=100000", "--micro_batch=10"], stderr=subprocess.DEVNULL)  # a step of minutes
    while not (tmp_path / "log.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    time.sleep(3.5)
    assert process.poll() is None  # it waits for the end of the step
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == 143


def test_resume_finds_its_run_or_says_that_there_is_none(dataset, tmp_path, capsys):
    args = [f"--data={dataset}", f"--out_dir={tmp_path}", "--batch_size=12", "--steps=2"] + TINY
    assert "found no" in mistake(train.main, *args, "--resume")
    train.main(args + ["--resume", "auto"])
    train.main(args + ["--resume", "auto"])
    assert "resumed from step 2" in capsys.readouterr().err
    ckpt = tmp_path / "ft.pt"
    (tmp_path / "ft.prev.pt").write_bytes(ckpt.read_bytes())
    ckpt.write_bytes(ckpt.read_bytes()[:1000])
    train.main([f"--out_dir={tmp_path}", "--resume", "--steps=3"])
    assert "falling back" in capsys.readouterr().err
    assert load_checkpoint(str(ckpt))["step"] == 3


def test_a_fresh_run_keeps_the_checkpoint_whose_name_it_takes(dataset, tmp_path):
    args = [f"--data={dataset}", f"--out_dir={tmp_path}", "--batch_size=12"] + TINY
    train.main(args + ["--steps=1"])
    train.main(args + ["--steps=2"])
    assert load_checkpoint(str(tmp_path / "ft.old.pt"))["step"] == 1


def test_fine_tuning_at_another_resolution_and_with_other_classes(dataset, labelled, tmp_path, capsys):
    big = make_dataset(tmp_path / "big", size=32, classes=2)
    base = [f"--out_dir={tmp_path}", "--batch_size=12", "--steps=1"]
    train.main(base + [f"--data={labelled}", "--class_cond"] + TINY)
    (tmp_path / "ft.pt").rename(tmp_path / "first.pt")
    train.main(base + [f"--data={big}", f"--init_from={tmp_path}/first.pt", "--device=cpu"])
    assert "label embedding starts afresh" in capsys.readouterr().err
    second = load_checkpoint(str(tmp_path / "ft.pt"))["architecture"]
    assert (second["image_size"], second["num_classes"]) == (32, 2)
    train.main(base + [f"--data={dataset}", f"--init_from={tmp_path}/first.pt", "--device=cpu"])
    assert load_checkpoint(str(tmp_path / "ft.pt"))["architecture"]["num_classes"] == 0


@pytest.mark.parametrize("network", [["--decoder_depth=1", "--decoder_dim=16"],
                                     ["--dense_depth=1", "--decoder_depth=1"]])
def test_a_masked_run_with_a_decoder_learns_goes_on_and_is_sampled(labelled, tmp_path, network):
    args = [f"--data={labelled}", f"--out_dir={tmp_path}", "--batch_size=12"] + TINY
    train.main(args + ["--steps=150", "--lr=4e-3", "--mask_ratio=0.5", "--mask_type=patch", "--class_cond"] + network)
    curve = list(losses(tmp_path, "pt").values())
    assert np.mean(curve[-3:]) < 0.85 * np.mean(curve[:2])
    tune = [a for a in args if a.split("=")[0] not in ("--dim", "--depth", "--heads", "--patch_size")]
    train.main(tune + ["--steps=3", f"--init_from={tmp_path}/pt.pt"])
    stored = load_checkpoint(str(tmp_path / "ft.pt"))["architecture"]
    assert stored["decoder_depth"] == 1 and stored["num_classes"] == 3
    sample.main(["--ckpt", f"{tmp_path}/ft.pt", "--out", f"{tmp_path}/x.npz", "--steps=2", "--num=4",
                 "--cfg_scale=2", "--cfg_interval=0.1,10"])
    assert np.load(tmp_path / "x.npz")["arr_0"].shape == (4, 16, 16, 3)


def test_a_decoder_can_be_dropped_or_added_at_init_from_but_not_at_resume(dataset, tmp_path, capsys):
    args = [f"--data={dataset}", f"--out_dir={tmp_path}", "--batch_size=12"] + TINY
    train.main(args + ["--steps=2", "--mask_ratio=0.5", "--mask_type=patch", "--decoder_depth=1"])
    assert "decoder_depth is 0" in mistake(
        train.main, f"--out_dir={tmp_path}", "--resume", "--mask_ratio=0.5", "--decoder_depth=0")
    capsys.readouterr()
    train.main(args + ["--steps=0", f"--init_from={tmp_path}/pt.pt", "--decoder_depth=0"])
    assert "decoder_embed, mask_token" in capsys.readouterr().err
    masked, plain = (load_checkpoint(str(tmp_path / f"{n}.pt")) for n in ("pt", "ft"))
    assert "net.mask_token" not in plain["model"] and "net.mask_token" in masked["model"]
    for name in plain["model"]:
        assert torch.equal(plain["model"][name], masked["ema"][name]), name
    train.main(args + ["--steps=0", f"--init_from={tmp_path}/ft.pt", "--decoder_depth=2", "--mask_ratio=0.5",
                       "--mask_type=patch"])
    added = load_checkpoint(str(tmp_path / "pt.pt"))
    assert added["architecture"]["decoder_depth"] == 2
    assert torch.equal(added["model"]["net.embed.weight"], plain["ema"]["net.embed.weight"])


def test_the_reconstruction_loss_has_its_weight(dataset):
    images = np.load(dataset / "train.npy", mmap_mode="r")
    cfg, config = config_for(mask_ratio=0.5, mask_type="patch")
    config = ModelConfig(image_size=16, dim=32, depth=2, heads=2, decoder_depth=1)
    denoiser = Denoiser(config)
    torch.nn.init.normal_(denoiser.net.head.weight)
    batch = train.Stream(images, None, cfg, config).load(0)
    del batch["index"]
    none, one, two = (train.objective(denoiser, config, **batch, mae_weight=w) for w in (0, 1, 2))
    assert torch.allclose(two - none, 2 * (one - none), rtol=1e-4)
    noisy = batch["clean"] + batch["sigma"].view(-1, 1, 1) * batch["noise"]
    denoised = denoiser(noisy, batch["sigma"], batch["visible"])
    assert torch.allclose(one - none, reconstruction_loss(denoised, noisy, batch["visible"]), rtol=1e-4)


def test_latents_train_unscaled(tmp_path):
    data = make_dataset(tmp_path / "latents", size=8, channels=4, dtype=np.float32)
    train.main([f"--data={data}", f"--out_dir={tmp_path}", "--batch_size=12", "--steps=2"] + TINY)
    assert load_checkpoint(str(tmp_path / "ft.pt"))["architecture"]["channels"] == 4


def test_steps_that_are_not_finite_are_skipped_and_many_stop_the_run(dataset, tmp_path):
    data = make_dataset(tmp_path / "poison", size=8, channels=4, dtype=np.float32)
    images = np.load(data / "train.npy")
    images[0] = np.nan
    np.save(data / "train.npy", images)
    args = [f"--data={data}", f"--out_dir={tmp_path}", "--batch_size=6"] + TINY
    train.main(args + ["--steps=12"])  # one of four batches holds image 0
    state = load_checkpoint(str(tmp_path / "ft.pt"))
    assert all(t.isfinite().all() for k in ("model", "ema") for t in state[k].values())
    skipped = [r for r in map(json.loads, open(tmp_path / "log.jsonl")) if r.get("event") == "skipped"]
    assert len(skipped) == 3 and all(0 in r["index"] for r in skipped)
    images[:] = np.nan
    np.save(data / "train.npy", images)
    with pytest.raises(SystemExit) as e:
        train.main([f"--out_dir={tmp_path}", "--resume", "--steps=100"])
    assert e.value.code == 3
    assert load_checkpoint(str(tmp_path / "ft.pt"))["step"] == 12


@pytest.mark.parametrize("extra", [[], ["--micro_batch=2"]])
@pytest.mark.parametrize("network", [[], ["--decoder_depth=1", "--mask_ratio_end=0"]])
def test_two_processes_give_the_loss_curve_and_gradients_of_one(labelled, tmp_path, extra, network):
    args = [f"--data={labelled}", "--batch_size=12", "--steps=20", "--log_every=1", "--mask_ratio=0.5",
            "--mask_type=patch", "--class_cond", "--lr_schedule=constant", "--grad_clip=0",
            "--keep_every=1", *network] + TINY
    name = "ft" if network else "pt"
    train.main(args + [f"--out_dir={tmp_path}/one"])
    result = run("train.py", *args, *extra, f"--out_dir={tmp_path}/two", processes=2)
    assert result.returncode == 0, result.stderr
    one, two = losses(tmp_path / "one", name), losses(tmp_path / "two", name)
    assert list(one) == list(two) == list(range(1, 21))
    assert np.allclose(list(one.values()), list(two.values()), rtol=1e-4)
    # AdamW hides errors of scale; its first moment after one step is a tenth of the gradient itself.
    a, b = (load_checkpoint(str(tmp_path / d / f"{name}-0000001.pt"))["optimizer"]["state"] for d in ("one", "two"))
    for i in a:
        scale = a[i]["exp_avg"].abs().max()
        assert (a[i]["exp_avg"] - b[i]["exp_avg"]).abs().max() <= 1e-4 * scale
    norms = [[r["grad_norm"] for r in map(json.loads, open(tmp_path / d / "log.jsonl")) if "grad_norm" in r]
             for d in ("one", "two")]
    assert np.allclose(*norms, rtol=1e-3)


# -- mistakes -------------------------------------------------------------------------------------


def test_mistakes_on_the_command_line_get_a_sentence(dataset, labelled, tmp_path):
    base = [f"--data={dataset}", f"--out_dir={tmp_path}/out", "--batch_size=12", "--steps=1"] + TINY

    def says(*flags):
        return mistake(train.main, *base, *flags)

    assert "no such" in says(f"--data={tmp_path}/nowhere").lower() or "nowhere" in says(
        f"--data={tmp_path}/nowhere")
    assert "mask_ratio" in says("--mask_ratio=1.0") and "mask_ratio" in says("--mask_ratio=-0.5")
    assert "hides none" in says("--mask_ratio=0.01")
    assert "not divisible by patch_size" in says("--patch_size=5")
    assert "heads" in says("--heads=7")
    assert "not divisible by 1 processes x micro_batch 5" in says("--micro_batch=5")
    assert "at least 1" in says("--batch_size=0")
    assert "needs labels" in says("--class_cond")
    assert "no checkpoint at" in says(f"--init_from={tmp_path}/none.pt")
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04 cut off")
    assert "damaged" in says(f"--init_from={tmp_path}/cut.pt")
    assert not (tmp_path / "out").exists()


def test_unknown_and_ill_typed_flags_name_the_right_ones(capsys):
    for flag, expected in (("--mask_ration=0.5", "--mask_ratio"), ("--steps=many", "--steps"),
                           ("--mask-ratio=0.5", "--mask_ratio"), ("--mask_type=stripes", "block")):
        with pytest.raises(SystemExit) as e:
            train.main([flag])
        said = str(e.value.code) + capsys.readouterr().err
        assert e.value.code not in (0, 2) and expected in said and "Traceback" not in said


def test_another_architecture_than_the_checkpoints_names_the_field(dataset, tmp_path):
    base = [f"--data={dataset}", f"--out_dir={tmp_path}", "--batch_size=12", "--steps=1"]
    train.main(base + TINY)
    ckpt = tmp_path / "ft.pt"
    assert "depth is 3" in mistake(train.main, *base, f"--init_from={ckpt}", "--depth=3")
    assert "depth is 3" in mistake(train.main, f"--out_dir={tmp_path}", "--resume", "--depth=3")
    assert "dim is" in mistake(train.main, *base, f"--init_from={ckpt}", "--preset=dit-s")
    grey = make_dataset(tmp_path / "grey", channels=1)
    assert "channels is 1" in mistake(train.main, *base, f"--data={grey}", f"--init_from={ckpt}")
    train.main(base + [f"--init_from={ckpt}", "--depth=2", "--device=cpu"])  # what agrees is welcome


def test_a_mistake_on_the_command_line_has_exit_code_1_and_no_traceback(tmp_path):
    result = run("train.py", f"--data={tmp_path}/nowhere", f"--out_dir={tmp_path}")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_run_is_not_resumed_on_data_with_other_classes(labelled, tmp_path):
    other = make_dataset(tmp_path / "other", classes=2)
    args = [f"--out_dir={tmp_path}", "--batch_size=12", "--steps=1"]
    train.main(args + [f"--data={labelled}", "--class_cond"] + TINY)
    assert "2 classes, but the run has 3" in mistake(train.main, *args, f"--data={other}", "--resume")


# -- two processes and their ends -----------------------------------------------------------------


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
def test_a_killed_process_ends_the_others_with_a_message(dataset, tmp_path):
    launcher, children = start_two(dataset, tmp_path)
    assert len(children) == 2
    os.kill(children[1], signal.SIGKILL)
    _, errors = launcher.communicate(timeout=60)
    assert launcher.returncode != 0
    assert "lost touch with another one" in errors or "Sending process" in errors
    assert str(children[1]) in errors and "SIGKILL" in errors  # torchrun names the one that failed


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="finds the processes through /proc")
def test_sigterm_to_torchrun_saves_once_on_all_processes(dataset, tmp_path, capsys):
    launcher, children = start_two(dataset, tmp_path)
    launcher.send_signal(signal.SIGTERM)
    _, errors = launcher.communicate(timeout=60)
    assert launcher.returncode != 0 and errors.count("go on with --resume") == 1
    step = load_checkpoint(str(tmp_path / "ft.pt"))["step"]
    assert step > 0 and not (tmp_path / "ft.prev.pt").exists()
    train.main([f"--out_dir={tmp_path}", "--resume", f"--steps={step + 1}"])
    assert f"resumed from step {step}" in capsys.readouterr().err


# -- what a resumed or a fresh run must not take over ---------------------------------------------


def test_optimizer_settings_changed_at_resume_take_effect(dataset, tmp_path):
    args = [f"--data={dataset}", f"--out_dir={tmp_path}", "--batch_size=12"] + TINY
    train.main(args + ["--steps=1"])
    train.main([f"--out_dir={tmp_path}", "--resume", "--steps=2", "--weight_decay=0.5", "--beta2=0.9"])
    group = load_checkpoint(str(tmp_path / "ft.pt"))["optimizer"]["param_groups"][0]
    assert group["weight_decay"] == 0.5 and tuple(group["betas"]) == (0.9, 0.9)


def test_a_fresh_run_leaves_no_checkpoint_of_the_old_one_to_resume(dataset, tmp_path):
    args = [f"--data={dataset}", f"--out_dir={tmp_path}", "--batch_size=12"] + TINY
    train.main(args + ["--steps=2", "--save_every=1"])
    assert (tmp_path / "ft.prev.pt").exists()
    train.main(args + ["--steps=1"])
    assert not (tmp_path / "ft.prev.pt").exists() and (tmp_path / "ft.prev.old.pt").exists()


def test_a_moved_run_goes_on_where_it_is_now(dataset, tmp_path):
    args = [f"--data={dataset}", f"--out_dir={tmp_path}/here", "--batch_size=12", "--steps=1"] + TINY
    train.main(args)
    (tmp_path / "here").rename(tmp_path / "there")
    train.main([f"--out_dir={tmp_path}/there", "--resume", "--steps=2"])
    assert not (tmp_path / "here").exists()
    assert load_checkpoint(str(tmp_path / "there/ft.pt"))["step"] == 2
    for line in open(tmp_path / "there/log.jsonl"):
        json.loads(line, parse_constant=lambda c: pytest.fail(f"{c} is no JSON"))
