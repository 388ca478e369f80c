"""Continual learning: replay, penalties, distillation and the report against formulas."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import TINY, make_dataset, mistake, run, run_two

import model
import prepare_data
import reproduce
import sample
import train
from model import Denoiser, ModelConfig, load_checkpoint, sample_visible

CONFIG = ModelConfig(image_size=16, dim=32, depth=2, heads=2)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Two prepared sets, and a model that knows the first."""
    folder = tmp_path_factory.mktemp("tasks")
    for i, n in enumerate((24, 36)):
        make_dataset(folder / f"set{i}", n=n, seed=i)
    train.main([f"--data={folder}/set0", f"--out_dir={folder}/first", "--batch_size=12", "--steps=6"] + TINY)
    return folder


def tune(tasks, name, *flags, data="set1"):
    """Fine-tune on a set; returns the checkpoint."""
    train.main([f"--data={tasks}/{data}", f"--out_dir={tasks}/{name}", "--batch_size=12", "--steps=5",
                f"--init_from={tasks}/first/ft.pt", "--log_every=1", *TINY[4:], *flags])
    return load_checkpoint(str(tasks / name / "ft.pt"))


def same(a, b):
    return all(torch.equal(a[k][n], b[k][n]) for k in ("model", "ema") for n in a[k])


def stream_of(tasks, **changes):
    sets, labels, _ = prepare_data.open_union([f"{tasks}/set0", f"{tasks}/set1"])
    cfg = train.Config(batch_size=10, steps=5, **changes)
    return lambda new=None, old=(): train.Stream(sets, labels, cfg, CONFIG, new=new, old=old)


# -- replay ---------------------------------------------------------------------------------------


def test_replay_with_coefficient_0_is_fine_tuning_bit_for_bit(tasks):
    plain = tune(tasks, "plain")
    assert same(plain, tune(tasks, "zero", f"--replay={tasks}/set0", "--replay_coef=0"))
    assert same(plain, tune(tasks, "zero", f"--replay={tasks}/set0", "--replay_coef=0", "--replay_buffer=4"))
    assert not same(plain, tune(tasks, "one", f"--replay={tasks}/set0"))


def test_replay_of_everything_is_training_on_the_old_set(tasks):
    assert same(tune(tasks, "all", f"--replay={tasks}/set0", "--replay_frac=1"), tune(tasks, "old", data="set0"))


def test_a_batch_has_its_share_of_old_images_and_they_weigh_their_coefficient(tasks):
    stream = stream_of(tasks, replay_frac=0.3, replay_coef=0.1)(range(24), range(24, 60, 9))
    batches = [stream.load(n) for n in range(24)]
    for b in batches:
        assert (b["index"][:7] < 24).all() and set(b["index"][7:]) <= {24, 33, 42, 51}
    # the loss: mean of the new ones + 0.1 * mean of the old ones
    assert torch.allclose(stream.weight, torch.tensor([10 / 7] * 7 + [0.1 * 10 / 3] * 3))
    new = np.concatenate([b["index"][:7] for b in batches])
    assert (np.bincount(new[:168]) == 7).all()  # 24 images, each once an epoch


def test_a_joint_run_draws_evenly_from_the_union(tasks):
    batches = [stream_of(tasks)().load(n) for n in range(6)]
    assert sorted(np.concatenate([b["index"] for b in batches])) == list(range(60))
    images = [np.load(f"{tasks}/set{i}/train.npy") for i in (0, 1)]
    for i, clean in zip(batches[0]["index"], batches[0]["clean"]):
        image = images[0][i] if i < 24 else images[1][i - 24]
        patch = image[:4, :4].reshape(-1) / 127.5 - 1
        assert np.allclose(clean[0], patch, atol=1e-6)


def test_replayed_images_are_those_of_the_buffer(tasks, monkeypatch):
    streams = []

    class Watched(train.Stream):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            streams.append(self)

    monkeypatch.setattr(train, "Stream", Watched)
    tune(tasks, "buffer", f"--replay={tasks}/set0", "--replay_buffer=4", "--replay_frac=0.25")
    (stream,) = streams
    assert stream.new.tolist() == list(range(36)) and len(stream.old) == 4 and min(stream.old) >= 36
    assert set(np.concatenate([stream.index(n)[9:] for n in range(9)])) == set(stream.old)


