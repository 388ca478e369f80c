"""Learn the classes of a data set in pairs, one pair after the other, by several methods.

python tests/tools/continual.py --data data/fashion

A task is what two classes hold. All methods start from one model of the first task and learn the others in order,
each for --minutes (planned as in reproduce.py) on one core. After each task classifier.py judges the samples of every
task so far, and fid.py its losses and bits per dimension. Forgetting is the last distance less the least.

fine-tuning                nothing but the new task
joint                      --data: all tasks so far
l2-C, ewc-C                --l2=C, --ewc=C with the importance on all old tasks
replay-COEF-BUFFER         --replay: a buffer of so many images of each old task; --replay_coef
generative-COEF            --replay: 512 samples of the model before, made a set by prepare_data.py
NAME+taught                the same with the predictions of the model before as targets (--distill_from)
"""

import json
import shutil
import statistics
import sys
from pathlib import Path

from common import call, last_json, markdown, measure_costs, picture, spread, subset, train_for, typed, where_from

import numpy as np

import classifier
from prepare_data import Parser, check, open_folder, run_script
from reproduce import whole

METHODS = ("fine-tuning,joint,replay-1-8,replay-0.3-8,replay-0.1-8,replay-1-64,replay-0.3-64,replay-0.1-64,"
           "replay-1-512,replay-0.3-512,replay-0.1-512,generative-1,generative-1+taught,l2-0.01,ewc-1e3")
FIRST = "first"  # the model of the first task, from which all methods start
PLAIN = ["--preset=demo", "--class_cond", *whole(patch_size=4)]
DRAW = ["--sampler=euler", "--steps=12", "--dtype=bfloat16"]

def flags_of(method, tasks, before, folder, args, log):
    """The flags of train.py for learning tasks[-1] when `before`, a checkpoint, knows the others."""
    name, _, value = method.split("+")[0].partition("-")
    *old, new = tasks
    if name in (FIRST, "fine"):
        return [f"--data={new}"]
    if name == "joint":
        return [f"--data={','.join(tasks)}"]
    if name in ("l2", "ewc"):
        return [f"--data={new}", f"--{name}={value}", f"--ewc_data={','.join(old)}"]
    coef, _, size = value.partition("-")
    if name == "generative":
        samples = folder / "generated.npz"
        call("sample.py", "--ckpt", before, "--num=512", *DRAW, "--out", samples, log=log)
        old = [subset(samples, folder / "generated", "--val_frac", 0, log=log)]
    else:
        old = [subset(task, args.out / f"{Path(task).name}-{size}", "--num", size, log=log) for task in old]
    teacher = [f"--distill_from={before}"] if "+taught" in method else []
    return [f"--data={new}", f"--replay={','.join(map(str, old))}", f"--replay_coef={coef}", *teacher]

def judge(checkpoint, sets, folder, args, log):
    """For each set so far: its samples' scores by the classifier of the whole set, bits and losses of test images."""
    samples = folder / "samples.npz"
    known = 2 * len(sets)
    call("sample.py", "--ckpt", checkpoint, f"--num={args.num * len(sets)}", *DRAW, f"--seed={args.seed}", "--labels",
         ",".join(args.classes[:known]), "--out", samples, log=log)
    drawn = np.load(samples)["arr_0"]
    place = np.arange(len(drawn)) % known
    asked = np.array(args.order)[place]
    out, _ = call("fid.py", ",".join(sets), checkpoint, "--metrics=bpd", "--num=128", log=log)
    found = []
    for i, report in enumerate(last_json(out).values()):
        own = place // 2 == i
        found.append(classifier.scores(args.net, args.references[i], drawn[own], asked[own]) | report)
    return found

def seen_in(buffer, checkpoint, log):
    """Bits and losses of the images in a buffer themselves."""
    seen = Path(f"{buffer}-seen")
    if not seen.exists():
        shutil.copytree(buffer, seen)
        for part in ("", "_labels"):
            shutil.copy(seen / f"train{part}.npy", seen / f"val{part}.npy")
        meta = json.loads((seen / "meta.json").read_text())
        (seen / "meta.json").write_text(json.dumps(meta | dict(num_val=meta["num_train"])))
    return last_json(call("fid.py", seen, checkpoint, "--metrics=bpd", "--num=128", log=log)[0])[str(seen)]

def learn(method, first, args):
    """Run a method through all tasks, or learn the first one -> scores, row t of them after task t, and more."""
    folder = args.out / f"{method}-{args.seed}"
    shutil.rmtree(folder, ignore_errors=True)  # of an interrupted call
    folder.mkdir(parents=True)
    log = folder / "output.txt"
    checkpoint = first and args.out / f"{FIRST}-{args.seed}" / "final.pt"
    rows = [first["scores"][0]] if first else []
    steps = []
    for t in range(len(rows), len(args.tasks) if first else 1):
        here = folder / f"task{t}"
        here.mkdir()
        flags = [f"--seed={args.seed}", *PLAIN, *flags_of(method, args.tasks[: t + 1], checkpoint, here, args, log)]
        if checkpoint:
            flags.append(f"--init_from={checkpoint}")
        kind = "taught" if "+taught" in method else method.split("-")[0]
        own = {"plain": [*PLAIN, f"--data={args.tasks[0]}"], kind: flags}
        costs = measure_costs(own, args.out, rounds=2)
        minutes = args.minutes if first else 4 * args.minutes
        checkpoint, facts = train_for(60 * minutes, costs[kind], here / "run", flags, log)
        steps.append(facts["steps"])
        rows.append(judge(checkpoint, args.tasks[: t + 1], here, args, log))
    shutil.copy(checkpoint, folder / "final.pt")
    buffer = args.out / f"task1-{method.split('-')[-1]}"
    seen = seen_in(buffer, checkpoint, log) if method.startswith("replay") else None
    for big in folder.glob("task*/run"):
        shutil.rmtree(big)
    return dict(method=method, seed=args.seed, scores=rows, steps=steps, seen=seen, **args.about)

