"""Test what the papers promise, on any images, with the commands a user would type.

python tests/tools/reproduce.py speedup --each 4                                    # on the built-in faces
python tests/tools/reproduce.py transfer --data data/noto64 --other data/twemoji --each 4
python tests/tools/reproduce.py decoder --data data/noto --each 8 --only 'scratch|MaskDM'

CLAIM names a table of CLAIMS below. Each row is a way of training: stages (share of its time, flags
of train.py), from scratch or from the checkpoint of another row, and ways of sampling. Time is planned:
first short runs of all stages take turns, and the least seconds of a step are its cost; a stage then
gets as many steps as its time has room for. So the drift of the machine does not enter, and "seconds"
are steps times cost. Judged are the validation loss on whole images and --num samples: the Frechet
distance to 2000 training images by features that judge.py learns from the data set; with --random
that by random features, too. What is finished lies in OUT/CLAIM.json and is not run again, so an
interrupted call goes on; OUT holds one comparison, of one data set.
"""

import re
import shutil
import statistics
import sys
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from common import (  # puts the project on the path
    B16, DEMO, Results, call, frechet_distance, markdown, masked, measure_costs, picture, spread, train_for, typed,
    where_from)

import numpy as np

import curves
from prepare_data import Parser, check, open_folder, run_script

# ---- Claims.
@dataclass
class Row:
    """A way of training and of sampling."""
    stages: list  # share of the time, flags of train.py; stages of equal flags cost the same
    start: str = None  # the row from whose checkpoint it starts
    time: float = 1  # in units of --each
    on: str = "data"  # or the set "other", or "few": a tenth of its images
    draw: tuple = (["--steps=10"],)  # flags of sample.py
    curve: bool = False  # whether to measure on the way, too
    once: bool = False  # with seed 0 only; rows of all seeds start from that

def half_masked(first, *second):
    """Half of the time with these flags, then whole images."""
    return Row([(1 / 2, first), (1 / 2, list(second))])

def tuned(*flags, draw=(["--steps=2", "--weights=raw"],), once=True):
    """Consistency tuning of the claim's diffusion model."""
    return Row([(1, list(flags))], start="diffusion", draw=draw, once=once)

BLOCK = masked(0.9, kind="block")
ADAMW = "--optimizer=adamw"
WIDE = ["--p_mean=-0.4", "--p_std=1.6"]  # draws the noise levels more often that decide the colours of the whole
ROUTED = [*masked(0.75, kind="block"), "--route=1,5", "--batch_size=4", "--lr=2e-3"]  # a quarter through blocks 1 to 4
FINE = "--patch_size=2"
DECODER = ["--decoder_depth=2", "--decoder_dim=64", "--decoder_heads=2"]
CM = ["--loss=consistency", "--ema=0.999"]  # one line of the table is drawn by the average
SCT = [*CM, "--ref_batch=256"]
RAW = (["--steps=1", "--weights=raw"], ["--steps=2", "--weights=raw"])

