"""The comparison scripts count what they say, and their commands are those of today's flags."""

import importlib
import io
import json
import math
import re
import shlex
import signal
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, make_dataset
from PIL import Image

import continual
import fid
import judge
import model
import reproduce
import train
from prepare_data import open_folder


def result(name, seed, curve, fd):
    """A row whose validation loss and distance fell along these points."""
    return dict(row=name, seed=seed, val_loss=curve[-1][1], drawn=[dict(flags="--steps=10", judge_fd=fd[-1][1])],
                stages=[dict(seconds=curve[-1][0], curve=curve[:-1], fd_curve=fd[:-1], images_per_s=1, steps=1,
                             peak_gb=1)])


def test_a_value_is_reached_on_the_line_between_two_points():
    curve = [[10, 0.5], [20, 0.3], [30, 0.35], [40, 0.1]]
    for value in (0.49, 0.4, 0.31, 0.2, 0.1):
        # By brute force: the first of many moments at which the broken line is at the value or below.
        t = np.linspace(10, 40, 300_001)
        line = np.interp(t, *zip(*curve))
        assert reproduce.reached(curve, value) == pytest.approx(t[np.argmax(line <= value + 1e-12)], abs=2e-4)
    assert reproduce.reached(curve, 0.05) is None and reproduce.reached(curve, 0.7) == 10


def test_the_ratio_is_of_times_at_equal_quality(tmp_path):
    slow = result("from scratch", 0, [[60, 0.4], [120, 0.2]], [[60, 9.0], [120, 4.0]])
    fast = result("two stages", 0, [[20, 0.3], [40, 0.1]], [[20, 8.0], [40, 5.0]])
    loss, fd = reproduce.time_ratios([slow, fast]).splitlines()[2:]
    assert loss.endswith("| 0.2 | 120 s | 30 s | 4.0 |")  # where the slow one ends, 120 against 30
    assert fd.endswith("| 5 | 108 s | 40 s | 2.7 |")  # where the fast one ends, 120 - 60 / 5 against 40
    # A dip does not count: where a curve stays does. What was there at its first point came no later than that.
    again = result("two stages", 0, [[20, 0.25], [30, 0.18], [40, 0.3], [60, 0.1]], [[20, 2.0], [40, 3.0], [50, 3.5]])
    loss, fd = reproduce.time_ratios([slow, again]).splitlines()[2:]
    assert loss.endswith("| 0.2 | 120 s | 50 s | 2.4 |")  # not at 28 s, on the way to the dip
    assert fd.endswith("| 4 | 120 s | ≤ 20 s | ≥ 6.0 |")
    reproduce.plot(tmp_path / "curve.png", [slow, fast], "curve", "validation loss")
    with Image.open(tmp_path / "curve.png") as picture:
        colours = {c for _, c in picture.convert("RGB").getcolors(1 << 16)}
    assert {(0xd1, 0x49, 0x5b), (0x00, 0x79, 0x8c)} <= colours  # a line for each row


def test_tables_have_the_mean_and_half_the_range():
    rows = [result("from scratch", s, [[60, 0.4], [120, v]], [[60, 9.0], [120, f]])
            for s, v, f in ((0, 0.2, 4.0), (1, 0.3, 6.0))]
    assert "| from scratch | steps=10 | 0.25 ± 0.05 | 5 ± 1 |" in reproduce.table(rows)
    assert reproduce.both([3.0]) == "3"


def test_forgetting_is_the_last_distance_less_the_best():
    report = [dict(ln_sigma=list(range(11)), loss_by_level=[1.0] * 10, bits_per_dim=3.0)]
    later = [dict(report[0], loss_by_level=[1.5] * 10, bits_per_dim=2.9)]
    r = dict(method="fine-tuning", matrix=[[4.0], [9.0, 5.0], [8.0, 6.0, 2.0]], seconds=60, report=later,
             stages=[dict(images_per_s=30.2)])
    cells = continual.table([r], ["a", "b", "c"]).splitlines()[2].split(" | ")
    assert cells[-4] == f"{16 / 3:.4g}" and cells[-3] == f"{((8 - 4) + (6 - 5)) / 2:.4g}" and cells[-2] == "30"
    again = dict(r, matrix=[[6.0], [9.0, 5.0], [14.0, 6.0, 2.0]], seconds=62,  # another seed: forgets 8 and 1
                 stages=[dict(images_per_s=40.2)])
    cells = continual.table([r, again], ["a", "b", "c"]).splitlines()[2].split(" | ")
    assert cells[-2:] == ["35", "61 |"]
    assert cells[1:3] == ["5 ± 1", "9 ± 0"] and cells[-3] == "3.5 ± 1"
    line = continual.change_by_level([r], dict(report=report)).splitlines()[2]
    assert line.count("+0.5000") == 10 and line.endswith("| -0.1000 | +4 |")


