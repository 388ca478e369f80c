"""Test what the papers promise, on any images, with the commands a user would type.

python tests/tools/reproduce.py speedup --minutes 40 --seeds 2                      # on the built-in faces
python tests/tools/reproduce.py transfer --data noto-emoji-64.zip --other twemoji-64.zip --minutes 60
python tests/tools/reproduce.py decoder --data noto-emoji-64.zip --size 32 --each 8 --seeds 2

CLAIM names a table of CLAIMS below. Each row is a way of training: stages (share of its time, flags
of train.py), from scratch or from the checkpoint of another row, and ways of sampling. Time is planned:
first short runs of all stages take turns, and the least seconds of a step are its cost; a stage then
gets as many steps as its time has room for. So the drift of the machine does not enter, rows can run
side by side (--jobs), and "seconds" below are steps times cost. --minutes is the planned training of
all rows and seeds; --each gives that of a row instead. Judged are the validation loss on whole images and
--num samples: the Frechet distance to the first 2000 training images by features that judge.py learns
from the data set; with --random that by random features, too. What is finished lies in OUT/CLAIM.json
and is not run again, so an interrupted call goes on; OUT holds one comparison, of one data set.
"""

import argparse
import itertools
import json
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

import curves
import sample

DECODER = ["--decoder_depth=2", "--decoder_dim=64", "--decoder_heads=2"]
QUIET = ["--sample_every=0", "--save_every=0"]
RAW = "--weights=raw"  # not the average, which follows slowly


def row(*stages, start=None, time=1, on="data", draw=(["--steps=10"],), curve=False, once=False):
    """A way of training: stages (share of its time, flags; equal steps cost the same) on a data set, for `time` units.

    once: with seed 0 only, and rows of all seeds start from that; or from --start in place of it.
    """
    return dict(stages=stages, start=start, time=time, on=on, draw=draw, curve=curve, once=once)


def masked(ratio, *flags, kind="patch"):
    return [f"--mask_ratio={ratio}", f"--mask_type={kind}", *flags]


def two_stages(share, *flags):
    """Masked with these flags for a share of the time, then whole images."""
    return row((share, flags), (1 - share, []))


def tuned(*stages, once=False, draw=(["--steps=1", RAW], ["--steps=2", RAW])):
    """Stages of consistency tuning of the claim's diffusion model, drawn in one and two steps."""
    return row(*stages, start="diffusion", draw=draw, once=once)


