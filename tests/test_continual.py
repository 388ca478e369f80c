"""Continual learning: replay, pulls and distillation against formulas."""

import json
import math
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import few_images, make_dataset, mistake, TINY

import model
import sample
import train
from model import Denoiser, ModelConfig, load_checkpoint, sample_visible
from model import Images

CONFIG = ModelConfig(image_size=16, dim=32, depth=2, heads=2)
CPU, PLAIN = torch.device("cpu"), torch.autocast("cpu", enabled=False)
MASKED = ["--mask_ratio=0.5", "--mask_type=patch"]


@pytest.fixture(autouse=True)
def fast():
    with few_images():
        yield


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Two prepared sets, a model that knows the first, and one that went on from there."""
    folder = tmp_path_factory.mktemp("tasks")
    for i, n in enumerate((24, 36)):
        make_dataset(folder / f"set{i}", n=n, seed=i)
    base = [f"--data={folder}/set0", "--batch_size=12", "--steps=6"]
    train.main([*base, f"--out_dir={folder}/first", *TINY])
    train.main([*base, f"--out_dir={folder}/second", f"--init_from={folder}/first/ft.pt", *TINY[4:]])
    return folder


def tune(tasks, name, *flags, data="set1"):
    """Fine-tune on a set; returns the checkpoint."""
    train.main([f"--data={tasks}/{data}", f"--out_dir={tasks}/{name}", "--batch_size=12", "--steps=5",
                f"--init_from={tasks}/first/ft.pt", "--log_every=1", *TINY[4:], *flags])
    (path,) = (tasks / name).glob("??.pt")
    return load_checkpoint(str(path))


def losses(folder):
    return [r["loss"] for r in map(json.loads, open(folder / "log.jsonl")) if "images_per_s" in r]


def same(a, b):
    return all(torch.equal(a[k][n], b[k][n]) for k in ("model", "ema") for n in a[k])


def stream_of(tasks, new, old, *flags):
    cfg = train.parse(["--device=cpu", "--batch_size=10", "--steps=5", *flags])[0]
    new, old = ([f"{tasks}/{name}" for name in (sets or "").split(",") if name] for sets in (new, old))
    images = Images(",".join(new + old), "train", 4)
    return train.Stream(images, len(Images(",".join(new))), cfg, CONFIG, CPU)


# -- replay ---------------------------------------------------------------------------------------


def test_replay_with_coefficient_0_is_fine_tuning_bit_for_bit(tasks):
    plain = tune(tasks, "plain")
    assert same(plain, tune(tasks, "zero", f"--replay={tasks}/set0", "--replay_coef=0"))
    assert not same(plain, tune(tasks, "one", f"--replay={tasks}/set0"))


def test_replay_of_everything_is_training_on_the_old_set(tasks):
    everything = tune(tasks, "all", f"--replay={tasks}/set0", "--replay_frac=1")
    assert same(everything, tune(tasks, "old", data="set0"))


def test_a_batch_has_its_share_of_old_images_and_they_weigh_their_coefficient(tasks):
    stream = stream_of(tasks, "set0", "set1", "--replay_frac=0.3", "--replay_coef=0.1")
    batches = [stream.load(n) for n in range(24)]
    # the loss: mean of the new ones + 0.1 * mean of the old ones
    assert torch.allclose(stream.weight, torch.tensor([10 / 7] * 7 + [0.1 * 10 / 3] * 3))
    new, old = (np.concatenate([b["index"][part] for b in batches]) for part in (slice(0, 7), slice(7, 10)))
    assert (np.bincount(new) == 7).all() and len(np.bincount(new)) == 24  # once an epoch
    assert (np.bincount(old)[24:] == 2).all() and (np.bincount(old)[:24] == 0).all()
    images = [np.load(f"{tasks}/set{i}/train.npy") for i in (0, 1)]
    for i, clean in zip(batches[0]["index"], batches[0]["clean"]):
        image = images[0][i] if i < 24 else images[1][i - 24]
        assert np.allclose(clean[0], image[:4, :4].reshape(-1) / 127.5 - 1, atol=1e-6)


def test_a_joint_run_draws_evenly_from_the_union(tasks):
    stream = stream_of(tasks, "set0,set1", None)
    assert sorted(np.concatenate([stream.load(n)["index"] for n in range(6)])) == list(range(60))


# -- pulls to where the weights were --------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0, 0.5])
@pytest.mark.parametrize("network", [{}, dict(route=(1, 2)), dict(num_classes=2)], ids=str)
def test_fisher_information_equals_the_squared_gradients_of_single_images(ratio, network):
    torch.manual_seed(0)
    config = ModelConfig(image_size=16, dim=32, depth=2, heads=2, **network)
    denoiser = Denoiser(config)
    for p in denoiser.parameters():
        torch.nn.init.normal_(p, std=0.1)
    visible = sample_visible(6, 4, ratio)
    k = 16 if visible is None or config.route else visible.shape[1]
    batch = dict(clean=torch.randn(6, k, 48), noise=torch.randn(6, k, 48), sigma=torch.rand(6) + 0.2,
                 visible=visible, labels=torch.arange(6) % 3 - 1 if config.num_classes else None, index=None)
    ours = model.fisher_information(denoiser, config, batch, PLAIN)

    parameters, expected = list(denoiser.parameters()), [0] * len(ours)
    for i in range(6):  # the formula, for one image
        clean, noise, sigma = (batch[name][i] for name in ("clean", "noise", "sigma"))
        shown, label = (None if t is None else t[i : i + 1] for t in (visible, batch["labels"]))
        denoised = denoiser((clean + sigma * noise)[None], sigma[None], shown, label)[0]
        loss = ((sigma**2 + 0.25) / (0.5 * sigma) ** 2) * ((denoised - clean) ** 2).mean()
        gradients = torch.autograd.grad(loss, parameters)
        expected = [e + g**2 / 6 for e, g in zip(expected, gradients)]
    for a, b in zip(ours, expected):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-7 * b.max().item())


def test_a_step_pulls_by_the_gradient_of_the_penalty_whatever_the_clipping(tasks, monkeypatch):
    """theta' = theta - lr (gradient + the gradient of 1/2 sum F (theta - theta*)^2)."""
    g, asked = torch.Generator().manual_seed(0), []

    def known(anchor, config, batch, autocast):
        asked.append(batch)
        return [torch.rand(p.shape, generator=g) for p in anchor.parameters()]

    monkeypatch.setattr(train, "fisher_information", known)
    monkeypatch.setattr(train, "configure_optimizers", lambda denoiser, cfg: [
        torch.optim.SGD([dict(params=list(denoiser.parameters()), initial_lr=cfg.lr)], lr=cfg.lr)])
    flags = ["--steps=1", "--warmup=0", "--lr=0.5", "--lr_schedule=constant", "--grad_clip=0.01", *MASKED]
    free = tune(tasks, "one step", *flags)["model"]
    pulled = tune(tasks, "pulled", *flags, "--l2=0.2", "--ewc=0.3", f"--anchor={tasks}/second/ft.pt",
                  f"--ewc_data={tasks}/set0,{tasks}/set1")["model"]
    start, anchor = (load_checkpoint(f"{tasks}/{name}/ft.pt")["model"] for name in ("first", "second"))
    g.manual_seed(0)
    for n, theta in start.items():
        theta = theta.clone().requires_grad_()
        strength = 0.2 + 0.3 * torch.rand(theta.shape, generator=g)
        penalty = (strength * (theta - anchor[n]) ** 2).sum() / 2
        (gradient,) = torch.autograd.grad(penalty, theta)
        assert gradient.abs().sum() > 0
        assert torch.allclose(free[n] - pulled[n], 0.5 * gradient, atol=1e-6), n
    (batch,) = asked  # of whole images of both sets, although the run is masked
    assert batch["visible"] is None and batch["clean"].shape[1:] == (16, 48)
    assert set(batch["index"]) == set(range(60))


