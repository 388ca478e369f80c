"""Test what the papers promise, on a data set with classes, with the commands a user would type.

python prepare_data.py fashion-mnist/ --size 28 --out data/fashion      # Debian: apt install dataset-fashion-mnist
python tests/tools/reproduce.py speedup --data data/fashion             # ends with the table of records

A way of your own becomes a line of that table: add it to WAYS and to CLAIMS, and run the command again.

A claim names ways to train (WAYS: stages, each a share of the time and flags of train.py), and for how long,
in units of --each minutes on one core. Time is planned: short runs of all stages take turns, and the least
seconds of a step are its cost; a stage then gets as many steps as its time has room for. Reported are the
validation loss on whole images and what classifier.py says of --num samples; on a set without classes the loss
alone. A finished run in OUT is not repeated: an interrupted call goes on, and other --seeds and claims may share OUT.
"""

import json
import re
import shutil
import statistics
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from common import (  # puts the project on the path
    call, markdown, masked, measure_costs, picture, spread, subset, train_for, typed, where_from)

import numpy as np

import classifier
import curves
from prepare_data import Parser, check, open_folder, run_script

# ---- Ways to train.
@dataclass
class Way:
    stages: list  # [(share of the time, flags)]; stages of equal flags cost the same
    start: tuple = None  # (way, times its own units) from whose checkpoint it starts
    on: str = "data"  # or a part of the set: "eight" classes, "few" images of the other two
    draw: tuple = (["--steps=10"],)  # flags of sample.py
    guide: str = None  # the way of a worse model to guide by, of as many units

FINE = "--patch_size=2"
SHARE, MASK = 1 / 2, "crop"  # of stage 1; these and the rate and batch of whole images by the claim tune

def stage_1(ratio=0.9, batch_size=48, mask=MASK, patch_size=2):
    return [f"--patch_size={patch_size}", *masked(ratio, mask), f"--batch_size={batch_size}"]

def whole(batch_size=16, lr="4e-3", patch_size=2):
    return [f"--patch_size={patch_size}", f"--batch_size={batch_size}", f"--lr={lr}", "--warmup=50"]

WHOLE = whole()

def two_stages(first, share=SHARE, last=WHOLE):
    return Way([(share, first), (1 - share, last)])

def patches(size, batch_size, first_batch, lr="4e-3", named=""):
    """From scratch and in two stages with patches of another size."""
    last = whole(batch_size, lr, size)
    return {f"from scratch, patches of {size}{named}": Way([(1, last)]),
            f"two stages, patches of {size}{named}": two_stages(stage_1(batch_size=first_batch, patch_size=size), last=last)}

def tuned(*flags, share=1):
    """Consistency tuning of the model that two stages trained for as long."""
    return Way([(share, [FINE, "--batch_size=16", "--loss=consistency", *flags])], start=("two stages", 1), draw=RAW)

HALF = [*masked(0.5), "--batch_size=24"]
DECODER = [FINE, "--decoder_depth=2", "--decoder_dim=64", "--decoder_heads=2"]
ROUTED = [FINE, "--route=1,5"]
RAW = (["--steps=1", "--weights=raw"], ["--steps=2", "--weights=raw"])

