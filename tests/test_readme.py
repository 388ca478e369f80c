"""Every measured table of README and of the results is what a file under assets/results/ says; budgets hold."""

import ast
import io
import json
import re
import statistics
import tokenize
from pathlib import Path

import pytest

import bench
import continual
import model
import reproduce

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("README.md", "assets/results/README.md", "assets/results/papers.md", "assets/results/h100.md",
         "assets/results/steps.md")
PAGES = {name: (ROOT / name).read_text() for name in NAMES}
SCRIPTS = ("model.py", "train.py", "sample.py", "fid.py", "prepare_data.py")
DESCRIBING = ("| question |", "| file |", "| to change |", "| paper,", "| run on 8 H100")  # tested below
TABLE = re.compile(r"(?:<!-- (assets/results/\S+\.json)(?: (\w+))?(?: (\S.*))? -->\n)?((?:^\|.*\n)+)", re.MULTILINE)
MEASURED = [m.groups() for page in PAGES.values() for m in TABLE.finditer(page) if not m[4].startswith(DESCRIBING)]
MAKERS = {
    "table": lambda r, *only: reproduce.table(r["results"], *only),
    "records": lambda r: reproduce.records(r["results"]),
    "continual": lambda r, some: continual.table([x for x in r["results"] if re.fullmatch(some, x["method"])]),
    "speed": lambda r: bench.summary(r["results"]),
    "against": lambda r: bench.against_table(r["results"]),
}


def stored(name):
    return json.loads((ROOT / "assets/results" / name).read_text())


@pytest.mark.parametrize("file, kind, some, text", MEASURED)
def test_table_equals_its_results(file, kind, some, text):
    assert file, f"no file is named above the table that begins {text.splitlines()[0]}"
    made = MAKERS[kind or "table"](json.loads((ROOT / file).read_text()), *([some] if some else []))
    assert text.strip() == made.strip()


@pytest.mark.parametrize("file", sorted((ROOT / "assets/results").glob("*.json")))
def test_results_can_be_repeated(file):
    found = json.loads(file.read_text())
    assert re.match("python (tests/(tools/)?)?[a-z_]+.py", found["command"])
    for r in found["results"]:
        assert re.fullmatch(r"[0-9a-f]{7,}", r["commit"]) and r["machine"] and r["date"]
    assert any(file.name in page for page in PAGES.values())
    assert "/root" not in file.read_text() and "/tmp" not in file.read_text()


def test_what_is_expected_of_8_h100_is_what_the_plan_says(capsys):
    rows = [line.strip("| ").split(" | ") for line in PAGES["assets/results/h100.md"].splitlines()
            if line.startswith(("| Mask", "| ECT"))]
    assert len(rows) == 5
    for _, flags, rate, limit, hours in rows:
        bench.main(["plan", *flags.strip("`").split()])
        last = capsys.readouterr().out.splitlines()[-1]
        found, took = float(re.search(r"(\d+) images/s", last)[1]), float(re.search(r"in (\S+) h", last)[1])
        assert float(rate.replace("k", "e3")) == pytest.approx(found, rel=0.05) and float(hours) == pytest.approx(took, rel=0.04)
        assert ("launches" in last) == (limit == "launches")


def mean_of(results, key, **wanted):
    """The mean over the seeds of the validation loss, or of a score of the first samples."""
    values = [r["val_loss"] if key == "val_loss" else r["drawn"][0][key] for r in results if wanted.items() <= r.items()]
    return statistics.mean(values)


def per_cent_less(results, key, way, rival, minutes, **wanted):
    """How far the score of a way is below its rival's."""
    own, other = (mean_of(results, key, way=name, minutes=minutes, **wanted) for name in (way, rival))
    return 100 * (1 - own / other)


