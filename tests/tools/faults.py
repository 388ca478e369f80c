"""Fault campaign: disturb small training runs, resume them, compare with the undisturbed run.

python tests/tools/faults.py [--faults 60] [--seed 0]        # about five seconds a fault on two cores

Every fault hits a fresh run of STEPS steps that saves every EVERY steps:
  kill       kill -9 at a random moment, also in the middle of a save
  truncate   the newest checkpoint is cut at a random byte
  flip       random bytes of the newest checkpoint are changed
  full disk  writing fails at a random size of file (RLIMIT_FSIZE); kill -9 if the run has not ended by itself
  poison     some images are NaN; such steps must be skipped, and the run killed and resumed once
The final weights (model, EMA, optimizer) must be those of the undisturbed run, bit for bit.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import ROOT, make_dataset  # noqa: E402, it puts the project on the path
from model import load_checkpoint  # noqa: E402

STEPS, EVERY = 160, 10
FLAGS = ["--dim=32", "--depth=2", "--heads=2", "--patch_size=4", "--device=cpu", "--dtype=float32",
         "--batch_size=8", "--lr=1e-3", "--lr_schedule=constant", "--log_every=1", "--eval_every=0",
         "--sample_every=0", f"--save_every={EVERY}", f"--steps={STEPS}"]


def start(data, out, *more, limit=None):
    """A training run as a user starts it; `limit`: largest file it may write, in bytes."""
    def set_limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    return subprocess.Popen([sys.executable, str(ROOT / "train.py"), f"--data={data}", f"--out_dir={out}",
                             *FLAGS, *more], stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, preexec_fn=limit and set_limit)


def finish(process):
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


def last_step(out):
    """The last step that the log tells of; a line cut off by a kill does not count."""
    last = 0
    for line in (out / "log.jsonl").read_text().splitlines():
        try:
            last = max(last, json.loads(line).get("step", 0))
        except ValueError:
            pass
    return last


def kill_at_random(process, out, rng):
    """kill -9 at a random moment after the first checkpoint."""
    while process.poll() is None and not (out / "ft.pt").exists():
        time.sleep(0.005)
    time.sleep(rng.uniform(0, 1.0))
    process.send_signal(signal.SIGKILL)
    finish(process)


def same(a, b):
    """Whether two checkpoints hold the same tensors."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return True


def disturb(kind, data, out, rng):
    """Run until the fault; returns the step that a resumed run may at worst go back to."""
    ckpt = out / "ft.pt"
    if kind in ("kill", "poison"):
        kill_at_random(start(data, out), out, rng)
        return last_step(out) - (2 * EVERY if kind == "poison" else EVERY)  # a skipped step is not saved
    if kind == "full disk":
        finish(start(data, out, f"--steps={3 * EVERY}"))
        limit = rng.randrange(1, ckpt.stat().st_size)
        process = start(data, out, "--resume", limit=limit)
        time.sleep(rng.uniform(2, 4))
        process.send_signal(signal.SIGKILL)
        finish(process)
        return 3 * EVERY  # the last state for which there was room
    steps = EVERY * rng.randrange(2, STEPS // EVERY)
    finish(start(data, out, f"--steps={steps}"))
    content = bytearray(ckpt.read_bytes())
    if kind == "truncate":
        content = content[: rng.randrange(len(content))]
    else:
        for _ in range(rng.choice((1, 10, 1000))):
            content[rng.randrange(len(content))] ^= rng.randrange(1, 256)
    ckpt.write_bytes(content)
    return steps - EVERY


def one(kind, rng, sets, references):
    """(resumed, steps lost beyond what was allowed, bit-identical) for one fault."""
    out = Path(tempfile.mkdtemp(prefix="faults-"))
    data = sets["poison" if kind == "poison" else "clean"]
    try:
        allowed = disturb(kind, data, out, rng)
        code, errors = finish(start(data, out, "--resume"))
        resumed = [int(line.split()[-1]) for line in errors.splitlines() if "resumed from step" in line]
        if code or not resumed:
            print(errors, file=sys.stderr)
            return False, 0, False
        final = load_checkpoint(str(out / "ft.pt"))
        intact = all(same(final[k], references[kind == "poison"][k]) for k in ("model", "ema", "optimizer"))
        return True, max(0, allowed - resumed[0]), intact
    finally:
        shutil.rmtree(out)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        sets = {name: make_dataset(folder / name, n=64, channels=4, dtype=np.float32)
                for name in ("clean", "poison")}
        images = np.load(sets["poison"] / "train.npy")
        images[[3, 40]] = np.nan
        np.save(sets["poison"] / "train.npy", images)
        references = []
        for name in ("clean", "poison"):
            code, errors = finish(start(sets[name], folder / f"{name}-run"))
            assert code == 0, errors
            references.append(load_checkpoint(str(folder / f"{name}-run" / "ft.pt")))
        assert all(t.isfinite().all() for r in references for t in r["ema"].values())
        kinds = ["kill", "truncate", "flip", "full disk", "poison"]
        counts = {kind: Counter() for kind in kinds}
        for i in range(args.faults):
            kind = kinds[i % len(kinds)]
            resumed, lost, intact = one(kind, rng, sets, references)
            counts[kind].update(faults=1, resumed=resumed, lost=lost > 0, identical=intact)
            print(f"\r{i + 1}/{args.faults}", end="", file=sys.stderr, flush=True)
    print(f"\n| fault | runs | resumed | lost more than {EVERY} steps | final weights bit-identical |")
    print("|---|---|---|---|---|")
    for kind, c in counts.items():
        print(f"| {kind} | {c['faults']} | {c['resumed']} | {c['lost']} | {c['identical']} |")
    total = sum(counts.values(), Counter())
    good = total["resumed"] == total["identical"] == total["faults"] and not total["lost"]
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