WAYS = {
    "from scratch": Way([(1, WHOLE)]), "two stages": two_stages(stage_1()),
    "short stage 1": two_stages(stage_1(0.75, 20), 1 / 8),
    **{f"two stages, batch {batch}": two_stages(stage_1(), last=whole(batch)) for batch in (8, 4)},
    "growing crops": Way([(0.6 * SHARE, stage_1()), (0.4 * SHARE, [*stage_1(0.75, 20), "--warmup=20"]),
                          (1 - SHARE, WHOLE)]),
    "coarse patches first": two_stages(["--patch_size=4", "--batch_size=16", "--lr=4e-3", "--lr_schedule=constant"]),
    **patches(4, 16, 64), **patches(1, 4, 32),
    # Transfer: pre-training on eight classes, then 300 images of the other two.
    "eight classes, masked": Way([(1, stage_1())], on="eight", draw=()),
    "eight classes, whole": Way([(1, WHOLE)], on="eight", draw=()),
    "300 images": Way([(1, WHOLE)], on="few"),
    "300 images after masked": Way([(1, WHOLE)], on="few", start=("eight classes, masked", 2)),
    "300 images after whole": Way([(1, WHOLE)], on="few", start=("eight classes, whole", 2)),
    # Where hidden patches leave the network, at 0.5: for good, for the encoder, for the middle blocks.
    "plain masking 0.5": two_stages([FINE, *HALF], 1 / 2),
    "decoder 0.5": two_stages([*DECODER, *HALF], 1 / 2, [*DECODER, *WHOLE[1:]]),
    "decoder, whole images": Way([(1, [*DECODER, *WHOLE[1:]])]),
    "routed 0.5": two_stages([*ROUTED, *HALF], 1 / 2, [*ROUTED, *WHOLE[1:]]),
    # One, two and 35 evaluations.
    "two stages, drawn in 35": Way([], start=("two stages", 1), draw=(["--steps=18"],)),
    "trained on": Way([(1, WHOLE)], start=("two stages", 1), draw=(["--steps=18"],)),
    "ECT": tuned(), "ECT, no dropout": tuned("--dropout=0"),
    "SCT": tuned("--ref_batch=256"), "SCT, no dropout": tuned("--ref_batch=256", "--dropout=0"),
    "SCT, half the time": tuned("--ref_batch=256", share=1 / 2),
    "SCT, guided": Way([], ("SCT", 1), guide="SCT, half the time", draw=tuple([*how, "--cfg_scale=1.5"] for how in RAW)),
}
for _batch, _lr in ((16, "1e-3"), *product((16, 8, 32), ("2e-3", "4e-3")), (16, "8e-3"), (8, "8e-3"), (4, "4e-3")):
    WAYS[f"scratch, batch {_batch}, rate {_lr}"] = Way([(1, whole(_batch, _lr))])
for _batch, _lr in ((2, "4e-3"), (4, "2e-3"), (4, "8e-3")):
    WAYS |= patches(1, _batch, 32, _lr, f", batch {_batch}, rate {_lr}")
for _mask, _share, _lr in (*product(("crop", "block"), (1 / 2, 2 / 3, 4 / 5), ["2e-3"]), ("crop", 1 / 2, "4e-3"),
                           ("crop", 1 / 2, "8e-3")):
    WAYS[f"stage 1 {_mask}, share {_share:.2f}, rate {_lr}"] = two_stages(stage_1(mask=_mask), _share, whole(lr=_lr))
for _ratio, _batch, _share in ((0.9, 48, 1 / 8), (0.75, 20, 1 / 8), (0.75, 20, 1 / 4)):
    WAYS[f"longer, crop {_ratio}, share {_share}"] = two_stages(stage_1(_ratio, _batch), _share)
for _mask, _ratio, _batch in (("crop", 0.75, 20), ("crop", 0.95, 64), ("block", 0.9, 48), ("patch", 0.9, 48)):
    WAYS[f"two stages, {_mask} {_ratio}"] = two_stages(stage_1(_ratio, _batch, _mask))