def test_figures_within_the_text_are_those_of_the_results():
    text = " ".join(PAGES["assets/results/README.md"].split())
    readme = " ".join(PAGES["README.md"].split())
    (demo,) = stored("demo.json")["results"]
    assert f"takes {demo['all_s'] / 60:.1f} minutes without" in text and f"commit {demo['commit']}" in text
    assert f"stage 1 takes {demo['pt_seconds']:.0f} s to a validation loss of {demo['pt_val_loss']:.4f}" in text
    assert f"stage 2 {demo['ft_seconds']:.0f} s to {demo['ft_val_loss']:.4f}" in text
    assert f"step 3400: validation loss {demo['ft_val_loss']:.4f}" in readme and "in six minutes" in readme
    assert 5.5 < demo["all_s"] / 60 < 6.5 and 4.5 < (demo["pt_seconds"] + demo["ft_seconds"]) / 60 < 5.5
    speedup = stored("speedup.json")
    floor = speedup["floor"]
    assert f"an FD of {floor['fd']:.2f} and {100 * floor['right']:.1f} % of the right class" in text
    rivals = "two stages", "from scratch"
    less = [per_cent_less(speedup["results"], "fd", *rivals, t) for t in (2, 4, 8)]
    short = [r for r in speedup["results"] if r["minutes"] <= 8]
    (cells,) = [line.split(" | ") for line in reproduce.records(short).splitlines() if line.startswith("| two stages")]
    by_seed = {(t, seed): per_cent_less(speedup["results"], "fd", *rivals, t, seed=seed) for t in (2, 4, 8) for seed in (0, 1, 2)}
    late = [-per_cent_less(speedup["results"], "fd", *rivals, 16, seed=seed) for seed in (0, 1, 2)]
    assert f"higher after 16, by {min(late):.0f} to {max(late):.0f} %" in text
    assert "{:.0f}, {:.0f} and {:.0f} % lower".format(*less) in text
    assert f"by {min(by_seed.values()):.0f} to {max(by_seed.values()):.0f} %" in text
    last = [x for (t, _), x in by_seed.items() if t == 8]
    assert f"the FD is {less[-1]:.0f} % lower ({min(last):.0f} to {max(last):.0f} % by seed)" in readme
    assert "after {}, {} and {} minutes".format(*cells[3].split(", ")) in text
    sooner = cells[4].split(", ")
    assert f"{min(sooner)} to {max(sooner)} times sooner, after" in text
    behind = -per_cent_less(speedup["results"], "val_loss", *rivals, 16)
    assert f"are {behind:.1f} % behind after 16" in text
    assert abs(per_cent_less(speedup["results"], "val_loss", *rivals, 8)) < 0.3  # "tie after 8"
    for way, t in (("growing crops", 4), ("growing crops", 8), ("coarse patches first", 4), ("two stages", 4), ("two stages", 8)):
        assert f"{mean_of(speedup['results'], 'fd', way=way, minutes=t, seed=0):.1f}" in text
    seen = [round(stage["images_per_s"] * stage["seconds"]) for way, t in
            (("from scratch, patches of 4", 0.5), ("from scratch", 2), ("from scratch, patches of 1", 16))
            for r in stored("patches.json")["results"] if (r["way"], r["minutes"], r["seed"]) == (way, t, 0) for stage in r["stages"]]
    levels = [[statistics.mean(bin) for bin in zip(*(r["loss_by_level"] for r in stored("levels.json")["results"]
                                                     if r["way"] == way))] for way in ("from scratch", "two stages")]
    assert f"differ by at most {100 * max(abs(b / a - 1) for a, b in zip(*levels)):.1f} %, `levels.json`)" in text
    assert "sees {:,}, {:,} and {:,} images".format(*seen) in text
    def less_by_patches(key, share):
        """Per cent below training from scratch, in a share of its time."""
        found = []
        for of, minutes in ((", patches of 4", 0.5), ("", 2), (", patches of 1", 16)):
            slow, fast = (mean_of(stored("patches.json")["results"], key, way=f"{way}{of}", minutes=t)
                          for way, t in (("from scratch", minutes), ("two stages", minutes * share)))
            found.append(100 * (1 - fast / slow))
        return found

    loss, distance = less_by_patches("val_loss", 1), less_by_patches("fd", 1)
    assert abs(loss[0]) < 0.3  # "equals"
    assert f"is {loss[1]:.1f} and {loss[2]:.1f} % lower with 196 and 784" in text
    assert f"FD is {-distance[0]:.0f} % higher, {distance[1]:.0f} and {distance[2]:.0f} % lower" in text
    assert "the loss is {:.0f}, {:.0f} and {:.0f} % higher".format(*(-x for x in less_by_patches("val_loss", 1 / 2))) in text
    assert "the FD {:.0f}, {:.0f} and {:.0f} % ([".format(*(-x for x in less_by_patches("fd", 1 / 2))) in text


