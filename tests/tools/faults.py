"""Fault campaign: disturb small training runs, resume them, compare with the undisturbed run.

python tests/tools/faults.py [--faults 80] [--seed 0]        # about five seconds a fault on two cores

Every fault hits a fresh run of STEPS steps that saves every EVERY steps:
  kill       kill -9 at a random moment, also in the middle of a save
  poison     the same, where some images are NaN: such steps must be skipped
  SIGHUP     the terminal is closed at a random moment: the run must finish its step and save
  SIGUSR1    the same, sent by SLURM before the time is up
  truncate   the newest checkpoint is cut at a random byte
  flip       random bytes of the newest checkpoint are changed
  full disk  writing fails at a random size of file (RLIMIT_FSIZE); kill -9 if the run has not ended by itself
  two runs   two start in the same folder: one must be refused, and the other one undisturbed
The final weights (model, EMA, optimizer) must be those of the undisturbed run, bit for bit.
"""

import argparse
import json
import math
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import ROOT, TINY, make_dataset  # noqa: E402, it puts the project on the path
from test_train import finite, load, same_runs  # noqa: E402

STEPS, EVERY = 160, 10
SIGNALS = dict(kill=signal.SIGKILL, poison=signal.SIGKILL, SIGHUP=signal.SIGHUP, SIGUSR1=signal.SIGUSR1)
KINDS = [*SIGNALS, "truncate", "flip", "full disk", "two runs"]


def start(data, out, *more, limit=None):
    """A training run as a user starts it; `limit`: largest file it may write, in bytes."""
    def set_limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    flags = [f"--data={data}", f"--out_dir={out}", *TINY, "--batch_size=8", "--lr_schedule=constant", "--log_every=1",
             f"--save_every={EVERY}", f"--steps={STEPS}", *more]
    return subprocess.Popen([sys.executable, str(ROOT / "train.py"), *flags], stderr=subprocess.PIPE, text=True,
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


def signalled(kind, data, out, rng):
    """Send a signal at a random moment after the first checkpoint; returns as `disturb`."""
    process = start(data, out)
    while process.poll() is None and not (out / "ft.pt").exists():
        time.sleep(0.005)
    time.sleep(rng.uniform(0, 0.8))
    process.send_signal(SIGNALS[kind])
    code, _ = finish(process)
    if SIGNALS[kind] == signal.SIGKILL:
        return last_step(out) - (2 * EVERY if kind == "poison" else EVERY)  # a skipped step is not saved
    done = last_step(out)
    return done if code == 128 + SIGNALS[kind] or done == STEPS else math.inf


def disturb(kind, data, out, rng):
    """Run until the fault. Returns the step that a resumed run may at worst go back to, or infinity if a signal or a
    second run was not met as it should."""
    if kind in SIGNALS:
        return signalled(kind, data, out, rng)
    if kind == "two runs":
        codes = [finish(process)[0] for process in (start(data, out), start(data, out))]
        return STEPS if sorted(codes) == [0, 1] else math.inf
    ckpt = out / "ft.pt"
    if kind == "full disk":
        finish(start(data, out, f"--steps={3 * EVERY}"))
        process = start(data, out, "--resume", limit=rng.randrange(1, ckpt.stat().st_size))
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


def one(kind, rng, data, reference):
    """What is counted of one fault: whether it was resumed, lost more steps than it may, ended bit-identically."""
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        out = Path(folder)
        allowed = disturb(kind, data, out, rng)
        code, errors = finish(start(data, out, "--resume"))
        resumed = re.search(r"starts at step (\d+)", errors)
        if code or not resumed:
            print(errors, file=sys.stderr)
            return dict(faults=1)
        identical = same_runs(out / "ft.pt", reference)
        return dict(faults=1, resumed=1, lost=int(int(resumed[1]) < allowed), identical=int(identical))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    rng = random.Random(args.seed)
    counts = {kind: Counter() for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        runs = []  # without and with poison: the data, and the checkpoint of the undisturbed run
        for sick in [], [3, 40]:
            out = Path(folder, f"run{len(sick)}")
            data = make_dataset(Path(folder, f"data{len(sick)}"), n=64, channels=4, dtype=np.float32)
            images = np.load(data / "train.npy")
            images[sick] = np.nan
            np.save(data / "train.npy", images)
            code, errors = finish(start(data, out))
            assert code == 0 and finite(load(out / "ft.pt")), errors
            runs.append((data, out / "ft.pt"))
        for i in range(args.faults):
            kind = KINDS[i % len(KINDS)]
            counts[kind].update(one(kind, rng, *runs[kind == "poison"]))
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