@pytest.mark.parametrize("how", ["l2=100", "ewc=1e6"])  # importances are small numbers
def test_pulls_hold_the_weights_and_resume_exactly(tasks, how):
    start = load_checkpoint(f"{tasks}/first/ft.pt")["ema"]

    def distance(state):
        return sum((f * (state["model"][n] - start[n]) ** 2).sum() for n, f in importance.items()).sqrt()

    importance = dict.fromkeys(start, 1.0)
    if how.startswith("ewc"):
        anchor, _ = sample.load_denoiser(f"{tasks}/first/ft.pt")
        batch = stream_of(tasks, "set0", None, "--batch_size=512").load(0)
        fisher = train.fisher_information(anchor.requires_grad_(True), CONFIG, batch, PLAIN)
        importance = dict(zip(start, fisher))
    held = tune(tasks, how, f"--{how}", "--keep_every=3")
    assert distance(held) < 0.5 * distance(tune(tasks, "free"))
    (tasks / how / "ft-0000003.pt").replace(tasks / how / "ft.pt")
    train.main([f"--out_dir={tasks}/{how}", "--resume"])
    assert same(held, load_checkpoint(str(tasks / how / "ft.pt")))


def test_what_begins_afresh_is_not_pulled(tmp_path):
    for classes in (2, 3):
        make_dataset(tmp_path / f"of{classes}", classes=classes)
    train.main([f"--data={tmp_path}/of2", f"--out_dir={tmp_path}", "--steps=1", "--batch_size=12", "--class_cond",
                *TINY])
    grown = Denoiser(ModelConfig(image_size=16, dim=32, depth=3, heads=2, num_classes=3))
    cfg = Namespace(**vars(train.parse(["--device=cpu", f"--init_from={tmp_path}/ft.pt"])[0]) | dict(l2=1.0, ewc=1.0))
    weights = {id(weight) for weight, _, _ in train.pull_of(cfg, grown, CPU, PLAIN)}
    free = {n for n, p in grown.named_parameters() if id(p) not in weights}
    assert free == {"net.labels.weight", *(n for n, _ in grown.named_parameters() if "blocks.2" in n)}


