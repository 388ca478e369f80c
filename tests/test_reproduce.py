"""The comparison scripts count what they say, and their commands are those of today's flags."""

import importlib
import io
import json
import math
import shlex
import signal
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, make_dataset, mistake
from PIL import Image

import common
import continual
import fid
import judge
import reproduce
import train
from model import ModelConfig
from prepare_data import Images, open_folder


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
    assert common.spread([3.0]) == "3"


def test_forgetting_is_the_last_distance_less_the_best():
    r = dict(method="fine-tuning", matrix=[[4.0], [9.0, 5.0], [8.0, 6.0, 2.0]], seconds=60,
             stages=[dict(images_per_s=30.2)])
    cells = continual.table([r], ["a", "b", "c"]).splitlines()[2].split(" | ")
    assert cells[-4] == f"{16 / 3:.4g}" and cells[-3] == f"{((8 - 4) + (6 - 5)) / 2:.4g}" and cells[-2] == "30"
    again = dict(r, matrix=[[6.0], [9.0, 5.0], [14.0, 6.0, 2.0]], seconds=62,  # another seed: forgets 8 and 1
                 stages=[dict(images_per_s=40.2)])
    cells = continual.table([r, again], ["a", "b", "c"]).splitlines()[2].split(" | ")
    assert cells[-2:] == ["35", "61 |"]
    assert cells[1:3] == ["5 ± 1", "9 ± 0"] and cells[-3] == "3.5 ± 1"


def test_the_stored_command_can_be_typed():
    argv = ["decoder", "--only", "MaskDiT 0.5$|routed", "--data=/a/b/set", "--out", "/c/d"]
    command = common.typed("/home/me/tests/tools/reproduce.py", argv)
    assert shlex.split(command) == ["python", "tests/tools/reproduce.py", "decoder", "--only", "MaskDiT 0.5$|routed",
                                    "--data=set", "--out", "d"]


def test_images_without_a_class_ask_for_none(tmp_path):
    data = make_dataset(tmp_path / "set", n=40, classes=3)
    np.save(data / "train_labels.npy", np.repeat([0, 1, -1], [10, 5, 25]))
    _, asked = continual.labels_of(data, 300)
    counts = [asked.split(",").count(f"class {i}") for i in range(3)]
    assert counts[2] == 0 and sum(counts) == 300 and 150 < counts[0] < 250


def arguments(**settings):
    return type("Args", (), dict(start=None, patch_size=None, batch_size=None, random=False, other=None) | settings)


def test_a_row_that_runs_once_is_where_all_seeds_start():
    args = arguments(out=Path("out"), claim="consistency")
    assert reproduce.folder_of("diffusion", 1, args) == reproduce.folder_of("diffusion", 0, args)
    assert reproduce.folder_of("ECT", 1, args) != reproduce.folder_of("ECT", 0, args)
    for claim, rows in reproduce.CLAIMS.items():
        args.claim = claim
        assert len({reproduce.folder_of(name, 0, args) for name in rows}) == len(rows)
        assert all(row.start in (None, *list(rows)[:i]) for i, row in enumerate(rows.values()))  # those run before


def test_a_trained_model_stands_in_for_the_shared_start(tmp_path, monkeypatch):
    (tmp_path / "ft.pt").write_bytes(b"weights")
    args = arguments(out=tmp_path, claim="consistency", start=tmp_path / "ft.pt", each=1)
    judged = []
    monkeypatch.setattr(reproduce, "judged", lambda checkpoint, *_: judged.append(checkpoint) or dict(judge_fd=1.0))
    found = reproduce.run_row("diffusion", reproduce.rows_of(args)["diffusion"], 0, args, {})
    assert found["stages"] == [] and [d["judge_fd"] for d in found["drawn"]] == [1.0] * 4
    final = reproduce.folder_of("diffusion", 1, args) / "final.pt"
    assert set(judged) == {final} and final.read_bytes() == b"weights"
    assert "| diffusion | steps=18 |" in reproduce.table([found])


