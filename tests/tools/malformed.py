"""Malformed input campaign: nothing hangs, is left half done, runs code or is wrong without a word.

python tests/tools/malformed.py [--cases 200] [--seed 0] [--only NUMBER]   # 0: all cases, some 1,000

A case is a tree of files, made from sound ones, and a command line that reads it. `main` is called
in this process; for one case of each route the script is run as a user runs it. A case may end in
  accepted    with success and all of the output
  sentence    with one sentence and exit code 1
  error       loudly and at once in an error of Python, numpy or torch, which names what is wrong
and these are faults:
  hang        it took longer than LIMIT seconds
  crash       the process died without a word of Python
  left-over   a refusal or an error changed the folder (but that a run of train.py which had begun
              has a log.jsonl), or a success lost or changed what it read, or left temporary files
              or half an output
  payload     code out of a file ran: it makes a folder called canary
  misjudged   it accepted nonsense, or refused what is sound but for a file that can be left out
"""

import argparse
import gzip
import io
import json
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from struct import pack

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import ROOT, TINY, make_dataset

import fid
import prepare_data
import sample
import train
from model import load_checkpoint
from prepare_data import Images

LIMIT, HUGE, DROP = 20, 100_000, object()
NOT_FINITE = 3  # the exit code of training that did not stay finite
FAULTS = ["hang", "crash", "left-over", "payload", "misjudged"]

# Routes into the scripts. IN is what is under test, SOUND a folder of what is not.
TRAIN = [*TINY, "--batch_size=4", "--steps=2"]
GO_ON = TRAIN[4:]  # the architecture is that of the checkpoint
FID = ["SOUND/set", "--batch_size=4", "--stats=IN.out.npz"]
ROUTES = {  # name: (main, command line, what it writes)
    "prepare_data.py": (prepare_data.main, ["IN", "--out=IN.out", "--size=8"], "IN.out"),
    "prepare_data.py --labels": (
        prepare_data.main, ["SOUND/latents.npy", "--labels=IN", "--out=IN.out"], "IN.out"),
    "train.py --data": (
        train.main, ["--data=IN", "--class_cond", "--out_dir=IN.out", *TRAIN], "IN.out/ft.pt"),
    "train.py --init_from": (train.main, ["--data=SOUND/set", "--init_from=IN/ft.pt",
                                          "--out_dir=IN.out", *GO_ON], "IN.out/ft.pt"),
    "train.py --resume": (
        train.main, ["--data=SOUND/set", "--out_dir=IN", *GO_ON, "--resume"], "IN/ft.pt"),
    "sample.py": (
        sample.main, ["--ckpt=IN/ft.pt", "--out=IN.out.png", "--num=2", "--steps=2"], "IN.out.png"),
    "fid.py": (fid.main, ["IN", *FID, "--features=SOUND/net.ts"], "IN.out.npz"),
    "fid.py CHECKPOINT": (
        fid.main, ["IN/ft.pt", *FID, "--features=SOUND/net.ts", "--num=4", "--steps=1"], "IN.out.npz"),
    "fid.py --features": (fid.main, ["SOUND/set", *FID, "--features=IN"], "IN.out.npz"),
}
PREPARE, LABELS, DATA, INIT, RESUME, SAMPLE, MEASURE, DRAW, FEATURES = ROUTES


def check_output(path):
    """Raises something unless the output is there and complete."""
    if path.endswith(".pt"):
        load_checkpoint(path)
    elif path.endswith(".png"):
        Image.open(path).load()
    elif path.endswith(".npz"):
        stored = np.load(path)
        assert stored["sigma"].shape == 2 * stored["mu"].shape and stored["n"] != 1  # 0: not known
        assert np.isfinite(stored["sigma"]).all()
    else:
        sets = [Images(path, split) for split in ("train", "val")]
        named = ["train_labels.npy", "val_labels.npy"] * bool(sets[0].meta["class_names"])
        assert set(os.listdir(path)) == {"train.npy", "val.npy", "meta.json", *named}
        assert all(len(x) and (x.labels >= 0).all() >= bool(named) for x in sets)


# ---------------------------------------------------------------------------------------------
# Files as bytes, sound and damaged.


