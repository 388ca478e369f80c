"""Malformed input: no script hangs, runs code out of a file, leaves half an output or accepts nonsense.

python tests/tools/malformed.py [--cases 200] [--seed 0]     # --cases 0: all, some 950

A case is a tree of files, made from sound ones, and a call of a script that reads it. It may be accepted, or refused
by a sentence or an error of Python, numpy or torch. These are faults:
  hang        it took longer than LIMIT seconds
  crash       the script ended with an exit code and no sentence
  payload     code out of a file ran: it makes a folder called exploded
  left-over   a refusal changed the folder, or a success spoilt its input, left temporary files or half an output
  misjudged   nonsense was accepted, or something sound was refused
"""

import argparse
import io
import json
import pickle
import signal
import sys
import tarfile
import tempfile
from collections import Counter
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from threading import RLock

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import TINY, make_dataset
from test_prepare_data import Bomb, tree as written, zipped

import fid
import prepare_data
import sample
import train
from model import load_checkpoint

LIMIT = 20
FAULTS = ("hang", "crash", "payload", "left-over", "misjudged")
FORMS = ("png", "jpeg", "gif", "webp", "bmp", "tiff")

# ---- Routes into the scripts. IN is what is under test, SOUND a folder of what is not.
TRAIN = [*TINY, "--batch_size=4", "--steps=2"]
GO_ON = ["--data=SOUND/set", *TRAIN[4:]]  # the architecture is that of the checkpoint
FID = ["SOUND/set", "--batch_size=4", "--stats=IN.out.npz", "--features=SOUND/mean.ts"]
ROUTES = {  # name: (main, command line, what it writes)
    "prepare_data.py": (prepare_data.main, ["IN", "--out=IN.out", "--size=8"], "IN.out"),
    "prepare_data.py --labels": (prepare_data.main, ["SOUND/set/val.npy", "--labels=IN", "--out=IN.out"], "IN.out"),
    "train.py --data": (train.main, ["--data=IN", "--class_cond", "--out_dir=IN.out", *TRAIN], "IN.out/ft.pt"),
    "train.py --init_from": (train.main, ["--init_from=IN/ft.pt", "--out_dir=IN.out", *GO_ON], "IN.out/ft.pt"),
    "train.py --resume": (train.main, ["--resume", "--out_dir=IN", *GO_ON], "IN/ft.pt"),
    "sample.py": (sample.main, ["--ckpt=IN/ft.pt", "--out=IN.out.png", "--num=2", "--steps=2"], "IN.out.png"),
    "fid.py": (fid.main, ["IN", *FID], "IN.out.npz"),
    "fid.py CHECKPOINT": (fid.main, ["IN/ft.pt", *FID, "--num=4", "--steps=1"], "IN.out.npz"),
    "fid.py --features": (fid.main, ["SOUND/set", *FID, "--features=IN"], "IN.out.npz"),
}
PREPARE, LABELS, DATA, INIT, RESUME, SAMPLE, MEASURE, DRAW, FEATURES = ROUTES
BOTH = (PREPARE, MEASURE)  # they read images
READERS = (INIT, RESUME, SAMPLE, DRAW)  # they read checkpoints

def check_output(path):
    """Raise something unless the output is there and complete."""
    reader = {"pt": load_checkpoint, "png": Image.open, "npz": np.load, "out": prepare_data.open_folder}
    reader[path.split(".")[-1]](path)

# ---- Files as bytes, sound and damaged.
def npy(values):
    file = io.BytesIO()
    np.save(file, np.asarray(values), allow_pickle=True)
    return file.getvalue()