def test_a_short_first_stage_is_ahead_after_16_minutes():
    text, readme = (" ".join(PAGES[name].split()) for name in ("assets/results/README.md", "README.md"))
    results = stored("speedup.json")["results"]
    less = {key: [per_cent_less(results, key, "short stage 1", "from scratch", 16, seed=seed) for seed in (0, 1, 2)]
            for key in ("fd", "val_loss")}
    low, high = min(less["fd"]), max(less["fd"])
    assert low > 0 and f"its FD is {low:.0f} to {high:.0f} % lower" in text
    assert "its loss {:.1f} to {:.1f} %".format(min(less["val_loss"]), max(less["val_loss"])) in text
    mean = per_cent_less(results, "fd", "short stage 1", "from scratch", 16)
    assert f"an FD {mean:.0f} % lower ({low:.0f} to {high:.0f} %)" in readme
    tried = {r["way"]: (r["val_loss"], r["drawn"][0]["fd"]) for r in stored("tune.json")["results"] if r["minutes"] == 16}
    best = [min(tried, key=lambda way: tried[way][i]) for i in (0, 1)]
    assert len(tried) == 3 and best == ["longer, crop 0.75, share 0.125"] * 2
    assert reproduce.WAYS["short stage 1"] == reproduce.WAYS[best[0]]


def test_what_is_said_of_784_patches_is_in_its_file():
    text, readme = (" ".join(PAGES[name].split()) for name in ("assets/results/README.md", "README.md"))
    results, keys = stored("patches.json")["results"], ("val_loss", "fd")
    ways = [f"{name}, patches of 1" for name in ("two stages", "from scratch")]
    less = [per_cent_less(results, key, *ways, minutes, seed=seed)
            for minutes in (8, 16) for key in keys for seed in (0, 1, 2)]
    assert "lead after 8 and 16 minutes by both measures with all three seeds" in text and min(less) > 0
    goals = [mean_of(results, key, way=ways[1], minutes=16) for key in keys]
    times = [[reproduce.reached(reproduce.by_time(results, ways[0], seed, key), goal) for seed in (0, 1, 2)]
             for key, goal in zip(keys, goals)]
    loss, distance = ([f"{16 / t:.1f}" for t in sorted(own, reverse=True)] for own in times)
    minutes = [f"{t:.1f}" for own in times for t in own]
    assert "after {}, {} and {} minutes, {} to {} times sooner".format(*minutes[:3], loss[0], loss[-1]) in text
    assert "its FD after {}, {} and {}, {} to {} times".format(*minutes[3:], distance[0], distance[-1]) in text
    assert f"{distance[0]} to {loss[-1]} times sooner with 784 patches" in text
    assert f"{loss[0]} to {loss[-1]} times sooner by validation loss" in readme
    assert f"{distance[0]} to {distance[-1]} times by classifier FD" in readme and "(three seeds)" in readme
    found = {(r["way"], r["seed"], r["classifier"]): r["fd"] for r in stored("classifiers.json")["results"]}
    assert all(found[ways[0], *about] < found[ways[1], *about] for about in [(s, c) for s in (0, 1, 2) for c in (1, 2)])


def test_with_784_patches_the_rival_has_its_best_settings_and_two_stages_do_not():
    tried = {r["way"]: (r["val_loss"], r["drawn"][0]["fd"]) for r in stored("tune-patches.json")["results"]}
    for name, best in (("two stages", ", batch 4, rate 2e-3"), ("from scratch", "")):
        own = {way: scores for way, scores in tried.items() if way.startswith(name)}
        assert len(own) == 4 and [min(own, key=lambda way: own[way][i]) for i in (0, 1)] == [f"{name}, patches of 1{best}"] * 2
    assert "rival's rate won its four trials, two stages prefer 2e-3" in " ".join(PAGES["assets/results/README.md"].split())