CLAIMS = {
    # How much sooner is equal quality there? Two stages end after half of the time.
    "speedup": {
        "from scratch": Row([(1, [])], curve=True),
        "two stages": Row([(0.6, BLOCK), (0.4, [])], time=1 / 2, curve=True)},
    # What should the two stages be like, each for the same time? From scratch has twice as much.
    "recipe": {
        "from scratch": Row([(1, [])], time=2, curve=True),
        "from scratch, half as long": Row([(1, [])]),
        "from scratch, twice the rate": Row([(1, ["--lr=4e-3"])], time=2, once=True),
        "two stages": Row([(2 / 3, BLOCK), (1 / 3, [])], curve=True),
        "twice the rate in stage 2": Row([(2 / 3, BLOCK), (1 / 3, ["--lr=4e-3"])], once=True),
        "both with AdamW": Row([(2 / 3, [*BLOCK, ADAMW]), (1 / 3, [ADAMW])]),
        "from averaged weights": Row([(2 / 3, BLOCK), (1 / 3, ["--init_weights=ema"])]),
        "then wide noise": Row([(2 / 3, BLOCK), (1 / 3, WIDE)]),
        "routed between": Row([(2 / 3, BLOCK), (1 / 5, ROUTED), (2 / 15, [])]),
        "from scratch, AdamW": Row([(1, [ADAMW])])},
    # Masked pre-training on one set, then training on few images of another.
    "transfer": {
        "pre-training": Row([(1, BLOCK)], draw=()),
        "10 % of the images": Row([(1, [])], on="few"),
        "10 % of the images, pre-trained": Row([(1, [])], on="few", start="pre-training"),
        "100 % of the images": Row([(1, [])], on="other"),
        "100 % of the images, pre-trained": Row([(1, [])], on="other", start="pre-training")},
    "masks": {
        f"{name} {ratio}": half_masked([*masked(ratio, kind=kind), f"--block_size={block}", f"--batch_size={batch}"])
        for name, kind, block in (("patch", "patch", 1), ("block 2", "block", 2), ("block 4", "block", 4),
                                  ("crop", "crop", 1))
        for ratio, batch in ((0.1, 5), (0.5, 10), (0.9, 48))},  # a step sees about as many patches at each ratio
    # 256 patches at 32 px; six blocks on the visible tokens in all rows, MaskDiT's decoder on top.
    "decoder": {
        "from scratch": Row([(1, [FINE, B16])]),
        "MaskDM 0.5": half_masked([FINE, *masked(0.5)], FINE, B16),
        "MaskDiT 0.5": half_masked([FINE, *DECODER, *masked(0.5)], FINE, *DECODER, B16),
        "routed 0.5": half_masked([FINE, "--route=1,5", *masked(0.5)], FINE, B16)},
    # One diffusion model (or that of --start), tuned in several ways, each for the time that it took itself.
    "consistency": {
        "diffusion": Row([(0.5, masked(0.75)), (0.5, [B16])], once=True, draw=(
            ["--steps=18"], *(["--sampler=euler", f"--steps={n}"] for n in (1, 2, 8)))),
        "diffusion, trained on": Row([(1, [B16])], start="diffusion", draw=(["--steps=18"],)),
        "ECT": tuned(*CM, once=False, draw=RAW),
        "SCT": tuned(*SCT, once=False, draw=(*RAW, ["--steps=2"])),
        "SCT, clipped": tuned(*SCT, "--grad_clip=1"),
        # As at first: an average that warms up is at (1 + step) / (10 + step) = 0.995 here at the end.
        "SCT, AdamW, clipped, average of 0.995": tuned(
            *SCT, ADAMW, "--grad_clip=1", "--ema=0.995", draw=(["--steps=1"], ["--steps=2"]))},
}

# ---- Rows.
def rows_of(args):
    """The claim's rows with all flags, but for the data, the seed and the start."""
    def flags_of(own):  # come last, and count
        flags = [DEMO]
        if args.patch_size:
            flags.append(f"--patch_size={args.patch_size}")
        if args.batch_size:
            is_masked = any(flag.startswith("--mask_ratio") for flag in own)
            flags.append(f"--batch_size={args.batch_size * (12 if is_masked else 1)}")
        return flags + own

    rows = {}
    for name, row in CLAIMS[args.claim].items():
        rows[name] = replace(row, stages=[(share, flags_of(own)) for share, own in row.stages])
    if args.start:
        rows["diffusion"].stages = []
    return rows

def data_set(on, args):
    """The folder of "data" or "other", or OUT/few: a tenth of the images of "other"."""
    if on == "data":
        return args.data
    check(args.other, f"{args.claim} needs a second data set: give --other")
    if on == "other":
        return args.other
    few = args.out / "few"
    if not few.exists():
        tenth = len(open_folder(args.other)[0]) // 10
        call("prepare_data.py", args.other, "--num", tenth, "--out", few, log=args.out / "output.txt")
    return few

def folder_of(name, seed, args):
    if CLAIMS[args.claim][name].once:
        seed = 0
    return args.out / args.claim / f"{re.sub(r'[^0-9a-zA-Z.]+', '-', name)}-{seed}"

def judged(checkpoint, samples, flags, row, args, log):
    """Draw samples -> their distances to the row's data set."""
    call("sample.py", "--ckpt", checkpoint, f"--num={args.num}", *flags, "--out", samples, log=log)
    on = "data" if row.on == "data" else "other"
    where = data_set(on, args), args.out / on, log
    distances = dict(judge_fd=frechet_distance(samples, *where))
    if args.random:
        distances["random_fd"] = frechet_distance(samples, *where, "random")
    return distances

