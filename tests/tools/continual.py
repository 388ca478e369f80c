"""Learn prepared sets one after another, by several methods, and measure what is forgotten.

python tests/tools/continual.py data/a data/b --minutes 4 --methods fine-tuning,joint,replay-0.1-512
python tests/tools/continual.py data/emoji:people-body data/emoji:flags          # one class after another

If all have classes, the model is conditional, and a set is compared with samples of those that it
holds; else all sets are compared with the same samples, and distances depend on their mixture, too.

Every method starts from one model of the first set, and --minutes are planned as in reproduce.py: by the cost of a
step, here against that of a step on the first set taken in turns with it. After each set the Frechet distance to
every set so far is measured with --num samples, by features that judge.py learns from that set. What is finished
lies in OUT/continual.json and is not run again. Methods, as flags of train.py:

fine-tuning                nothing but the new set
joint                      --data: all sets so far
l2-C, ewc-C                --l2=C, --ewc=C with the importance on all old sets
replay-COEF[-BUFFER]       --replay: all old sets, or a buffer of so many images of each; --replay_coef
generative-COEF            --replay: --num samples of the model before, made a set by prepare_data.py
NAME+taught                the same with the predictions of the model before as targets (--distill_from)
NAME+masked                the same with --mask_ratio=0.75 in the first half of the time

What fid.py --metrics bpd says of the sets (loss by noise level, bits per dimension) is stored beside the distances.
"""

import argparse
import shutil
import statistics
import sys
import time
from pathlib import Path

from common import (  # puts the project on the path
    B16, DEMO, Results, call, frechet_distance, last_json, markdown, masked, measure_costs, picture, spread,
    train_for, typed, where_from)

import numpy as np

from prepare_data import Parser, check, open_folder, run_script

METHODS = ("fine-tuning,joint,replay-1-64,replay-0.1-64,replay-1-512,replay-0.1-512,replay-1+taught,generative-1,"
           "generative-1+taught,replay-0.1-512+masked,ewc-1e4,ewc-1e6,l2-0.001,l2-0.1")
FIRST = "first"  # the model of the first set, from which all methods start

def subset(source, folder, *flags, log):
    """A part of a prepared set, made once."""
    if not folder.exists():
        call("prepare_data.py", source, *flags, "--out", folder, log=log)
    return str(folder)

def task_of(text, out):
    """The prepared set that an argument means: a folder, or FOLDER:CLASS, whose images go to OUT/CLASS."""
    folder, _, name = text.partition(":")
    if not name:
        return str(Path(folder).resolve())
    return subset(folder, out / name, "--classes", name, log=out / "output.txt")

def flags_of(method, tasks, before, folder, args, log):
    """The flags of train.py for learning tasks[-1] when `before`, a checkpoint, knows the others."""
    name, _, value = method.split("+")[0].partition("-")
    *old, new = tasks
    if name == FIRST:
        return [f"--data={new}", DEMO, *args.class_flags]
    if name == "fine":
        return [f"--data={new}"]
    if name == "joint":
        return [f"--data={','.join(tasks)}"]
    if name in ("l2", "ewc"):
        return [f"--data={new}", f"--{name}={value}", f"--ewc_data={','.join(old)}"]
    coef, _, size = value.partition("-")
    if name == "generative":
        samples = folder / "generated.npz"
        call("sample.py", "--ckpt", before, f"--num={args.num}", "--steps=10", "--out", samples, log=log)
        old = [subset(samples, folder / "generated", log=log)]
    elif size:
        old = [subset(task, args.out / f"{Path(task).name}-{size}", "--num", size, log=log) for task in old]
    teacher = [f"--distill_from={before}"] if "+taught" in method else []
    return [f"--data={new}", f"--replay={','.join(old)}", f"--replay_coef={coef}", *teacher]

def labels_of(task, num):
    """Flags for sample.py: classes in the proportions of a set."""
    _, labels, meta = open_folder(task)
    drawn = np.random.default_rng(0).choice(labels[labels >= 0], num)
    return ["--labels", ",".join(meta["class_names"][label] for label in drawn)]

def judge(checkpoint, tasks, folder, args, log):
    """Frechet distance of a model's samples to each set, by features learned from it."""
    distances = []
    for i, task in enumerate(tasks):
        samples = folder / "samples0.npz"
        labels = []
        if args.class_flags:
            samples = folder / f"samples{i}.npz"
            labels = labels_of(task, args.num)
        if not samples.exists():
            call("sample.py", "--ckpt", checkpoint, f"--num={args.num}", "--steps=10", f"--seed={args.seed}", *labels,
                 "--out", samples, log=log)
        distances.append(frechet_distance(samples, task, args.out / str(i), log))
    return distances

def train_stages(halves, flags, checkpoint, costs, folder, args, log):
    """Train for args.minutes, in shares with flags of their own -> the last checkpoint, facts of all stages."""
    plain = [f"--data={args.tasks[0]}", DEMO, B16, *args.class_flags]
    stages = []
    for i, (share, more) in enumerate(halves):
        own = [*flags, *more]
        if checkpoint:
            own.append(f"--init_from={checkpoint}")
        measure_costs({"plain": plain, "own": own}, costs, args.out / "trial", log, rounds=2)
        checkpoint, facts = train_for(60 * args.minutes * share, costs.pop("own"), folder / f"stage{i}", own, log)
        stages.append({key: facts[key] for key in ("steps", "seconds", "images_per_s", "peak_gb")})
    return checkpoint, stages