class Bomb:
    def __reduce__(self):  # what unpickling calls
        return os.mkdir, ("canary",)


class Features(torch.nn.Module):
    """A feature network for fid.py: the mean colours of the quarters of an image."""

    def forward(self, x: torch.Tensor):
        return torch.nn.functional.adaptive_avg_pool2d(x.float(), 2).flatten(1)


def written(write, *args, **options):
    """The bytes that write(file, ...) writes."""
    file = io.BytesIO()
    write(file, *args, **options)
    return file.getvalue()


def npy(array):
    return written(np.save, array, allow_pickle=True)


def npy_header(text, version=1):
    return b"\x93NUMPY" + bytes([version, 0]) + pack("<H", len(text)) + text.encode() + bytes(64)


def npz(**arrays):
    return zipped({f"{k}.npy": v if isinstance(v, bytes) else npy(v) for k, v in arrays.items()})


def saved(thing, **options):
    return written(lambda file: torch.save(thing, file, **options))


def zipped(files, link=None):
    def write(file):
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in files.items():
                info = zipfile.ZipInfo(name)
                info.external_attr = 0o120777 << 16 if name == link else 0
                archive.writestr(info, data, zipfile.ZIP_DEFLATED)
    return written(write)


def tarred(files, **odd):
    """`odd`: attributes of one more entry."""
    def write(file):
        with tarfile.open(fileobj=file, mode="w") as archive:
            for name, data in [*files.items(), *[("odd.png", b"")] * bool(odd)]:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                for key, value in odd.items() if name == "odd.png" else ():
                    setattr(info, key, value)
                archive.addfile(info, io.BytesIO(data) if data else None)
    return written(write)