def run_row(name, row, seed, args, costs):
    """Train and judge a row with one seed -> what the results say of it."""
    folder = folder_of(name, seed, args)
    shutil.rmtree(folder, ignore_errors=True)  # of an interrupted call
    folder.mkdir(parents=True)
    log = folder / "output.txt"
    checkpoint = folder_of(row.start, seed, args) / "final.pt" if row.start else None
    stages = []
    before = 0  # planned seconds until this stage
    for share, flags in row.stages:
        cost = costs["/".join(flags)]
        flags = [f"--data={data_set(row.on, args)}", f"--seed={seed}", *flags]
        if checkpoint:
            flags.append(f"--init_from={checkpoint}")
        out = folder / f"stage{len(stages) + 1}"
        checkpoint, facts = train_for(60 * args.each * row.time * share, cost, out, flags, log, row.curve)
        facts["curve"] = [[before + at, loss] for at, loss in facts["curve"]]
        stages.append(facts)
        if row.curve and len(stages) == len(row.stages):  # a masked model draws nothing yet
            facts["fd_curve"] = []
            for kept in sorted(out.glob("??-*.pt")):
                found = judged(kept, folder / "early.npz", [f"--seed={seed}", "--steps=10"], row, args, log)
                facts["fd_curve"].append([before + int(kept.stem[-7:]) * cost, found["judge_fd"]])
        before += facts["seconds"]
    shutil.copy(checkpoint or args.start, folder / "final.pt")
    drawn = []
    for i, flags in enumerate(row.draw):
        found = judged(folder / "final.pt", folder / f"samples{i}.npz", [f"--seed={seed}", *flags], row, args, log)
        drawn.append(dict(flags=" ".join(flags), **found))
    for big in folder.glob("stage*"):
        shutil.rmtree(big)
    val_loss = None
    if stages and "--loss=consistency" not in row.stages[-1][1]:  # whose loss is another thing
        val_loss = stages[-1]["val_loss"]
    return dict(row=name, seed=seed, minutes=args.each * row.time, stages=stages, drawn=drawn, val_loss=val_loss,
                **where_from())

# ---- Reports.
MEASURES = {"judge_fd": "judge's FD", "random_fd": "random-feature FD"}
FACTS = {"images_per_s": ("images/s by stage", ".0f"), "steps": ("steps", ".0f"), "seconds": ("seconds", ".0f"),
         "peak_gb": ("peak memory, GB", ".2f")}

def table(results):
    """A line for each row and way of sampling, over the seeds; columns of what was measured."""
    measures = [key for key in MEASURES if any(key in drawn for r in results for drawn in r["drawn"])]
    lines = []
    for name in dict.fromkeys(r["row"] for r in results):
        own = [r for r in results if r["row"] == name]
        facts = []
        for key, (_, form) in FACTS.items():
            stages = zip(*([stage[key] for stage in r["stages"]] for r in own))  # over the seeds
            facts.append(", ".join(format(statistics.mean(values), form) for values in stages))
        for drawn in zip(*(r["drawn"] for r in own)):
            distances = [spread([d[key] for d in drawn]) for key in measures]
            lines.append([name, drawn[0]["flags"].replace("--", ""), spread([r["val_loss"] for r in own]),
                          *distances, *facts])
    heads = ["way", "samples", "validation loss", *(MEASURES[key] for key in measures)]
    return markdown(heads + [head for head, _ in FACTS.values()], lines)

def points(result, key):
    """[seconds of training, value] of a row: validation loss ("curve") or the judge's distance ("fd_curve")."""
    last = result["val_loss"] if key == "curve" else result["drawn"][0]["judge_fd"]
    end = sum(stage["seconds"] for stage in result["stages"])
    return [point for stage in result["stages"] for point in stage.get(key, ())] + [[end, last]]

def settled(curve):
    """The points with the worst value that is still to come: a dip is not yet where a curve stays."""
    return [[t, max(value for _, value in curve[i:])] for i, (t, _) in enumerate(curve)]

def reached(curve, value):
    """When a curve of points is first at a value or below, between two points on their line; or None."""
    for (t0, v0), (t1, v1) in zip(curve[:1] + curve, curve):
        if v1 <= value < v0:
            return t0 + (t1 - t0) * (v0 - value) / (v0 - v1)
        if v1 <= value:
            return t1
    return None