# -- distillation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0, 0.5])
def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(tasks, ratio):
    torch.manual_seed(0)
    student, teacher = Denoiser(CONFIG), Denoiser(CONFIG).requires_grad_(False)
    torch.nn.init.normal_(student.net.head.weight, std=0.1)
    teacher.load_state_dict(student.state_dict())
    stream = stream_of(tasks, "set0", "set1", "--replay_frac=1", f"--mask_ratio={ratio}", "--mask_type=patch")
    batch = stream.load(0)
    del batch["index"]
    target = train.teach(teacher, stream.n_new, **batch)
    loss = model.diffusion_objective(student, CONFIG, **batch, target=target)
    assert loss.abs().max() < 1e-10
    assert all(g.abs().max() < 1e-6 for g in torch.autograd.grad(loss.sum(), list(student.parameters())))


@pytest.mark.parametrize("micro", [1, 2, 4, 12])
@pytest.mark.parametrize("flags", [[], MASKED])
def test_old_images_aim_at_the_teachers_answer_and_new_ones_at_themselves(tasks, monkeypatch, micro, flags):
    parts, objective = [], train.diffusion_objective

    def recorded(*args, **batch):
        if torch.is_grad_enabled():
            parts.append(batch)
        return objective(*args, **batch)

    monkeypatch.setattr(train, "diffusion_objective", recorded)
    name = f"taught{micro}{bool(flags)}"
    tune(tasks, name, f"--replay={tasks}/set0", "--replay_frac=0.4", "--replay_coef=0.3", "--steps=1", *flags,
         f"--distill_from={tasks}/second/ft.pt", f"--micro_batch={micro}")
    assert len(parts) == 12 // micro
    batch = {k: None if parts[0][k] is None else torch.cat([part[k] for part in parts])
             for k in ("clean", "noise", "sigma", "visible", "target")}
    teacher, _ = sample.load_denoiser(f"{tasks}/second/ft.pt")
    assert torch.equal(batch["target"][:7], batch["clean"][:7])
    for i in range(7, 12):  # five of twelve are old
        noisy = batch["clean"][i] + batch["sigma"][i] * batch["noise"][i]
        shown = None if batch["visible"] is None else batch["visible"][i : i + 1]
        answer = teacher(noisy[None], batch["sigma"][i : i + 1], shown)[0]
        assert torch.allclose(batch["target"][i], answer, atol=1e-5)
    assert not torch.allclose(batch["target"][7:], batch["clean"][7:], atol=0.1)
    # The loss: the mean of the new ones and 0.3 times that of the old ones, in whatever parts.
    student, _ = sample.load_denoiser(f"{tasks}/first/ft.pt", "raw")
    del batch["target"], parts[:]
    x = batch["clean"] + batch["sigma"].view(-1, 1, 1) * batch["noise"]
    target = torch.cat([batch["clean"][:7], teacher(x, batch["sigma"], batch["visible"])[7:]])
    error = (student(x, batch["sigma"], batch["visible"]) - target).square().mean(dim=(1, 2))
    each = (batch["sigma"] ** 2 + 0.25) / (0.5 * batch["sigma"]) ** 2 * error
    assert losses(tasks / name) == pytest.approx([(each[:7].mean() + 0.3 * each[7:].mean()).item()], rel=1e-4)