def test_what_is_said_of_the_faces_is_in_its_file():
    text, readme = (" ".join(PAGES[name].split()) for name in ("assets/results/README.md", "README.md"))
    results = stored("faces.json")["results"]
    ways = ["two stages", "scratch, batch 8, rate 8e-3"]
    ours, others = ([f"{mean_of(results, 'val_loss', way=way, minutes=t):.4f}" for t in (1, 2, 4, 8)] for way in ways)
    assert "loss of {}, {}, {} and {} after 1, 2, 4 and 8 minutes".format(*others) in text
    assert "two stages {}, {}, {} and {}:".format(*ours) in text
    less = [per_cent_less(results, "val_loss", *ways, t) for t in (1, 2, 4, 8)]
    assert f": {min(less):.0f} to {max(less):.0f} % lower" in text
    (cells,) = [line.split(" | ") for line in reproduce.records(results).splitlines() if line.startswith("| two stages")]
    after, sooner = (cell.split(", ") for cell in cells[1:3])
    assert f"after {' and '.join(after)} minutes, {' and '.join(dict.fromkeys(sooner))} times sooner" in text
    assert f"in 256 patches their loss is {less[-1]:.0f} % lower after 8 minutes" in readme
    tried = {r["way"]: r["val_loss"] for r in stored("tune-faces.json")["results"]}
    scratch = {way: loss for way, loss in tried.items() if way.startswith("scratch")}
    assert len(scratch) == 7 and min(scratch, key=scratch.get) == ways[1]


def test_other_classifiers_agree_that_two_stages_are_nearer():
    assert "agree in all 15 comparisons (`classifiers.json`)" in " ".join(PAGES["assets/results/README.md"].split())
    found = {(r["way"], r["minutes"], r["seed"], r["classifier"]): r["fd"] for r in stored("classifiers.json")["results"]}
    scratch = {about[1:]: fd for about, fd in found.items() if about[0] == "from scratch"}
    assert len(scratch) == 2 * 12
    assert all((found["two stages", *about] < fd) == (about[0] < 16) for about, fd in scratch.items())
    short = {about[1:]: fd for about, fd in found.items() if about[0] == "short stage 1"}
    assert len(short) == 2 * 3 and all(fd < scratch[about] for about, fd in short.items())


def test_what_is_said_of_the_share_of_patches_is_in_its_file():
    text = " ".join(PAGES["assets/results/README.md"].split())
    tuned = {r["way"]: (r["val_loss"], r["drawn"][0]["fd"], -r["drawn"][0]["right"]) for r in stored("tune.json")["results"]}
    better = [[tuned[f"stage 1 crop, share {share}, rate 2e-3"][i] < tuned[f"stage 1 block, share {share}, rate 2e-3"][i]
               for share in ("0.50", "0.67", "0.80")] for i in (0, 1, 2)]
    assert "beats blocks at all three shares by FD and loss, at one by right class" in text
    assert [sum(own) for own in better] == [3, 3, 1]
    results = stored("masks.json")["results"]
    ways = [f"two stages{which}" for which in (", crop 0.75", "", ", crop 0.95", ", block 0.9")]
    losses, distances = ([statistics.mean(mean_of(results, key, way=way, minutes=8, seed=seed) for seed in (0, 1))
                          for way in ways] for key in ("val_loss", "fd"))
    assert "a loss of {:.4f}, {:.4f} and {:.4f}".format(*losses) in text
    assert "an FD of {:.1f}, {:.1f} and {:.1f};".format(*distances) in text
    assert f"blocks of 1/10 have {losses[3]:.4f} and {distances[3]:.1f}" in text
    ahead = [per_cent_less(results, key, *ways[:2], minutes, seed=seed)
             for minutes in (4, 8) for key in ("val_loss", "fd") for seed in (0, 1)]
    assert "1/4 leads with both seeds, also after 4 (`masks.json`)" in text and min(ahead) > 0