def test_the_stored_command_can_be_typed(monkeypatch):
    monkeypatch.setattr("sys.argv", ["x", "decoder", "--only", "MaskDiT 0.5$|routed", "--data=/a/b/set", "--out", "/c/d"])
    assert shlex.split(reproduce.typed("reproduce.py")) == ["python", "tests/tools/reproduce.py", "decoder", "--only",
                                                            "MaskDiT 0.5$|routed", "--data=set"]


def test_images_without_a_class_ask_for_none(tmp_path):
    data = make_dataset(tmp_path / "set", n=40, classes=3)
    np.save(data / "train_labels.npy", np.repeat([0, 1, -1], [10, 5, 25]))
    args = type("Args", (), dict(class_cond=True, num=300))
    _, asked = continual.labels_of(str(data), args)
    counts = [asked.split(",").count(f"class {i}") for i in range(3)]
    assert counts[2] == 0 and sum(counts) == 300 and 150 < counts[0] < 250


def test_a_row_that_runs_once_is_where_all_seeds_start():
    args = type("Args", (), dict(out="out", claim="consistency"))
    assert reproduce.folder_of(args, "diffusion", 1) == reproduce.folder_of(args, "diffusion", 0)
    assert reproduce.folder_of(args, "ECT", 1) != reproduce.folder_of(args, "ECT", 0)


def test_a_trained_model_stands_in_for_the_shared_start(tmp_path, monkeypatch):
    (tmp_path / "ft.pt").write_bytes(b"weights")
    args = type("Args", (), dict(out=str(tmp_path), claim="consistency", start=str(tmp_path / "ft.pt"), unit=60))
    judged = []
    monkeypatch.setattr(reproduce, "distances", lambda checkpoint, *_: judged.append(checkpoint) or dict(judge_fd=1.0))
    row = reproduce.run_row("diffusion", 0, args, {})
    assert set(judged) == {args.start} and row["stages"] == [] and [d["judge_fd"] for d in row["drawn"]] == [1.0] * 4
    assert (reproduce.folder_of(args, "diffusion", 1) / "final.pt").read_bytes() == b"weights"
    assert "| diffusion | steps=18 |" in reproduce.table([row])


def test_a_tenth_of_a_set_is_a_set_with_the_same_validation_images(tmp_path):
    other = make_dataset(tmp_path / "source", n=40, classes=4)
    (tmp_path / "other").symlink_to(other)
    args = type("Args", (), dict(out=str(tmp_path), other=str(other), size=None, claim="transfer"))
    few = reproduce.data_set("few", args)
    images, labels, meta = open_folder(few)
    whole, of_whole, _ = open_folder(other)
    assert len(images) == 4 and meta["num_train"] == 4
    place = [next(i for i, x in enumerate(whole) if np.array_equal(x, y)) for y in images]
    assert np.array_equal(labels, of_whole[place])
    assert np.array_equal(open_folder(few, "val")[0], open_folder(other, "val")[0])
    assert len(np.load(other / "train.npy")) == 40


