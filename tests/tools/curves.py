"""Draw the losses of runs of train.py into a PNG.

python tests/tools/curves.py out                                # every run in out/log.jsonl -> out/curves.png
python tests/tools/curves.py out other/out --x seconds --out both.png

Lines are losses of steps (means over the last twentieth), dots are validation losses. Seconds are those of
training, without validation and saving; a run that starts from another one (--init_from) follows it.
"""

import json
import math
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from PIL import Image, ImageDraw

from prepare_data import Parser, check, run_script

COLOURS = "#d1495b", "#00798c", "#edae49", "#30638e", "#66a182", "#8d5a97", "#7f5539", "#444444"

def runs_of(folder):
    """{name of a run: its records} from folder/log.jsonl; of a step that was repeated the last record counts."""
    path = Path(folder, "log.jsonl")
    check(path.exists(), f"{path} does not exist: give the --out_dir of a run of train.py")
    runs = {}
    for record in map(json.loads, path.read_text().splitlines()):
        name, first = record["run"], record["step"]
        known = runs.setdefault(name, [])
        if record.get("event") == "start":  # afresh at step 0, or resumed
            runs[name] = [r for r in known if 0 < r["step"] <= first]
        if record.get("event") != "skipped":
            runs[name].append(record)
    return runs

def points_of(records, what, x="step"):
    """[(step or seconds, value)] of one kind; a validation loss stands at the seconds of its step."""
    seconds = 0.0
    before = 0.0  # the run was resumed: it counts its seconds anew
    points = []
    for record in records:
        if record.get("event") == "start":
            before = seconds
        if "seconds" in record:
            seconds = before + record["seconds"]
        if what in record:
            points.append((record["step"] if x == "step" else seconds, record[what]))
    return [(t, value) for t, value in points if t > 0 and value > 0]  # which have logarithms

def smoothed(points):
    """Each value the mean of those of the last twentieth of the steps until then."""
    width = max(1, len(points) // 20)
    return [(t, np.mean([value for _, value in points[max(0, i + 1 - width) : i + 1]]))
            for i, (t, _) in enumerate(points)]

def ticks(low, high, most=8):
    """Round values within a range for a logarithmic axis, the densest of at most so many."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    tenths = [np.arange(10, 100, by) / 10 for by in (1, 2, 5)]
    for digits in (*tenths, range(1, 10), (1, 2, 5), (1,)):
        values = [float(f"{digit:g}e{decade}") for decade in decades for digit in digits]
        inside = [value for value in values if low <= value <= high]
        if len(inside) <= most:
            return inside
    return inside[:: math.ceil(len(inside) / most)]

def draw(path, lines, title, unit, size=(720, 440)):
    """A PNG with `unit` below and `title` above lines [(name, [(x > 0, y > 0)], whether with dots)]; those of one name have one colour."""
    image = Image.new("RGB", size, "white")
    canvas = ImageDraw.Draw(image)
    xs, ys = zip(*(point for _, points, _ in lines for point in points))
    left, top, right, bottom = 60, 36, size[0] - 20, size[1] - 56

    def scale(values, start, end):
        """A logarithmic axis from start to end, with a margin."""
        low, high = math.log(min(values)) - 0.05, math.log(max(values)) + 0.05
        return lambda value: start + (math.log(value) - low) / (high - low) * (end - start)

    place_x = scale(xs, left, right)
    place_y = scale(ys, bottom, top)
    for value in ticks(min(xs), max(xs)):
        x = place_x(value)
        canvas.line((x, top, x, bottom), "#dddddd")
        canvas.text((x - 10, bottom + 6), f"{value:g}", "black")
    for value in ticks(min(ys), max(ys)):
        y = place_y(value)
        canvas.line((left, y, right, y), "#dddddd")
        canvas.text((8, y - 6), f"{value:g}", "black")
    canvas.rectangle((left, top, right, bottom), outline="black")
    canvas.text((left, 10), title, "black")
    canvas.text((right - canvas.textlength(unit), bottom + 28), unit, "black")
    names = list(dict.fromkeys(name for name, _, _ in lines))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    for name, points, with_dots in lines:
        places = [(place_x(x), place_y(y)) for x, y in points]
        canvas.line(places, colours[name], 2)
        if with_dots:
            for x, y in places:
                canvas.ellipse((x - 3, y - 3, x + 3, y + 3), colours[name])
    for i, name in enumerate(names):
        canvas.text((right - 8 - canvas.textlength(name), top + 8 + 14 * i), name, colours[name])
    image.save(path)

def main(argv):
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", help="--out_dir of runs of train.py")
    parser.add("x", "step", "horizontal axis", choices=("step", "seconds"))
    parser.add("out", None, "PNG to write; None = curves.png in the first folder")
    args = parser.parse_args(argv)
    lines = []
    ends = {}  # checkpoint of a run, as its command named it: seconds of training until then
    for folder in args.runs:
        for run, records in runs_of(folder).items():
            name = run if len(args.runs) == 1 else f"{folder} {run}"
            config = records[0].get("config", {})
            parent = os.path.normpath(config.get("init_from") or "none")
            before = ends.get(parent, 0) if args.x == "seconds" else 0
            for what, with_dots in (("loss", False), ("val_loss", True)):
                points = [(before + x, value) for x, value in points_of(records, what, args.x)]
                lines.append((name, points if with_dots else smoothed(points), with_dots))
            path = os.path.normpath(f"{config.get('out_dir', folder)}/{run}.pt")
            ends[path] = max((x for _, points, _ in lines[-2:] for x, _ in points), default=0)
    lines = [line for line in lines if line[1]]
    check(lines, f"nothing to draw in {', '.join(args.runs)}: the runs have not logged yet")
    path = args.out or f"{args.runs[0]}/curves.png"
    draw(path, lines, "loss in training (lines) and validation (dots), logarithmic; pt: stage 1, ft: stage 2", args.x)
    print(f"wrote {path}")

if __name__ == "__main__":
    run_script(main)
