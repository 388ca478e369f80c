"""Compare ways of training at equal wall-clock time, with the commands a user would type.

python tests/reproduce.py decoder --data noto-emoji-64.zip --size 32 --minutes 8 --seeds 2
python tests/reproduce.py consistency --data noto-emoji-64.zip --size 32 --minutes 12 --seeds 2

CLAIM names a table of CLAIMS below. Each row is a way of training: stages (share of the minutes,
flags of train.py), from scratch or from the checkpoint of another row, and ways of sampling. Every
stage is first run for a few steps to see how many fit into its time. Judged are the validation loss
on whole images and --num samples: random-feature Frechet distance to the training set and, in
some claims, KID to its first --num images. What is finished lies in OUT/CLAIM.json and is not run again, so an
interrupted comparison goes on.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

import sample

DECODER = ["--decoder_depth=2", "--decoder_dim=64", "--decoder_heads=2"]
QUIET = ["--eval_every=0", "--sample_every=0", "--save_every=0"]


def row(*stages, start=None, draw=(["--steps=10"],)):
    return dict(stages=stages, start=start, draw=draw)


def masked(ratio, *flags):
    return [f"--mask_ratio={ratio}", "--mask_type=patch", *flags]


WHOLE = (0.5, [])  # the second half of the time, on whole images
CLAIMS = {
    # 256 patches at 32 px; six blocks on the tokens that pass through in all rows, MaskDiT's decoder on top.
    "decoder": dict(
        network=["--patch_size=2", "--dim=128", "--heads=4"],
        rows={
            "from scratch": row((1, ["--depth=6"])),
            "MaskDM 0.5": row((0.5, ["--depth=6", *masked(0.5)]), WHOLE),
            "MaskDM 0.75": row((0.5, ["--depth=6", *masked(0.75)]), WHOLE),
            "MaskDiT 0.5": row((0.5, ["--depth=6", *masked(0.5, *DECODER)]), WHOLE),
            "MaskDiT 0.5, no reconstruction": row((0.5, ["--depth=6", *masked(0.5, *DECODER, "--mae_weight=0")]), WHOLE),
            "sparse-dense 0.75": row((0.5, ["--depth=5", "--dense_depth=1", "--decoder_depth=1", *masked(0.75)]), WHOLE),
        }),
    # One diffusion model, tuned in several ways, each for the time that it took itself.
    "consistency": dict(
        network=["--preset=demo"],
        kid=True,
        rows={
            "diffusion": row((0.5, masked(0.75)), WHOLE, draw=[["--steps=18"]] + [
                ["--sampler=euler", f"--steps={n}"] for n in (1, 2, 4, 8)]),
            **{name: row((1, ["--loss=consistency", *flags]), start="diffusion", draw=(["--steps=1"], ["--steps=2"]))
               for name, flags in {
                   "ECT": [], "SCT": ["--ref_batch=256"],
                   "SCT, masked 0.5 at first": ["--ref_batch=256", *masked(0.5, "--mask_ratio_end=0")]}.items()},
        }),
}


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


def records(folder):
    return [r for r in map(json.loads, open(folder / "log.jsonl")) if "images_per_s" in r or "val_loss" in r]


def train_for(seconds, out_dir, flags, log):
    """Train for a given time; returns (checkpoint, facts)."""
    flags = [*flags, f"--out_dir={out_dir}"]
    trial = out_dir / "trial"
    call("train.py", *flags, f"--out_dir={trial}", "--steps=40", "--log_every=10", "--warmup=10", log=log)
    timed = {r["step"]: r["seconds"] for r in records(trial) if "seconds" in r}
    steps = max(10, round(30 * seconds / (timed[40] - timed[10])))
    begun = time.time()
    _, memory = call("train.py", *flags, f"--steps={steps}", "--log_every=10", log=log)
    rate = [r for r in records(out_dir) if "images_per_s" in r][-1]
    checkpoint = max(out_dir.glob("??.pt"), key=os.path.getmtime)
    return checkpoint, dict(
        steps=rate["step"], images_per_s=rate["images_per_s"], seconds=rate["seconds"], wall=time.time() - begun,
        peak_gb=memory, val_loss=[r["val_loss"] for r in records(out_dir) if "val_loss" in r][-1])


def where_from():
    """What a figure must be told with: the code, the machine."""
    git = subprocess.run(["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=ROOT, capture_output=True,
                         text=True)
    names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")] \
        if os.path.exists("/proc/cpuinfo") else [platform.processor()]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{len(names)} cores of {names[0]}"
    return dict(commit=git.stdout.strip() or "unknown", machine=device, torch=torch.__version__,
                date=time.strftime("%Y-%m-%d"))


def folder_of(args, name, seed):
    return Path(args.out) / args.claim / f"{name.replace(' ', '-').replace(',', '')}-{seed}"


def run_row(name, seed, args):
    claim, out_dir = CLAIMS[args.claim], folder_of(args, name, seed)
    out_dir.mkdir(parents=True, exist_ok=True)
    way, log, stages = claim["rows"][name], out_dir / "output.txt", []
    checkpoint = folder_of(args, way["start"], seed) / "final.pt" if way["start"] else None
    for i, (share, flags) in enumerate(way["stages"]):  # the network comes with a checkpoint
        start = [f"--init_from={checkpoint}"] if checkpoint else claim["network"]
        checkpoint, facts = train_for(60 * args.minutes * share, out_dir / f"stage{i + 1}", [
            f"--data={args.out}/data", f"--seed={seed}", *QUIET, *start, *flags], log)
        stages.append(facts)
    shutil.copy(checkpoint, out_dir / "final.pt")
    drawn = []
    for flags in way["draw"]:
        name_of = out_dir / f"samples{''.join(flags)}"
        call("sample.py", "--ckpt", checkpoint, f"--num={args.num}", f"--seed={seed}", *flags, "--out",
             f"{name_of}.npz", log=log)
        with np.load(f"{name_of}.npz") as images:
            sample.save_grid(f"{name_of}.png", images["arr_0"][:64])
        fd, _ = call("fid.py", f"{args.out}/reference.npz", f"{name_of}.npz", "--features=random", "--json", log=log)
        drawn.append(dict(flags=" ".join(flags), fd=json.loads(fd.splitlines()[-1])["random_fd"]))
        if claim.get("kid"):
            kid, _ = call("fid.py", f"{args.out}/data", f"{name_of}.npz", "--features=random", "--metrics=kid",
                          f"--num={args.num}", "--json", log=log)
            drawn[-1]["kid"] = json.loads(kid.splitlines()[-1])["kid"]
    return dict(row=name, seed=seed, minutes=args.minutes, num=args.num, stages=stages, drawn=drawn,
                val_loss=stages[-1]["val_loss"], **where_from())


def table(results):
    def both(values):
        spread = f" ± {(max(values) - min(values)) / 2:.2g}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.4g}{spread}"

    print("\n| way | samples | validation loss | random-feature FD | KID | images/s by stage | steps | peak memory, GB |"
          "\n|---|---|---|---|---|---|---|---|")
    for name in dict.fromkeys(r["row"] for r in results):
        rows = [r for r in results if r["row"] == name]
        stages = list(zip(*(r["stages"] for r in rows)))

        def each(key, form):
            return ", ".join(form.format(statistics.mean(s[key] for s in stage)) for stage in stages)

        for drawn in zip(*(r["drawn"] for r in rows)):
            print(f"| {name} | {drawn[0]['flags'].replace('--', '')} | {both([r['val_loss'] for r in rows])} "
                  f"| {both([d['fd'] for d in drawn])} | {both([d['kid'] for d in drawn]) if 'kid' in drawn[0] else ''} "
                  f"| {each('images_per_s', '{:.0f}')} | {each('steps', '{:.0f}')} | {each('peak_gb', '{:.2f}')} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("claim", choices=CLAIMS)
    parser.add_argument("--data", default="data/faces", help="prepared set, or anything that prepare_data.py reads")
    parser.add_argument("--size", type=int, help="pixels a side, for images that are not prepared")
    parser.add_argument("--minutes", type=float, default=8, help="of training, for each row and seed")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--num", type=int, default=500, help="samples of each Frechet distance")
    parser.add_argument("--out", default="out/reproduce")
    args = parser.parse_args()
    args.out = os.path.abspath(args.out)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    log, data, reference = args.out + "/output.txt", Path(args.out, "data"), Path(args.out, "reference.npz")
    if not data.exists():
        if Path(args.data, "meta.json").exists():
            data.symlink_to(Path(args.data).resolve())
        else:
            size = ["--size", args.size] if args.size else []
            call("prepare_data.py", args.data, "--out", data, *size, log=log)
    if not reference.exists():
        call("fid.py", data, "--features=random", "--stats", reference, log=log)
    done = Path(args.out, args.claim + ".json")
    results = json.loads(done.read_text()) if done.exists() else []
    for seed in range(args.seeds):
        for name in CLAIMS[args.claim]["rows"]:
            if not any(r["row"] == name and r["seed"] == seed for r in results):
                results.append(run_row(name, seed, args))
                done.write_text(json.dumps(results, indent=1))
                print(f"{name}, seed {seed}: validation loss {results[-1]['val_loss']:.4f}, random-feature FD "
                      + ", ".join(f"{d['fd']:.4g}" for d in results[-1]["drawn"]), file=sys.stderr, flush=True)
    table(results)


if __name__ == "__main__":
    main()