CLAIMS = {  # [(way, units of time)]
    # Rate and batch; share and mask of the first stage, also for eight times as long. On other seeds and images.
    "tune": [(name, 1) for name in WAYS if name.startswith(("scratch,", "stage 1 ", "two stages, batch"))]
            + [(name, 8) for name in WAYS if name.startswith("longer,")],
    "tune-patches": [(name, 1) for name in WAYS if "patches of 1" in name],
    # How much sooner is equal quality there? Each time has a schedule of its own.
    "speedup": [(name, units) for units in (1 / 4, 1 / 2, 1, 2) for name in ("from scratch", "two stages")]
               + [(name, units) for name in ("growing crops", "coarse patches first") for units in (1 / 2, 1)] + [("short stage 1", 2)],
    "faces": [(name, units) for units in (1 / 4, 1 / 2, 1, 2) for name in ("scratch, batch 8, rate 8e-3", "two stages")],
    # Does the gain grow with the number of patches? More patches get more time.
    "patches": [(f"{name}{of}", time * units) for of, time in ((", patches of 4", 1 / 16), ("", 1 / 4), (", patches of 1", 1))
                for name, units in (("from scratch", 1), ("two stages", 1 / 2), ("two stages", 1 / 4), ("two stages", 1))]
               + [(f"{name}, patches of 1", 2) for name in ("from scratch", "two stages")],
    # Which patches are hidden, and how many?
    "masks": [(name, units) for units in (1 / 2, 1) for name in WAYS if re.match("two stages($|, crop|, block|, patch [0-9])", name)],
    "transfer": [("eight classes, masked", 1 / 4), ("eight classes, whole", 1 / 4), ("300 images", 3 / 8),
                 ("300 images", 1 / 8), ("300 images after masked", 1 / 8), ("300 images after whole", 1 / 8)],
    "decoder": [(name, units) for units in (1 / 2, 2) for name in WAYS if re.match("from scratch$|plain|decoder|routed", name)],
    "consistency": [(name, units) for units in (1 / 2, 2) for name in ("two stages", "two stages, drawn in 35", "trained on", "ECT",
                    "ECT, no dropout", "SCT", "SCT, no dropout")] + [("SCT, half the time", 2), ("SCT, guided", 2)],
}

# ---- Runs.
def flags_of(flags, args):
    """All flags of a stage, but for the data, the seed and the start."""
    classes = ["--class_cond"] if args.classes else []
    return ["--preset=demo", *classes, *flags]

def cost_key(flags):
    """What a step costs depends on these flags alone."""
    return "/".join(flag for flag in flags if not flag.startswith(("--lr", "--warmup", "--class")))

def folder_of(name, units, seed, args):
    minutes = f"{args.each * units:g}m"
    return args.out / re.sub(r"[^0-9a-zA-Z.]+", "-", f"{name} {minutes} {seed}")

def data_set(on, args):
    """The folder of the data, of its first eight classes, or of 300 images of the other two."""
    if on == "data":
        return args.data
    flags = ["--classes", ",".join(args.classes[:8])]
    if on == "few":
        flags = ["--classes", ",".join(args.classes[8:]), "--num", 300]
    return subset(args.data, args.out / on, *flags, log=args.out / "output.txt")

def judged(checkpoint, samples, flags, on, args, log):
    """Draw samples -> what the classifier says of them."""
    if on != "data":
        flags = [*flags, "--labels", ",".join(args.classes[8:])]
    call("sample.py", "--ckpt", checkpoint, f"--num={args.num}", "--dtype=bfloat16", *flags, "--out", samples, log=log)
    if not args.classes:
        return {}
    images, labels = open_folder(args.data, "val")[:2]
    if on != "data":
        images, labels = images[labels >= 8], labels[labels >= 8]
    net = classifier.load(args.data)
    drawn = np.load(samples)
    asked = np.unique(drawn["arr_1"], return_inverse=True)[1] + (0 if on == "data" else 8)
    return classifier.scores(net, classifier.features_of(net, images), drawn["arr_0"], asked)

def run(name, units, seed, args, costs):
    """Train and judge -> what the results say of it."""
    way = WAYS[name]
    folder = folder_of(name, units, seed, args)
    shutil.rmtree(folder, ignore_errors=True)  # of an interrupted call
    folder.mkdir(parents=True)
    log = folder / "output.txt"
    checkpoint = way.start and folder_of(way.start[0], way.start[1] * units, seed, args) / "final.pt"
    stages = []
    for share, flags in way.stages:
        cost = costs[cost_key(flags_of(flags, args))]
        own = [f"--data={data_set(way.on, args)}", f"--seed={seed}", *flags_of(flags, args)]
        if checkpoint:
            own.append(f"--init_from={checkpoint}")
        out = folder / f"stage{len(stages) + 1}"
        checkpoint, facts = train_for(60 * args.each * units * share, cost, out, own, log)
        stages.append(facts)
    if stages:
        shutil.copy(checkpoint, folder / "final.pt")
    drawn = []
    guide = [f"--guide_ckpt={folder_of(way.guide, units, seed, args) / 'final.pt'}"] if way.guide else []
    for i, how in enumerate(way.draw):
        found = judged(checkpoint, folder / f"samples{i}.npz", [f"--seed={seed}", *how, *guide], way.on, args, log)
        drawn.append(dict(flags=" ".join(how), **found))
    for big in folder.glob("stage*"):
        shutil.rmtree(big)
    val_loss = None
    if stages and "--loss=consistency" not in flags:  # whose validation loss is another thing
        val_loss = stages[-1]["val_loss"]
    return dict(way=name, minutes=args.each * units, seed=seed, stages=stages, drawn=drawn, val_loss=val_loss, **args.about)

