"""Learn prepared sets one after another, by several methods, and measure what is forgotten.

python tests/tools/continual.py data/a data/b --minutes 4 --methods fine-tuning,joint,replay-0.1-512
python tests/tools/continual.py data/emoji:people-body data/emoji:flags          # one class after another

If all have classes, the model is conditional, and a set is compared with samples of those that it
holds; else all sets are compared with the same samples, and distances depend on their mixture, too.

Every method starts from one model of the first set, and --minutes are planned as in reproduce.py: by the cost of a
step, here against that of a step on the first set taken in turns with it. After each set the Frechet distance to
every set so far is measured with --num samples, by features that judge.py learns from that set. What is finished lies in
OUT/continual.json and is not run again. Methods, as flags of train.py:

fine-tuning                nothing but the new set
joint                      --data: all sets so far
l2-C, ewc-C                --l2=C, --ewc=C with the importance on all old sets
replay-COEF[-BUFFER]       --replay: all old sets, or a buffer of so many images of each; --replay_coef
generative-COEF            --replay: --num samples of the model before, made a set by prepare_data.py
NAME+taught                the same with the answers of the model before as targets (--distill_from)
NAME+masked                the same with --mask_ratio=0.75 in the first half of the time

What fid.py --metrics bpd says of the sets (loss by noise level, bits per dimension) is stored beside
the distances, and its change from the first model to the last is printed for the first set.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from PIL import Image

from reproduce import (B16, QUIET, both, call, last_json, masked, step_seconds, train_for, typed,
                       where_from)  # puts the project on the path

import sample
from prepare_data import open_folder

DEFAULT = ("fine-tuning,joint,replay-1-64,replay-0.1-64,replay-1-512,replay-0.1-512,replay-1+taught,generative-1,"
           "generative-1+taught,replay-0.1-512+masked,ewc-1e4,ewc-1e6,l2-0.001,l2-0.1")


def task_of(text, out):
    """The prepared set that an argument means: a folder, or FOLDER:CLASS, whose images go to OUT/CLASS."""
    name, _, wanted = text.partition(":")
    folder = Path(out, wanted) if wanted else Path(name).resolve()
    if wanted and not folder.exists():
        call("prepare_data.py", name, "--classes", wanted, "--out", folder, log=Path(out, "output.txt"))
    return str(folder)


def labels_of(task, args):
    """Flags for sample.py: classes in the proportions of a set; none for a model without classes."""
    if not args.class_cond:
        return []
    _, labels, meta = open_folder(task)
    drawn = np.random.default_rng(0).choice(labels[labels >= 0], args.num)
    return ["--labels", ",".join(meta["class_names"][i] for i in drawn)]


def flags_of(method, tasks, before, folder, args, log):
    """The flags of train.py for learning tasks[-1] when `before`, a checkpoint, knows the others."""
    name, *values = method.split("+")[0].split("-")
    teacher = [f"--distill_from={before}"] if "+taught" in method else []
    if name == "fine":
        return [f"--data={tasks[-1]}"]
    if name == "joint":
        return [f"--data={','.join(tasks)}"]
    if name in ("l2", "ewc"):
        return [f"--data={tasks[-1]}", f"--{name}={'-'.join(values)}", f"--anchor={before}",
                f"--ewc_data={','.join(tasks[:-1])}"]
    if name == "replay":
        old = [buffer_of(task, values[1], args, log) for task in tasks[:-1]] if values[1:] else tasks[:-1]
        return [f"--data={tasks[-1]}", f"--replay={','.join(old)}", f"--replay_coef={values[0]}", *teacher]
    if name == "generative":
        made = folder / "generated"
        call("sample.py", "--ckpt", before, f"--num={args.num}", "--steps=10", "--out", f"{made}.npz", log=log)
        call("prepare_data.py", f"{made}.npz", "--out", made, "--force", log=log)
        return [f"--data={tasks[-1]}", f"--replay={made}", f"--replay_coef={values[0]}", *teacher]
    sys.exit(f"--methods has {method!r}, expected some of those in --help")


def buffer_of(task, size, args, log):
    """A prepared set of `size` images of a task."""
    folder = Path(args.out) / f"{Path(task).name}-{size}"
    if not folder.exists():
        call("prepare_data.py", task, "--num", size, "--out", folder, log=log)
    return str(folder)


def distances(checkpoint, tasks, folder, args, log):
    """Frechet distance of a model's samples to each set, by features learned from it."""
    found, before = [], None
    for i, task in enumerate(tasks):
        reference, net, asked = *(Path(args.out) / f"{i}-{n}" for n in ("reference.npz", "judge.pt")), labels_of(task, args)
        if not reference.exists():
            call("tests/tools/judge.py", task, "--no-table", "--out", net, log=log)
            call("fid.py", task, f"--features={net}", f"--num={args.references}", "--stats", reference, log=log)
        if asked != before:
            call("sample.py", "--ckpt", checkpoint, f"--num={args.num}", "--steps=10", f"--seed={args.seed}", *asked,
                 "--out", folder / "samples.npz", log=log)
            with np.load(folder / "samples.npz") as images:
                sample.save_grid(folder / f"samples{i}.png", images["arr_0"][:64])
        before = asked
        found.append(last_json(call("fid.py", reference, folder / "samples.npz", f"--features={net}", "--json",
                                    log=log)[0])["fd"])
    return found