def saved(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    return file.getvalue()

def zip_of(files):
    return zipped(io.BytesIO(), files).getvalue()

def tar_of(files):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()

def patched(data, at, value):
    return data[:at] + value + data[at + len(value):]

def damages(data, rng):
    """{how: damaged data}"""
    wrong = patched(data, rng.integers(len(data)), rng.bytes(1))
    return {"truncated": data[: rng.integers(1, len(data))], "wrong byte": wrong, "noise": rng.bytes(len(data)),
            "half zero": data[: len(data) // 2].ljust(len(data), b"\0"), "empty": b""}

def edits(table, values):
    """{variant: table} with one key missing, or one value another."""
    odd = {f"no {key}": {k: v for k, v in table.items() if k != key} for key in table}
    for key in table:
        odd |= {f"{key} = {value}"[:60]: {**table, key: value} for value in values}
    return odd

def sound_files(folder):
    """Fill the folder SOUND -> {path: bytes} of all files in it."""
    make_dataset(folder / "set", n=8, classes=3)
    image = Image.fromarray(np.load(folder / "set/val.npy")[0])
    for form in FORMS:
        image.save(f"{folder}/a.{form}")
    torch.jit.trace(lambda x: x.float().mean((2, 3)), torch.zeros(1, 3, 8, 8)).save(f"{folder}/mean.ts")
    with redirect_stderr(io.StringIO()):
        train.main([f"--data={folder}/set", f"--out_dir={folder}", "--class_cond", *TRAIN])
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

# ---- Families of cases: generators of (routes, what must happen, {variant: tree}).
SHAPE = (8, 16, 16, 3)
NO_IMAGES = {
    "objects": npy([Bomb()]), "numbers": npy(np.zeros(8)), "text": npy(np.full(SHAPE, "x")),
    "NaN": npy(np.full(SHAPE, np.nan)), "none": npy(np.ones((0, 16, 16, 3))), "times": npy(np.ones(SHAPE, "M8[s]")),
}
NO_LABELS = {"objects": npy([Bomb()] * 8), "few": npy([0] * 7), "negative": npy([-2] * 8), "text": npy(["x"] * 8)}

def at(path, table, beside=None):
    return {variant: {**(beside or {}), path: data} for variant, data in table.items()}

def five(sound, folder=""):
    return {f"{folder}{i}.png": sound["a.png"] for i in range(5)}

def images(sound, rng):
    for form in FORMS:
        damaged = damages(sound[f"a.{form}"], rng)
        yield [PREPARE], "accept", at(f"in/x.{form}", damaged, five(sound, "in/"))
        yield BOTH, "any", at(f"in/x.{form}", damaged)
    yield BOTH, "refuse", {"65,535 x 65,535 pixels": {"in/x.gif": patched(sound["a.gif"], 6, b"\xff" * 4)}}
    for value in (3, "x", {"x": 0}, [["0.png", 0, 0]], [["x.png", 0]], [[f"{i}.png", 0.5] for i in range(5)]):
        labels = json.dumps({"labels": value}).encode()
        yield [PREPARE], "accept", {f"labels {value}": {**five(sound, "in/"), "in/dataset.json": labels}}

def archives(sound, rng):
    files = five(sound)
    yield BOTH, "any", at("in.zip", damages(zip_of(files), rng))
    yield BOTH, "any", at("in.tar", damages(tar_of(files), rng))
    for name in ("../evil.png", "/tmp/evil.png", "C:\\evil.png", "./0.png", "\n.png", "a" * 60_000 + ".png"):
        yield BOTH, "any", {f"zip with {name[:20]}": {"in.zip": zip_of({**files, name: b"x"})}}
        yield BOTH, "any", {f"tar with {name[:20]}": {"in.tar": tar_of({**files, name: b"x"})}}
    yield BOTH, "refuse", at("in.zip", {"no images": zip_of({}), "nested": zip_of({"a.zip": zip_of(files)})})
    for odd in (Bomb(), [], {"data": np.zeros((2, 5)), "labels": [0, 1]}):
        yield [PREPARE], "any", {f"CIFAR {odd}": {"in.tar": tar_of({"c/data_batch_1": pickle.dumps(odd)})}}

def arrays(sound, rng):
    yield [PREPARE], "any", at("in.npy", damages(sound["set/val.npy"], rng))
    yield BOTH, "any", at("in.npz", damages(zip_of({"arr_0.npy": sound["set/val.npy"]}), rng))
    yield [PREPARE], "refuse", at("in.npy", NO_IMAGES)
    yield [LABELS], "refuse", at("in.npy", NO_LABELS)
    odd = (np.full((3, 3), np.nan), np.ones((3, 5)), ["x"] * 3, [Bomb()])
    for variant, table in edits({"mu": np.zeros(3), "sigma": np.eye(3)}, odd).items():
        statistics = zip_of({f"{name}.npy": npy(value) for name, value in table.items()})
        yield [MEASURE], "refuse", {variant: {"in.npz": statistics}}

def data_sets(sound, rng):
    files = {path: data for path, data in sound.items() if path.startswith("set/")}
    for variant, meta in edits(json.loads(files["set/meta.json"]), (None, "x", -16, 10**9, ["a"])).items():
        yield [DATA, MEASURE], "any", {variant: {**files, "set/meta.json": json.dumps(meta).encode()}}
    for path, data in files.items():
        yield [DATA, MEASURE], "any", at(path, damages(data, rng), files)
    yield [DATA], "refuse", at("set/train.npy", NO_IMAGES, files)
    yield [DATA], "refuse", at("set/train_labels.npy", NO_LABELS, files)

def checkpoints(sound, rng):
    right = torch.load(io.BytesIO(sound["ft.pt"]), weights_only=True)
    tables = edits(right, (None, "x", -1, [], {}, Bomb()))
    for variant, table in edits(right["architecture"], ("x", -1, 1.5)).items():
        tables[variant] = {**right, "architecture": table}
    for odd in ("x", torch.ones(3, 3), torch.full([32], np.nan)):
        tables[f"bias = {odd}"] = {**right, "ema": {**right["ema"], "net.patch_embed.bias": odd}}
    wrong = {"bomb": saved(Bomb()), "pickle": pickle.dumps(Bomb()), "list": saved([1]), "network": sound["mean.ts"]}
    yield READERS, "any", at("in/ft.pt", damages(sound["ft.pt"], rng))
    yield READERS, "any", at("in/ft.pt", {variant: saved(table) for variant, table in tables.items()})
    yield READERS, "refuse", at("in/ft.pt", wrong)
    yield [FEATURES], "refuse", at("in.ts", {"bomb": saved(Bomb()), "weights": saved(right["ema"])})

def paths(sound, rng):
    for name in ("a b", "line\nbreak", "ünï 中", "'\"$(x)`;&", "%s{0}", "a" * 120, "...", "#?*"):
        yield BOTH, "accept", {name: five(sound, f"{name}/x{name}")}
        yield READERS, "accept", {name: {f"{name}/ft.pt": sound["ft.pt"]}}
        yield [route for route in ROUTES if route != RESUME], "refuse", {name: {f"{name}-other": b""}}

# ---- One case, and many.
def call(function, argument):
    """How function(argument) ended, and what was said."""
    tqdm.set_lock(RLock())  # an error in a progress bar may have left the old one locked
    signal.signal(signal.SIGALRM, signal.default_int_handler)  # raises KeyboardInterrupt
    signal.alarm(LIMIT)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            function(argument)
        return "accepted", ""
    except KeyboardInterrupt:
        return "hang", ""
    except SystemExit as end:
        return "refused" if end.code == 3 else "crash", f"exit code {end.code}"  # 3: training is not finite
    except Exception as error:
        return "refused", repr(error)
    finally:
        signal.alarm(0)

def contents(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}

def judge(route, verdict, tree, sound, folder):
    """Run a case in a new folder -> how it ended, or its fault, and what was said."""
    main, argv, output = ROUTES[route]
    tested = next(iter(tree)).split("/")[0]
    argv = [arg.replace("IN", tested).replace("SOUND", str(sound)) for arg in argv]
    output = folder / output.replace("IN", tested)
    before = contents(written(folder, tree))
    with chdir(folder):
        outcome, said = call(main, argv)
    after = contents(folder)
    changed = {path for path in {**before, **after} if before.get(path) != after.get(path)}
    if "train.py" in route:
        changed -= {output.parent, output.parent / "log.jsonl"}  # of a run that had begun
    if outcome == "accepted":
        changed = {path for path in changed if path in before or ".tmp" in str(path)} - {output}
    if folder / "exploded" in after:
        return "payload", said
    if changed and outcome not in FAULTS:
        return "left-over", f"{said} {changed}"
    if outcome == "accepted" and call(check_output, str(output))[0] != "accepted":
        return "left-over", "half an output"
    if (outcome, verdict) in (("accepted", "refuse"), ("refused", "accept")):
        return "misjudged", said
    return outcome, said

def campaign(folder, seed=0, count=200):
    """Judge `count` cases, 0 = all -> Counter of (route, outcome), and a line for each fault."""
    sound = sound_files(folder / "sound")
    rng = np.random.default_rng(seed)
    cases = []
    for family in (images, archives, arrays, data_sets, checkpoints, paths):
        for routes, verdict, trees in family(sound, rng):
            cases += [(route, verdict, variant, tree) for route in routes for variant, tree in trees.items()]
    counts, faults = Counter(), []
    for number in rng.permutation(len(cases))[: count or None]:
        route, verdict, variant, tree = cases[number]
        outcome, said = judge(route, verdict, tree, folder / "sound", folder / str(number))
        counts[route, outcome] += 1
        if outcome in FAULTS:
            faults.append(f"{route}, {variant!r}: {outcome}: {said[:1000]}")
    return counts, faults

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counts, faults = campaign(Path(folder).resolve(), args.seed, args.cases)
    for (route, outcome), count in sorted(counts.items()):
        print(f"{count:5} {route}: {outcome}")
    sys.exit("\n".join(faults) or 0)

if __name__ == "__main__":
    main()
