"""Continual learning: replay, pulls and distillation against formulas."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import TINY, few_images, make_dataset, mistake

import model
import sample
import train
from model import Denoiser, ModelConfig, load_checkpoint, patchify
from prepare_data import Images

CONFIG = ModelConfig(image_size=16, dim=32, depth=2, heads=2)
CPU, PLAIN = torch.device("cpu"), torch.autocast("cpu", enabled=False)
MASKED = ["--mask_ratio=0.5", "--mask_type=patch"]


@pytest.fixture(autouse=True)
def fast():
    with few_images():
        yield


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Two prepared sets, a model that knows the first, and one that was trained on from there."""
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


def stream_of(tasks, new, *flags, old=None):
    """The stream of new sets, and perhaps one old set."""
    new = ",".join(f"{tasks}/{name}" for name in new.split(","))
    folders = f"{new},{tasks}/{old}" if old else new
    replay = [f"--replay={tasks}/{old}"] if old else []
    cfg, _, _ = train.parse(["--device=cpu", "--batch_size=10", "--steps=5", *replay, *flags])
    return train.Stream(Images(folders, "train", 4), len(Images(new)), cfg, CONFIG, CPU)


def scaled(tasks, *sets):
    """All patches of the images of some sets, (N, 16, 48), in [-1, 1]."""
    images = np.concatenate([np.load(f"{tasks}/{name}/train.npy") for name in sets])
    return patchify(torch.from_numpy(images / 127.5 - 1), 4).float()


# ---- Replay.


def test_replayed_images_of_coefficient_0_teach_nothing(tasks):
    make_dataset(tasks / "others", n=24, seed=5)
    replays = [tune(tasks, f"zero{old}", f"--replay={tasks}/{old}", "--replay_coef=0") for old in ("set0", "others")]
    assert same(*replays)  # bit for bit, whatever they are
    assert not same(replays[0], tune(tasks, "one", f"--replay={tasks}/set0"))


def test_replay_of_everything_is_training_on_the_old_set(tasks):
    everything = tune(tasks, "all", f"--replay={tasks}/set0", "--replay_frac=1")
    assert same(everything, tune(tasks, "old", data="set0"))


def test_a_batch_has_its_share_of_old_images_and_they_weigh_their_coefficient(tasks):
    stream = stream_of(tasks, "set0", "--replay_frac=0.3", "--replay_coef=0.1", old="set1")
    # The loss: the mean of the new ones + 0.1 * the mean of the old ones.
    expected = torch.tensor([10 / 7] * 7 + [0.1 * 10 / 3] * 3)
    assert torch.allclose(stream.load(0)["weight"], expected)
    index = np.stack([stream.index(step) for step in range(24)])
    new, old = index[:, :7], index[:, 7:]
    assert np.bincount(new.flatten()).tolist() == [7] * 24  # once an epoch
    assert np.bincount(old.flatten()).tolist() == [0] * 24 + [2] * 36
    assert torch.allclose(stream.load(0)["clean"], scaled(tasks, "set0", "set1")[index[0]], atol=1e-6)


def test_a_joint_run_draws_evenly_from_the_union(tasks):
    stream = stream_of(tasks, "set0,set1")
    assert sorted(np.concatenate([stream.index(n) for n in range(6)])) == list(range(60))


class OneSet:
    """A class of data that gives the same images whatever folders it is given."""

    folder = None
    latent = None

    def __init__(self, folders, *args):
        self.images = Images(str(self.folder), *args)
        self.labels = self.images.labels
        self.meta = self.images.meta | dict(latent=self.latent)

    def __len__(self):
        return len(self.labels)

    def read(self, index, visible, flip):
        return self.images.read(index, visible, flip)


def test_a_replay_without_old_images_is_refused(tasks, tmp_path, monkeypatch):
    base = [f"--data={tasks}/set0", f"--out_dir={tmp_path}", "--batch_size=12", "--steps=1", *TINY]
    replay = f"--replay={tasks}/set1"
    for fraction in "0", "0.01", "1.1":
        assert "--replay" in mistake(train.main, *base, replay, f"--replay_frac={fraction}")

    class Mine(OneSet):  # knows nothing of --replay
        folder = tasks / "set0"

    monkeypatch.setattr(train, "Images", Mine)
    train.main(base)
    assert "6 of 0" in mistake(train.main, *base, "--force", replay)


LATENT = [[0.5] * 3, [0.2] * 3]  # mean and deviation of three channels


@pytest.mark.parametrize("scale, given, expected", [
    *[(None, given, "uint8") for given in ("float16", "float32", "float64", "int64")],
    *[(LATENT, given, "float32") for given in ("uint8", "float16", "float64")]])
