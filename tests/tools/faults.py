"""Fault campaign: disturb small training runs, resume them, compare with the undisturbed run.

python tests/tools/faults.py [--faults 80] [--seed 0]        # about five seconds a fault on two cores

Every fault hits a fresh run of STEPS steps that saves every EVERY steps:
  kill       kill -9 at a random moment, also in the middle of a save
  poison     the same, and some images are NaN: their steps must be skipped
  SIGHUP     the terminal is closed at a random moment: the run must save; SIGUSR1 is the same, sent by SLURM
  truncate   the newest checkpoint is cut at a random byte
  flip       a random byte of the newest checkpoint is changed
  full disk  no file may grow beyond a random size (RLIMIT_FSIZE); then kill -9
  two runs   two start in the same folder: one must be refused, and the other one undisturbed
The final weights (model, EMA, optimizer) must be those of the undisturbed run, bit for bit.
"""

import argparse
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import ROOT, TINY  # noqa: E402, it puts the project on the path
from test_train import finite, load, poisoned, same_runs  # noqa: E402

STEPS, EVERY = 160, 10
KILL = signal.SIGKILL
# {kind: (signal, how many steps may be lost)}; a skipped step is not saved.
SIGNALS = dict(kill=(KILL, EVERY), poison=(KILL, 2 * EVERY), SIGHUP=(signal.SIGHUP, 0), SIGUSR1=(signal.SIGUSR1, 0))
KINDS = [*SIGNALS, "truncate", "flip", "full disk", "two runs"]

def start(data, out, *more):
    """A training run as a user starts it."""
    flags = [f"--data={data}", f"--out_dir={out}", *TINY, "--batch_size=8", "--lr_schedule=constant", "--log_every=1",
             f"--save_every={EVERY}", f"--steps={STEPS}", *more]
    return subprocess.Popen([sys.executable, str(ROOT / "train.py"), *flags], stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})

def finish(process):
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors

def disturb(kind, data, out, rng):
    """Run until the fault -> the step that a resumed run may at worst go back to; beyond STEPS: it was not met well."""
    if kind in SIGNALS:
        number, loss = SIGNALS[kind]
        process = start(data, out)
        while process.poll() is None and not (out / "ft.pt").exists():
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.8))
        process.send_signal(number)
        code, _ = finish(process)
        steps = re.findall(r'"step": (\d+).*}\n', (out / "log.jsonl").read_text())  # a kill may cut off the last line
        done = int(steps[-1])
        as_told = number == KILL or code == 128 + number or done == STEPS
        return done - loss if as_told else STEPS + 1
    if kind == "two runs":
        codes = [finish(process)[0] for process in (start(data, out), start(data, out))]
        return STEPS if sorted(codes) == [0, 1] else STEPS + 1
    steps = EVERY * rng.randrange(2, STEPS // EVERY)
    finish(start(data, out, f"--steps={steps}"))
    content = bytearray((out / "ft.pt").read_bytes())
    at = rng.randrange(len(content))
    if kind == "full disk":
        process = start(data, out, "--resume")
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (at, at))
        time.sleep(rng.uniform(2, 4))
        process.kill()
        finish(process)
        return steps  # the last state for which there was room
    if kind == "truncate":
        content = content[:at]
    else:
        content[at] ^= rng.randrange(1, 256)
    (out / "ft.pt").write_bytes(content)
    return steps - EVERY

def repeats(kind, data, reference, rng):
    """Whether a disturbed run, resumed, goes back no further than it may and ends as the undisturbed one."""
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        out = Path(folder)
        allowed = disturb(kind, data, out, rng)
        code, errors = finish(start(data, out, "--resume"))
        resumed = re.search(r"starts at step (\d+)", errors)
        assert code == 0 and resumed, errors
        return int(resumed[1]) >= allowed and same_runs(out / "ft.pt", reference)

def undisturbed(folder, sick):
    """A run on images of which the `sick` are NaN -> the data and its checkpoint."""
    data = poisoned(folder / "data", sick, n=64)
    code, errors = finish(start(data, folder / "run"))
    assert code == 0 and finite(load(folder / "run/ft.pt")), errors
    return data, folder / "run/ft.pt"

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        healthy = undisturbed(Path(folder, "healthy"), [])
        with_nan = undisturbed(Path(folder, "poisoned"), [3, 40])
        for i in range(args.faults):
            kind = KINDS[i % len(KINDS)]
            data, reference = with_nan if kind == "poison" else healthy
            ended_well = repeats(kind, data, reference, rng)
            wrong += int(not ended_well)
            print(f"{i + 1}/{args.faults} {kind}, ended as it should: {ended_well}", flush=True)
    sys.exit(wrong > 0)

if __name__ == "__main__":
    main()