def test_what_is_said_of_the_decoder_and_routing_is_in_its_file():
    text = " ".join(PAGES["assets/results/README.md"].split())
    results = stored("decoder.json")["results"]
    early = [f"{mean_of(results, 'fd', way=way, minutes=4):.1f}" for way in
             ("from scratch", "plain masking 0.5", "routed 0.5", "decoder 0.5")]
    assert "the FD from scratch is {}, of plain masking {}, of routing {} and of the decoder {}".format(*early) in text
    less = [per_cent_less(results, "fd", "decoder 0.5", "from scratch", 16, seed=seed) for seed in (0, 1)]
    assert "FD is {:.0f} and {:.0f} % lower with the two seeds than".format(*less) in text
    more = -per_cent_less(results, "val_loss", "decoder 0.5", "from scratch", 16)
    assert f"its loss {more:.1f} % higher" in text
    for way, words in (("decoder, whole images", "a loss of {:.4f} and an FD of {:.2f}, with"),
                       ("decoder 0.5", "stage {:.4f} and {:.2f} (seed 0")):
        assert words.format(*(mean_of(results, key, way=way, minutes=16, seed=0) for key in ("val_loss", "fd"))) in text
    configs = [bench.parse(["--preset=demo", *flags], image_size=28, channels=3, num_classes=10)[1]
               for flags in ([reproduce.FINE], reproduce.DECODER)]
    plain, larger = (sum(p.numel() for p in model.Denoiser(config).parameters()) for config in configs)
    assert f"network has {100 * (larger / plain - 1):.0f} % more weights" in text
    other = {(r["way"], r["seed"], r["classifier"]): r["fd"] for r in stored("classifiers.json")["results"] if r["minutes"] == 16}
    assert all(other["decoder 0.5", *about] < other["from scratch", *about] for about in [(0, 1), (0, 2), (1, 1), (1, 2)])


def test_what_is_said_of_few_steps_is_in_its_file():
    text = " ".join(PAGES["assets/results/README.md"].split())
    results = stored("consistency.json")["results"]

    def found(way, i=0, minutes=16):
        """The mean FD of the samples drawn in the i-th way from models tuned for so long."""
        own = [r for r in results if (r["way"], r["minutes"]) == (way, minutes)]
        assert len(own) == 2 or minutes == 16 and way in ("SCT, guided", "SCT, half the time")  # seed 0 alone
        return f"{statistics.mean(r['drawn'][i]['fd'] for r in own):.1f}"

    one, two = ([found(way, i) for way in ("ECT", "SCT")] for i in (0, 1))
    assert f"(FD {two[0]} and {two[1]} against {found('two stages, drawn in 35')}), in one step" in text
    assert f"in one step to {one[0]} and {one[1]}." in text
    assert f"has {found('trained on')} in 35 evaluations" in text
    assert f"has {found('SCT, guided', 0)} and {found('SCT, guided', 1)}" in text
    one, two = ([found(way, i, 4) for way in ("ECT", "SCT", "ECT, no dropout", "SCT, no dropout")] for i in (0, 1))
    assert f"ECT has {one[0]} and {two[0]}, SCT {one[1]} and {two[1]}; without dropout" in text
    assert f"without dropout {one[2]} and {two[2]}, {one[3]} and {two[3]}" in text
    assert f"({found('two stages, drawn in 35', minutes=4)} in 35, {found('trained on', minutes=4)} trained on)" in text


def test_what_is_said_of_forgetting_is_in_its_file():
    text = " ".join(PAGES["assets/results/README.md"].split())
    results = stored("continual.json")["results"]
    assert {r["seed"] for r in results} == {0, 1} and len(results) == 2 * len({r["method"] for r in results})

    def mean(method, key="fd", results=results):
        """The mean over the seeds and the tasks, after the last one."""
        return statistics.mean(d[key] for r in results if r["method"] == method for d in r["scores"][-1])

    assert f"(mean FD {mean('fine-tuning'):.0f}, joint training {mean('joint'):.0f})" in text
    for coef in (1, 0.3, 0.1):
        assert "({:.0f}, {:.0f} and {:.0f})".format(*(mean(f"replay-{coef}-{size}") for size in (8, 64, 512))) in text
    finetuned, *replayed = (mean(method, results=stored("continual-backwards.json")["results"])
                            for method in ("fine-tuning", "replay-1-8", "replay-0.1-8"))
    assert f"In the opposite order fine-tuning has {finetuned:.0f}" in text
    assert "of 8 images {:.1f} at 1 and {:.1f} at 0.1".format(*replayed) in text
    assert f"(L2 {mean('l2-0.01'):.0f}, EWC {mean('ewc-1e3'):.0f})" in text
    assert f"({mean('generative-1'):.0f} without, {mean('generative-1+taught'):.0f} with)" in text
    assert f"fine-tuning ({mean('fine-tuning', 'bits_per_dim'):.2f})" in text
    assert f"8 images ({mean('replay-1-8', 'bits_per_dim'):.2f})" in text
    for size, words in ((8, "{:.2f} bits, other images of the task {:.2f}"), (64, "64 images {:.2f} and {:.2f}")):
        own = [r for r in results if r["method"] == f"replay-1-{size}"]
        seen = statistics.mean(r["seen"]["bits_per_dim"] for r in own)
        assert words.format(seen, statistics.mean(r["scores"][-1][0]["bits_per_dim"] for r in own)) in text


