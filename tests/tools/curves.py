"""Draw the losses of one or several runs of train.py into a PNG.

python tests/tools/curves.py out                                # every run in out/log.jsonl -> out/curves.png
python tests/tools/curves.py out other/out --x seconds --out both.png
python tests/tools/curves.py out --what grad_norm

Lines are the losses of the steps (the mean of the last twentieth), dots the validation losses. Both axes
are logarithmic. Seconds are those of training, without validation and saving; of `lr`, `grad_norm` and
`images_per_s` there are lines alone.
"""

import argparse
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from PIL import Image, ImageDraw

from model import replace_file
from prepare_data import need

COLOURS = "#d1495b", "#00798c", "#edae49", "#30638e", "#66a182", "#8d5a97", "#7f5539", "#444444"


def runs_of(folder):
    """{name of a run: its records} from folder/log.jsonl; of a step that was repeated the last record counts."""
    path = Path(folder, "log.jsonl")
    need(path.exists(), f"{path} does not exist: give the --out_dir of a run of train.py")
    runs = {}
    for record in map(json.loads, path.read_text().splitlines()):
        known = runs.setdefault(record["run"], [])
        if record.get("event") == "start":  # afresh, or resumed from a step before the last
            known[:] = [r for r in known if r["step"] <= record["step"]]
            if not record["step"]:
                known.clear()
        known.append(record)
    return runs


def points_of(records, what, x="step"):
    """[(step or seconds, value)] of one kind; a validation loss stands at the seconds of its step."""
    seconds, shift, points = 0.0, 0.0, []
    for r in records:
        if r.get("event") == "start":
            shift = seconds  # a resumed run counts its seconds anew
        seconds = shift + r["seconds"] if "seconds" in r else seconds
        if what in r:
            points.append((r["step"] if x == "step" else seconds, r[what]))
    return [(t, v) for t, v in points if t > 0 and v > 0]


def smoothed(points):
    """Each value the mean of those of the last twentieth of the steps until then."""
    width = max(1, len(points) // 20)
    values = [v for _, v in points]
    return [(t, sum(values[max(0, i - width + 1) : i + 1]) / min(width, i + 1)) for i, (t, _) in enumerate(points)]


def ticks(low, high, most=8):
    """Round values within a range for a logarithmic axis, the densest of at most so many."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in (*([x / 10 for x in range(10, 100, by)] for by in (1, 2, 5)), range(1, 10), (1, 2, 5), (1,)):
        found = [v for v in (float(f"{step:g}e{e}") for e in decades for step in steps) if low <= v <= high]
        if len(found) <= most:
            return found
    return found[:: -(-len(found) // most)]


def draw(path, lines, title, size=(720, 420)):
    """A PNG of lines [(name, colour number, [(x > 0, y > 0)], whether with dots)], both axes logarithmic."""
    image = Image.new("RGB", size, "white")
    canvas = ImageDraw.Draw(image)
    x, y = zip(*(p for _, _, points, _ in lines for p in points))
    left, top, right, bottom = 60, 36, size[0] - 20, size[1] - 36
    spans = [(math.log(min(v)) - 0.05, math.log(max(v)) + 0.05) for v in (x, y)]

    def place(px, py):
        fx, fy = ((math.log(v) - low) / (high - low) for v, (low, high) in zip((px, py), spans))
        return left + fx * (right - left), bottom - fy * (bottom - top)

    for (low, high), is_x in zip(spans, (True, False)):
        for v in ticks(math.exp(low), math.exp(high)):
            at = place(v, min(y)) if is_x else place(min(x), v)
            ends = ((at[0], top), (at[0], bottom)) if is_x else ((left, at[1]), (right, at[1]))
            canvas.line(ends, "#dddddd")
            canvas.text((at[0] - 10, bottom + 6) if is_x else (8, at[1] - 6), f"{v:g}", "black")
    canvas.rectangle((left, top, right, bottom), outline="black")
    canvas.text((left, 10), title, "black")
    for name, number, points, dots in lines:
        colour = COLOURS[number % len(COLOURS)]
        at = [place(*p) for p in points]
        canvas.line(at, colour, 2)
        for a, b in at if dots else ():
            canvas.ellipse((a - 3, b - 3, a + 3, b + 3), colour)
    named = dict((name, number) for name, number, _, _ in lines)
    for i, (name, number) in enumerate(named.items()):
        canvas.text((right - 8 - canvas.textlength(name), top + 8 + 14 * i), name, COLOURS[number % len(COLOURS)])
    replace_file(path, lambda f: image.save(f, "PNG"))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="--out_dir of runs of train.py")
    parser.add_argument("--x", default="step", choices=("step", "seconds"))
    parser.add_argument("--what", default="loss", choices=("loss", "grad_norm", "lr", "images_per_s"))
    parser.add_argument("--out", help="default: curves.png in the first folder")
    args = parser.parse_args(argv)
    lines = []
    for folder in args.runs:
        for name, records in runs_of(folder).items():
            label, number = f"{folder} {name}", len({line[1] for line in lines})
            for what in (args.what, "val_loss")[: 1 + (args.what == "loss")]:
                if points := points_of(records, what, args.x):
                    dots = what == "val_loss"
                    lines.append((label, number, points if dots else smoothed(points), dots))
    need(lines, f"nothing to draw in {', '.join(args.runs)}: the runs have not logged yet")
    path = args.out or str(Path(args.runs[0], "curves.png"))
    draw(path, lines, f"{args.what} against {args.x}{'; dots: validation loss' * (args.what == 'loss')}")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