def forgetting(rows):
    """The mean over the old tasks of the last distance less the least."""
    last = rows[-1]
    best = [min(row[i]["fd"] for row in rows[i:]) for i in range(len(last))]
    return statistics.mean(last[i]["fd"] - best[i] for i in range(len(last) - 1))

def table(results):
    """A line for each method, over its seeds."""
    lines = []
    for method in dict.fromkeys(r["method"] for r in results if r["method"] != FIRST):
        own = [r for r in results if r["method"] == method]
        by_task = [spread([r["scores"][-1][i]["fd"] for r in own]) for i in range(len(own[0]["scores"][-1]))]
        mean = spread([statistics.mean(d["fd"] for d in r["scores"][-1]) for r in own])
        right = spread([100 * statistics.mean(d["right"] for d in r["scores"][-1]) for r in own])
        bits = spread([statistics.mean(d["bits_per_dim"] for d in r["scores"][-1]) for r in own])
        lines.append([method, *by_task, mean, spread([forgetting(r["scores"]) for r in own]), right, bits])
    heads = [f"task {i + 1}" for i in range(len(lines[0]) - 5)]
    return markdown(["method", *heads, "mean FD", "forgetting", "right class, %", "bits per dimension"], lines)

def main(argv):
    parser = Parser(__doc__)
    add = parser.add
    add("data", "data/fashion", "prepared set with classes")
    add("methods", METHODS, "as explained in the file")
    add("minutes", 1.0, "of training of a task; of the first one four times as many")
    add("seed", 0, "of training and sampling")
    add("num", 200, "samples of each distance", low=2)
    add("backwards", False, "learn the last pair of classes first")
    add("out", None, "folder; None = out/continual/DATA")
    args = parser.parse_args(argv)
    args.out = Path(args.out or f"out/continual/{Path(args.data).name}{'-backwards' * args.backwards}").resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    args.data = Path(args.data).resolve()
    args.about = where_from()
    names = open_folder(args.data)[2]["class_names"]
    check(names and len(names) % 2 == 0, f"{args.data} has no classes in pairs")
    args.order = list(range(len(names)))[:: -1 if args.backwards else 1]
    args.classes = [names[k] for k in args.order]
    args.net = classifier.load(args.data)
    images, labels = open_folder(args.data, "val")[:2]
    seen, known = open_folder(args.data)[:2]
    args.tasks, args.references, floor = [], [], []  # the floor: training images in place of samples
    for i in range(0, len(args.classes), 2):
        flags = ["--classes", ",".join(args.classes[i : i + 2])]
        args.tasks.append(str(subset(args.data, args.out / f"task{i // 2 + 1}", *flags, log=args.out / "output.txt")))
        args.references.append(classifier.features_of(args.net, images[np.isin(labels, args.order[i : i + 2])]))
        own = np.flatnonzero(np.isin(known, args.order[i : i + 2]))[: args.num]
        floor.append(classifier.scores(args.net, args.references[-1], seen[own], known[own]))
    first = None
    for method in [FIRST, *args.methods.split(",")]:
        kept = args.out / f"{method}-{args.seed}" / "result.json"
        if not kept.exists():
            found = learn(method, first, args)
            kept.write_text(json.dumps(found, indent=1))
            print(method, [round(d["fd"], 1) for d in found["scores"][-1]], file=sys.stderr, flush=True)
        if method == FIRST:
            first = json.loads(kept.read_text())
    results = [json.loads(path.read_text()) for path in args.out.glob("*/result.json")]
    results.sort(key=lambda r: (f"{FIRST},{METHODS}".find(r["method"]), r["seed"]))
    about = dict(command=typed(__file__, argv), minutes=args.minutes, num=args.num, floor=floor, results=results)
    (args.out / "continual.json").write_text(json.dumps(about, indent=1))
    print(table(results))
    lines = [("real", images[np.unique(labels, return_index=True)[1][args.order]])]
    for r in (r for r in results if r["method"] != FIRST and r["seed"] == args.seed):
        samples = args.out / f"{r['method']}-{r['seed']}" / f"task{len(args.tasks) - 1}" / "samples.npz"
        lines.append((r["method"], np.load(samples)["arr_0"][: len(args.classes)]))
    picture(args.out / "continual-samples.png", lines)

if __name__ == "__main__":
    run_script(main)