def test_floors_are_those_of_the_images_that_are_drawn():
    text = " ".join(PAGES["assets/results/README.md"].split())
    assert f"images of the two classes (floor {stored('transfer.json')['floor']['fd']:.2f})" in text
    floors = [{round(task["fd"], 6) for task in stored(f"continual{order}.json")["floor"]} for order in ("", "-backwards")]
    assert floors[0] == floors[1] and len(floors[0]) == 5
    assert f"200 samples a task (floors {min(floors[0]):.1f} to {max(floors[0]):.1f})" in text


def test_links_and_files_of_the_pages_exist():
    for name, page in PAGES.items():
        for target in re.findall(r"\]\(([^)#:]+)\)|src=\"([^\"]+)\"", page):
            assert (ROOT / name).parent.joinpath("".join(target)).exists(), target
        headings = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.+)", page, re.MULTILINE)}
        assert set(re.findall(r"\]\(#([^)]+)\)", page)) <= headings
    for path in re.findall(r"tests/tools/\w+\.py", "".join(PAGES.values())):
        assert (ROOT / path).exists()


def docstring_lines(tree):
    """Line numbers of all docstrings."""
    lines = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            lines |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def density(text):
    """(tokens of code, lines of code, conditional expressions) of a script, without comments and docstrings."""
    tree = ast.parse(text)
    described = docstring_lines(tree)
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(text).readline)
              if t.type not in layout and t.start[0] not in described]
    lines = {number for t in tokens for number in range(t.start[0], t.end[0] + 1)}
    return len(tokens), len(lines), sum(isinstance(node, ast.IfExp) for node in ast.walk(tree))


def test_the_budget_counts_tokens_of_code():
    text = '"""About."""\n\nx = 1  # one\n\n\ndef f(a):\n    """What f does."""\n    return a if a else (\n        x)\n'
    assert density(text) == (3 + 6 + 8, 4, 1)  # x = 1; def f ( a ) :; return a if a else ( x )


def test_the_scripts_keep_to_their_budgets():
    texts = {name: (ROOT / name).read_text() for name in SCRIPTS}
    measured = {name: density(text) for name, text in texts.items()}
    assert sum(tokens for tokens, _, _ in measured.values()) <= 25_000
    for name, (tokens, lines, conditional) in measured.items():
        assert tokens <= 11 * lines, f"{name}: {tokens} tokens in {lines} lines of code"
        assert conditional <= 0.03 * lines, f"{name}: {conditional} conditional expressions in {lines} lines of code"
    counts = {name: len(text.splitlines()) for name, text in texts.items()}
    assert max(counts.values()) <= 700 and sum(counts.values()) <= 2900
    assert all(len(line) <= 100 for text in texts.values() for line in text.splitlines())
    assert all(len(PAGES[name].splitlines()) <= 200 for name in ("README.md", "assets/results/README.md"))
    tools = (ROOT / "tests/tools").glob("*.py")
    assert sum(len(tool.read_text().splitlines()) for tool in tools) <= 2000


def test_prose_fits_into_120_columns():
    for name in ("README.md", "assets/results/README.md"):
        prose = re.sub(r"(?ms)^```.*?^```$", "", PAGES[name])
        for line in prose.splitlines():
            assert len(line) <= 120 or line.startswith(("|", "!", "<")), f"{name}: {line}"


def test_training_is_a_short_story():
    text = (ROOT / "train.py").read_text()
    functions = {node.name: node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
    (loop,) = [node for node in ast.walk(functions["train"]) if isinstance(node, ast.While)]
    lengths = [node.end_lineno - node.lineno + 1 for node in (functions["main"], functions["train"], loop)]
    assert lengths[0] <= 120 and lengths[1] <= 120 and lengths[2] <= 60