def cost_of(flags, tasks, args, known, log):
    """Seconds of a step with these flags, on the machine on which one on the first set takes `known` seconds."""
    plain = [f"--data={tasks[0]}", "--preset=demo", B16, *["--class_cond"] * args.class_cond]
    paces = step_seconds([plain, flags] if known else [plain], Path(args.out, "trial"), log, rounds=2)
    return paces[tuple(flags)] * known / paces[tuple(plain)] if known else paces[tuple(plain)]


def learn(method, tasks, args, first):
    """Run a method through all tasks; returns the matrix of distances, row t after task t."""
    folder = Path(args.out) / f"{method}-{args.seed}"
    shutil.rmtree(folder, ignore_errors=True)  # of an interrupted call
    folder.mkdir(parents=True)
    log, checkpoint, matrix, seconds, stages = folder / "output.txt", first["checkpoint"], [first["row"]], [], []
    for t in range(1, len(tasks)):
        here = folder / f"task{t}"
        here.mkdir(exist_ok=True)
        begun = time.time()  # what a method does before it trains counts, too
        flags = [*QUIET, f"--seed={args.seed}", *flags_of(method, tasks[: t + 1], checkpoint, here, args, log)]
        seconds.append(time.time() - begun)
        halves = [(0.5, masked(0.75)), (0.5, [B16])] if method.endswith("+masked") else [(1, [B16])]
        for i, (share, mask) in enumerate(halves):
            start = f"--init_from={checkpoint}"
            cost = cost_of([*flags, start, *mask], tasks, args, first["step_seconds"], log)
            checkpoint, facts = train_for(60 * args.minutes * share, cost, here / f"stage{i}", [*flags, start, *mask], log)
            seconds.append(facts["seconds"])
            stages.append({k: facts[k] for k in ("steps", "images_per_s", "peak_gb")})
        matrix.append(distances(checkpoint, tasks[: t + 1], here, args, log))
    return dict(method=method, seed=args.seed, matrix=matrix, stages=stages, seconds=sum(seconds),
                report=report_of(checkpoint, tasks, log), **where_from())


def report_of(checkpoint, tasks, log):
    """What fid.py says of a model's losses on each task."""
    out, _ = call("fid.py", ",".join(tasks), checkpoint, "--metrics=bpd", log=log)
    return [last_json(out)[task] for task in tasks]


