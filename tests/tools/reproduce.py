"""Test what the papers promise, on a data set with classes, with the commands a user would type.

python prepare_data.py fashion-mnist/ --size 28 --out data/fashion      # Debian: apt install dataset-fashion-mnist
python tests/tools/reproduce.py speedup --data data/fashion --each 8
python tests/tools/reproduce.py speedrun --data data/fashion --each 8   # the table of records

CLAIM names rows of CLAIMS: ways to train (WAYS: stages, each a share of the time and flags of train.py),
and for how long, in units of --each minutes on one core. Time is planned: short runs of all stages take
turns, and the least seconds of a step are its cost; a stage then gets as many steps as its time has room
for. So the drift of the machine does not enter. Judged are the validation loss on whole images and --num
samples: Frechet distance and KID to the held-out images in the features of a classifier of that set, and
the share that it takes for the class asked for (classifier.py). On a set without classes: the loss alone.
Each run keeps its folder in OUT and is not repeated, so an interrupted call goes on, two calls with other
--seeds or claims may share OUT, and a row that two claims name is trained once.
"""

import json
import re
import shutil
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from common import (  # puts the project on the path
    call, last_json, markdown, masked, measure_costs, picture, spread, train_for, typed, where_from)

import numpy as np

import classifier
import curves
from prepare_data import Parser, check, open_folder, run_script

# ---- Ways to train.
@dataclass
class Way:
    stages: list  # [(share of the time, flags)]; stages of equal flags cost the same
    start: tuple = None  # (way, units) from whose checkpoint it starts
    on: str = "data"  # or a part of the set: "eight" classes, "few" images of the other two
    draw: tuple = (["--steps=10"],)  # flags of sample.py

FINE = ["--patch_size=2"]
WHOLE = [*FINE, "--batch_size=16", "--lr=2e-3", "--warmup=50"]  # tuned: claim tune
CROP = [*FINE, *masked(0.9, kind="crop"), "--batch_size=48"]

def two_stages(share, first, whole=WHOLE):
    return Way([(share, first), (1 - share, whole)])

WAYS = {
    "from scratch": Way([(1, WHOLE)]),
    "two stages": two_stages(2 / 3, CROP),
}
for _batch, _lr in ((16, "1e-3"), (16, "2e-3"), (16, "4e-3"), (8, "2e-3"), (32, "2e-3"), (32, "4e-3")):
    WAYS[f"scratch, batch {_batch}, rate {_lr}"] = Way(
        [(1, [*FINE, f"--batch_size={_batch}", f"--lr={_lr}", "--warmup=50"])])
for _mask, _share in ((m, s) for m in (["crop"], ["block"]) for s in (1 / 2, 2 / 3, 4 / 5)):
    WAYS[f"stage 1 {_mask[0]}, share {_share:.2f}"] = two_stages(
        _share, [*FINE, *masked(0.9, kind=_mask[0]), "--batch_size=48"],
        [*FINE, "--batch_size=16", "--lr=2e-3", "--warmup=50"])

CLAIMS = {
    # Rate and batch of a run from scratch; then share and mask of the first stage. On other seeds and images.
    "tune": [(name, 1) for name in WAYS if name.startswith(("scratch,", "stage 1 "))],
    "speedup": [(name, units) for units in (1 / 8, 1 / 4, 1 / 2, 1) for name in ("from scratch", "two stages")],
}

# ---- Runs.
def flags_of(flags, args):
    """All flags of a stage, but for the data, the seed and the start."""
    classes = ["--class_cond"] if args.classes else []
    return ["--preset=demo", *classes, *flags]

def folder_of(name, units, seed, args):
    minutes = f"{args.each * units:g}m"
    return args.out / re.sub(r"[^0-9a-zA-Z.]+", "-", f"{name} {minutes} {seed}")

def data_set(on, args):
    """The folder of a part of the data: eight classes, the other two, or 300 images of these."""
    if on == "data":
        return args.data
    folder = args.out / on
    if not folder.exists():
        names = args.classes[:8] if on == "eight" else args.classes[8:]
        few = ["--num", 300] if on == "few" else []
        call("prepare_data.py", args.data, "--classes", ",".join(names), *few, "--out", folder,
             log=args.out / "output.txt")
    return folder

def judged(checkpoint, samples, flags, on, args, log):
    """Draw samples -> what the classifier says of them."""
    if on != "data":
        flags = [*flags, "--labels", ",".join(args.classes[8:])]
    call("sample.py", "--ckpt", checkpoint, f"--num={args.num}", *flags, "--out", samples, log=log)
    if not args.classes:
        return {}
    images, labels = open_folder(args.data, "val")[:2]
    if on != "data":
        images, labels = images[labels >= 8], labels[labels >= 8]
    net = classifier.load(args.data)
    drawn = np.load(samples)
    _, asked = np.unique(drawn["arr_1"], return_inverse=True)
    asked = asked if on == "data" else asked + 8
    return classifier.scores(net, classifier.features_of(net, images), drawn["arr_0"], asked)