def time_ratios(results):
    """A line for each seed and measure: how many times sooner two stages are at what both end with, and stay there.

    A way that was there at its first point came at some time before, which bounds the ratio, too.
    """
    heads = ["seed", "measure", "reached by both", "from scratch after", "two stages after", "times faster"]
    signs = {(True, False): "≤ ", (False, True): "≥ ", (True, True): "? ", (False, False): ""}
    lines = []
    for seed in sorted({r["seed"] for r in results}):
        found = {r["row"]: r for r in results if r["seed"] == seed}
        if not {"from scratch", "two stages"} <= found.keys():
            continue
        pair = found["from scratch"], found["two stages"]
        for key, name in (("curve", "validation loss"), ("fd_curve", "judge's FD")):
            ways = [settled(points(r, key)) for r in pair]
            value = max(way[-1][1] for way in ways)
            times = [reached(way, value) for way in ways]
            early = tuple(way[0][1] <= value for way in ways)
            after = [f"{'≤ ' if is_early else ''}{t:.0f} s" for is_early, t in zip(early, times)]
            lines.append([str(seed), name, f"{value:.4g}", *after, f"{signs[early]}{times[0] / times[1]:.1f}"])
    return markdown(heads, lines)

def plot(path, results, key, title):
    """Draw a measure against planned seconds, a line for each row and seed of which there are several points."""
    lines = [(r["row"], points(r, key), True) for r in results if len(points(r, key)) > 1]
    if lines:
        curves.draw(path, lines, f"{title} against planned seconds of training")

def main(argv):
    parser = Parser(__doc__)
    parser.add_argument("claim", choices=CLAIMS)
    add = parser.add
    add("data", "data/faces", "prepared set")
    add("other", None, "the set that transfer goes to")
    add("start", None, "a trained diffusion model, for consistency to tune")
    add("patch_size", None, "another one than the claim's", int, low=1)
    add("batch_size", None, "of whole images; of masked ones 12 times as many", int, low=1)
    add("each", 4.0, "minutes of training of a row of one unit")
    add("only", "", "rows whose names this regular expression finds")
    add("seeds", 2, "seeds of each row", low=1)
    add("num", 1000, "samples of each Frechet distance", low=2)
    add("random", False, "measure random features, too, in two minutes each")
    add("out", None, "folder; None = out/reproduce/CLAIM-DATA")
    args = parser.parse_args(argv)
    if args.start:
        check("diffusion" in CLAIMS[args.claim] and Path(args.start).is_file(),
              f"--start {args.start}: expected a checkpoint, for the claim consistency")
    args.out = Path(args.out or f"out/reproduce/{args.claim}-{Path(args.data).name}").resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.data == "data/faces" and not Path(args.data).exists():
        call("prepare_data.py", log=args.out / "output.txt")  # makes them
    open_folder(args.data)  # a mistake is told at once
    settings = {name: getattr(args, name) for name in ("claim", "patch_size", "batch_size", "each", "num", "random")}
    for name in ("data", "other", "start"):
        settings[name] = Path(getattr(args, name) or "none").name
    done = Results(args.out / f"{args.claim}.json", settings, typed(__file__, argv))
    names = list(CLAIMS[args.claim])
    rows = {name: row for name, row in rows_of(args).items() if re.search(args.only, name)}
    costs = done.stored.setdefault("cost_seconds", {})  # by the flags
    commands = {"/".join(flags): [f"--data={data_set(row.on, args)}", *flags]
                for row in rows.values() for _, flags in row.stages}
    measure_costs(commands, costs, args.out / "trial", args.out / "output.txt")
    done.save()
    for seed, (name, row) in product(range(args.seeds), rows.items()):
        if (seed and row.once) or done.find(row=name, seed=seed):
            continue
        done.results.append(run_row(name, row, seed, args, costs))
        print(table(done.results[-1:]), file=sys.stderr, flush=True)
        done.results.sort(key=lambda r: (names.index(r["row"]), r["seed"]))
        done.save()

    print(table(done.results))
    # Ten samples of seed 0 for each line of the table, from the same noise.
    paths = [folder_of(r["row"], 0, args) / f"samples{i}.npz"
             for r in done.find(seed=0) for i in range(len(r["drawn"]))]
    if paths:
        picture(args.out / f"{args.claim}-samples.png", [np.load(path)["arr_0"][:10] for path in paths])
    if any(row.curve for row in rows.values()):
        print("\n" + time_ratios(done.results))
        for key, title in (("curve", "validation loss"), ("fd_curve", "judge's Frechet distance")):
            plot(args.out / f"{args.claim}-{key}.png", done.results, key, title)

if __name__ == "__main__":
    run_script(main)