# ---- Reports.
def table(results, only=""):
    """A line for each way and time ("WAY, 2 min", that `only` finds) and way of sampling, over the seeds."""
    lines = []
    for name, at in dict.fromkeys((r["way"], r["minutes"]) for r in results):
        own = [r for r in results if (r["way"], r["minutes"]) == (name, at)]
        if not re.search(only, f"{name}, {at:g} min"):
            continue
        steps = ", ".join(f"{stage['steps']}" for stage in own[0]["stages"])
        measured = sum(stage["measured"] for r in own for stage in r["stages"]) / len(own)
        for drawn in zip(*(r["drawn"] for r in own)):
            scores = [spread([scale * d[key] for d in drawn]) if key in drawn[0] else ""
                      for key, scale in (("fd", 1), ("kid", 1), ("right", 100))]
            lines.append([name, f"{at:g}", f"{measured / 60:.1f}", steps, drawn[0]["flags"].replace("--", ""),
                          spread([r["val_loss"] for r in own]), *scores, str(len(own))])
    heads = ["way", "minutes", "measured", "steps", "samples", "validation loss", "classifier FD", "KID", "right class, %", "seeds"]
    return markdown(heads, lines)

def by_time(results, way, seed, key):
    """[(minutes, validation loss or another score)] of a way and seed, each time with a schedule of its own."""
    own = [r for r in results if (r["way"], r["seed"]) == (way, seed)]
    points = [(r["minutes"], dict(*r["drawn"][:1], val_loss=r["val_loss"]).get(key)) for r in own]
    return sorted(point for point in points if point[1] is not None)

def reached(curve, value):
    """When a curve of points is at a value or below and stays there, on the line between two points; or None."""
    late = [point for point in curve if point[1] > value]
    if not late:
        return curve[0][0]  # or before
    if late[-1] == curve[-1]:
        return None
    (t0, v0), (t1, v1) = curve[curve.index(late[-1]) :][:2]
    return t0 + (t1 - t0) * (v0 - value) / (v0 - v1)

def records(results):
    """A line for each way: minutes to what the first way has after its longest time, on average."""
    first = results[0]["way"]
    longest = max(r["minutes"] for r in results if r["way"] == first)
    last = [r for r in results if (r["way"], r["minutes"]) == (first, longest)]
    goals = dict(val_loss=statistics.mean(r["val_loss"] for r in last))
    if "fd" in last[0]["drawn"][0]:
        goals["fd"] = statistics.mean(r["drawn"][0]["fd"] for r in last)
    lines = []
    for way in dict.fromkeys(r["way"] for r in results):
        seeds = sorted({r["seed"] for r in results if r["way"] == way})
        cells = []
        for key, value in goals.items():
            curves_of_seeds = [by_time(results, way, seed, key) for seed in seeds]
            times = [reached(curve, value) for curve in curves_of_seeds]
            signs = ["≤ " if curve[0][1] <= value else "" for curve in curves_of_seeds]
            cells.append(", ".join(f"{sign}{t:.1f}" if t else f"> {curve[-1][0]:g}"
                                   for sign, t, curve in zip(signs, times, curves_of_seeds)))
            cells.append(", ".join(f"{'≥ ' * bool(sign)}{longest / t:.1f}" if t else "-" for sign, t in zip(signs, times)))
        lines.append([way, *cells, ", ".join(map(str, seeds))])
    names = dict(val_loss="loss", fd="FD")
    heads = [head for key, goal in goals.items() for head in (f"minutes to {names[key]} {goal:.4g}", "times faster")]
    return markdown(["way", *heads, "seeds"], lines)

