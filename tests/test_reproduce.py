"""The comparison scripts count what they say, and their commands are those of today's flags."""

import importlib
import io
import json
import shlex
import signal
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, make_dataset, mistake
from PIL import Image

import classifier
import common
import continual
import reproduce
import train
from model import ModelConfig
from prepare_data import Images, open_folder


def result(way, minutes, seed, loss, fd):
    return dict(way=way, minutes=minutes, seed=seed, val_loss=loss,
                drawn=[dict(flags="--steps=10", fd=fd, kid=fd, right=0.5)],
                stages=[dict(steps=7, seconds=60 * minutes, measured=90 * minutes)])


def test_a_value_is_reached_where_the_broken_line_stays_below_it():
    curve = [(10, 0.5), (20, 0.3), (30, 0.35), (40, 0.1)]
    for value in (0.49, 0.4, 0.34, 0.31, 0.2, 0.11):
        # By brute force: the moment after the last of many at which the broken line is above the value.
        t = np.linspace(10, 40, 300_001)
        line = np.interp(t, *zip(*curve))
        assert reproduce.reached(curve, value) == pytest.approx(t[np.flatnonzero(line > value + 1e-12)[-1]], abs=2e-4)
    assert reproduce.reached(curve, 0.05) is None and reproduce.reached(curve, 0.7) == 10


def test_records_are_times_to_what_scratch_has_at_the_end():
    rows = [result("from scratch", t, s, loss + 0.02 * s, fd) for s in (0, 1)
            for t, loss, fd in ((2, 0.4, 40), (4, 0.3, 20), (8, 0.2, 10))]
    rows += [result("two stages", t, 0, loss, fd) for t, loss, fd in ((2, 0.31, 30), (4, 0.11, 5), (8, 0.1, 4))]
    rows += [result("worse", 8, 0, 0.5, 11), result("at once", 2, 0, 0.1, 1)]
    lines = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in reproduce.records(rows).splitlines()[2:]}
    # The goals are 0.21, the mean of both seeds, and 10.
    assert "minutes to loss 0.21 " in reproduce.records(rows) and "minutes to FD 10 " in reproduce.records(rows)
    assert lines["from scratch"] == ["7.6, > 8", "1.1, -", "8.0, 8.0", "1.0, 1.0", "0, 1 |"]
    assert lines["two stages"] == ["3.0", "2.7", "3.6", "2.2", "0 |"]  # 2 + 2 / 2; 2 + 2 * 20 / 25
    assert lines["worse"][:2] == ["> 8", "-"] and lines["at once"][:2] == ["≤ 2.0", "≥ 4.0"]


def test_tables_have_the_mean_and_half_the_range():
    rows = [result("from scratch", 2, s, v, f) for s, v, f in ((0, 0.2, 4.0), (1, 0.3, 6.0))]
    line = "| from scratch | 2 | 3.0 | 7 | steps=10 | 0.25 ± 0.05 | 5 ± 1 | 5 ± 1 | 50 ± 0 | 2 |"
    assert line in reproduce.table(rows) and line in reproduce.table(rows, "^from")
    assert line not in reproduce.table(rows, "two") and common.spread([3.0]) == "3"


def test_forgetting_is_the_last_distance_less_the_least():
    fds = [[4.0], [9.0, 5.0], [8.0, 6.0, 2.0]]
    bits = [2.0, 3.0, 7.0]
    rows = [[dict(fd=fd, right=0.9, bits_per_dim=b) for fd, b in zip(row, bits)] for row in fds]
    assert continual.forgetting(rows) == ((8 - 4) + (6 - 5)) / 2
    r = dict(method="fine-tuning", seed=0, scores=rows)
    line = continual.table([r]).splitlines()[2]
    assert line == f"| fine-tuning | 8 | 6 | 2 | {16 / 3:.4g} | 2.5 | 90 | 4 |"
    again = dict(r, scores=[[dict(d, fd=2 * d["fd"], right=0.7) for d in row] for row in rows])
    assert "| 12 ± 4 | 9 ± 3 | 3 ± 1 | 8 ± 2.7 | 3.75 ± 1.2 | 80 ± 10 |" in continual.table([r, again])