def test_a_tenth_of_a_set_is_a_set_with_the_same_validation_images(tmp_path):
    other = make_dataset(tmp_path / "source", n=40, classes=4)
    few = reproduce.data_set("few", arguments(out=tmp_path, other=other, claim="transfer"))
    images, labels, meta = open_folder(few)
    whole, of_whole, _ = open_folder(other)
    assert len(images) == 4 and meta["num_train"] == 4
    place = [next(i for i, x in enumerate(whole) if np.array_equal(x, y)) for y in images]
    assert np.array_equal(labels, of_whole[place])
    assert np.array_equal(open_folder(few, "val")[0], open_folder(other, "val")[0])
    assert len(np.load(other / "train.npy")) == 40


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
    costs = {}
    common.measure_costs(commands, costs, tmp_path / "trial", tmp_path / "log")
    assert costs == {name: pytest.approx(pace) for name, pace in paces.items()} and turns == list(paces) * 3
    common.measure_costs(commands, costs, tmp_path / "trial", tmp_path / "log")
    assert len(turns) == 6  # all are known
    # Another day the machine is half as fast: what is new is planned for the machine of the first day.
    costs, paces = {"few": costs["few"]}, {name: 2 * pace for name, pace in paces.items()}
    common.measure_costs(commands, costs, tmp_path / "trial", tmp_path / "log", rounds=1)
    assert costs == dict(few=pytest.approx(0.25), many=pytest.approx(0.5))


def test_a_short_run_tells_the_seconds_of_a_step_and_a_plan_is_kept(tmp_path):
    data, log = make_dataset(tmp_path / "set", n=30), tmp_path / "log"
    flags = [f"--data={data}", *TINY, "--batch_size=4"]
    cost = common.step_seconds(flags, tmp_path / "trial", log)
    assert 0 < cost < 1 and not (tmp_path / "trial").exists()
    checkpoint, facts = common.train_for(400, 20, tmp_path / "stage", flags, log, curve=True)
    assert checkpoint == tmp_path / "stage/ft.pt" and (facts["steps"], facts["seconds"]) == (20, 400)
    assert facts["images_per_s"] == 4 / 20 and 0.01 < facts["peak_gb"] < 10
    assert [at for at, _ in facts["curve"]] == [200] and facts["val_loss"] != facts["curve"][0][1]


def test_the_ways_that_are_compared_are_told_in_flags_that_train_py_knows(tmp_path, monkeypatch):
    monkeypatch.setattr(continual, "call", lambda *args, log: None)
    args = arguments(out=tmp_path, num=8)
    tasks = ["a", "b", "c"]
    for method in continual.METHODS.split(","):
        flags = continual.flags_of(method, tasks, "before.pt", tmp_path, args, None)
        cfg, *_ = train.parse([*common.QUIET, *flags])
        assert cfg.data == ("a,b,c" if method == "joint" else "c")
        assert bool(cfg.replay) == method.startswith(("replay", "generative"))
        assert (cfg.distill_from == "before.pt") == ("taught" in method)
        assert (cfg.ewc > 0, cfg.l2 > 0) == (method.startswith("ewc"), method.startswith("l2"))
        assert not (cfg.ewc or cfg.l2) or cfg.ewc_data == "a,b"
    assert "--methods has replays-1" in mistake(continual.main, *tasks, "--methods", "joint,replays-1")
    assert "only one set" in mistake(continual.main, "a")
    data = make_dataset(tmp_path / "set", size=64)
    for claim in reproduce.CLAIMS:
        for row in reproduce.rows_of(arguments(claim=claim)).values():
            for _, flags in row.stages:
                cfg, *_ = train.parse([f"--data={data}", *common.QUIET, *flags])
                sizes = {name: getattr(cfg, name) for name in train.NETWORK_SETTINGS}
                train.Stream(Images(cfg.data), 24, cfg, ModelConfig(**sizes), torch.device("cpu"))  # refuses, too


def test_a_script_that_fails_is_quoted(tmp_path):
    out, memory = common.call("prepare_data.py", "--help", log=tmp_path / "log")
    assert "--val_frac" in out and 0.01 < memory < 10
    sentence = mistake(lambda argv: common.call("prepare_data.py", *argv, log=tmp_path / "log"), tmp_path / "nowhere")
    assert sentence.startswith("prepare_data.py failed: ") and "nowhere" in sentence