def cifar(**changes):
    batch = {"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1]}
    files = {"data_batch_1": batch, "test_batch": batch, "batches.meta": {"label_names": [*"ab"]}}
    files = {k: v for k, v in (files | changes).items() if v is not DROP}
    return tarred({f"cifar/{k}": pickle.dumps(v) for k, v in files.items()})


def patched(data, marker, at, value):
    """`value` written `at` bytes behind the first `marker`."""
    at += data.index(marker)
    return data[:at] + value + data[at + len(value):]


def oversized(form, data):
    """A picture whose header claims HUGE x HUGE pixels, or as many as the format can."""
    both = pack(">II", HUGE, HUGE) if form == "png" else pack("<II", HUGE, HUGE)
    ihdr = both + data[24:29]
    marker, at, value = {
        "png": (b"IHDR", 4, ihdr + pack(">I", zlib.crc32(b"IHDR" + ihdr))),
        "jpeg": (b"\xff\xc0", 5, b"\xff" * 4), "gif": (b"GIF8", 6, b"\xff" * 4),
        "webp": (b"VP8 ", 14, b"\xff\x3f" * 2), "bmp": (b"BM", 18, both),
        "tiff": (pack("<HHI", 256, 4, 1), 8, both[:4] + pack("<HHI", 257, 4, 1) + both[:4])}[form]
    return patched(data, marker, at, value)


def damages(data, rng):
    flipped = bytearray(data)
    for at in rng.integers(len(data), size=rng.integers(1, 20)):
        flipped[at] ^= 1 << rng.integers(8)
    return {"truncated": data[: rng.integers(1, len(data))], "bits flipped": bytes(flipped),
            "wrong magic": rng.bytes(8) + data[8:], "zero bytes": b"", "all zero": bytes(len(data)),
            "end zero": data[: len(data) // 2] + bytes(len(data) // 2),
            "noise": rng.bytes(len(data))}


def sound_files(folder):
    """Makes the folder SOUND -> {name: bytes} of all files in it."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (8, 12, 12, 3), np.uint8)
    for form in ("png", "jpeg", "gif", "webp", "bmp", "tiff"):
        Image.fromarray(pixels[0].repeat(4, 0).repeat(4, 1)).save(f"{folder}/a.{form}")
    np.save(f"{folder}/latents.npy", rng.normal(size=(8, 4, 16, 16)).astype(np.float32))
    np.save(f"{folder}/images.npy", pixels)
    np.savez(f"{folder}/a.npz", pixels, np.arange(8) % 3)
    make_dataset(folder / "set", classes=3)
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")  # TorchScript is deprecated, but such networks come in it
        torch.jit.script(Features()).save(f"{folder}/net.ts")
        train.main([f"--data={folder}/set", f"--out_dir={folder}", "--class_cond", *TRAIN,
                    "--steps=1"])
    files = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    five = {f"{i}.png": files["a.png"] for i in range(5)}
    tar = tarred(five)
    return files | {"a.zip": zipped(five), "a.tar": tar, "a.tgz": gzip.compress(tar)}


# ---------------------------------------------------------------------------------------------
# The cases.


def make_groups(good, rng):
    """[(kind, what must happen, routes, {variant: tree})], a tree being {path: bytes or None}."""
    five, nan = {f"in/{i}.png": good["a.png"] for i in range(5)}, float("nan")
    files = {f"in/{f}": good[f] for f in good if f.startswith(("meta", "train", "val"))}
    template = torch.load(io.BytesIO(good["ft.pt"]), weights_only=True)

    def at(path, table, beside=None):
        return {variant: (beside or {}) | {path: data} for variant, data in table.items()}

    def damaged(names, path, beside=None):
        table = {f"{n} {how}": data for n in names for how, data in damages(good[n], rng).items()}
        return at(path, table, beside)

    def prepared(**changes):
        tree = files | {f"in/{k}.npy": v for k, v in changes.items()}
        return {k: v for k, v in tree.items() if v is not DROP}

    def meta(**changes):
        table = json.loads(good["meta.json"]) | changes
        return json.dumps({k: v for k, v in table.items() if v is not DROP}).encode()

    def checkpoint(**changes):
        table = template | changes
        return saved({k: v for k, v in table.items() if v is not DROP})

    def weights(name, value):
        both = {w: template[w] | {name: value} for w in ("model", "ema")}
        return checkpoint(**{w: {k: v for k, v in t.items() if v is not DROP} for w, t in both.items()})

    def header(**changes):
        right = {"descr": "|u1", "fortran_order": False, "shape": (4, 8, 8, 3)}
        return npy_header(str(right | changes))

    arrays = {
        "objects": npy(np.array([Bomb()], object)), "scalar": npy(np.uint8(3)),
        "fields": npy(np.zeros((4, 8, 8, 3), [("a", "u1"), ("b", object)])),
        **{f"{d} {s}": npy(np.ones(s).astype(d)) for d, s in [
            ("U3", (4, 8, 8, 3)), ("c8", (4, 3, 8, 8)), ("?", (4, 8, 8, 3)), ("i8", (4, 8, 8, 3)),
            ("M8[s]", (4, 8, 8, 3)), ("u1", (0, 8, 8, 3)), ("u1", (4, 0, 0, 3)), ("u1", (4, 8)),
            ("u1", (1, 4, 8, 8, 3)), ("u1", (4, 3, 8, 8)), ("f4", (4, 3, 8, 9))]},
        "NaN": npy(np.full((4, 3, 8, 8), nan)), "beyond float32": npy(np.full((4, 3, 8, 8), 1e300)),
        "huge": header(shape=(10**17, 8, 8, 3)), "negative": header(shape=(-4, 8, 8, 3)),
        "odd dtype": header(descr="|xyz"), "code": npy_header("__import__('os').mkdir('canary')"),
        "version 9": npy_header("{}", 9), "long header": npy_header("{" + " " * 60_000),
        "deep header": npy_header("(" * 9000)}
    def labels(n, **more):  # which are none of n images of three classes
        table = {f"{v}"[:30]: npy(np.array(v)) for v in (
            list(range(n - 1)), [-2] * n, [0.0] * n, [[1, 0]] * n, ["cat"] * n, [True] * n)}
        return table | {"objects": npy(np.array([Bomb()] * n)), **more}

    stats = {
        f"{a}"[:30]: npz(**{"mu": np.zeros(12), "sigma": np.eye(12), **a}) for a in (
            {"sigma": np.full((12, 12), nan)}, {"sigma": np.ones((12, 5))}, {"mu": np.array(["x"] * 12)},
            {"sigma": np.array([Bomb()], object)}, {"mu": np.zeros(7)}, {"n": np.array("many")},
            {"net": np.array("clip 00")}, {"mu": np.zeros(3), "sigma": np.eye(3)},
            {"mu": np.zeros(0), "sigma": np.zeros((0, 0))})}
    tables = {text[:30]: text.encode() for text in (
        '{"labels": [["0.png", 0]', "\0\1", '{"labels": 3}', '{"labels": {"kidney": 0}}', "[]",
        '{"labels": [["0.png", 0, 0]]}', '{"labels": [[["0.png"], 0]]}', '{"labels": [["x.png", 0]]}')}
    tables |= {f"label {v}": json.dumps({"labels": [[f"{i}.png", v] for i in range(5)]}).encode()
                for v in (-1, 0.5, "cat", 10**30)}
    metas = {"cut": b"{", "list": b"[1]", "deep": b"[" * 99_999, "bytes": b"\xff\xfe", **{
        f"{c}"[:40]: meta(**c) for c in (
            {"size": "16"}, {"size": -16}, {"size": DROP}, {"num_train": -1}, {"num_val": 10**9},
            {"channels": None}, {"dtype": "object"}, {"class_names": ["a"]},
            {"class_names": None}, {"class_names": DROP}, {"dtype": "float32"})}}
    folders = {
        **{f"meta {k}": files | {"in/meta.json": v} for k, v in metas.items()},
        **{f"labels {k}": prepared(train_labels=v) for k, v in labels(24, beyond=npy([3] * 24)).items()},
        **{f"images {k}": prepared(train=v) for k, v in arrays.items()},
        **{f"no {k}": prepared(**{k: DROP})
           for k in ("train", "val", "train_labels", "val_labels")},
        "val of other size": prepared(val=npy(np.zeros((8, 8, 8, 3), np.uint8)))}
    five_zip = {k[3:]: v for k, v in five.items()}
    odd_zips = {
        **{name[:9]: zipped(five_zip | {name: data}) for name, data in {
            "../evil.png": b"x", "/tmp/evil.png": b"x", "C:\\evil.png": b"x", "a.zip": b"PK",
            "./0.png": b"x", "\n.png": b"x", "a" * 60_000 + ".png": b"x",
            "bomb.png": bytes(1 << 26)}.items()},
        "link": zipped(five_zip | {"a.png": b"/etc/passwd"}, link="a.png"),
        **{f"header at {n}": patched(good["a.zip"], b"PK\1\2", n, value) for n, value in (
            (8, b"\1"), (10, b"\x63"), (24, b"\0\0\0\x10"), (42, b"\xff\xff\xff\x7f"))}}
    odd_tars = {f"{odd}": tarred(five_zip, **odd) for odd in (
        {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"},
        {"type": tarfile.LNKTYPE, "linkname": "../x"}, {"type": tarfile.CHRTYPE},
        {"type": tarfile.FIFOTYPE}, {"name": "../../evil.png"}, {"name": "/tmp/evil.png"})}
    empty = {"in.zip empty": zipped({}), "in.zip in zip": zipped({"a.zip": good["a.zip"]}),
             "in.zip ../": zipped({"../a.png": good["a.png"]}), "in.zip of tar": good["a.tar"],
             "in.tar empty": tarred({}), "in.tar huge": tarred({}, size=10**15),
             "in.tar of zip": good["a.zip"],
             "in.tgz twice": gzip.compress(good["a.tgz"])}
    cifars = {f"{c}"[:40]: cifar(**c) for c in (
        {"test_batch": Bomb()}, {"batches.meta": Bomb()}, {"batches.meta": DROP},
        {"batches.meta": {}}, {"test_batch": []},
        {"test_batch": {"data": np.zeros((2, 3072), np.uint8)}},
        {"test_batch": {"data": np.zeros((1, 3072), np.uint8), "labels": [7]}},
        {"data_batch_1": {"data": np.zeros((2, 5), np.uint8), "labels": [0, 1]}})}
    bias = "net.patch_embed.bias"
    tensor = template["ema"][bias]
    checkpoints = {
        "bomb": saved(Bomb()), "bomb inside": checkpoint(ema=Bomb()),
        "pickle": pickle.dumps(Bomb()), "list": saved([1]), "tensor": saved(tensor),
        "old-style bomb": saved(Bomb(), _use_new_zipfile_serialization=False),
        "state dict": saved(template["ema"]), "module": saved(torch.nn.Linear(3, 3)),
        "TorchScript": good["net.ts"], "other zip": good["a.zip"], "empty zip": zipped({}),
        "no tensors": checkpoint(ema={}, model={}), **{
            f"architecture {v}": checkpoint(architecture=v) for v in (None, [], "dim")},
        "lists": checkpoint(ema=[1], model=[1]),
        **{f"weights {name}": weights(bias, v) for name, v in {
            "missing": DROP, "wrong shape": torch.ones(3, 3), "text": "x"}.items()},
        "one more tensor": weights("x", tensor), "another noise model": checkpoint(noise="flow"),
        "another network": checkpoint(network="unet"), "no architecture": checkpoint(architecture=DROP)}
    architectures = {
        **{f"{v}": checkpoint(architecture=v) for v in ({}, {"dim": 32})},
        **{f"{k} {v}": checkpoint(architecture=template["architecture"] | {k: v}) for k, values in {
            "dim": (64, "x", 0, -32, 32.0, 8 * 10**9, None), "depth": (3, -1, [2]),
            "heads": (0, -2, 3), "patch_size": (0, -4, 8), "image_size": (-16, 17),
            "channels": (0, "3"), "num_classes": (-1, 10**12, 1.5), "route": ((1, 9), "x"),
            "sigma_data": (0.0, "x", nan, 1.5), "latent": ("x", [[0.0] * 2, [1.0] * 2])}.items()
           for v in values}}
    states = {f"{k} {v}"[:40]: checkpoint(**{k: v}) for k, values in {  # not all scripts read them
        "config": (DROP, None, [], {}, {"colour": 1}, {"steps": "many"}, {"lr": None}, {"ema": -4}),
        "step": (DROP, "x", -1, 1.5, None), "optimizer": (None, {}, [{"state": 1}], DROP),
        "ema": (DROP,), "class_names": (DROP, ["a"], 3), "model": (DROP, {})}.items() for v in values}
    states |= {f"weights {name}": weights(bias, v) for name, v in {
        "NaN": tensor * nan, "complex": tensor * 1j, "infinite": tensor - torch.inf}.items()}
    names = ("a b", "line\nbreak", "ünï 中", "'\"$(x)`;&", "%s{0}", " ", "a" * 120, "...", "#?*")
    bytes_too = (*names, os.fsdecode(b"\xff"))  # which torch.load can't open

    formats = [f"a.{form}" for form in ("png", "jpeg", "gif", "webp", "bmp", "tiff")]
    huge = {f: oversized(f[2:], good[f]) for f in formats}
    readers = [INIT, RESUME, SAMPLE, DRAW]
    return [
        ("image among sound ones", "accept", [PREPARE], damaged(formats, "in/x.png", five)),
        ("image among sound ones", "any", [MEASURE], damaged(formats, "in/x.png", five)),
        ("image alone", "any", [PREPARE], damaged(formats, "in/x.png")),
        ("image, huge header", "refuse", [PREPARE, MEASURE], at("in/x.png", huge)),
        *(("archive, damaged", "any", [PREPARE, MEASURE], damaged([f"a.{s}"], f"in.{s}"))
          for s in ("zip", "tar", "tgz")),
        ("archive, odd entry", "any", [PREPARE, MEASURE], at("in.zip", odd_zips)),
        ("archive, odd entry", "any", [PREPARE, MEASURE], at("in.tar", odd_tars)),
        ("archive, odd suffix", "accept", [PREPARE, MEASURE], at("in.tgz", {"plain": good["a.tar"]})),
        ("archive, no images", "refuse", [PREPARE, MEASURE],
         {k: {k[:6]: v} for k, v in empty.items()}),
        ("archive, CIFAR", "any", [PREPARE], at("in.tar", cifars)),
        ("dataset.json", "accept", [PREPARE], at("in/dataset.json", tables, five)),
        ("array, damaged", "any", [PREPARE], damaged(["images.npy", "latents.npy"], "in.npy")),
        ("array, damaged", "any", [PREPARE, MEASURE], damaged(["a.npz"], "in.npz")),
        ("array, nonsense", "refuse", [PREPARE], at("in.npy", arrays)),
        ("array, nonsense", "refuse", [PREPARE, MEASURE],
         at("in.npz", {k: npz(arr_0=v) for k, v in arrays.items()})),
        ("labels", "refuse", [LABELS], at("in.npy", labels(8))),
        ("statistics", "refuse", [MEASURE], at("in.npz", stats)),
        *(("prepared, damaged", "any", [DATA, MEASURE], damaged([f], f"in/{f}", files))
          for f in ("meta.json", "train.npy", "train_labels.npy")),
        ("prepared, nonsense", "refuse", [DATA], folders),
        ("prepared, nonsense", "any", [MEASURE], folders),
        ("checkpoint, damaged", "any", readers, damaged(["ft.pt"], "in/ft.pt")),
        ("checkpoint, nonsense", "refuse", readers[1:], at("in/ft.pt", checkpoints)),
        ("checkpoint, nonsense", "any", [INIT], at("in/ft.pt", checkpoints)),  # it tells what is new
        ("checkpoint, architecture", "refuse", [SAMPLE, DRAW], at("in/ft.pt", architectures)),
        ("checkpoint, architecture", "any", [INIT, RESUME], at("in/ft.pt", architectures)),
        ("checkpoint, odd state", "any", readers, at("in/ft.pt", states)),
        ("features", "refuse", [FEATURES],
         at("in.ts", {"bomb": saved(Bomb()), "tar": good["a.tar"]})),
        ("path", "accept", [PREPARE, MEASURE],
         {n: {f"{n}/x{n}{i}.png": good["a.png"] for i in range(5)} for n in bytes_too}),
        ("path", "accept", [DATA, MEASURE],
         {n: {n + k[2:]: v for k, v in files.items()} for n in names}),
        ("path", "accept", readers, {n: {f"{n}/ft.pt": good["ft.pt"]} for n in names}),
        *(("path, nothing there", "accept" if route == RESUME else "refuse", [route],
           {n: {n: None} for n in names}) for route in ROUTES),  # nothing to resume: a new run
    ]


def make_cases(good, seed, count=None):
    """[(number, kind, verdict, route, variant, tree)]; large groups have more in every stretch."""
    order, turns = random.Random(seed), []
    for kind, verdict, routes, variants in make_groups(good, np.random.default_rng(seed)):
        for route in routes:
            group = order.sample(sorted(variants), len(variants))
            turns += [((i + order.random()) / len(group) ** 0.7, kind, verdict, route, variant,
                       variants[variant]) for i, variant in enumerate(group)]
    turns.sort(key=lambda turn: turn[0])
    return [(number, *turn[1:]) for number, turn in enumerate(turns[: count or None])]


# ---------------------------------------------------------------------------------------------
# One case, and all of them.


class TooLong(BaseException):  # which no `except Exception` of a script stops
    pass


def ring(*_):
    raise TooLong


def call(main, argv):
    """-> what main(argv) leaves with: 0, its sentence, "hang" or an exception."""
    before = signal.signal(signal.SIGALRM, ring)
    out = io.TextIOWrapper(io.BytesIO(), "ascii", "backslashreplace")  # what LANG=C is at worst
    signal.alarm(LIMIT)
    try:
        with redirect_stdout(out), redirect_stderr(out):
            main(argv)
        return 0
    except SystemExit as e:
        return e.code or 0
    except TooLong:
        return "hang"
    except Exception as e:  # noqa: BLE001 (that is what this looks for)
        told = isinstance(e, ValueError) and traceback.extract_tb(e.__traceback__)[-1].name == "check"
        return str(e) if told or isinstance(e, OSError) else e
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run_script(script, argv):
    """The same for the script run as a user runs it; its last line is taken for the sentence."""
    try:
        done = subprocess.run([sys.executable, str(ROOT / script), *argv], capture_output=True,
                              check=False, timeout=3 * LIMIT)
    except subprocess.TimeoutExpired:
        return "hang"
    lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no word\n"]
    if done.returncode == 1 and "Traceback (most recent call last):" in lines:
        return RuntimeError(lines[-1])
    return lines[-1] if done.returncode == 1 else done.returncode


def contents(folder):
    return {str(path): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def judge(case, sound, folder, as_user=False):
    """Runs a case in a new folder -> (outcome, what was said)."""
    _, _, verdict, route, _, tree = case
    (folder / "tmp").mkdir(parents=True)
    for path, data in tree.items():
        if data is not None:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
    main, argv, output = ROUTES[route]
    top = next(iter(tree)).split("/")[0]
    argv = [arg.replace("SOUND", str(sound)).replace("IN", top) for arg in argv]
    here, before = (os.getcwd(), tempfile.tempdir), contents(folder)
    os.chdir(folder)
    tempfile.tempdir = str(folder / "tmp")
    try:
        code = run_script(route.split()[0], argv) if as_user else call(main, argv)
        said, after = f"{type(code).__name__}: {code}" if code else "", contents(folder)
        if code == "hang":
            return "hang", ""
        if any(path.endswith("canary") for path in after):
            return "payload", said
        if isinstance(code, int) and code not in (0, NOT_FINITE):
            return "crash", said
        temporary = [path for path in after if path.endswith(".tmp")] + os.listdir("tmp")
        changed = {path for path in {*before, *after} if before.get(path) != after.get(path)}
        if "train.py" in route:
            run = os.path.dirname(folder / output.replace("IN", top))
            changed -= {run, f"{run}/log.jsonl"}
        spoilt = changed & before.keys() if route != RESUME else before.keys() - after.keys()
        if temporary or spoilt or code and changed:
            return "left-over", f"{said} {sorted(changed)}"
        if not code:
            try:
                check_output(output.replace("IN", top))
            except BaseException as e:  # noqa: BLE001
                return "left-over", f"half an output: {e!r}"
        if verdict != "any" and (verdict == "accept") == bool(code):
            return "misjudged", said
        lines = said.replace(top, "IN").replace(ascii(top)[1:-1], "IN").splitlines()
        if isinstance(code, Exception) or len(lines) > 1 or len(said) > 2000:
            return "error", said
        return "sentence" if code else "accepted", said
    finally:
        os.chdir(here[0])
        tempfile.tempdir = here[1]


def campaign(folder, seed=0, count=None, only=None, as_user=True):
    """-> Counter of (route, kind, outcome), a line for each fault, a Counter of the errors, number
    of cases that were run as a user runs them."""
    (folder / "sound").mkdir()
    cases = make_cases(sound_files(folder / "sound"), seed, count)
    users = {c[3]: c[0] for c in reversed(cases) if c[2] == "refuse"}.values() if as_user else ()
    counts, faults, errors = Counter(), [], Counter()
    for case in cases:
        number, kind, _, route, variant, _ = case
        if only in (None, number):
            outcome, said = judge(case, folder / "sound", folder / str(number), number in users)
            counts[route, kind, outcome] += 1
            if outcome in FAULTS:
                faults.append(f"case {number}, {route}, {kind}, {variant!r}: {outcome}: {said[:1000]}")
            if outcome == "error":
                said = re.sub(r"\S*/\S*", "PATH", " ".join(said.split()))
                errors[f"{route}, {kind}: {re.sub('[0-9]+', 'N', said)[:90]}"] += 1
    return counts, faults, errors, len(users)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one case")
    args = parser.parse_args(argv)
    started = time.time()
    with tempfile.TemporaryDirectory() as folder:
        counts, faults, errors, users = campaign(Path(folder).resolve(), args.seed, args.cases, args.only)
    columns = ["accepted", "sentence", "error", *FAULTS]
    print("| script | kind | cases |", " | ".join(columns), "|\n|---|---|" + "---:|" * 9)
    for row in sorted({key[:2] for key in counts}) + [("all", "")]:
        n = [sum(v for k, v in counts.items() if k[2] == c and row in (k[:2], ("all", "")))
             for c in columns]
        print(f"| {row[0]} | {row[1]} | {sum(n)} |", " | ".join(map(str, n)), "|")
    print("\nErrors of Python, numpy and torch:")
    print(*(f"{n:4} {error}" for error, n in sorted(errors.items())), sep="\n")
    print(f"\n{users} of them run as a user does; {time.time() - started:.0f} s", *faults, sep="\n")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