def draw_figures(results, args):
    """Curves over time, and ten samples of each row that `only` finds (seed 0, the same noise) below real images."""
    for key, title in (("fd", "classifier FD"), ("val_loss", "validation loss")):
        runs = dict.fromkeys((r["way"], r["seed"]) for r in results)
        lines = [(way, by_time(results, way, seed, key), True) for way, seed in runs]
        lines = [line for line in lines if line[1]]
        if lines:
            curves.draw(args.out / f"{args.claim}-{key}.png", lines, title, "minutes of training, planned")
    images, labels = open_folder(args.data, "val")[:2]
    _, first = np.unique(labels, return_index=True)  # one of each class
    lines = [("real", images[first])]
    for r in (r for r in results if r["seed"] == 0 and re.search(args.only, f"{r['way']}, {r['minutes']:g} min")):
        folder = folder_of(r["way"], r["minutes"] / args.each, 0, args)
        for i, drawn in enumerate(r["drawn"]):
            flags = drawn["flags"].replace("--", "") if len(r["drawn"]) > 1 else ""
            lines.append((f"{r['way']}, {r['minutes']:g} min {flags}", np.load(folder / f"samples{i}.npz")["arr_0"][:10]))
    picture(args.out / f"{args.claim}-samples.png", lines)

def main(argv):
    parser = Parser(__doc__)
    parser.add_argument("claim", choices=CLAIMS)
    parser.add("data", "data/fashion", "prepared set")
    parser.add("each", 8.0, "minutes of training of a row of one unit")
    parser.add("only", "", 'rows ("WAY, 2 min") that this regular expression finds')
    parser.add("seeds", "0,1", "seeds of each row", tuple)
    parser.add("num", 1000, "samples of each row", low=2)
    parser.add("out", None, "folder; None = out/reproduce/DATA")
    args = parser.parse_args(argv)
    args.out = Path(args.out or f"out/reproduce/{Path(args.data).name}").resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    args.data = Path(args.data).resolve()
    args.classes = open_folder(args.data)[2]["class_names"]
    args.about = where_from()  # now: the code may change while this runs
    rows = [(name, units) for name, units in CLAIMS[args.claim] if re.search(args.only, f"{name}, {args.each * units:g} min")]
    all_flags = [flags_of(flags, args) for name, _ in rows for _, flags in WAYS[name].stages]
    commands = {cost_key(flags): [f"--data={args.data}", *flags] for flags in all_flags}
    costs = measure_costs(commands, args.out)
    for seed in args.seeds:
        for name, units in rows:
            kept = folder_of(name, units, seed, args) / "result.json"
            if not kept.exists():
                found = run(name, units, seed, args, costs)
                kept.write_text(json.dumps(found, indent=1))
                print("\n".join(table([found]).splitlines()[2:]), file=sys.stderr, flush=True)
    results = []  # all that is finished, with whatever flags it was asked for
    for name, units in CLAIMS[args.claim]:
        stem = folder_of(name, units, "", args).name
        results += [json.loads(path.read_text()) for path in sorted(args.out.glob(f"{stem}*/result.json"))]
    floor = {}
    if args.classes:  # as many training images, of the classes that are drawn, in place of samples
        net = classifier.load(args.data)
        (images, labels), (real, known) = (open_folder(args.data, part)[:2] for part in ("train", "val"))
        first = 8 if args.claim == "transfer" else 0
        images, labels = images[labels >= first][: args.num], labels[labels >= first][: args.num]
        reference = classifier.features_of(net, real[known >= first])
        floor = classifier.scores(net, reference, images, labels)
    about = dict(command=typed(__file__, argv), claim=args.claim, each=args.each, num=args.num, floor=floor, results=results)
    (args.out / f"{args.claim}.json").write_text(json.dumps(about, indent=1))
    print(table(results))
    draw_figures(results, args)
    if args.claim in ("speedup", "faces"):
        print("\n" + records(results))

if __name__ == "__main__":
    run_script(main)