def table(results, names):
    """Markdown, a line for each method, over its seeds."""
    lines = ["| method | " + " | ".join(f"{n} after {m}" for j, m in enumerate(names) for n in names[: j + 1])
             + " | average at the end | forgetting | images/s by stage | seconds |",
             "|---" * (len(names) * (len(names) + 1) // 2 + 5) + "|"]
    for method in dict.fromkeys(r["method"] for r in results):
        own, found = [r for r in results if r["method"] == method], []  # a list of figures for each seed
        for r in own:
            last = r["matrix"][-1]
            lost = [last[i] - min(row[i] for row in r["matrix"] if len(row) > i) for i in range(len(last) - 1)]
            found.append([*(v for row in r["matrix"] for v in row), statistics.mean(last), statistics.mean(lost)])
        figures = " | ".join(both(values) for values in zip(*found))
        rates = ", ".join(f"{statistics.mean(s['images_per_s'] for s in stage):.0f}"
                          for stage in zip(*(r["stages"] for r in own)))
        lines.append(f"| {method} | {figures} | {rates} | {statistics.mean(r['seconds'] for r in own):.0f} |")
    return "\n".join(lines)


def change_by_level(results, first):
    """Loss on the first set after the last minus before, by noise level; and bits per dimension."""
    before = first["report"][0]
    middle = [(a + b) / 2 for a, b in zip(before["ln_sigma"], before["ln_sigma"][1:])]
    lines = ["| change on the first set | " + " | ".join(f"ln sigma {v:.1f}" for v in middle)
             + " | bits per dimension | Frechet distance |", "|---" * 13 + "|"]
    for r in results:
        after = r["report"][0]
        lines.append(f"| {r['method']} | " + " | ".join(
            f"{b - a:+.4f}" for a, b in zip(before["loss_by_level"], after["loss_by_level"]))
            + f" | {after['bits_per_dim'] - before['bits_per_dim']:+.4f} "
            f"| {r['matrix'][-1][0] - r['matrix'][0][0]:+.4g} |")
    return "\n".join(lines)


def picture(args, results):
    """OUT/continual-samples.png: a line for each method, the first images of each set after the last one."""
    lines = []
    for r in results:
        grids = sorted(Path(args.out, f"{r['method']}-{args.seed}", f"task{len(r['matrix']) - 1}").glob("samples?.png"))
        rows = [np.asarray(Image.open(grid)) for grid in grids]  # of eight lines
        lines.append(np.hstack([row[: len(row) // 8] for row in rows]))
    Image.fromarray(np.vstack(lines)).save(Path(args.out, "continual-samples.png"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", help="prepared sets in the order of learning, or SET:CLASS: one class of it")
    parser.add_argument("--methods", default=DEFAULT, help="with commas")
    parser.add_argument("--minutes", type=float, default=4, help="of training, for each set and method")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num", type=int, default=1000, help="samples of each Frechet distance")
    parser.add_argument("--references", type=int, default=2000, help="real images of each Frechet distance")
    parser.add_argument("--out", default="out/continual")
    args = parser.parse_args()
    args.out = os.path.abspath(args.out)
    folder = Path(args.out) / f"first-{args.seed}"
    Path(args.out).mkdir(parents=True, exist_ok=True)
    tasks = [task_of(t, args.out) for t in args.tasks]
    args.class_cond = all(open_folder(t)[2]["class_names"] for t in tasks)
    done = Path(args.out) / "continual.json"
    about = dict(tasks=[Path(t).name for t in tasks], minutes=args.minutes, num=args.num, references=args.references)
    stored = json.loads(done.read_text()) if done.exists() else dict(about, results=[])
    results = stored["results"]
    if differ := [k for k in about if stored[k] != about[k]]:
        sys.exit(f"{done} has results with other {differ[0]} ({stored[differ[0]]}): give another --out")
    done.write_text(json.dumps(stored, indent=1))
    stored["command"] = typed("continual.py")
    if not (folder / "first.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        log = folder / "output.txt"
        known, pt = cost_of([], tasks, args, None, log), None
        for i, mask in enumerate((masked(0.75), [B16])):
            start = [f"--init_from={pt}"] if i else ["--preset=demo", *["--class_cond"] * args.class_cond]
            flags = [f"--data={tasks[0]}", f"--seed={args.seed}", *mask]
            cost = cost_of([*flags, "--preset=demo"], tasks, args, known, log)
            pt, _ = train_for(30 * args.minutes, cost, folder / f"stage{i}", [*flags, *start], log)
        checkpoint = pt
        row = distances(checkpoint, tasks[:1], folder, args, log)
        (folder / "first.json").write_text(json.dumps(dict(
            checkpoint=str(checkpoint), step_seconds=known, row=row, report=report_of(checkpoint, tasks[:1], log))))
    first = json.loads((folder / "first.json").read_text())
    stored["first"] = {k: v for k, v in first.items() if k != "checkpoint"}
    mine = []
    for method in args.methods.split(","):
        wanted = dict(method=method, seed=args.seed)
        if not any(wanted.items() <= r.items() for r in results):
            results.append(learn(method, tasks, args, first))
            done.write_text(json.dumps(stored, indent=1))
            print(method, results[-1]["matrix"], file=sys.stderr, flush=True)
        mine += [r for r in results if wanted.items() <= r.items()]
    picture(args, mine)
    print(table(mine, stored["tasks"]))
    print("\n" + change_by_level(mine, first))


if __name__ == "__main__":
    main()