def test_generated_images_count_as_the_classes_they_are_numbered_by(tmp_path):
    for name, names in (("real", ["cat", "dog"]), ("drawn", ["0", "1"]), ("some", ["0"]), ("other", ["sun", "moon"]),
                        ("more", ["0", "1", "2"])):
        folder = make_dataset(tmp_path / name, classes=len(names))
        meta = json.loads((folder / "meta.json").read_text())
        (folder / "meta.json").write_text(json.dumps(meta | {"class_names": names}))
    for name, known in (("drawn", True), ("some", True), ("other", False), ("more", False)):
        _, labels, meta = prepare_data.open_union([f"{tmp_path}/real", f"{tmp_path}/{name}"])
        assert (meta["class_names"], labels is None) == ((["cat", "dog"], False) if known else (None, True))


def test_a_buffer_is_reproducible_and_balanced():
    labels = np.array([0] * 50 + [1] * 30 + [2] * 3)
    chosen = prepare_data.choose_buffer(83, labels, 20, 0)
    assert np.array_equal(chosen, prepare_data.choose_buffer(83, labels, 20, 0)) and len(set(chosen)) == 20
    assert not np.array_equal(chosen, prepare_data.choose_buffer(83, labels, 20, 1))
    counts = np.bincount(labels[chosen])
    assert counts[2] == 3 and abs(counts[0] - counts[1]) <= 1
    assert len(prepare_data.choose_buffer(83, None, 20, 0)) == 20 and len(prepare_data.choose_buffer(5, None, 20, 0)) == 5


# -- penalties ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0, 0.5])
def test_fisher_information_equals_the_squared_gradients_of_single_images(ratio):
    torch.manual_seed(0)
    denoiser = Denoiser(CONFIG)
    for p in denoiser.parameters():
        torch.nn.init.normal_(p, std=0.1)
    visible = sample_visible(6, 4, ratio)
    k = 16 if visible is None else visible.shape[1]
    batch = dict(clean=torch.randn(6, k, 48), noise=torch.randn(6, k, 48), sigma=torch.rand(6) + 0.2,
                 visible=visible, labels=None, index=None)
    parts = [{n: t if t is None else t[rows] for n, t in batch.items()} for rows in (slice(0, 4), slice(4, 6))]
    ours = train.fisher_information(denoiser, CONFIG, parts, torch.autocast("cpu", enabled=False))

    weights = {n: p.detach() for n, p in denoiser.named_parameters()}

    def loss(weights, clean, noise, sigma, shown):  # the formula, for one image
        noisy = (clean + sigma * noise)[None]
        out = torch.func.functional_call(denoiser, weights, (noisy, sigma[None], None if visible is None else shown[None]))
        return ((sigma**2 + 0.25) / (0.5 * sigma) ** 2) * ((out[0] - clean) ** 2).mean()

    shown = torch.zeros(6, 1, dtype=torch.long) if visible is None else visible
    single = torch.func.vmap(torch.func.grad(loss), (None, 0, 0, 0, 0))(
        weights, batch["clean"], batch["noise"], batch["sigma"], shown)
    for n, g in single.items():
        assert torch.allclose(ours[n], (g**2).mean(dim=0), rtol=1e-3, atol=1e-7 * (g**2).max().item()), n


def test_penalty_gradients_equal_the_formula():
    g = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (5,)]
    for strength in (0.7, [torch.rand(s, generator=g) for s in shapes]):
        theta = [torch.randn(s, generator=g, requires_grad=True) for s in shapes]
        anchor = [torch.randn(s, generator=g) for s in shapes]
        each = strength if isinstance(strength, list) else [strength] * 2
        value = sum((0.5 * s * (t - a) ** 2).sum() for s, t, a in zip(each, theta, anchor))
        value.backward()
        expected = [t.grad.clone() + 1 for t in theta]
        for t in theta:
            t.grad = torch.ones_like(t)  # the gradient of the loss
        assert torch.allclose(train.add_penalty(theta, anchor, strength), value)
        for t, e in zip(theta, expected):
            assert torch.allclose(t.grad, e)