def learn(method, first, costs, args):
    """Run a method through all tasks, or learn the first one -> distances, row t of them after task t, and more."""
    folder = args.out / f"{method}-{args.seed}"
    shutil.rmtree(folder, ignore_errors=True)  # of an interrupted call
    log = folder / "output.txt"
    checkpoint = None
    num_tasks = 1
    matrix = []
    if first:
        checkpoint = args.out / first["checkpoint"]
        num_tasks = len(args.tasks)
        matrix = [first["matrix"][0]]
    seconds = 0
    stages = []
    for t in range(len(matrix), num_tasks):
        here = folder / f"task{t}"
        here.mkdir(parents=True)
        tasks = args.tasks[: t + 1]
        begin = time.time()  # what a method does before it trains counts, too
        flags = [f"--seed={args.seed}", *flags_of(method, tasks, checkpoint, here, args, log)]
        seconds += time.time() - begin
        halves = [(1, [B16])]
        if method == FIRST or method.endswith("+masked"):
            halves = [(0.5, masked(0.75)), (0.5, [B16])]
        checkpoint, found = train_stages(halves, flags, checkpoint, costs, here, args, log)
        seconds += sum(facts["seconds"] for facts in found)
        stages += found
        matrix.append(judge(checkpoint, tasks, here, args, log))
    out, _ = call("fid.py", ",".join(args.tasks[:num_tasks]), checkpoint, "--metrics=bpd", log=log)
    return dict(method=method, seed=args.seed, checkpoint=str(checkpoint.relative_to(args.out)), matrix=matrix,
                stages=stages, seconds=seconds, report=list(last_json(out).values()), **where_from())

def table(results, names):
    """A line for each method, over its seeds."""
    lines = []
    for method in dict.fromkeys(r["method"] for r in results if r["method"] != FIRST):
        own = [r for r in results if r["method"] == method]
        figures = []  # a list for each seed
        for r in own:
            matrix, last = r["matrix"], r["matrix"][-1]
            best = [min(row[i] for row in matrix[i:]) for i in range(len(last))]
            forgotten = [last[i] - best[i] for i in range(len(last) - 1)]
            figures.append([*sum(matrix, []), statistics.mean(last), statistics.mean(forgotten)])
        stages = zip(*(r["stages"] for r in own))
        rates = [f"{statistics.mean(stage['images_per_s'] for stage in seeds):.0f}" for seeds in stages]
        seconds = statistics.mean(r["seconds"] for r in own)
        lines.append([method, *(spread(values) for values in zip(*figures)), ", ".join(rates), f"{seconds:.0f}"])
    after = [f"{known} after {last}" for i, last in enumerate(names) for known in names[: i + 1]]
    return markdown(["method", *after, "average at the end", "forgetting", "images/s by stage", "seconds"], lines)

def main(argv):
    parser = Parser(__doc__)
    parser.epilog, parser.formatter_class = __doc__, argparse.RawDescriptionHelpFormatter
    parser.add_argument("tasks", nargs="+", help="prepared sets in the order of learning, or SET:CLASS, a class of it")
    parser.add("methods", METHODS, "as explained below")
    parser.add("minutes", 4.0, "of training, for each set and method")
    parser.add("seed", 0, "of training and sampling")
    parser.add("num", 1000, "samples of each Frechet distance", low=2)
    parser.add("out", "out/continual", "folder")
    args = parser.parse_args(argv)
    methods = args.methods.split(",")
    known = {method.split("-")[0] for method in METHODS.split(",")}
    for method in methods:
        check(method.split("-")[0] in known, f"--methods has {method}, expected some of those in --help")
    check(len(args.tasks) > 1, f"{args.tasks[0]} is only one set: name those to learn after it")
    args.out = Path(args.out).resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    args.tasks = [task_of(text, args.out) for text in args.tasks]
    args.class_flags = []
    if all(open_folder(task)[2]["class_names"] for task in args.tasks):
        args.class_flags = ["--class_cond"]
    settings = dict(tasks=[Path(task).name for task in args.tasks], minutes=args.minutes, num=args.num)
    done = Results(args.out / "continual.json", settings, typed(__file__, argv))
    costs = done.stored.setdefault("cost_seconds", {})
    own = []
    for method in [FIRST, *methods]:
        if not done.find(method=method, seed=args.seed):
            first = own[0] if own else None
            done.results.append(learn(method, first, costs, args))
            done.save()
            print(method, done.results[-1]["matrix"], file=sys.stderr, flush=True)
        own += done.find(method=method, seed=args.seed)
    print(table(own, settings["tasks"]))
    lines = []  # eight samples for each set after the last one, a line for each method
    for r in own[1:]:
        last = args.out / f"{r['method']}-{args.seed}" / f"task{len(args.tasks) - 1}"
        lines.append(np.concatenate([np.load(path)["arr_0"][:8] for path in sorted(last.glob("samples?.npz"))]))
    picture(args.out / "continual-samples.png", lines)

if __name__ == "__main__":
    run_script(main)