B16 = "--batch_size=16"  # of whole images, where 4 is the default today
WHOLE = (0.5, [B16])  # the second half of the time
BLOCK = masked(0.9, kind="block")
WIDE = ["--p_mean=-0.4", "--p_std=1.6"]  # draws the noise levels more often that decide the colours of the whole
DEMO = ["--preset=demo"]
ADAMW = ["--optimizer=adamw"]
# Whole images of which a quarter of the patches goes through blocks 1 to 4.
ROUTED = [*masked(0.75, kind="block"), "--route=1,5", "--batch_size=4", "--lr=2e-3"]
CM = ["--loss=consistency", "--ema=0.999"]  # on every device; one line of the table is drawn by it
SCT = [*CM, "--ref_batch=256"]
CLAIMS = {
    # How much sooner is equal quality there? The other rows end after half of the time.
    "speedup": dict(network=DEMO, rows={
        "from scratch": row((1, []), curve=True),
        "from scratch, half as long": row((1, []), time=1 / 2),
        "two stages": row((0.6, BLOCK), (0.4, []), time=1 / 2, curve=True)}),
    # What the two stages should be like, each for the same time, but for the first row, which has twice as much.
    "recipe": dict(network=DEMO, rows={
        "from scratch": row((1, []), time=2, curve=True),
        "from scratch, half as long": row((1, [])),
        "from scratch, twice the rate": row((1, ["--lr=4e-3"]), time=2, once=True),
        "two stages": row((2 / 3, BLOCK), (1 / 3, []), curve=True),
        "twice the rate in stage 2": row((2 / 3, BLOCK), (1 / 3, ["--lr=4e-3"]), once=True),
        "both with AdamW": row((2 / 3, [*BLOCK, *ADAMW]), (1 / 3, ADAMW)),
        "from averaged weights": row((2 / 3, BLOCK), (1 / 3, ["--init_weights=ema"])),
        "then wide noise": row((2 / 3, BLOCK), (1 / 3, WIDE)),
        "routed between": row((2 / 3, BLOCK), (1 / 5, ROUTED), (2 / 15, [])),
        "from scratch, AdamW": row((1, ADAMW))}),
    # Masked pre-training on one set, then fine-tuning on few images of another.
    "transfer": dict(network=DEMO, rows={
        "pre-training": row((1, BLOCK), draw=()),
        **{f"{name} of the images{', pre-trained' * bool(start)}": row((1, []), start=start, on=on)
           for name, on in {"10 %": "few", "100 %": "other"}.items() for start in (None, "pre-training")}}),
    "masks": dict(network=DEMO, rows={
        f"{name} {ratio}": two_stages(0.5, *masked(ratio, *flags, f"--batch_size={batch}", kind=kind))
        for name, kind, flags in (("patch", "patch", []), ("block 2", "block", []),
                                  ("block 4", "block", ["--block_size=4"]), ("crop", "crop", []))
        for ratio, batch in ((0.1, 5), (0.5, 10), (0.9, 48))}),  # a step sees about as many patches at each ratio
    # 256 patches at 32 px; six blocks on the tokens that pass through in all rows, MaskDiT's decoder on top.
    "decoder": dict(network=["--patch_size=2", "--dim=128", "--heads=4"], rows={
        "from scratch": row((1, ["--depth=6", B16])),
        "MaskDM 0.5": row((0.5, ["--depth=6", *masked(0.5)]), WHOLE),
        "MaskDM 0.75": row((0.5, ["--depth=6", *masked(0.75)]), WHOLE),
        "MaskDiT 0.5": row((0.5, ["--depth=6", *masked(0.5, *DECODER)]), WHOLE),
        "MaskDiT 0.5, no reconstruction": row((0.5, ["--depth=6", *masked(0.5, *DECODER, "--mae_weight=0")]), WHOLE),
        "routed 0.5": row((0.5, ["--depth=6", "--route=1,5", *masked(0.5)]), WHOLE)}),
    # One diffusion model, tuned in several ways, each for the time that it took itself or for --steps.
    "consistency": dict(network=DEMO, rows={
        "diffusion": row((0.5, masked(0.75)), WHOLE, once=True, draw=[["--steps=18"]] + [
            ["--sampler=euler", f"--steps={n}"] for n in (1, 2, 8)]),
        "diffusion, trained on": row((1, [B16]), start="diffusion", draw=(["--steps=18"],)),
        "ECT": tuned((1, CM)),
        "SCT": tuned((1, SCT), draw=(["--steps=1", RAW], ["--steps=2", RAW], ["--steps=2"])),
        "SCT, clipped": tuned((1, [*SCT, "--grad_clip=1"]), once=True, draw=(["--steps=2", RAW],)),
        # As at first: an average that warms up is at (1 + step) / (10 + step) = 0.995 here at the end.
        "SCT, AdamW, clipped, average of 0.995": tuned((1, [*SCT, *ADAMW, "--grad_clip=1", "--ema=0.995"]), once=True,
                                                       draw=(["--steps=1"], ["--steps=2"])),
        "SCT, masked 0.5 at first": tuned((0.5, [*SCT, *masked(0.5)]), (0.5, SCT), once=True, draw=(["--steps=2", RAW],))}),
}

# ---------------------------------------------------------------------------------------------
# Commands.