def test_data_of_an_unexpected_kind_are_refused(tasks, tmp_path, monkeypatch, scale, given, expected):
    """Numbers in [0, 1], say: they would be trained on, but on another scale than noise levels are for."""

    class Mine(OneSet):
        folder = tasks / "set0"
        latent = scale

        def read(self, index, visible, flip):
            return (super().read(index, visible, flip) / 255).astype(given)

    monkeypatch.setattr(train, "Images", Mine)
    sentence = mistake(train.main, f"--out_dir={tmp_path}", "--batch_size=12", "--steps=1", *TINY)
    assert given in sentence and expected in sentence


# ---- Pulls to where the weights were.


@pytest.mark.parametrize("network", [{}, dict(route=(1, 2)), dict(num_classes=2), dict(decoder_depth=1)], ids=str)
def test_fisher_information_equals_the_squared_gradients_of_single_images(network):
    torch.manual_seed(0)
    denoiser = Denoiser(ModelConfig(image_size=16, dim=32, depth=2, heads=2, **network))
    for p in denoiser.parameters():
        torch.nn.init.normal_(p, std=0.1)
    batch = dict(clean=torch.randn(6, 16, 48), noise=torch.randn(6, 16, 48), sigma=torch.rand(6) + 0.2)
    if "num_classes" in network:
        batch["labels"] = torch.arange(6) % 3 - 1
    ours = model.fisher_information(denoiser, batch, PLAIN)

    named = dict(denoiser.named_parameters())
    expected = dict.fromkeys(named, 0)
    for i in range(6):  # the formula, for one image
        clean, noise, sigma = (batch[name][i] for name in ("clean", "noise", "sigma"))
        label = batch["labels"][i : i + 1] if "labels" in batch else None
        denoised = denoiser((clean + sigma * noise)[None], sigma[None], labels=label)[0]
        loss = ((sigma**2 + 0.25) / (0.5 * sigma) ** 2) * ((denoised - clean) ** 2).mean()
        for name, gradient in zip(named, torch.autograd.grad(loss, named.values())):
            expected[name] = expected[name] + gradient**2 / 6
    assert ours.keys() == expected.keys()
    for name, f in expected.items():
        assert torch.allclose(ours[name], f, rtol=1e-3, atol=1e-7 * f.max().item()), name


def test_a_step_pulls_by_the_gradient_of_the_penalty_whatever_the_clipping(tasks, monkeypatch):
    """theta' = theta - lr (gradient + the gradient of 1/2 sum F (theta - theta*)^2)."""
    g, asked = torch.Generator().manual_seed(0), []

    def known(anchor, batch, autocast):
        asked.append(batch)
        return {name: torch.rand(p.shape, generator=g) for name, p in anchor.named_parameters()}

    monkeypatch.setattr(train, "fisher_information", known)
    monkeypatch.setattr(train, "configure_optimizers",
                        lambda denoiser, cfg: [torch.optim.SGD(denoiser.named_parameters(), lr=cfg.lr)])
    flags = ["--warmup=0", "--lr=0.5", "--lr_schedule=constant", "--grad_clip=0.01", *MASKED]
    start = load_checkpoint(f"{tasks}/first/ft.pt")["model"]
    # The first step starts where the pull leads to, so that the second is the first to be pulled.
    moved = tune(tasks, "one step", *flags, "--steps=1")["model"]
    free = tune(tasks, "two steps", *flags, "--steps=2")["model"]
    pulled = tune(tasks, "pulled", *flags, "--steps=2", "--l2=0.2", "--ewc=0.3",
                  f"--ewc_data={tasks}/set0,{tasks}/set1")["model"]
    g.manual_seed(0)
    for name, theta in moved.items():
        theta = theta.clone().requires_grad_()
        strength = 0.2 + 0.3 * torch.rand(theta.shape, generator=g)
        penalty = (strength * (theta - start[name]) ** 2).sum() / 2
        (gradient,) = torch.autograd.grad(penalty, theta)
        assert gradient.abs().sum() > 0
        assert torch.allclose(free[name] - pulled[name], 0.5 * gradient, atol=1e-6), name
    (batch,) = asked  # of whole images of both sets, although the run is masked
    assert "visible" not in batch
    assert torch.allclose(batch["clean"], scaled(tasks, "set0", "set1"), atol=1e-6)


