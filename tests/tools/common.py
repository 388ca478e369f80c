"""Run the scripts of the project, and say with what a figure was measured."""

import json
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from PIL import Image, ImageDraw

from prepare_data import check, to_image

# ---- Runs.
QUIET = ["--sample_every=0", "--save_every=0"]

def masked(ratio, kind="patch"):
    return [f"--mask_ratio={ratio}", f"--mask_type={kind}"]

def subset(source, folder, *flags, log):
    """A part of a prepared set, made once by prepare_data.py with these flags."""
    if not folder.exists():
        call("prepare_data.py", source, *flags, "--out", folder, log=log)
    return folder

def call(script, *args, log):
    """Run a script of the project -> what it prints, and its peak memory in GB. The rest goes to the file `log`."""
    command = [sys.executable, ROOT / script, *map(str, args)]
    with open(log, "a") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        out = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        last_words = Path(log).read_text().strip().splitlines()[-1]
        check(False, f"{script} failed: {last_words} (all of it in {log})")
    return out, usage.ru_maxrss / 1e6

def last_json(out):
    return json.loads(out.splitlines()[-1])

def records(folder):
    return [json.loads(line) for line in open(Path(folder, "log.jsonl"))]

def train_for(seconds, cost, out_dir, flags, log):
    """Train for a planned time, at `cost` seconds a step -> the checkpoint, and what is known of the run."""
    steps = max(10, round(seconds / cost))
    _, memory = call("train.py", *flags, f"--out_dir={out_dir}", *QUIET, f"--steps={steps}", "--log_every=10",
                     "--eval_every=0", log=log)
    start, *found = records(out_dir)
    (loss,) = [r["val_loss"] for r in found if "val_loss" in r]
    measured = max(r["seconds"] for r in found if "seconds" in r)
    (checkpoint,) = out_dir.glob("??.pt")
    return checkpoint, dict(steps=steps, seconds=steps * cost, measured=measured, val_loss=loss, peak_gb=memory,
                            images_per_s=start["config"]["batch_size"] / cost)

def step_seconds(flags, folder, log):
    """The least seconds of a step in a short run of train.py."""
    call("train.py", *flags, f"--out_dir={folder}", *QUIET, "--steps=36", "--log_every=4", "--eval_every=0", log=log)
    times = [r["seconds"] for r in records(folder) if "seconds" in r]
    shutil.rmtree(folder)
    return min(later - earlier for earlier, later in pairwise(times)) / 4

def measure_costs(commands, folder, rounds=3):
    """Seconds of a step of each command, {name: flags of train.py} -> {name: seconds}, also kept in costs.json.

    Short runs take turns, and the least time counts. A command whose cost was known before tells how fast the
    machine is now, so that a call that goes on plans as the first one did.
    """
    file, trial = folder / "costs.json", folder / f"trial{os.getpid()}"
    costs = json.loads(file.read_text()) if file.exists() else {}
    known = [name for name in commands if name in costs][:1]
    missing = [name for name in commands if name not in costs]
    if not missing:
        return costs
    times = {name: [] for name in known + missing}
    for name in list(times) * rounds:
        times[name].append(step_seconds(commands[name], trial, folder / "output.txt"))
    scale = costs[known[0]] / min(times[known[0]]) if known else 1
    costs |= {name: scale * min(times[name]) for name in missing}
    file.write_text(json.dumps(costs, indent=1))
    return costs

# ---- Reports.
def where_from():
    """What a figure must be told with: the code, the machine, the day."""
    git = subprocess.run(["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=ROOT, capture_output=True,
                         text=True)
    names = [platform.processor()]
    if os.path.exists("/proc/cpuinfo"):
        names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    machine = f"{len(names)} cores of {names[0]}"
    if torch.cuda.is_available():
        machine = torch.cuda.get_device_name()
    return dict(commit=git.stdout.strip() or "unknown", machine=machine, torch=torch.__version__,
                date=time.strftime("%Y-%m-%d"))

def typed(file, argv):
    """The command of this process as anybody can type it: files by their names."""
    names = [re.sub("(^|=)/.*/", r"\1", arg) for arg in argv]
    return shlex.join(["python", f"tests/tools/{Path(file).name}", *names])

def spread(values):
    """The mean, and half the distance between the extremes; nothing of what was not measured."""
    if None in values:
        return ""
    mean = f"{statistics.mean(values):.4g}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {(max(values) - min(values)) / 2:.2g}"

def markdown(heads, rows):
    lines = [f"| {' | '.join(cells)} |" for cells in [heads, *rows]]
    lines.insert(1, "|---" * len(heads) + "|")
    return "\n".join(lines)

def picture(path, lines, scale=2):
    """Write lines [(label, images uint8 (n, H, W, C))] as one PNG, each line behind its label."""
    rows = [np.concatenate(list(images), axis=1) for _, images in lines]
    pictures = [to_image(row) for row in rows]
    width, height = max(p.width for p in pictures) * scale, max(p.height for p in pictures) * scale
    margin = 10 + max(round(ImageDraw.Draw(pictures[0]).textlength(label)) for label, _ in lines)
    sheet = Image.new("RGB", (margin + width, height * len(lines)), "white")
    for i, (label, _) in enumerate(lines):
        large = pictures[i].convert("RGB").resize((pictures[i].width * scale, pictures[i].height * scale), Image.NEAREST)
        sheet.paste(large, (margin, i * height))
        ImageDraw.Draw(sheet).text((4, i * height + height // 2 - 6), label, "black")
    sheet.save(path)