@pytest.mark.parametrize("how", ["l2_prev", "ewc"])
def test_penalties_hold_the_weights_and_resume_exactly(tasks, how):
    start = load_checkpoint(f"{tasks}/first/ft.pt")["ema"]

    coefficient = "100" if how == "l2_prev" else "1e6"  # importances are small numbers
    flags = [f"--{how}={coefficient}"] + ["--fisher_batches=2"] * (how == "ewc")
    held = tune(tasks, how, *flags)
    weight = held.get("importance", dict.fromkeys(start, 1.0))

    def distance(state):
        return sum((weight[n] * (state["model"][n] - start[n]) ** 2).sum() for n in start).sqrt()

    assert distance(held) < 0.5 * distance(tune(tasks, "free"))
    tune(tasks, how + "b", *flags, "--keep_every=3")
    (tasks / (how + "b") / "ft-0000003.pt").replace(tasks / (how + "b") / "ft.pt")
    train.main([f"--out_dir={tasks}/{how}b", "--resume"])
    again = load_checkpoint(str(tasks / (how + "b") / "ft.pt"))
    assert same(held, again)
    if how == "ewc":
        for n in start:  # all tasks until now: the first one's importance and the second one's own
            assert (held["fisher"][n] >= held["importance"][n]).all()
            assert torch.equal(held["fisher"][n], again["fisher"][n])
        (tasks / "ewcb/ft.prev.pt").replace(tasks / "ewcb/ft.pt")  # killed before its own was known
        train.main([f"--out_dir={tasks}/ewcb", "--resume"])
        third = load_checkpoint(str(tasks / "ewcb/ft.pt"))
        assert all(torch.equal(held["fisher"][n], third["fisher"][n]) for n in start)


def test_what_begins_afresh_is_not_pulled_after_a_resume_either(tmp_path):
    for classes in (2, 3):
        make_dataset(tmp_path / f"of{classes}", classes=classes)
    base = ["--batch_size=12", "--class_cond"]
    train.main([f"--data={tmp_path}/of2", f"--out_dir={tmp_path}/first", "--steps=2", *base, *TINY])
    tuned = [f"--data={tmp_path}/of3", f"--init_from={tmp_path}/first/ft.pt", "--l2_prev=10", "--steps=4", *base,
             *TINY[4:]]
    train.main(tuned + [f"--out_dir={tmp_path}/whole"])
    train.main(tuned + [f"--out_dir={tmp_path}/parts", "--keep_every=2"])
    (tmp_path / "parts/ft-0000002.pt").replace(tmp_path / "parts/ft.pt")
    train.main([f"--out_dir={tmp_path}/parts", "--resume"])
    whole, parts = (load_checkpoint(str(tmp_path / name / "ft.pt")) for name in ("whole", "parts"))
    assert same(whole, parts) and "net.labels.weight" not in whole["anchor"]


def test_importance_adds_up_over_three_tasks_whatever_lies_between(tasks):
    first = tune(tasks, "t1", "--ewc=1", "--fisher_batches=1")  # knows set0, learns set1
    base = [f"--data={tasks}/set0", "--batch_size=12", "--steps=3", *TINY[4:]]
    train.main(base + [f"--init_from={tasks}/t1/ft.pt", f"--out_dir={tasks}/t2"])  # without EWC
    train.main([f"--data={tasks}/set1", "--batch_size=12", "--steps=3", f"--init_from={tasks}/t2/ft.pt", "--ewc=1",
                f"--out_dir={tasks}/t3", "--fisher_batches=1", *TINY[4:]])
    third = load_checkpoint(str(tasks / "t3/ft.pt"))
    for n, f in first["fisher"].items():
        assert (third["importance"][n] >= f).all()
    train.main([f"--data={tasks}/set1", "--batch_size=12", "--steps=2", f"--init_from={tasks}/t1/ft.pt", "--ewc=1",
                f"--out_dir={tasks}/t4", "--fisher_batches=1", *TINY[4:]])
    second = load_checkpoint(str(tasks / "t4/ft.pt"))  # another stage on the same data: the same anchor
    for k in ("anchor", "importance"):
        assert all(torch.equal(second[k][n], first[k][n]) for n in first[k])