@pytest.mark.parametrize("how", ["l2=100", "ewc=1e6"])  # importances are small numbers
def test_pulls_hold_the_weights_and_resume_exactly(tasks, how):
    anchor, stored = sample.load_denoiser(f"{tasks}/first/ft.pt", "raw")
    start = stored["model"]
    importance = dict.fromkeys(start, 1.0)
    if how.startswith("ewc"):
        batch = train.fixed_batch(Images(f"{tasks}/set0", "train", 4), CONFIG, "cpu")
        importance = train.fisher_information(anchor.requires_grad_(True), batch, PLAIN)

    def distance(checkpoint):
        return sum((f * (checkpoint["model"][n] - start[n]) ** 2).sum() for n, f in importance.items()).sqrt()

    held = tune(tasks, how, f"--{how}", "--keep_every=3")
    assert distance(held) < 0.5 * distance(tune(tasks, f"free of {how}"))
    (tasks / how / "ft-0000003.pt").replace(tasks / how / "ft.pt")
    train.main([f"--out_dir={tasks}/{how}", "--resume"])
    assert same(held, load_checkpoint(str(tasks / how / "ft.pt")))


def name_classes(folder, *names):
    path = folder / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(class_names=names)))


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """A model of the classes ant and bee, and a set of the classes cat, bee and ant."""
    folder = tmp_path_factory.mktemp("grown")
    name_classes(make_dataset(folder / "two", classes=2), "ant", "bee")
    name_classes(make_dataset(folder / "three", classes=3), "cat", "bee", "ant")
    train.main([f"--data={folder}/two", f"--out_dir={folder}/out", "--steps=1", "--batch_size=12", "--class_cond",
                *TINY])
    path = f"{folder}/out/ft.pt"
    checkpoint = torch.load(path)
    for weight in checkpoint["model"].values():  # or most of the information would be zero
        torch.nn.init.normal_(weight, std=0.1)
    torch.save(checkpoint, path)
    return folder


def penalties_of(folder, *flags):
    cfg, checkpoint, _ = train.parse([f"--data={folder}/three", f"--out_dir={folder}/new", "--device=cpu",
                                      f"--init_from={folder}/out/ft.pt", "--dtype=float32", *flags])
    images, denoiser, _ = train.build(cfg, checkpoint, False, CPU)
    names = images.meta["class_names"]
    return names, train.weight_penalties(cfg, denoiser.config, names, CPU, PLAIN)


def test_a_new_class_is_pulled_to_zero_by_l2_alone_and_old_ones_to_where_they_were(grown):
    start = load_checkpoint(f"{grown}/out/ft.pt")["model"]
    names, penalties = penalties_of(grown, "--l2=0.5", "--ewc=2")
    assert penalties.keys() == start.keys()
    goal, strength = penalties.pop("net.label_embed.weight")
    ant, bee, null = start["net.label_embed.weight"]
    rows = dict(zip(names, goal)) | {"none": goal[-1]}
    for name, expected in dict(ant=ant, bee=bee, cat=torch.zeros(32), none=null).items():
        assert torch.equal(rows[name], expected), name
    rows = dict(zip(names, strength))
    assert (rows["cat"] == 0.5).all()  # as the old images say nothing about it
    assert (rows["ant"] > 0.5).any() and (rows["bee"] > 0.5).any()
    for name, (goal, strength) in penalties.items():
        assert torch.equal(goal, start[name]) and (strength >= 0.5).all() and (strength > 0.5).any(), name


def test_ewc_holds_the_null_class_too(grown):
    """It is trained by --label_dropout, and guidance needs it."""
    _, penalties = penalties_of(grown, "--ewc=2")
    _, strength = penalties["net.label_embed.weight"]
    assert (strength[-1] > 0).any()


def test_a_run_with_a_new_class_is_pulled(grown):
    base = [f"--data={grown}/three", f"--init_from={grown}/out/ft.pt", "--steps=30", "--batch_size=12", *TINY[4:]]
    tables = []
    for name, flags in (("free", []), ("held", ["--l2=1000"])):
        train.main([*base, f"--out_dir={grown}/{name}", *flags])
        tables.append(load_checkpoint(f"{grown}/{name}/ft.pt")["model"]["net.label_embed.weight"])
    ant, bee, null = load_checkpoint(f"{grown}/out/ft.pt")["model"]["net.label_embed.weight"]
    goal = torch.stack([ant, bee, torch.zeros(32), null])  # the new class has the number after the old ones
    free, held = [(table - goal).norm(dim=1) for table in tables]
    assert (held < 0.6 * free).all()


@pytest.mark.parametrize("flags, fresh", [
    (["--depth=3"], ["blocks.2.qkv.weight", "blocks.2.fc1.bias"]),
    (["--patch_size=2"], ["patch_embed.weight", "final_linear.weight", "final_linear.bias"]),
    (["--dim=64"], ["blocks.0.qkv.weight", "label_embed.weight"]),
    (["--decoder_depth=1"], ["mask_token", "decoder.0.qkv.weight"])])