def run(name, units, seed, args, costs):
    """Train and judge -> what the results say of it."""
    way = WAYS[name]
    folder = folder_of(name, units, seed, args)
    shutil.rmtree(folder, ignore_errors=True)  # of an interrupted call
    folder.mkdir(parents=True)
    log = folder / "output.txt"
    checkpoint = way.start and folder_of(*way.start, seed, args) / "final.pt"
    stages = []
    for share, flags in way.stages:
        cost = costs["/".join(flags_of(flags, args))]
        own = [f"--data={data_set(way.on, args)}", f"--seed={seed}", *flags_of(flags, args)]
        if checkpoint:
            own.append(f"--init_from={checkpoint}")
        out = folder / f"stage{len(stages) + 1}"
        checkpoint, facts = train_for(60 * args.each * units * share, cost, out, own, log)
        stages.append(facts)
    shutil.copy(checkpoint, folder / "final.pt")
    drawn = []
    for i, flags in enumerate(way.draw):
        found = judged(checkpoint, folder / f"samples{i}.npz", [f"--seed={seed}", *flags], way.on, args, log)
        drawn.append(dict(flags=" ".join(flags), **found))
    for big in folder.glob("stage*"):
        shutil.rmtree(big)
    is_loss = "--loss=consistency" not in way.stages[-1][1]  # whose validation loss is another thing
    return dict(way=name, minutes=args.each * units, seed=seed, stages=stages, drawn=drawn,
                val_loss=stages[-1]["val_loss"] if is_loss else None, **where_from())

# ---- Reports.
def table(results, *minutes):
    """A line for each way, time and way of sampling, over the seeds."""
    lines = []
    for name, at in dict.fromkeys((r["way"], r["minutes"]) for r in results):
        own = [r for r in results if (r["way"], r["minutes"]) == (name, at)]
        if minutes and f"{at:g}" not in minutes:
            continue
        steps = ", ".join(f"{stage['steps']}" for stage in own[0]["stages"])
        measured = sum(stage["measured"] for r in own for stage in r["stages"]) / len(own)
        for drawn in zip(*(r["drawn"] for r in own)):
            judged = [spread([scale * d.get(key) if key in d else None for d in drawn])
                      for key, scale in (("fd", 1), ("kid", 1000), ("right", 100))]
            lines.append([name, f"{at:g}", f"{measured / 60:.1f}", steps, drawn[0]["flags"].replace("--", ""),
                          spread([r["val_loss"] for r in own]), *judged, str(len(own))])
    heads = ["way", "minutes", "measured", "steps", "samples", "validation loss", "classifier FD", "KID x 1000",
             "right class, %", "seeds"]
    return markdown(heads, lines)

def main(argv):
    parser = Parser(__doc__)
    parser.add_argument("claim", choices=CLAIMS)
    add = parser.add
    add("data", "data/fashion", "prepared set")
    add("each", 8.0, "minutes of training of a row of one unit")
    add("only", "", "rows whose names this regular expression finds")
    add("seeds", "0,1", "seeds of each row", tuple)
    add("num", 1000, "samples of each row", low=2)
    add("out", None, "folder; None = out/reproduce/DATA")
    args = parser.parse_args(argv)
    args.out = Path(args.out or f"out/reproduce/{Path(args.data).name}").resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    args.data = Path(args.data).resolve()
    args.classes = open_folder(args.data)[2]["class_names"]
    rows = [(name, units) for name, units in CLAIMS[args.claim] if re.search(args.only, name)]
    costs_file = args.out / "costs.json"  # seconds of a step by the flags
    costs = json.loads(costs_file.read_text()) if costs_file.exists() else {}
    all_flags = [flags_of(flags, args) for name, _ in rows for _, flags in WAYS[name].stages]
    commands = {"/".join(flags): [f"--data={args.data}", *flags] for flags in all_flags}
    measure_costs(commands, costs, args.out / f"trial-{args.claim}", args.out / "output.txt")
    costs_file.write_text(json.dumps(costs, indent=1))
    for seed in args.seeds:
        for name, units in rows:
            kept = folder_of(name, units, seed, args) / "result.json"
            if not kept.exists():
                found = run(name, units, seed, args, costs)
                kept.write_text(json.dumps(found, indent=1))
                print(table([found]).splitlines()[-1], file=sys.stderr, flush=True)

    # All that is finished, with whatever flags it was asked for.
    results = []
    for name, units in CLAIMS[args.claim]:
        stem = folder_of(name, units, "", args).name
        results += [json.loads(path.read_text()) for path in sorted(args.out.glob(f"{stem}*/result.json"))]
    if args.classes:
        net = classifier.load(args.data)
        reference = classifier.features_of(net, open_folder(args.data, "val")[0])
    about = dict(command=typed(__file__, argv), claim=args.claim, each=args.each, num=args.num, results=results)
    (args.out / f"{args.claim}.json").write_text(json.dumps(about, indent=1))
    print(table(results))

if __name__ == "__main__":
    run_script(main)