def test_a_student_may_take_the_place_of_its_teacher(tasks):
    state = load_checkpoint(f"{tasks}/first/ft.pt")
    (tasks / "place").mkdir()
    torch.save(state, tasks / "place/ft.pt")
    train.main([f"--data={tasks}/set1", f"--out_dir={tasks}/place", "--batch_size=12", "--steps=4",
                f"--init_from={tasks}/place/ft.pt", f"--distill_from={tasks}/place/ft.pt", *TINY[4:], "--save_every=2"])
    whole = load_checkpoint(str(tasks / "place/ft.pt"))
    assert whole["config"]["distill_from"].endswith("ft.old.pt")
    (tasks / "place/ft.prev.pt").replace(tasks / "place/ft.pt")
    train.main([f"--out_dir={tasks}/place", "--resume"])
    assert same(whole, load_checkpoint(str(tasks / "place/ft.pt")))


def test_ewc_without_the_old_data_is_refused(tasks):
    state = load_checkpoint(f"{tasks}/first/ft.pt")
    torch.save(state | {"data_hash": "another"}, tasks / "moved.pt")
    assert "has changed" in mistake(
        train.main, f"--data={tasks}/set1", f"--out_dir={tasks}/x", "--batch_size=12", "--steps=1",
        f"--init_from={tasks}/moved.pt", "--ewc=1", *TINY[4:])
    base = [f"--data={tasks}/set1", f"--out_dir={tasks}/x", "--batch_size=12", "--steps=1"]
    assert "init_from" in mistake(train.main, *base, "--l2_prev=1", *TINY)
    tuned = base + [f"--init_from={tasks}/first/ft.pt", *TINY[4:]]
    assert "no new images" in mistake(train.main, *tuned, f"--replay={tasks}/set0",
                                      f"--distill_from={tasks}/first/ft.pt", "--replay_frac=0.6")
    assert "at least one image" in mistake(train.main, *tuned, f"--replay={tasks}/set0", "--replay_frac=0.01")
    assert "replay_buffer" in mistake(train.main, *tuned, f"--replay={tasks}/set0", "--replay_buffer=0")
    assert "without --replay" in mistake(train.main, *tuned, "--replay_coef=0.5")
    train.main(tuned)
    assert "middle of a run" in mistake(train.main, f"--out_dir={tasks}/x", "--resume", "--ewc=1", "--steps=2")
    assert "does nothing with --eval_only" in mistake(train.main, "--eval_only", f"--init_from={tasks}/first/ft.pt")


# -- distillation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0, 0.5])
def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(tasks, ratio):
    torch.manual_seed(0)
    student, teacher = Denoiser(CONFIG), Denoiser(CONFIG).requires_grad_(False)
    torch.nn.init.normal_(student.net.head.weight, std=0.1)
    teacher.load_state_dict(student.state_dict())
    stream = stream_of(tasks, replay_frac=1.0, distill_from="teacher", mask_ratio=ratio, mask_type="patch")()
    batch = stream.load(0)
    del batch["index"]
    batch = train.with_teacher(teacher, **batch)
    loss = train.objective(student, CONFIG, **batch)
    assert loss.abs().max() < 1e-10
    assert all(g.abs().max() < 1e-6 for g in torch.autograd.grad(loss.sum(), list(student.parameters())))