def test_costs_are_the_least_of_runs_that_take_turns_and_plan_the_steps(tmp_path, monkeypatch):
    """The machine slows down by half in the second round, for all alike, and one step in a run is late."""
    turns, paces = [], {"--batch_size=4": 0.25, "--batch_size=8": 0.5}

    def step_times(flags, folder, log):
        turns.extend(flags)
        pace, slow = paces[flags[0]], 2 if len(turns) in (3, 4) else 1
        return [3 + (i + (i > 8)) * pace * slow for i in range(4, 36, 4)]

    def call(script, *flags, log):
        options = dict(f[2:].split("=") for f in flags)
        folder, n = Path(options["out_dir"]), int(options["steps"])
        folder.mkdir(parents=True)
        lines = [dict(step=n, images_per_s=1, seconds=450.0), dict(step=n, val_loss=0.5)]
        (folder / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
        torch.save(dict(model={}, architecture=dict(dim=32), config=dict(batch_size=int(options["batch_size"]))),
                   folder / "ft.pt")
        return "", 1.0

    monkeypatch.setattr(reproduce, "call", call)
    monkeypatch.setattr(reproduce, "step_times", step_times)
    commands = [[flag] for flag in paces]
    found = reproduce.step_seconds(commands, tmp_path / "trial", tmp_path / "log")
    assert found == {(flag,): pytest.approx(pace) for flag, pace in paces.items()} and turns == list(paces) * 3
    checkpoint, facts = reproduce.train_for(400, 0.5, tmp_path / "stage1", commands[1], tmp_path / "log")
    assert (facts["steps"], facts["seconds"], facts["images_per_s"], facts["took"]) == (800, 400, 16, 450)


def test_a_short_run_tells_its_seconds_and_is_stopped(tmp_path):
    data = make_dataset(tmp_path / "set", n=30)
    at = reproduce.step_times([f"--data={data}", *TINY], tmp_path / "trial", tmp_path / "log", points=3)
    assert len(at) >= 3 and at == sorted(at) and not (tmp_path / "trial").exists()
    with pytest.raises(SystemExit, match="train.py failed: .*nowhere"):
        reproduce.step_times([f"--data={tmp_path}/nowhere"], tmp_path / "trial", tmp_path / "log")


def test_rows_side_by_side_wait_for_where_they_start(tmp_path, monkeypatch):
    order, began = [], []

    def run_row(name, seed, args, costs):
        began.append((name, seed))
        time.sleep(0.2 if name == "diffusion" else 0.01)
        order.append((name, seed))
        return dict(row=name, seed=seed, stages=[], drawn=[dict(flags="", judge_fd=1.0)], val_loss=None)

    data = make_dataset(tmp_path / "set", n=8)
    monkeypatch.setattr(reproduce, "run_row", run_row)
    monkeypatch.setattr(reproduce, "step_seconds", lambda commands, *_: {tuple(c): 1.0 for c in commands})
    for name in ("reference", "picture"):
        monkeypatch.setattr(reproduce, name, lambda *_: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(sys, "argv", ["reproduce", "consistency", f"--data={data}", "--jobs=3", f"--out={tmp_path / 'out'}"])
    reproduce.main()
    assert order[0] == ("diffusion", 0) and len(order) == len(set(order)) == sum(
        2 - way["once"] for way in reproduce.CLAIMS["consistency"]["rows"].values())
    stored = json.loads((tmp_path / "out/consistency.json").read_text())
    assert len(stored["results"]) == len(order) and set(stored["cost_seconds"].values()) == {1.0}


def test_the_ways_that_are_compared_are_told_in_flags_that_train_py_knows(tmp_path, monkeypatch):
    monkeypatch.setattr(continual, "call", lambda *args, log: None)
    args = type("Args", (), dict(out=str(tmp_path), num=8))
    tasks = ["a", "b", "c"]
    for method in continual.DEFAULT.split(","):
        flags = continual.flags_of(method, tasks, "before.pt", tmp_path, args, None)
        cfg, *_ = train.parse([*reproduce.QUIET, *flags])
        assert cfg.data == ("a,b,c" if method == "joint" else "c")
        assert bool(cfg.replay) == method.startswith(("replay", "generative"))
        assert (cfg.distill_from == "before.pt") == ("taught" in method)
        assert (cfg.ewc > 0, cfg.l2 > 0) == (method.startswith("ewc"), method.startswith("l2"))
        assert not (cfg.ewc or cfg.l2) or (cfg.anchor, cfg.ewc_data) == ("before.pt", "a,b")
    for claim in reproduce.CLAIMS.values():
        for flags in (flags for way in claim["rows"].values() for _, flags in way["stages"]):
            train.parse([*reproduce.QUIET, *claim["network"], *flags])


def test_a_script_that_fails_is_quoted(tmp_path):
    out, memory = reproduce.call("prepare_data.py", "--help", log=tmp_path / "log")
    assert "--val_frac" in out and 0.01 < memory < 10
    with pytest.raises(SystemExit, match="prepare_data.py failed: .*nowhere"):
        reproduce.call("prepare_data.py", tmp_path / "nowhere", log=tmp_path / "log")


class Colours(torch.nn.Module):
    """Features in no time, in place of the judge's and those of Inception with random weights."""
    def __init__(self, args):
        super().__init__()
        self.identity = "random_fd 0" if args.features == "random" else "fd 0"

    def forward(self, x):
        return torch.nn.functional.adaptive_avg_pool2d(x.float(), 2).flatten(1)


@pytest.fixture
def called(monkeypatch, capsys):
    """called(module, *args) runs a comparison, and its scripts, in this process: to start one of them
    takes longer than what is asked of it here. Returns what is printed."""
    monkeypatch.setattr(fid, "load_features", Colours)
    monkeypatch.setattr(judge, "fit", lambda *_: judge.Judge().eval())
    monkeypatch.setitem(model.PRESETS, "demo", dict(dim=32, depth=2, heads=2, patch_size=4))

    def call(script, *args, log):
        out = io.StringIO()
        with open(log, "a") as err, redirect_stdout(out), redirect_stderr(err):
            importlib.import_module(Path(script).stem).main(list(map(str, args)))
        return out.getvalue(), 1.0

    def run(module, *args):
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, args)])
        capsys.readouterr()
        module.main()
        return capsys.readouterr()

    for module in (reproduce, continual):
        monkeypatch.setattr(module, "call", call)
    monkeypatch.setattr(reproduce, "step_times", lambda *_: [0.0, 0.1, 0.2])
    before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    yield run
    for number, handler in before:  # those of train.py stay behind
        signal.signal(number, handler)