@pytest.mark.parametrize("network", [["--decoder_depth=1"], ["--depth=3", "--route=1,2"]])
def test_classes_networks_replay_distillation_and_pulls_go_together(tmp_path, network):
    for i in (0, 1):
        make_dataset(tmp_path / f"c{i}", classes=3, seed=i)
    base = ["--batch_size=12", "--steps=3", *MASKED, "--class_cond"]
    train.main([f"--data={tmp_path}/c0", f"--out_dir={tmp_path}/a", *base, *TINY, *network])
    train.main([f"--data={tmp_path}/c1", f"--out_dir={tmp_path}/b", *base, *TINY[4:], f"--init_from={tmp_path}/a/pt.pt",
                f"--replay={tmp_path}/c0", "--replay_frac=0.25", f"--distill_from={tmp_path}/a/pt.pt", "--ewc=1",
                "--l2=0.1", "--micro_batch=4", "--log_every=1"])
    assert len(losses(tmp_path / "b")) == 3 and all(map(math.isfinite, losses(tmp_path / "b")))
    assert load_checkpoint(str(tmp_path / "b/pt.pt"))["architecture"]["num_classes"] == 3


# -- mistakes -------------------------------------------------------------------------------------


def test_sets_and_teachers_that_do_not_fit_are_refused(tasks, tmp_path):
    base = [f"--data={tasks}/set0", f"--out_dir={tmp_path}", "--batch_size=12", "--steps=1", *TINY, *MASKED]
    for name, how in (("small", dict(size=8)), ("large", dict(size=32)), ("grey", dict(channels=1))):
        other = make_dataset(tmp_path / name, **how)
        assert str(other) in mistake(train.main, *base, f"--data={tasks}/set0,{other}")
        assert str(other) in mistake(train.main, *base, f"--replay={other}")
    teacher = f"--distill_from={tasks}/first/ft.pt"
    assert "--replay" in mistake(train.main, *base, teacher)
    assert "--replay_frac" in mistake(train.main, *base, f"--replay={tasks}/set1", "--replay_frac=0.01")
    large = f"--data={tmp_path}/large", f"--replay={tmp_path}/large"  # the teacher's are of another size
    assert "first/ft.pt" in mistake(train.main, *base, *large, teacher)


def test_a_teacher_that_takes_other_patches_of_a_masked_image_is_refused(tasks, tmp_path):
    """With a decoder all patches go in, without one the visible ones alone; of whole images both take all."""
    base = [f"--data={tasks}/set0", f"--replay={tasks}/set1", "--batch_size=12", "--steps=1"]
    decoder = ["--decoder_depth=1", "--decoder_dim=16", "--decoder_heads=1"]
    train.main([f"--data={tasks}/set0", f"--out_dir={tmp_path}/a", "--batch_size=12", "--steps=1", *TINY, *decoder])
    for kind, teacher in ([], f"{tmp_path}/a/ft.pt"), (decoder, f"{tasks}/first/ft.pt"):
        args = [*base, f"--out_dir={tmp_path}/b", *TINY, *kind, f"--distill_from={teacher}"]
        assert teacher in mistake(train.main, *args, *MASKED)
        train.main(args)
    patches = [*base, f"--out_dir={tmp_path}/c", *TINY, "--patch_size=2"]  # patches of other sizes are none, either
    assert "first/ft.pt" in mistake(train.main, *patches, f"--distill_from={tasks}/first/ft.pt")


def test_a_consistency_model_is_no_teacher(tasks, tmp_path):
    """It answers with an image that may lie behind the noise, not with the mean of all that may."""
    tune(tasks, "consistent", "--loss=consistency", "--steps=1")
    consistent, diffusion = f"{tasks}/consistent/cm.pt", f"{tasks}/first/ft.pt"
    base = [f"--data={tasks}/set0", f"--replay={tasks}/set1", f"--out_dir={tmp_path}", "--batch_size=12", "--steps=1"]
    assert consistent in mistake(train.main, *base, *TINY, f"--distill_from={consistent}")
    tuning = ["--loss=consistency", f"--init_from={diffusion}", f"--distill_from={diffusion}"]
    assert diffusion in mistake(train.main, *base, *TINY[4:], *tuning)  # nor does its loss know targets
    assert consistent in mistake(train.main, *base, *TINY[4:], *tuning[:2], f"--distill_from={consistent}")