def test_distilled_images_are_two_euler_steps_of_the_teacher_and_others_stay(tasks):
    torch.manual_seed(0)
    teacher = Denoiser(CONFIG).requires_grad_(False)
    torch.nn.init.normal_(teacher.net.head.weight, std=0.1)
    batch = stream_of(tasks, replay_frac=0.4, distill_from="teacher")().load(0)
    assert batch["distilled"].tolist() == [False] * 6 + [True] * 4
    del batch["index"]
    ours = train.with_teacher(teacher, **batch)
    assert torch.equal(ours["clean"][:6], batch["clean"][:6]) and torch.equal(ours["target"][:6], batch["clean"][:6])
    middle = ((80 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7
    x = 80 * batch["start"][6:]
    for s, s_next in ((80.0, middle), (middle, 0.0)):
        denoised = teacher(x, torch.full((4,), s))
        x = x + (s_next - s) * (x - denoised) / s
    assert torch.allclose(ours["clean"][6:], x, atol=1e-4)
    noisy = x + batch["sigma"][6:].view(-1, 1, 1) * batch["noise"][6:]
    assert torch.allclose(ours["target"][6:], teacher(noisy, batch["sigma"][6:]), atol=1e-4)


def test_a_model_of_one_class_after_another_draws_and_distils_those_it_knows(tmp_path):
    data = make_dataset(tmp_path / "all", n=60, classes=4)
    labels = np.load(data / "train_labels.npy"), np.load(data / "val_labels.npy")
    for c in (1, 3):
        reproduce.subset(data, tmp_path / f"class{c}", train=np.flatnonzero(labels[0] == c),
                         val=np.flatnonzero(labels[1] == c))
    base = ["--batch_size=12", "--steps=2", *TINY]
    train.main([f"--data={tmp_path}/class1", f"--out_dir={tmp_path}/a", "--class_cond", *base])
    first, _ = sample.load_denoiser(tmp_path / "a/ft.pt")
    assert first.config.known_classes == (1,)
    # Without a word of which classes, samples are of those that the model has seen.
    default, asked = ([x for _, x in sample.generate(first, range(4), steps=1, labels=v)] for v in (None, [1]))
    assert np.array_equal(default, asked) and sample.labels_to_draw(first.config) == [1]

    cfg = train.Config(batch_size=10, steps=5, distill_from="teacher", replay_frac=0.4, label_dropout=0.0)
    sets, numbers, _ = prepare_data.open_union([f"{tmp_path}/class3"])
    batch = train.Stream(sets, numbers, cfg, first.config, teacher=first).load(0)
    assert batch["labels"].tolist() == [3] * 6 + [1] * 4 and sum(batch["distilled"]) == 4
    train.main([f"--data={tmp_path}/class3", f"--out_dir={tmp_path}/b", f"--init_from={tmp_path}/a/ft.pt", *base])
    second, _ = sample.load_denoiser(tmp_path / "b/ft.pt")
    assert second.config.known_classes == (1, 3)


@pytest.mark.parametrize("network", [["--decoder_depth=1"], ["--dense_depth=1", "--decoder_depth=1"]])
def test_classes_decoders_replay_distillation_and_penalties_go_together(tmp_path, network):
    for i in (0, 1):
        make_dataset(tmp_path / f"c{i}", classes=3, seed=i)
    base = ["--batch_size=12", "--steps=3", "--mask_ratio=0.5", "--mask_type=patch", "--class_cond"]
    train.main([f"--data={tmp_path}/c0", f"--out_dir={tmp_path}/a", *base, *TINY, *network])
    train.main([f"--data={tmp_path}/c1", f"--out_dir={tmp_path}/b", *base, *TINY[4:], f"--init_from={tmp_path}/a/pt.pt",
                f"--replay={tmp_path}/c0", "--replay_frac=0.25", f"--distill_from={tmp_path}/a/pt.pt", "--ewc=1",
                "--l2_prev=0.1", "--fisher_batches=1", "--micro_batch=4", "--log_every=1"])
    lines = [json.loads(line) for line in open(tmp_path / "b/log.jsonl")]
    assert all(math.isfinite(r["loss"]) for r in lines if "images_per_s" in r)
    assert lines[0]["replayed"] == lines[0]["distilled"] == 0.25
    assert load_checkpoint(str(tmp_path / "b/pt.pt"))["architecture"]["num_classes"] == 3


def test_two_processes_remember_like_one(tasks):
    args = [f"--data={tasks}/set1", "--batch_size=12", "--steps=6", f"--init_from={tasks}/first/ft.pt", "--log_every=1",
            f"--replay={tasks}/set0", "--replay_frac=0.25", "--replay_coef=0.3", "--replay_buffer=8",
            f"--distill_from={tasks}/first/ft.pt", "--ewc=10", "--fisher_batches=1", "--mask_ratio=0.5",
            "--mask_type=patch", *TINY[4:]]
    train.main(args + [f"--out_dir={tasks}/p1"])
    result = run("train.py", *args, f"--out_dir={tasks}/p2", processes=2)
    assert result.returncode == 0, result.stderr
    one, two = ([r["loss"] for r in map(json.loads, open(tasks / d / "log.jsonl")) if "images_per_s" in r]
                for d in ("p1", "p2"))
    assert len(one) == 6 and np.allclose(one, two, rtol=1e-4)
    a, b = (load_checkpoint(str(tasks / d / "pt.pt"))["fisher"] for d in ("p1", "p2"))
    assert all(torch.allclose(a[n], b[n], rtol=0.05, atol=1e-3 * a[n].max().item()) for n in a)


# -- report ---------------------------------------------------------------------------------------


def test_the_bound_on_quantised_gaussian_data_is_its_entropy():
    levels = torch.arange(256) / 127.5 - 1
    p = torch.softmax(-((levels.double() - 0.1) ** 2) / (2 * 0.03**2), dim=0)
    entropy = -(p * p.clamp_min(1e-300).log2()).sum().item()
    g = torch.Generator().manual_seed(0)
    near = p > 1e-9  # the other levels never occur
    values = torch.multinomial(p, 2**21, replacement=True, generator=g).view(-1, 4, 8).to(torch.uint8)

    def denoise(x, sigma):  # E[v | x], summed over the levels
        logits = p[near].log().float() - (x[..., None] - levels[near]) ** 2 / (2 * sigma.view(-1, 1, 1, 1) ** 2)
        return logits.softmax(dim=-1) @ levels[near]

    found = [train.bound(denoise, part, g) for part in values.split(4096)]
    bits, losses = (torch.cat(t) for t in zip(*found))
    standard_error = bits.std().item() / math.sqrt(len(bits))
    assert losses.shape == (2**16, 10) and standard_error < 0.003
    assert abs(bits.mean().item() - entropy) < 0.01, (bits.mean(), entropy, standard_error)


def test_the_decoder_sums_to_one_over_the_levels():
    for z in (-1.0, 0.123, 0.5, 1.002):
        nats = torch.stack([model.decoder_nats(torch.tensor([z], dtype=torch.float64), torch.tensor([v])) for v in range(256)])
        assert abs(torch.exp(-nats).sum().item() - 1) < 1e-12


def test_the_report_names_every_set(tasks, capsys):
    train.main(["--eval_only", f"--ckpt={tasks}/first/ft.pt", f"--data={tasks}/set0,{tasks}/set1", "--device=cpu"])
    out = capsys.readouterr().out.strip().splitlines()
    result = json.loads(out[-1])
    assert list(result) == [f"{tasks}/set0", f"{tasks}/set1"] and len(out) == 5
    for row in result.values():
        assert len(row["loss_by_level"]) == 10 and row["standard_error"] > 0 and row["bits_per_dim"] > 0
    assert json.loads((tasks / "first/ft.eval.json").read_text()) == result


def test_sets_that_do_not_fit_are_refused(tasks, tmp_path):
    other = make_dataset(tmp_path / "small", size=8)
    base = [f"--out_dir={tmp_path}", "--batch_size=12", "--steps=1", *TINY]
    assert "has size 8" in mistake(train.main, f"--data={tasks}/set0,{other}", *base)
    assert "has size 8" in mistake(train.main, f"--data={tasks}/set0", f"--replay={other}", *base)
    assert "(8, 8, 3)" in mistake(train.main, "--eval_only", f"--ckpt={tasks}/first/ft.pt", f"--data={other}")


def test_two_processes_report_once_and_leave_in_peace(tasks, tmp_path):
    result = run_two(tmp_path, "train", "--eval_only", f"--ckpt={tasks}/first/ft.pt", f"--data={tasks}/set0",
                     "--device=cpu")
    assert result.returncode == 0 and result.stdout.count("bits per dimension") == 1, result.stderr