class Colours(torch.nn.Module):
    """Features in no time, in place of the judge's and those of Inception with random weights."""

    def forward(self, x):
        return torch.nn.functional.adaptive_avg_pool2d(x.float(), 2).flatten(1)


@pytest.fixture
def called(monkeypatch, capsys):
    """called(module, *args) runs a comparison, and its scripts, in this process: to start one of them
    takes longer than what is asked of it here. Returns what is printed."""
    monkeypatch.setattr(fid, "load_features", lambda args: (
        Colours(), "random_fd 0" if args.features == "random" else "fd 0"))
    monkeypatch.setattr(judge, "fit", lambda *_: judge.Judge().eval())
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


def test_a_claim_runs_from_data_to_table_and_is_not_run_again(tmp_path, called):
    data = make_dataset(tmp_path / "set", n=30)
    command = ["speedup", f"--data={data}", "--seeds", "1", "--num", "8", "--each", "0.03", "--random",
               "--patch_size", "2", "--batch_size", "1", "--out", tmp_path / "out"]
    first = called(reproduce, *command)
    stored = json.loads((tmp_path / "out/speedup.json").read_text())
    scratch, two = stored["results"]
    for r, sizes in ((scratch, [1]), (two, [12, 1])):  # of whole and of masked images
        assert [s["images_per_s"] for s in r["stages"]] == pytest.approx([size / 0.025 for size in sizes])
        assert all({"judge_fd", "random_fd"} <= set(d) for d in r["drawn"])
    assert [r["row"] for r in (scratch, two)] == ["from scratch", "two stages"]
    assert scratch["minutes"] == 2 * two["minutes"] and two["minutes"] == pytest.approx(0.015)
    assert str(tmp_path) not in json.dumps(stored) and f"speedup --data={data.name} --seeds" in stored["command"]
    times = [t for t, _ in reproduce.points(two, "curve")]
    assert times == sorted(times) and len(times) > 2 and all(math.isfinite(v) for _, v in two["stages"][0]["curve"])
    with Image.open(tmp_path / "out/speedup-samples.png") as lines:
        assert lines.size == (8 * 16, 2 * 16)  # two lines of eight samples
    assert (tmp_path / "out/speedup-fd_curve.png").exists() and "times faster" in first.out
    again = called(reproduce, *command)
    assert again.out == first.out and "| from scratch |" not in again.err
    assert "give another --out" in mistake(reproduce.main, *command, "--num", "9")


def test_one_class_after_another_is_learned_and_each_judged_by_its_own_samples(tmp_path, called):
    data = make_dataset(tmp_path / "set", n=40, classes=2)
    command = [f"{data}:class 1", f"{data}:class 0", "--minutes", "0.01", "--num", "8",
               "--methods", "generative-1+taught", "--out", tmp_path / "out"]
    first = called(continual, *command)
    stored = json.loads((tmp_path / "out/continual.json").read_text())
    start, result = stored["results"]
    assert (start["method"], start["matrix"]) == ("first", result["matrix"][:1]) and len(start["stages"]) == 2
    assert stored["tasks"] == ["class 1", "class 0"] and [len(row) for row in result["matrix"]] == [1, 2]
    assert len(result["report"]) == 2 and str(tmp_path) not in json.dumps(stored)
    generated, labels, meta = open_folder(tmp_path / "out/generative-1+taught-0/task1/generated")
    assert len(generated) + meta["num_val"] == 8 and set(labels) == {0} and meta["class_names"] == ["class 1"]
    for c in (0, 1):
        images, labels, meta = open_folder(tmp_path / f"out/class {c}")
        assert meta["class_names"] == [f"class {c}"] and set(labels) == {0} and len(images) == 20
    with Image.open(tmp_path / "out/continual-samples.png") as lines:
        assert lines.size == (2 * 8 * 16, 16)  # samples of both classes side by side
    again = called(continual, *command)
    assert again.out == first.out and "class 1 after class 0" in first.out
    assert "--classes cats: there are " in mistake(continual.main, data, f"{data}:cats", "--out", tmp_path / "else")