def test_weights_of_another_shape_are_named_instead_of_pulled(grown, flags, fresh):
    base = [f"--data={grown}/three", f"--init_from={grown}/out/ft.pt", f"--out_dir={grown}/none", "--steps=1",
            "--batch_size=12", *TINY[4:], *flags]
    for pull in "--l2=1", "--ewc=1":
        sentence = mistake(train.main, *base, pull)
        assert all(f"'{name}'" in sentence for name in fresh)
        assert ("label_embed" in sentence) == ("--dim=64" in flags)
    assert not list(grown.glob("none/*.pt"))


def test_pulls_need_a_model_to_pull_to(tasks, tmp_path):
    for pull in "--l2=1", "--ewc=1":
        args = [f"--data={tasks}/set0", f"--out_dir={tmp_path}", "--batch_size=12", *TINY, pull]
        assert "--init_from" in mistake(train.main, *args)


def test_ewc_from_a_shared_checkpoint_asks_for_the_data(tasks, tmp_path):
    """A checkpoint that was stripped of its settings does not say what it was trained on."""
    whole = load_checkpoint(f"{tasks}/first/ft.pt")
    shared = {name: whole[name] for name in ("model", "architecture", "noise", "network")}
    torch.save(shared, tmp_path / "shared.pt")
    args = [f"--data={tasks}/set1", f"--out_dir={tmp_path}", f"--init_from={tmp_path}/shared.pt", "--batch_size=12",
            "--steps=1", *TINY[4:], "--ewc=1"]
    assert "--ewc_data" in mistake(train.main, *args)
    train.main([*args, f"--ewc_data={tasks}/set0"])


# ---- Distillation.


@pytest.mark.parametrize("ratio", [0, 0.5])
def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(tasks, ratio):
    torch.manual_seed(0)
    student, teacher = Denoiser(CONFIG), Denoiser(CONFIG).requires_grad_(False)
    torch.nn.init.normal_(student.net.final_linear.weight, std=0.1)
    teacher.load_state_dict(student.state_dict())
    stream = stream_of(tasks, "set0", "--replay_frac=1", f"--mask_ratio={ratio}", "--mask_type=patch", old="set1")
    batch = stream.load(0)
    batch["target"] = model.distill_targets(teacher, batch, stream.local_new)
    loss = model.objective(student, batch, stream.cfg, 0)["denoising"]
    assert loss.abs().max() < 1e-10
    assert all(g.abs().max() < 1e-6 for g in torch.autograd.grad(loss.sum(), list(student.parameters())))


@pytest.mark.parametrize("micro", [1, 2, 4, 12])
@pytest.mark.parametrize("flags", [[], MASKED])
def test_old_images_aim_at_the_teachers_answer_and_new_ones_at_themselves(tasks, monkeypatch, micro, flags):
    chunks, objective = [], train.objective

    def recorded(model, batch, *rest):
        if torch.is_grad_enabled():
            chunks.append(batch)
        return objective(model, batch, *rest)

    monkeypatch.setattr(train, "objective", recorded)
    name = f"taught{micro}{bool(flags)}"
    tune(tasks, name, f"--replay={tasks}/set0", "--replay_frac=0.4", "--replay_coef=0.3", "--steps=1", *flags,
         f"--distill_from={tasks}/second/ft.pt", f"--micro_batch={micro}")
    assert len(chunks) == 12 // micro
    batch = {key: torch.cat([chunk[key] for chunk in chunks]) for key in chunks[0] if key != "seed"}
    assert ("visible" in batch) == bool(flags)
    clean, sigma, visible = batch["clean"], batch["sigma"], batch.get("visible")
    x = clean + sigma.view(-1, 1, 1) * batch["noise"]

    teacher, _ = sample.load_denoiser(f"{tasks}/second/ft.pt")
    assert torch.equal(batch["target"][:7], clean[:7])
    for i in range(7, 12):  # five of twelve are old
        shown = None if visible is None else visible[i : i + 1]
        answer = teacher(x[i : i + 1], sigma[i : i + 1], shown)[0]
        assert torch.allclose(batch["target"][i], answer, atol=1e-5)
    assert not torch.allclose(batch["target"][7:], clean[7:], atol=0.1)
    # The loss: the mean of the new ones and 0.3 times that of the old ones, in whatever chunks.
    student, _ = sample.load_denoiser(f"{tasks}/first/ft.pt", "raw")
    target = torch.cat([clean[:7], teacher(x, sigma, visible)[7:]])
    error = (student(x, sigma, visible) - target).square().mean(dim=(1, 2))
    each = (sigma**2 + 0.25) / (0.5 * sigma) ** 2 * error
    expected = each[:7].mean() + 0.3 * each[7:].mean()
    assert losses(tasks / name) == pytest.approx([expected.item()], rel=1e-4)


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


