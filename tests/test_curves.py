"""The curves show what the log says."""

import json
import math

import pytest
from conftest import mistake
from PIL import Image

import curves


def write(folder, records):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def start(run, step):
    return dict(run=run, step=step, event="start", config={})


def line(run, step, loss, seconds):
    return dict(run=run, step=step, loss=loss, grad_norm=loss / 2, lr=1e-3, images_per_s=8, seconds=seconds)


def test_what_a_resumed_run_repeats_counts_once_and_its_seconds_go_on(tmp_path):
    out = write(tmp_path, [start("pt", 0), line("pt", 10, 9.0, 1), start("pt", 0), line("pt", 10, 4.0, 2),
                           line("pt", 20, 3.0, 4), line("pt", 30, 2.5, 6), start("pt", 20), line("pt", 30, 2.0, 3),
                           dict(run="pt", step=30, event="skipped", loss="nan", grad_norm="inf", index=[7]),
                           dict(run="pt", step=30, val_loss=1.5), start("ft", 0), line("ft", 10, 1.0, 1)])
    runs = curves.runs_of(out)
    assert curves.points_of(runs["pt"], "loss") == [(10, 4.0), (20, 3.0), (30, 2.0)]
    assert curves.points_of(runs["pt"], "loss", "seconds") == [(2, 4.0), (4, 3.0), (7, 2.0)]
    assert curves.points_of(runs["pt"], "val_loss", "seconds") == [(7, 1.5)]
    assert curves.points_of(runs["ft"], "grad_norm") == [(10, 0.5)]


def test_a_stage_follows_the_one_that_it_starts_from(tmp_path, monkeypatch):
    first = [dict(start("pt", 0), config=dict(out_dir="out", init_from=None)), line("pt", 10, 4.0, 2), line("pt", 20, 3.0, 5)]
    second = [dict(start("ft", 0), config=dict(out_dir="out", init_from="./out/pt.pt")), line("ft", 10, 2.0, 3),
              dict(run="ft", step=10, val_loss=1.5)]
    drawn = []
    monkeypatch.setattr(curves, "draw", lambda path, lines, title, unit: drawn.append({(n, d): p for n, p, d in lines}))
    out = str(write(tmp_path / "out", first + second))
    for x in "seconds", "step":
        curves.main([out, "--x", x])
    seconds, steps = drawn
    assert seconds["pt", False][-1] == (5, 3.0) and seconds["ft", False] == [(8, 2.0)]
    assert seconds["ft", True] == [(8, 1.5)] and steps["ft", True] == [(10, 1.5)]


def test_smoothing_takes_the_mean_of_the_last_twentieth():
    points = [(i, math.sin(i) + 2) for i in range(1, 201)]
    for i, (t, v) in enumerate(curves.smoothed(points)):
        window = [points[j][1] for j in range(max(0, i - 9), i + 1)]
        assert t == points[i][0] and v == pytest.approx(sum(window) / len(window))


def test_ticks_are_round_few_and_within_the_range():
    assert curves.ticks(8, 3600) == [10, 20, 50, 100, 200, 500, 1000, 2000]
    for low, high in ((0.0875, 1.09), (1e-6, 1e9), (0.11, 0.19), (95, 105), (1, 1.5), (3, 4e4)):
        found = curves.ticks(low, high)
        assert 2 <= len(found) <= 8 and low <= found[0] and found[-1] <= high and found == sorted(found)
        assert all(len(f"{v:.10e}".split("e")[0].rstrip("0").replace(".", "")) <= 3 for v in found)


def test_points_lie_where_their_values_say(tmp_path):
    """Both axes are logarithmic: the geometric mean of the ends lies half-way, and is drawn in its colour."""
    lines = [("a", [(1, 1), (10, 10), (100, 100)], True), ("b", [(1, 100), (100, 100)], False)]
    curves.draw(tmp_path / "c.png", lines, "title", "steps", size=(700, 400))
    with Image.open(tmp_path / "c.png") as image:
        image = image.convert("RGB")
    rgb = [tuple(int(c[i : i + 2], 16) for i in (1, 3, 5)) for c in curves.COLOURS[:2]]
    places = {c: [(x, y) for x in range(700) for y in range(400) if image.getpixel((x, y)) == c] for c in rgb}
    middle = ((60 + 680) / 2, (36 + 344) / 2)
    assert min(math.dist(p, middle) for p in places[rgb[0]]) < 2
    flat = {y for x, y in places[rgb[1]] if 100 < x < 500}
    assert flat and max(flat) - min(flat) <= 2 and max(flat) < 50  # near the top


def test_the_command_draws_several_folders_and_says_what_lacks(tmp_path, capsys):
    a, b = (write(tmp_path / name, [start("ft", 0), line("ft", 10, 2.0, 1), line("ft", 20, 1.0, 2),
                                    dict(run="ft", step=20, val_loss=1.2)]) for name in "ab")
    curves.main([str(a), str(b), "--x", "seconds"])
    assert str(a / "curves.png") in capsys.readouterr().out and (a / "curves.png").exists()
    curves.main([str(a), "--out", str(tmp_path / "steps.png")])
    assert (tmp_path / "steps.png").exists()
    assert "log.jsonl does not exist" in mistake(curves.main, tmp_path / "nowhere")
    assert "nothing to draw" in mistake(curves.main, write(tmp_path / "empty", [start("pt", 0)]))