def call(script, *args, log):
    """Run a script of the project; returns (stdout, peak memory in GB). Fails with its last words."""
    with open(log, "a") as err:
        p = subprocess.Popen([sys.executable, str(ROOT / script), *map(str, args)], stdout=subprocess.PIPE,
                             stderr=err, text=True)
        out = p.stdout.read()
        _, status, usage = os.wait4(p.pid, 0)
    if status:
        sys.exit(f"{script} failed: {Path(log).read_text().strip().splitlines()[-1]} (all of it in {log})")
    return out, usage.ru_maxrss / 1e6


def last_json(out):
    return json.loads(out.splitlines()[-1])


def where_from():
    """What a figure must be told with: the code, the machine."""
    git = subprocess.run(["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=ROOT, capture_output=True,
                         text=True)
    names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")] \
        if os.path.exists("/proc/cpuinfo") else [platform.processor()]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{len(names)} cores of {names[0]}"
    return dict(commit=git.stdout.strip() or "unknown", machine=device, torch=torch.__version__,
                date=time.strftime("%Y-%m-%d"))


def typed(script):
    """The command of this process as anybody can type it: without --out, files by their names."""
    return shlex.join(["python", f"tests/tools/{script}", *(
        re.sub("(^|=)/.*/", r"\1", a) for before, a in zip(sys.argv, sys.argv[1:])
        if "--out" not in (before, a) and not a.startswith("--out="))])


def records(folder):
    return [r for r in map(json.loads, open(folder / "log.jsonl")) if "images_per_s" in r or "val_loss" in r]


def step_times(flags, folder, log, points=8):
    """Seconds of training after each four steps of a run of train.py, which is stopped when there are so many."""
    command = ["train.py", *flags, f"--out_dir={folder}", *QUIET, "--steps=1000000", "--log_every=4", "--eval_every=0"]
    at = []
    with open(log, "a") as err:
        p = subprocess.Popen([sys.executable, ROOT / command[0], *command[1:]], stdout=subprocess.DEVNULL, stderr=err)
        while len(at) < points and p.poll() is None:
            time.sleep(0.2)
            at = [r["seconds"] for r in records(folder) if "seconds" in r] if Path(folder, "log.jsonl").exists() else []
        p.terminate()
        p.wait()
    shutil.rmtree(folder, ignore_errors=True)
    if len(at) < points:
        sys.exit(f"train.py failed: {Path(log).read_text().strip().splitlines()[-1]} (all of it in {log})")
    return at


def step_seconds(commands, folder, log, rounds=3):
    """The least seconds of a step of each list of flags of train.py, in short runs that take turns."""
    least = {}
    for _ in range(rounds):
        for flags in commands:
            at = step_times(flags, folder, log)
            pace = min((b - a) / 4 for a, b in zip(at, at[1:]))  # without the first steps, which warm up
            least[tuple(flags)] = min(pace, least.get(tuple(flags), pace))
    return least


def train_for(seconds, cost, out_dir, flags, log, curve=False):
    """Train for a planned time, at `cost` seconds a step; returns (checkpoint, facts).

    With curve=True the facts have points [planned seconds, validation loss], and the checkpoint kept at three
    quarters.
    """
    n = max(10, round(seconds / cost))
    every = max(10, n // 40 * 10) if curve else 0  # four times, and at the end
    begun = time.time()
    _, memory = call("train.py", *flags, f"--out_dir={out_dir}", *QUIET, f"--steps={n}", "--log_every=10",
                     f"--eval_every={every}", f"--keep_every={3 * every}", log=log)
    found = records(out_dir)
    losses = {r["step"]: r["val_loss"] for r in found if "val_loss" in r}
    checkpoint = max(out_dir.glob("??.pt"), key=os.path.getmtime)
    config = sample.load_checkpoint(checkpoint)["config"]
    took = [r["seconds"] for r in found if "seconds" in r][-1]
    facts = dict(steps=n, cost_ms=1e3 * cost, seconds=n * cost, images_per_s=config["batch_size"] / cost, took=took,
                 wall=time.time() - begun, peak_gb=memory, val_loss=losses[n])
    if curve:
        facts["curve"] = [[step * cost, loss] for step, loss in losses.items() if step < n]
        facts["kept"] = [[int(p.stem[-7:]) * cost, str(p)] for p in out_dir.glob("??-*.pt")]
    return checkpoint, facts


def distances(checkpoint, name, flags, on, args, log):
    """Frechet distances of --num samples to a set: by the judge's features and, if wished, by random ones."""
    dtype = str(sample.pick_dtype("auto", sample.pick_device("auto")))[6:]  # on a CPU that has it twice as fast
    call("sample.py", "--ckpt", checkpoint, f"--num={args.num}", f"--dtype={dtype}", *flags, "--out",
         f"{name}.npz", log=log)
    with np.load(f"{name}.npz") as images:
        sample.save_grid(f"{name}.png", images["arr_0"][:64])
    found = {}
    for features in ["judge", "random"][: 1 + args.random]:
        statistics, flag = reference(on, args, features)
        out, _ = call("fid.py", statistics, f"{name}.npz", flag, "--json", log=log)
        found[f"{features}_fd"] = last_json(out)["fd" if features == "judge" else "random_fd"]
    return found


# ---------------------------------------------------------------------------------------------
# Data sets and rows.


def data_set(on, args):
    """The prepared folder OUT/data, OUT/other, or OUT/few: a tenth of the images of OUT/other."""
    folder, log = Path(args.out, on), args.out + "/output.txt"
    if folder.exists():
        return folder
    if on == "few":
        other = data_set("other", args)
        n = len(np.load(other / "train.npy", mmap_mode="r"))
        call("prepare_data.py", other, "--num", n // 10, "--out", folder, log=log)
        return folder
    source = args.data if on == "data" else args.other
    if source is None:
        sys.exit(f"{args.claim} needs a second data set: give --other")
    if Path(source, "meta.json").exists():
        folder.symlink_to(Path(source).resolve())
    else:
        size = ["--size", args.size] if args.size else []
        source = [] if source == "data/faces" else [source]  # the built-in ones
        call("prepare_data.py", *source, "--out", folder, *size, log=log)
    return folder


def reference(on, args, features):
    """Statistics of the first 2000 training images, with which samples are compared; and fid.py's flag for them."""
    on, log = "other" if on == "few" else on, args.out + "/output.txt"
    path, net = Path(args.out, f"reference-{features}-{on}.npz"), Path(args.out, f"judge-{on}.pt")
    if features == "judge" and not net.exists():
        call("tests/tools/judge.py", data_set(on, args), "--no-table", "--out", net, log=log)
    flag = f"--features={net if features == 'judge' else features}"
    if not path.exists():
        call("fid.py", data_set(on, args), flag, "--stats", path, "--num=2000", log=log)
    return path, flag


def folder_of(args, name, seed):
    seed = 0 if CLAIMS[args.claim]["rows"][name]["once"] else seed
    return Path(args.out) / args.claim / f"{name.replace(' ', '-').replace(',', '').replace('/', '-')}-{seed}"


def flags_of(way, flags, args):
    """A stage's flags for train.py, but for where it starts, the seed and the number of steps."""
    network = CLAIMS[args.claim]["network"] + ([f"--patch_size={args.patch_size}"] if args.patch_size else [])
    if args.batch_size:  # a row's own comes later, and counts
        hidden = any(f.startswith("--mask_ratio=") for f in flags)
        flags = [f"--batch_size={args.batch_size * (12 if hidden else 1)}", *flags]
    return [f"--data={data_set(way['on'], args)}", *network, *flags]


def is_given(way, args):
    """Whether --start stands in for this row."""
    return bool(args.start and way["once"] and not way["start"])


def run_row(name, seed, args, costs):
    claim, out_dir = CLAIMS[args.claim], folder_of(args, name, seed)
    shutil.rmtree(out_dir, ignore_errors=True)
    out_dir.mkdir(parents=True)
    way, log, stages, before = claim["rows"][name], out_dir / "output.txt", [], 0
    ready = is_given(way, args)
    checkpoint = args.start if ready else (folder_of(args, way["start"], seed) / "final.pt" if way["start"] else None)
    for i, (share, flags) in enumerate(() if ready else way["stages"]):
        flags = flags_of(way, flags, args)
        start = [f"--init_from={checkpoint}"] if checkpoint else []
        checkpoint, facts = train_for(args.unit * way["time"] * share, costs["/".join(flags[1:])], out_dir / f"stage{i + 1}",
                                      [*flags, f"--seed={seed}", *start], log, way["curve"])
        kept = facts.pop("kept", ())
        for at, path in kept if i == len(way["stages"]) - 1 else ():  # masked ones draw nothing yet
            facts.setdefault("fd_curve", []).append([before + at, distances(
                path, out_dir / f"samples{before + at:.0f}", [f"--seed={seed}", "--steps=10"], way["on"], args,
                log)["judge_fd"]])
        facts["curve"] = [[before + at, loss] for at, loss in facts.get("curve", ())]
        stages.append(facts)
        before += facts["seconds"]
    shutil.copy(checkpoint, out_dir / "final.pt")
    drawn = [dict(flags=" ".join(flags), **distances(checkpoint, out_dir / f"samples{''.join(flags)}",
                                                     [f"--seed={seed}", *flags], way["on"], args, log))
             for flags in way["draw"]]
    for big in out_dir.glob("stage*"):
        shutil.rmtree(big)
    tuned = "--loss=consistency" in way["stages"][-1][1]  # its validation loss is another thing
    return dict(row=name, seed=seed, minutes=args.unit * way["time"] / 60, stages=stages, drawn=drawn,
                val_loss=None if tuned or ready else stages[-1]["val_loss"], **where_from())


# ---------------------------------------------------------------------------------------------
# Reports.


def both(values):
    """The mean, and half the distance between the extremes; nothing of what was not measured."""
    if None in values:
        return ""
    spread = f" ± {(max(values) - min(values)) / 2:.2g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4g}{spread}"


MEASURES = {"judge_fd": "judge's FD", "random_fd": "random-feature FD", "kid": "random-feature KID"}
FACTS = {"images_per_s": ("images/s by stage", "{:.0f}"), "steps": ("steps", "{:.0f}"), "seconds": ("seconds", "{:.0f}"),
         "peak_gb": ("peak memory, GB", "{:.2f}")}


def table(results):
    """Markdown, a line for each row and way of sampling, over the seeds; columns of what was measured."""
    measures = [key for key in MEASURES if any(key in d for r in results for d in r["drawn"])]
    facts = [key for key in FACTS if any(key in s for r in results for s in r["stages"])]
    heads = ["way", "samples", "validation loss", *map(MEASURES.get, measures), *(FACTS[key][0] for key in facts)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in dict.fromkeys(r["row"] for r in results):
        rows = [r for r in results if r["row"] == name]
        stages = list(zip(*(r["stages"] for r in rows)))
        for drawn in zip(*(r["drawn"] for r in rows)):
            cells = [name, drawn[0]["flags"].replace("--", ""), both([r["val_loss"] for r in rows]),
                     *[both([d.get(key) for d in drawn]) for key in measures],
                     *[", ".join(FACTS[key][1].format(statistics.mean(s[key] for s in stage)) for stage in stages)
                       for key in facts]]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(args, results):
    """OUT/CLAIM-samples.png: ten samples of seed 0, a line for each line of the table, from the same noise."""
    lines = []
    for name, flags in ((r["row"], flags) for r in results if r["seed"] == 0 for flags in CLAIMS[args.claim][
            "rows"][r["row"]]["draw"]):
        with np.load(folder_of(args, name, 0) / f"samples{''.join(flags)}.npz") as images:
            lines.append(images["arr_0"][:10])
    if lines:
        sample.save_grid(f"{args.out}/{args.claim}-samples.png", np.concatenate(lines), columns=len(lines[0]))


def points(result, key):
    """[seconds of training, value] of a row: validation loss ("curve") or the judge's distance ("fd_curve")."""
    last = result["val_loss"] if key == "curve" else result["drawn"][0]["judge_fd"]
    own = [p for stage in result["stages"] for p in stage.get(key, ())]
    return own + [[sum(s["seconds"] for s in result["stages"]), last]]


def settled(curve):
    """The points with the worst value that is still to come: a dip is not yet where a curve stays."""
    return [[t, max(v for _, v in curve[i:])] for i, (t, _) in enumerate(curve)]


def reached(curve, value):
    """When a curve of points is first at a value or below, between two points on their line; or None."""
    for (t0, v0), (t1, v1) in zip(curve[:1] + curve, curve):
        if v1 <= value:
            return t1 if v0 <= value else t0 + (t1 - t0) * (v0 - value) / (v0 - v1)
    return None


def time_ratios(results, slow="from scratch", fast="two stages"):
    """One line for each seed and measure: how many times sooner `fast` is at what both end with, and stays there.

    A way that was there at its first point came at some time before, which bounds the ratio, too.
    """
    lines = ["| seed | measure | reached by both | from scratch after | two stages after | times faster |",
             "|---|---|---|---|---|---|"]
    for seed in sorted({r["seed"] for r in results}):
        found = {r["row"]: r for r in results if r["seed"] == seed}
        if not {slow, fast} <= set(found):
            continue
        for key, name in (("curve", "validation loss"), ("fd_curve", "judge's FD")):
            ways = [settled(points(found[way], key)) for way in (slow, fast)]
            value = max(way[-1][1] for way in ways)
            late, soon = (reached(way, value) for way in ways)
            early = tuple(way[0][1] <= value for way in ways)
            sign = {(True, False): "≤ ", (False, True): "≥ ", (True, True): "? "}.get(early, "")
            lines.append(f"| {seed} | {name} | {value:.4g} | {'≤ ' * early[0]}{late:.0f} s | "
                         f"{'≤ ' * early[1]}{soon:.0f} s | {sign}{late / soon:.1f} |")
    return "\n".join(lines)


def plot(path, results, key, title):
    """Draw a measure against planned seconds, a line for each row and seed of which there are several points."""
    names = list(dict.fromkeys(r["row"] for r in results))
    lines = [(r["row"], names.index(r["row"]), points(r, key), True) for r in results if len(points(r, key)) > 1]
    curves.draw(path, lines, f"{title} against planned seconds of training")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claim", choices=CLAIMS)
    parser.add_argument("--data", default="data/faces", help="prepared set, or anything that prepare_data.py reads")
    parser.add_argument("--other", help="the set that transfer goes to")
    parser.add_argument("--start", help="a trained diffusion model, for consistency to tune")
    parser.add_argument("--size", type=int, help="pixels a side, for images that are not prepared")
    parser.add_argument("--patch_size", type=int, help="another one than the claim's")
    parser.add_argument("--batch_size", type=int, help="of whole images; of masked ones 12 times as many")
    parser.add_argument("--minutes", type=float, default=40, help="of training, all rows and seeds")
    parser.add_argument("--each", type=float, help="minutes of training of a row of one unit, instead")
    parser.add_argument("--jobs", type=int, default=1, help="rows at a time, each with its share of the cores")
    parser.add_argument("--only", default="", help="rows whose names this regular expression finds")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--num", type=int, default=1000, help="samples of each Frechet distance")
    parser.add_argument("--random", action="store_true", help="measure random features, too, in two minutes each")
    parser.add_argument("--out", help="default: out/reproduce/CLAIM-DATA")
    args = parser.parse_args()
    if args.start and not os.path.isfile(args.start):
        sys.exit(f"no checkpoint at {args.start}: train one, or leave --start out")
    args.out = os.path.abspath(args.out or f"out/reproduce/{args.claim}-{Path(args.data).stem}")
    Path(args.out).mkdir(parents=True, exist_ok=True)
    rows = CLAIMS[args.claim]["rows"]
    args.unit = 60 * (args.each or args.minutes / args.seeds / sum(r["time"] for r in rows.values()))
    about = dict(claim=args.claim, data=Path(args.data).name, other=args.other and Path(args.other).name,
                 start=args.start and Path(args.start).name, size=args.size, patch_size=args.patch_size,
                 batch_size=args.batch_size, num=args.num, random=args.random, minutes=args.unit / 60)
    done = Path(args.out, args.claim + ".json")
    stored = json.loads(done.read_text()) if done.exists() else dict(about, results=[])
    if differ := [k for k in about if stored.get(k) != about[k]]:
        sys.exit(f"{done} has results with other {differ[0]} ({stored.get(differ[0])}): give another --out")
    data_set("data", args)
    stored["command"] = typed("reproduce.py")
    rows = {name: way for name, way in rows.items() if re.search(args.only, name)}
    results, failed = stored["results"], []
    costs = stored.setdefault("cost_seconds", {})  # by the flags; a call that goes on plans as before
    needed = {"/".join(f[1:]): f for way in rows.values() if not is_given(way, args)
              for f in [flags_of(way, flags, args) for _, flags in way["stages"]]}
    if missing := [f for key, f in needed.items() if key not in costs]:
        known = [needed[key] for key in needed if key in costs][:1]  # tells how fast the machine is now
        paces = step_seconds(known + missing, Path(args.out, "trial"), args.out + "/output.txt")
        now = costs["/".join(known[0][1:])] / paces[tuple(known[0])] if known else 1
        costs.update({"/".join(f[1:]): now * paces[tuple(f)] for f in missing})
        done.write_text(json.dumps(stored, indent=1))
    if args.jobs > 1:
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // args.jobs))
    todo = [(name, seed) for seed, name in itertools.product(range(args.seeds), rows)
            if not (seed and rows[name]["once"]) and not any((r["row"], r["seed"]) == (name, seed) for r in results)]
    for way in rows.values():  # before several rows need it at once
        for features in ["judge", "random"][: 1 + args.random] if way["draw"] else []:
            reference(way["on"], args, features)
    ended, lock = {task: threading.Event() for task in todo}, threading.Lock()

    def attempt(task):
        name, seed = task
        start = rows[name]["start"]
        for before in ((start, seed), (start, 0)):
            if before in ended:
                ended[before].wait()
        try:
            found = run_row(name, seed, args, costs)
        except SystemExit as e:  # the others may run
            failed.append(f"{name}, seed {seed}: {e}")
        else:
            with lock:
                results.append(found)
                results.sort(key=lambda r: (list(CLAIMS[args.claim]["rows"]).index(r["row"]), r["seed"]))
                done.write_text(json.dumps(stored, indent=1))
            print(f"{name}, seed {seed}: validation loss {found['val_loss']}, judge's FD "
                  + ", ".join(f"{d['judge_fd']:.4g}" for d in found["drawn"]), file=sys.stderr, flush=True)
        finally:
            ended[task].set()

    if args.jobs > 1:
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(attempt, todo))
    else:
        for task in todo:
            attempt(task)
    print(table(results))
    picture(args, results)
    if any(way["curve"] for way in rows.values()):
        print("\n" + time_ratios(results))
        for key, title in (("curve", "validation loss"), ("fd_curve", "judge's Frechet distance")):
            plot(f"{args.out}/{args.claim}-{key}.png", results, key, title)
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