def test_a_claim_runs_from_data_to_table_and_is_not_run_again(tmp_path, called):
    data = make_dataset(tmp_path / "set", n=30)
    command = [reproduce, "speedup", f"--data={data}", "--seeds", "1", "--num", "8", "--each", "0.03", "--random",
               "--patch_size", "2", "--batch_size", "1", "--out", tmp_path / "out"]
    first = called(*command)
    stored = json.loads((tmp_path / "out/speedup.json").read_text())
    for name, sizes in (("from-scratch", {"1"}), ("two-stages", {"12", "1"})):  # of whole and of masked images
        log = (tmp_path / f"out/speedup/{name}-0/output.txt").read_text()
        assert set(re.findall(r"batch_size = (\d+)", log)) == sizes
    assert [r["row"] for r in stored["results"]] == ["from scratch", "from scratch, half as long", "two stages"]
    assert all({"judge_fd", "random_fd"} <= set(d) for r in stored["results"] for d in r["drawn"])
    scratch, short, two = stored["results"]
    assert scratch["minutes"] == 2 * short["minutes"] and len(two["stages"]) == 2 and two["minutes"] == pytest.approx(0.015)
    assert str(tmp_path) not in json.dumps(stored) and f"speedup --data={data.name} --seeds" in stored["command"]
    times = [t for t, _ in reproduce.points(two, "curve")]
    assert times == sorted(times) and len(times) > 2 and all(math.isfinite(v) for _, v in two["stages"][0]["curve"])
    with Image.open(tmp_path / "out/speedup-samples.png") as lines:
        assert lines.height < lines.width  # three lines of eight samples
    assert (tmp_path / "out/speedup-fd_curve.png").exists() and "times faster" in first.out
    again = called(*command)
    assert again.out == first.out and "from scratch, seed" not in again.err
    with pytest.raises(SystemExit, match="give another --out"):
        called(*command, "--size", "8")


def test_one_class_after_another_is_learned_and_each_judged_by_its_own_samples(tmp_path, called):
    data = make_dataset(tmp_path / "set", n=40, classes=2)
    command = [continual, f"{data}:class 1", f"{data}:class 0", "--minutes", "0.01", "--num", "8", "--references", "16",
               "--methods", "generative-1+taught", "--out", tmp_path / "out"]
    first = called(*command)
    stored = json.loads((tmp_path / "out/continual.json").read_text())
    (result,) = stored["results"]
    assert stored["tasks"] == ["class 1", "class 0"] and [len(row) for row in result["matrix"]] == [1, 2]
    assert len(result["report"]) == 2 and str(tmp_path) not in json.dumps(stored)
    generated, labels, meta = open_folder(tmp_path / "out/generative-1+taught-0/task1/generated")
    assert len(generated) + meta["num_val"] == 8 and set(labels) == {0} and meta["class_names"] == ["class 1"]
    for c in (0, 1):
        images, labels, meta = open_folder(tmp_path / f"out/class {c}")
        assert meta["class_names"] == [f"class {c}"] and set(labels) == {0} and len(images) == 20
    with Image.open(tmp_path / "out/continual-samples.png") as lines:
        grid = Image.open(tmp_path / "out/generative-1+taught-0/task1/samples1.png")
        assert lines.width == 2 * grid.width  # samples of both classes side by side
    again = called(*command)
    assert again.out == first.out and "class 1 after class 0" in first.out
    with pytest.raises(SystemExit, match="--classes cats: expected some of "):
        called(continual, f"{data}:cats", "--out", tmp_path / "else")