def test_tasks_in_the_opposite_order_are_judged_by_their_own_classes(tmp_path, monkeypatch):
    """Each sample stands for the class it was drawn as; scores and references are of these classes."""
    names = "abcd"

    def call(script, *flags, log):
        flags = list(map(str, flags))
        if script == "fid.py":
            return json.dumps({name: {} for name in flags[0].split(",")}), 1.0
        asked = flags[flags.index("--labels") + 1].split(",")
        num = next(int(flag[6:]) for flag in flags if flag.startswith("--num="))
        drawn = np.array([names.index(asked[i % len(asked)]) for i in range(num)])
        np.savez(flags[flags.index("--out") + 1], arr_0=drawn)
        return "", 1.0

    monkeypatch.setattr(continual, "call", call)
    monkeypatch.setattr(continual.classifier, "scores", lambda net, reference, drawn, asked: dict(
        reference=reference, drawn=drawn.tolist(), asked=asked.tolist()))
    for order in ([0, 1, 2, 3], [3, 2, 1, 0]):
        args = SimpleNamespace(order=order, classes=[names[k] for k in order], num=4, seed=0, net=None,
                               references=["first pair", "second pair"])
        found = continual.judge("x.pt", ["one", "two"], tmp_path, args, None)
        assert [r["reference"] for r in found] == args.references
        assert [r["asked"] for r in found] == [2 * order[:2], 2 * order[2:]] == [r["drawn"] for r in found]


def test_the_stored_command_can_be_typed():
    argv = ["decoder", "--only", "MaskDiT 0.5$|routed", "--data=/a/b/set", "--out", "/c/d"]
    command = common.typed("/home/me/tests/tools/reproduce.py", argv)
    assert shlex.split(command) == ["python", "tests/tools/reproduce.py", "decoder", "--only", "MaskDiT 0.5$|routed",
                                    "--data=set", "--out", "d"]