def test_the_labels_of_the_data_do_not_matter_to_models_without_classes(tmp_path):
    """A teacher of images in folders, not of classes, fits a student of images in other folders."""
    name_classes(make_dataset(tmp_path / "old", classes=2), "ant", "bee")
    name_classes(make_dataset(tmp_path / "new", classes=2), "cat", "dog")
    base = ["--batch_size=12", "--steps=1"]
    train.main([*base, f"--data={tmp_path}/old", f"--out_dir={tmp_path}/a", *TINY])
    train.main([*base, f"--data={tmp_path}/new", f"--out_dir={tmp_path}/b", *TINY[4:], f"--replay={tmp_path}/old",
                f"--init_from={tmp_path}/a/ft.pt", f"--distill_from={tmp_path}/a/ft.pt"])


# ---- Mistakes.


def test_sets_and_teachers_that_do_not_fit_are_refused(tasks, tmp_path):
    base = [f"--data={tasks}/set0", f"--out_dir={tmp_path}", "--batch_size=12", "--steps=1", *TINY, *MASKED]
    for name, how in (("small", dict(size=8)), ("large", dict(size=32)), ("grey", dict(channels=1))):
        other = make_dataset(tmp_path / name, **how)
        assert str(other) in mistake(train.main, *base, f"--data={tasks}/set0,{other}")
        assert str(other) in mistake(train.main, *base, f"--replay={other}")
    teacher = f"--distill_from={tasks}/first/ft.pt"
    assert "--replay" in mistake(train.main, *base, teacher)
    large = f"--data={tmp_path}/large", f"--replay={tmp_path}/large"  # the teacher's are of another size
    assert "first/ft.pt" in mistake(train.main, *base, *large, teacher)


def test_a_teacher_that_takes_other_patches_is_refused(tasks, tmp_path):
    """With a decoder all patches of a masked image go in, without one only the visible ones."""
    base = [f"--data={tasks}/set0", f"--replay={tasks}/set1", f"--out_dir={tmp_path}/b", "--batch_size=12", "--steps=1"]
    decoder = ["--decoder_depth=1", "--decoder_dim=16", "--decoder_heads=1"]
    train.main([f"--data={tasks}/set0", f"--out_dir={tmp_path}/a", "--batch_size=12", "--steps=1", *TINY, *decoder])
    for kind, teacher in ([], f"{tmp_path}/a/ft.pt"), (decoder, f"{tasks}/first/ft.pt"):
        assert teacher in mistake(train.main, *base, *TINY, *kind, f"--distill_from={teacher}")
    # Neither does one of patches of another size fit.
    first = f"{tasks}/first/ft.pt"
    assert first in mistake(train.main, *base, *TINY, "--patch_size=2", f"--distill_from={first}")


def test_a_teacher_of_other_classes_is_refused(grown):
    base = [f"--data={grown}/two", f"--replay={grown}/three", f"--out_dir={grown}/student", "--batch_size=12",
            "--steps=1", *TINY]
    teacher = f"--distill_from={grown}/out/ft.pt"
    train.main([*base, teacher, "--class_cond"])  # which knows the first two of the three classes
    assert "classes" in mistake(train.main, *base, "--force", teacher)  # and asks for them
    other_order = [f"--data={grown}/three", f"--replay={grown}/two"]
    assert "classes" in mistake(train.main, *base, *other_order, "--force", teacher, "--class_cond")


def test_a_consistency_model_is_no_teacher(tasks, tmp_path):
    """It answers with an image that may lie behind the noise, not with the mean of all that may."""
    tune(tasks, "consistent", "--loss=consistency", "--steps=1")
    consistent, diffusion = f"{tasks}/consistent/cm.pt", f"{tasks}/first/ft.pt"
    base = [f"--data={tasks}/set0", f"--replay={tasks}/set1", f"--out_dir={tmp_path}", "--batch_size=12", "--steps=1"]
    assert consistent in mistake(train.main, *base, *TINY, f"--distill_from={consistent}")
    tuning = ["--loss=consistency", f"--init_from={diffusion}", f"--distill_from={diffusion}"]
    assert diffusion in mistake(train.main, *base, *TINY[4:], *tuning)  # nor does its loss know targets
    assert consistent in mistake(train.main, *base, *TINY[4:], *tuning[:2], f"--distill_from={consistent}")