def test_costs_are_the_least_of_runs_that_take_turns(tmp_path, monkeypatch):
    """The machine slows down by half in the second round, for all alike, and one step in a run is late."""
    turns, paces = [], {"few": 0.25, "many": 0.5}

    def call(script, *flags, log):
        options = dict(f[2:].split("=") for f in flags)
        pace = paces[options["data"]] * (2 if len(turns) in (2, 3) else 1)
        turns.append(options["data"])
        seconds = [3 + (i + (i > 8)) * pace for i in range(4, int(options["steps"]) + 1, 4)]
        Path(options["out_dir"]).mkdir()
        lines = [dict(step=0, event="start"), *(dict(seconds=s) for s in seconds)]
        Path(options["out_dir"], "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
        return "", 1.0

    monkeypatch.setattr(common, "call", call)
    commands = {name: [f"--data={name}"] for name in paces}
    costs = common.measure_costs(commands, tmp_path)
    assert costs == {name: pytest.approx(pace) for name, pace in paces.items()} and turns == list(paces) * 3
    assert common.measure_costs(commands, tmp_path) == costs
    assert len(turns) == 6  # all are known
    # Another day the machine is half as fast: what is new is planned for the machine of the first day.
    (tmp_path / "costs.json").write_text(json.dumps({"few": costs["few"]}))
    paces = {name: 2 * pace for name, pace in paces.items()}
    costs = common.measure_costs(commands, tmp_path, rounds=1)
    assert costs == dict(few=pytest.approx(0.25), many=pytest.approx(0.5))


def test_a_short_run_tells_the_seconds_of_a_step_and_a_plan_is_kept(tmp_path):
    data, log = make_dataset(tmp_path / "set", n=30), tmp_path / "log"
    flags = [f"--data={data}", *TINY, "--batch_size=4"]
    cost = common.step_seconds(flags, tmp_path / "trial", log)
    assert 0 < cost < 1 and not (tmp_path / "trial").exists()
    checkpoint, facts = common.train_for(400, 20, tmp_path / "stage", flags, log)
    assert checkpoint == tmp_path / "stage/ft.pt" and (facts["steps"], facts["seconds"]) == (20, 400)
    assert facts["images_per_s"] == 4 / 20 and 0.01 < facts["peak_gb"] < 10
    assert facts["val_loss"] > 0 and 0 < facts["measured"] < 60


def test_the_ways_that_are_compared_are_told_in_flags_that_train_py_knows(tmp_path, monkeypatch):
    for module in (common, continual):
        monkeypatch.setattr(module, "call", lambda *args, log: None)
    args = type("Args", (), dict(out=tmp_path, num=8, classes=list("0123456789")))
    tasks = ["a", "b", "c"]
    for method in continual.METHODS.split(","):
        flags = continual.flags_of(method, tasks, "before.pt", tmp_path, args, None)
        cfg, *_ = train.parse([*common.QUIET, *flags])
        assert cfg.data == ("a,b,c" if method == "joint" else "c")
        assert bool(cfg.replay) == method.startswith(("replay", "generative"))
        assert (cfg.distill_from == "before.pt") == ("taught" in method)
        assert (cfg.ewc > 0, cfg.l2 > 0) == (method.startswith("ewc"), method.startswith("l2"))
        assert not (cfg.ewc or cfg.l2) or cfg.ewc_data == "a,b"
    data = make_dataset(tmp_path / "set", size=28, classes=10)
    for name, way in reproduce.WAYS.items():
        for _, flags in way.stages:
            cfg, *_ = train.parse([f"--data={data}", *common.QUIET, *reproduce.flags_of(flags, args)])
            own = {field: getattr(cfg, field) for field in train.NETWORK_SETTINGS}
            config = ModelConfig(**own, image_size=28, channels=3, num_classes=10)
            if cfg.mask_ratio:
                num_visible, _ = train.make_mask(cfg.mask_type, config.grid, cfg.mask_ratio, cfg.block_size)
                assert 0 < num_visible < config.grid**2, name
        time = 1 / 2 if "half the time" in name else 1
        assert sum(share for share, _ in way.stages) == pytest.approx(time) or not way.stages


def test_rows_start_from_rows_that_were_run_before():
    args = type("Args", (), dict(out=Path("out"), each=8))
    for claim, rows in reproduce.CLAIMS.items():
        folders = [reproduce.folder_of(name, units, 0, args) for name, units in rows]
        assert len(set(folders)) == len(rows), claim
        for i, (name, units) in enumerate(rows):
            way = reproduce.WAYS[name]
            assert way.start is None or (way.start[0], way.start[1] * units) in rows[:i], name
            assert way.guide is None or (way.guide, units) in rows[:i], name


def test_a_cost_is_that_of_what_a_step_does():
    one, two = (reproduce.flags_of(["--patch_size=2", f"--lr={lr}", "--batch_size=8"], type("Args", (), dict(classes=True)))
                for lr in (1, 2))
    assert reproduce.cost_key(one) == reproduce.cost_key(two)
    assert reproduce.cost_key(one) != reproduce.cost_key([*one[:-1], "--batch_size=9"])


@pytest.fixture
def called(monkeypatch, capsys):
    """called(module, *args) runs a comparison, and its scripts, in this process: to start one of them
    takes longer than what is asked of it here. Returns what is printed."""
    monkeypatch.setattr(classifier, "fit", lambda images, labels, num_classes, epochs, seed=0: classifier.Classifier(
        images.shape[3], num_classes).eval().requires_grad_(False))
    small = dict(network="--dim=32 --depth=2 --heads=2 --patch_size=4")
    monkeypatch.setitem(train.PRESETS, "demo", train.PRESETS["demo"] | small)

    def call(script, *args, log):
        out = io.StringIO()
        with open(log, "a") as err, redirect_stdout(out), redirect_stderr(err):
            importlib.import_module(Path(script).stem).main(list(map(str, args)))
        return out.getvalue(), 1.0

    def run(module, *args):
        capsys.readouterr()
        module.main([str(a) for a in args])
        return capsys.readouterr()

    for module in (common, reproduce, continual):
        monkeypatch.setattr(module, "call", call)
    monkeypatch.setattr(common, "step_seconds", lambda *_: 0.025)
    before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    yield run
    for number, handler in before:  # those of train.py stay behind
        signal.signal(number, handler)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_claim_runs_from_data_to_table_and_is_not_run_again(tmp_path, called):
    data = make_dataset(tmp_path / "set", n=60, size=8, classes=10, n_val=20)
    command = ["transfer", f"--data={data}", "--seeds", "0", "--num", "8", "--each", "0.02", "--out", tmp_path / "out"]
    first = called(reproduce, *command)
    stored = json.loads((tmp_path / "out/transfer.json").read_text())
    assert [r["way"] for r in stored["results"]] == [name for name, _ in reproduce.CLAIMS["transfer"]]
    assert str(tmp_path) not in json.dumps(stored) and f"transfer --data={data.name} --seeds" in stored["command"]
    assert stored["floor"]["num"] == 8
    for r in stored["results"]:
        assert all(stage["steps"] >= 10 for stage in r["stages"]) and r["val_loss"] > 0
        assert [set(d) for d in r["drawn"]] in ([], [{"flags", "num", "fd", "kid", "right"}])
    eight, few = (open_folder(tmp_path / "out" / name) for name in ("eight", "few"))
    assert len(eight[2]["class_names"]) == 8 and few[2]["class_names"] == ["class 8", "class 9"]
    with Image.open(tmp_path / "out/transfer-samples.png") as lines:
        assert lines.height == 5 * 2 * 8  # real ones, and four rows that draw
    again = called(reproduce, *command)
    assert again.out == first.out and "300 images" not in again.err


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_way_can_be_run_before_its_rival(tmp_path, called):
    data = make_dataset(tmp_path / "set", n=60, size=8, classes=0, n_val=20)
    command = ["speedup", f"--data={data}", "--seeds", "0", "--num", "8", "--each", "0.002", "--out", tmp_path / "out"]
    alone = called(reproduce, *command, "--only", "^coarse").out
    assert "| way | minutes to loss" in alone and "from scratch" not in alone


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_one_pair_of_classes_after_another_is_learned_and_judged(tmp_path, called):
    data = make_dataset(tmp_path / "set", n=60, size=8, classes=4, n_val=40)
    command = ["--data", data, "--minutes", "0.005", "--num", "8", "--methods", "generative-1+taught,replay-1-8",
               "--out", tmp_path / "out"]
    first = called(continual, *command)
    stored = json.loads((tmp_path / "out/continual.json").read_text())
    start, replayed, taught = stored["results"]
    assert [r["method"] for r in (start, replayed, taught)] == ["first", "replay-1-8", "generative-1+taught"]
    assert taught["scores"][0] == replayed["scores"][0] == start["scores"][0]
    assert [len(row) for row in taught["scores"]] == [1, 2] and taught["scores"][1][0]["images"] == 20
    assert replayed["seen"]["images"] == 8 and not taught["seen"]
    assert len(open_folder(tmp_path / "out/task1-8")[0]) == 8
    generated, _, meta = open_folder(tmp_path / "out/generative-1+taught-0/task1/generated")
    assert len(generated) == 512 and meta["class_names"] == ["class 0", "class 1"]
    again = called(continual, *command)
    assert again.out == first.out and "| replay-1-8 |" in first.out
