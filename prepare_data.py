"""Make a data set folder for train.py and fid.py out of images, or out of nothing.

    python prepare_data.py                                       # built-in faces -> data/faces
    python prepare_data.py photos/ --size 64 --out data/photos   # sub-folders are classes
    python prepare_data.py photos.zip --out data/photos          # the same from .zip, .tar, .tar.gz
    python prepare_data.py cifar-10-python.tar.gz --out data/cifar10
    python prepare_data.py latents.npy --labels labels.npy --out data/latents   # float (N,C,H,W)
    python prepare_data.py out/samples.npz --out data/generated  # arr_0 (N,H,W,C), labels arr_1

The folder holds train.npy and val.npy, uint8 (N,H,W,C), or float32 for latents; with classes also
train_labels.npy and val_labels.npy, int64 (N,); and meta.json, which says what is in them.
"""

import argparse
import difflib
import gzip
import hashlib
import io
import json
import math
import os
import pickle
import posixpath
import re
import shutil
import signal
import sys
import tarfile
import tempfile
import zipfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageColor, ImageDraw, ImageOps, UnidentifiedImageError
from tqdm import tqdm

NUM_FACES = 12_000
MAX_FILE = 1 << 29  # bytes of one unpacked file in an archive; more is taken for a bomb


def need(fact, message):
    """A user's mistake ends the script with one sentence and exit code 1."""
    if not fact:
        sys.exit(message)


class Parser(argparse.ArgumentParser):
    """argparse whose every complaint is one sentence and exit code 1; all the scripts use it."""

    def __init__(self, **settings):
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(allow_abbrev=False, formatter_class=form, **settings)

    def error(self, message):
        flags, unknown = self._option_string_actions, re.match(r"unrecog.*: ([^\s=]+)", message)
        near = difflib.get_close_matches(unknown[1], flags, 1, 0.5) if unknown else []
        hint = f", did you mean {near[0]}?" if near else ""
        plain = r"\1 is \3, expected \2"
        message = re.sub("argument (.*): invalid (.*) value: (.*)", plain, message, flags=re.DOTALL)
        sys.exit(f"{self.prog}: {message}{hint} (--help lists the settings)")


def colour(name):
    """An argparse type: what Pillow knows as a colour."""
    ImageColor.getrgb(name)
    return name


def number(kind, low, below=math.inf):
    """An argparse type: an int or a float, at least `low`."""

    def parse(text):
        value = kind(text)
        if not low <= value < below:
            top = "" if below == math.inf else f" and below {below}"
            raise argparse.ArgumentTypeError(f"{text}, expected at least {low}{top}")
        return value

    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse


def open_dataset(folder, split="train"):
    """-> images (N,H,W,C), a read-only memmap of uint8 or float32; labels (N,) or None; meta."""

    def check(fact, fault):
        need(fact, f"{folder} is damaged ({fault}): make it again with prepare_data.py --force")

    table, numbers = Path(folder, "meta.json"), Path(folder, f"{split}_labels.npy")
    need(table.is_file(), f"{folder} is no prepared data set (it has no meta.json): make one with "
         f"prepare_data.py SRC --out {folder}")
    images = load_array(f"{folder}/{split}.npy")
    labels = np.array(load_array(numbers)) if numbers.exists() else None
    try:
        meta = json.loads(table.read_text(encoding="utf-8"))
        names, sigma, digest = (meta[key] for key in ("class_names", "sigma_data", "hash"))
        said = [meta[key] for key in (f"num_{split}", "size", "size", "channels", "dtype")]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        check(False, f"meta.json cannot be read: {type(error).__name__} {error}")
    check(said == [*images.shape, str(images.dtype)] and images.size
          and images.dtype in (np.uint8, np.float32),
          f"{split}.npy is {images.dtype} {images.shape}, in meta.json it is {said}")
    check(type(sigma) is float and 0 < sigma < math.inf and isinstance(digest, str),
          f"sigma_data is {sigma} and hash {digest!r} in meta.json")
    check((labels is None) == (names is None), "it has labels or class_names, but not both")
    if labels is not None:
        check(isinstance(names, list) and all(isinstance(name, str) for name in names)
              and labels.dtype == np.int64 and labels.shape == images.shape[:1]
              and 0 <= labels.min() and labels.max() < len(names),
              f"{numbers.name} does not hold the number of a class name for each image")
    return images, labels, meta


def load_array(path):
    """A read-only memmap of an .npy file, which is never unpickled."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)[...]  # [...] fails on a renamed zip
    except Exception as error:  # noqa: BLE001 (a damaged header can raise nearly anything)
        why = " ".join(str(error).split())[:300]  # numpy's may run over several lines
        sys.exit(f"cannot read {path} ({why}): expected a complete .npy file of plain numbers")


# ---- What training reads: several sets as one, visible patches, a few images of each class.


def open_union(names, split="train"):
    """Several prepared sets: their arrays, the labels of all (or None), and one meta."""
    opened = [open_dataset(name, split) for name in names]
    first = opened[0][2]
    for name, (_, _, meta) in zip(names, opened):
        for key in ("size", "channels", "dtype"):
            need(meta[key] == first[key], f"{name} has {key} {meta[key]}, but {names[0]} has "
                 f"{first[key]}: prepare them alike")
    classes = first["class_names"] or []
    numbered = [str(i) for i in range(len(classes))]  # of drawn images, as far as any was drawn
    if not all(m["class_names"] in (classes, numbered[: len(m["class_names"] or [])])
               for _, _, m in opened):
        classes = None  # else a label would mean two things
    labels = np.concatenate([labels for _, labels, _ in opened]) if classes else None
    meta = first | dict(class_names=classes, hash="+".join(m["hash"] for _, _, m in opened))
    return [images for images, _, _ in opened], labels, meta


def gather(sets, index, visible, patch_size, flip):
    """The visible patches of some images, and no other byte of them.

    sets: arrays or memmaps (N, H, W, C), whose images are numbered through; index (b,), visible
    (b, K) patch numbers, flip (b,) bool: mirrored images, whose patch numbers count from the
    mirrored side. Returns (b, K, p*p*C).
    """
    _, size, _, channels = sets[0].shape
    p, g = patch_size, size // patch_size
    row, col = visible // g, visible % g
    col = np.where(flip[:, None], g - 1 - col, col)
    out = np.empty((*visible.shape, p, p, channels), sets[0].dtype)
    start = 0
    for images in sets:
        patches = images.reshape(-1, g, p, g, p, channels)  # a view: nothing is read yet
        own = (start <= index) & (index < start + len(images))
        out[own] = patches[index[own, None] - start, row[own], :, col[own]]
        start += len(images)
    out[flip] = out[flip][:, :, :, ::-1]
    return out.reshape(*visible.shape, p * p * channels)


def choose_buffer(n, labels, size, seed):
    """`size` of n images (None: all), alike many of each class: sorted, by the seed alone."""
    order = np.random.default_rng(seed).permutation(n)
    rank = np.zeros(n, np.int64)  # how many of its class come before it
    if labels is not None:
        for c in np.unique(labels):
            mine = np.flatnonzero(labels[order] == c)
            rank[mine] = np.arange(len(mine))
    return np.sort(order[np.argsort(rank, kind="stable")[:size]])


# ---- Sources: a list of candidates and a way to load each.


class Source(NamedTuple):
    names: object  # path of every candidate inside the source, sorted
    load: object  # index -> binary file, or array (H,W,C)
    labels: object = None  # class number of every candidate
    class_names: object = None
    rejects: object = ()  # (name, reason) of what can be left out without decoding it
    size: object = None  # side of the images, where the source has one
    num_val: int = 0  # so many at the end are the source's own test set


KINDS = ".zip", ".tar", ".tar.gz", ".tgz", ".npy", ".npz"
TEXTS = ".txt", ".md", ".rst", ".json", ".jsonl", ".csv", ".tsv", ".xml", ".yaml", ".yml", ".html"
JUNK = {"__macosx", "thumbs.db", "desktop.ini"}
CLUTTER = "text or system clutter"  # a reason to leave out that is no cause for alarm


def open_source(src, stack, labels=None, size=64, seed=0):
    """Lists the candidates and decodes none. What this opens, the ExitStack closes."""
    if src is None:
        return Source(range(NUM_FACES), lambda i: make_face(i, size, seed)[0],
                      [i % 4 for i in range(NUM_FACES)], FACE_CLASSES, size=size)
    src, fault = os.fspath(src), "is of no known kind" if os.path.exists(src) else "does not exist"
    arrays = os.path.isfile(src) and src.lower().endswith(KINDS[-2:])
    need(os.path.isdir(src) or os.path.isfile(src) and src.lower().endswith(KINDS),
         f"{src} {fault}: expected a folder or a file of kind {' '.join(KINDS)}")
    need(labels is None or arrays, f"--labels is for .npy and .npz files, not for {src}: drop it")
    try:
        return array_source(src, stack, labels) if arrays else file_source(*list_files(src, stack))
    except Exception as error:  # noqa: BLE001 (a damaged archive can raise nearly anything)
        sys.exit(f"cannot read {src} ({type(error).__name__}: {error}): is the file complete?")


def list_files(src, stack):
    """-> {path: key} of all files in a folder, zip or tar, and read(key) -> binary file."""
    if os.path.isdir(src):

        def read(path):
            if not path.is_file():  # opening a pipe would wait for ever
                raise ValueError("a link to a folder, or a special file")
            return path.open("rb")

        return {path.relative_to(src).as_posix(): path for path in Path(src).rglob("*")
                if path.is_symlink() or not path.is_dir()}, read

    if src.lower().endswith(".zip"):
        # Given an open file, ZipFile leaves its closing to us; its own count is not thread-safe.
        archive = zipfile.ZipFile(stack.enter_context(io.FileIO(src)))

        def read(info):
            if info.file_size > MAX_FILE:
                raise ValueError("a decompression bomb, or too large for an image")
            return io.BytesIO(archive.read(info))

        return {info.filename.replace("\\", "/"): info for info in archive.infolist()
                if not info.is_dir()}, read

    if not src.lower().endswith(".tar"):  # files are read in order of path, and gzip cannot seek
        src = unpack(gzip.GzipFile(src), stack)
    found = {}
    with tarfile.open(src, "r:", encoding="utf-8", errors="surrogateescape") as archive:
        for info in iter(archive.next, None):
            archive.members.clear()  # or the headers of a million files pile up in memory
            if not info.isdir():
                found[info.name] = info.size, info.offset_data
    return found, lambda at: io.BytesIO(np.fromfile(src, np.uint8, at[0], offset=at[1]))


def unpack(packed, stack):
    """Copies an unpacked stream to a temporary file -> its path."""
    path = os.path.join(stack.enter_context(tempfile.TemporaryDirectory()), "unpacked.npy")
    with packed, open(path, "wb") as file:
        shutil.copyfileobj(packed, file)
    return path


def file_source(found, read):
    """Chooses files by their names and finds their classes."""
    chosen, rejects = {}, []
    for path, key in found.items():
        name = posixpath.normpath(path)
        parts = name.lower().split("/")
        hidden = any(part.startswith(".") or part in JUNK for part in parts)
        if hidden or parts[-1].endswith(TEXTS) and parts[-1] != "dataset.json":
            rejects.append((name, CLUTTER))
        else:
            chosen[name] = key
    batches = {posixpath.basename(name): key for name, key in chosen.items()}
    if {"data_batch_1", "test_batch"} <= batches.keys():
        return cifar_source(batches, read)

    labels = class_names = None
    tables = [name for name in chosen if posixpath.basename(name) == "dataset.json"]
    table = min(tables, key=len, default=None)
    edm = json.load(read(chosen.pop(table))) if tables else None
    names = sorted(chosen)
    if isinstance(edm, dict) and "labels" in edm:  # the EDM layout: [[path, label], ...] or null
        top = posixpath.dirname(table)
        given = {posixpath.join(top, name): label for name, label in edm["labels"] or []}
        if given:
            rejects += [(n, "dataset.json has no label for it") for n in names if n not in given]
            names = [n for n in names if n in given]
            labels, class_names = check_labels([given[n] for n in names], len(names), table)
    else:  # the class is the innermost folder; one folder around everything is none
        paths = [name.split("/")[:-1] for name in names]
        if len({path[0] if path else "" for path in paths}) == 1:
            paths = [path[1:] for path in paths]
        folders = [path[-1] if path else "." for path in paths]
        if set(folders) - {"."}:
            class_names = sorted(set(folders))
            order = {name: i for i, name in enumerate(class_names)}
            labels = [order[folder] for folder in folders]
    return Source(names, lambda i: read(chosen[names[i]]), labels, class_names, rejects)


class SafeUnpickler(pickle.Unpickler):
    """Admits what arrays are made of, so that no pickle can run anything."""

    def find_class(self, module, name):
        safe = "ndarray", "dtype", "_reconstruct", "_frombuffer", "encode"
        homes = r"_codecs|numpy(\._?core\.(multiarray|numeric))?"  # importing others runs code, too
        if re.fullmatch(homes, module) and name in safe:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"refused, because it asks for {module}.{name}")


def cifar_source(files, read):
    """The python archive of CIFAR-10; its test batch becomes val.npy."""

    def unpickle(name):
        return SafeUnpickler(read(files[name]), encoding="latin1").load()

    names = sorted(name for name in files if name.startswith("data_batch_")) + ["test_batch"]
    batches = [unpickle(name) for name in names]
    pixels = np.concatenate([np.asarray(b["data"], np.uint8) for b in batches])
    pixels = pixels.reshape(-1, 3, 32, 32)
    labels, class_names = check_labels(np.concatenate([b["labels"] for b in batches]), len(pixels),
                                       "the archive", unpickle("batches.meta")["label_names"])
    return Source(range(len(pixels)), lambda i: pixels[i].transpose(1, 2, 0), labels, class_names,
                  size=32, num_val=len(batches[-1]["data"]))


def array_source(path, stack, labels=None):
    """Images, uint8 (N,H,W,C), or latents, float (N,C,H,W), in an .npy or .npz file."""
    file, class_names = path, None
    if path.lower().endswith(".npz"):
        archive = stack.enter_context(zipfile.ZipFile(path))
        file = unpack(archive.open("arr_0.npy"), stack)
        if labels is None and "arr_1.npy" in archive.namelist():
            labels = unpack(archive.open("arr_1.npy"), stack)
    array = load_array(file)
    n, *shape = array.shape if array.ndim == 4 else (0,)
    latents = array.dtype.kind == "f"
    need(n and min(shape) and (shape[1] == shape[2] if latents else
                               array.dtype == np.uint8 and shape[2] in (1, 3, 4)),
         f"{path} is {array.dtype} {array.shape}: expected float (N,C,S,S) for latents or uint8 "
         f"(N,H,W,C) with 1, 3 or 4 channels for images")
    if labels is not None:
        labels, class_names = check_labels(load_array(labels), n, labels)
    return Source(range(n), lambda i: array[i].transpose(1, 2, 0) if latents else array[i], labels,
                  class_names, size=shape[1] if latents else min(shape[:2]))


def check_labels(labels, n, where, names=None):
    """-> labels as a list, and a name for each number."""
    labels, most = np.asarray(labels), len(names) if names else 1_000_000
    right = labels.shape == (n,) and labels.dtype.kind in "iu"
    need(right and labels.min() >= 0 and labels.max() < most, f"the labels in {where} are "
         f"{labels.dtype} {labels.shape}: expected {n} class numbers from 0 to {most - 1}")
    return labels.tolist(), names or [str(i) for i in range(labels.max() + 1)]


# ---- The image reader: every rule about pixels is here.

Image.init()
# Formats that show themselves by their first bytes, and none that runs another program.
FORMATS = {"PNG", "JPEG", "MPO", "GIF", "WEBP", "BMP", "TIFF", "PPM", "ICO", "AVIF", "JPEG2000"}
FORMATS = sorted(FORMATS & set(Image.OPEN))


def iter_images(src, rejects, size=None, channels=3, fit="crop", background="white"):
    """Yields (name, uint8 (H,W,channels), label or None) in order of path, from a folder, archive,
    array file or Source; latents as they are. The list `rejects` gets (name, reason). Threads
    decode some ahead (Pillow and zlib work outside the interpreter's lock): memory stays flat."""
    colour = ImageColor.getrgb(background)[:3]

    def decode(i):
        try:
            return i, to_pixels(source.load(i), size, channels, fit, colour)
        except UnidentifiedImageError:
            return i, "not an image"
        except Exception as error:  # noqa: BLE001 (what a decoder says is the reason)
            return i, f"{type(error).__name__}: {error}"

    with ExitStack() as stack:
        source = src if isinstance(src, Source) else open_source(src, stack)
        rejects += source.rejects
        pool, todo = ThreadPoolExecutor(), iter(range(len(source.names)))
        stack.callback(pool.shutdown, cancel_futures=True)
        ahead = deque(pool.submit(decode, i) for i in islice(todo, 64))
        while ahead:
            i, pixels = ahead.popleft().result()
            ahead.extend(pool.submit(decode, j) for j in islice(todo, 1))  # one out, one in
            if isinstance(pixels, str):
                rejects.append((source.names[i], pixels))
            else:
                yield str(source.names[i]), pixels, source.labels[i] if source.labels else None


def to_pixels(item, size, channels, fit, background):
    """A binary file or an array -> uint8 (H,W,channels); latents are only checked."""
    if not isinstance(item, np.ndarray):
        with item:
            image = Image.open(item, formats=FORMATS)
            image.load()  # decodes everything: a truncated file fails here
            image = ImageOps.exif_transpose(image)
    elif item.dtype.kind == "f":
        item = np.ascontiguousarray(item, np.float32)
        if not np.isfinite(item).all() or size not in (None, item.shape[0]):
            raise ValueError(f"a latent of side {item.shape[0]} cannot be resized or infinite")
        return item
    else:
        image = to_image(item)
    if image.mode == "F":
        raise ValueError("floating-point pixels: save them with 8 or 16 bits")
    if image.mode.startswith("I"):  # 16 bits: scaled, where Pillow would clip
        values = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        image = Image.fromarray(np.uint8((values * 255 + 32767) // 65535))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    image = image.convert("RGB")

    if size and fit == "crop":
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    if size and fit == "pad":
        image = ImageOps.pad(image, (size, size), Image.Resampling.LANCZOS, background)
    elif size:  # one of this size stays as it is
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(image) if channels == 3 else np.asarray(image.convert("L"))[..., None]


def to_image(pixels):
    """uint8 (H,W,C), C = 1, 3 or 4 -> a picture of Pillow."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def image_grid(images, columns=None):
    """Contact sheet of uint8 (N,H,W,C), C = 1 or 3."""
    count, height, width, channels = images.shape
    columns, gap = columns or math.ceil(math.sqrt(count)), max(1, width // 32)
    rows = -(-count // columns)
    shape = gap + rows * (height + gap), gap + columns * (width + gap), channels
    sheet = np.full(shape, 255, np.uint8)
    for i, image in enumerate(images):
        y, x = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        sheet[y:y + height, x:x + width] = image
    return to_image(sheet)


# ---- The built-in data: faces.

FACE_CLASSES = ["short_hair", "short_hair_glasses", "long_hair", "long_hair_glasses"]
SKIN = "#ffe3cf #f9d0ae #efb98f #d99a6c #b9794e #8f5a3c #693f2b"
HAIR = "#241a17 #3d271d #6a4027 #94602f #c98f45 #ecc673 #b04a2a #d9773b #8d8f98 #e9e5df"
IRIS = "#4a2f1d #3a6ea5 #4b8a57 #7a5a35 #5d6d7e"
CLOTH = "#e4572e #2e86ab #f2b134 #3d9970 #7b5ea7 #f4f1ea #364152 #e87ea1 #58b5b0 #a63d40"
FRAME = "#22252b #7a3b2e #c79a3b #b3263c #3b5b8c"
WALL = "#cfe6f5 #fbe3c8 #d9efd5 #f6d5dc #e2dbf3 #fdf0bd #cdeae6 #d8dde6"
GLOW = Image.radial_gradient("L").point(lambda v: max(0, 255 - round(1.41 * v)))  # soft disc


def make_face(index, size=64, seed=0, label=None):
    """Face `index` of the built-in data -> (uint8 (size,size,3), label). Lots are drawn before
    anything is painted: another label gives the same person with other hair or with glasses."""
    rng, s = np.random.default_rng([seed, index]), 4 * size  # painted large and reduced at the end
    long, glasses = divmod(index % 4 if label is None else label, 2)

    def mix(a, b, t):
        return tuple(round(x + (y - x) * t) for x, y in zip(a, b))

    colours = [ImageColor.getrgb(rng.choice(row.split()))
               for row in (SKIN, HAIR, IRIS, CLOTH, CLOTH, FRAME, WALL, WALL)]
    skin, hair, iris, cloth, band, frame, wall, floor = (
        mix(colour, rng.integers(0, 256, 3), 0.06) for colour in colours)
    fringe, top, lens, collar, mouth = rng.integers([4, 4, 3, 4, 5]).tolist()
    striped, beard, sunny, rings = rng.random(4) < [0.3, 0.22, 0.12, 0.45]
    shift, lift, turn, gaze, smile, brow, wide, length, sun = rng.uniform(-1, 1, 9)
    side, fx = 1 if sun > 0 else -1, 0.1 * turn  # the shady side; how far the face is turned
    white, ink, lips, gold = (255, 255, 255), (48, 32, 36), (165, 50, 60), (247, 211, 88)
    dark, light = mix(skin, (90, 30, 40), 0.25), mix(skin, (255, 250, 235), 0.35)
    shade, shine = mix(hair, (20, 5, 25), 0.35), mix(hair, (255, 240, 215), 0.3)
    u = s * (0.27 + 0.008 * wide)  # one unit: half the width of a head
    cx, cy = s * (0.5 + 0.02 * shift), s * (0.46 + 0.015 * lift)

    def box(x, y, rx, ry):
        return [cx + u * (x - rx), cy + u * (y - ry), cx + u * (x + rx), cy + u * (y + ry)]

    def poly(brush, colour, *points):
        brush.polygon([(cx + u * x, cy + u * y) for x, y in points], colour)

    def glow(mask, x, y, r, colour):
        area = [round(v) for v in box(x, y, r, r)]
        soft = GLOW.resize((area[2] - area[0], area[3] - area[1]), Image.Resampling.NEAREST)
        image.paste(colour, area, ImageChops.multiply(soft, mask.crop(area)))

    gradient = Image.linear_gradient("L").resize((s, s), Image.Resampling.NEAREST)
    image, head, cap = (ImageOps.colorize(gradient, wall, floor), Image.new("L", (s, s)),
                        Image.new("L", (s, s)))
    draw, on_head, on_cap = map(ImageDraw.Draw, (image, head, cap))
    draw.ellipse(box(0, -0.1, 1.85, 1.85), mix(wall, white, 0.45))
    end = 1.75 + 0.3 * length
    if long:  # hair behind the head
        draw.rounded_rectangle(box(0, end / 2 - 0.5, 1.27, end / 2 + 0.75), u, shade)
    for y in np.arange(-0.2, end, 0.42) if long and top == 1 else ():
        draw.ellipse(box(-1.2, y, 0.27, 0.3), shade)
        draw.ellipse(box(1.2, y, 0.27, 0.3), shade)
    draw.rounded_rectangle(box(0, 2.5, 1.65, 1), 0.62 * u, cloth)
    for y in (1.92, 2.22) if striped else ():
        draw.rectangle(box(0, y, 1.65, 0.075), band)
    draw.rounded_rectangle(box(0, 1.1, 0.36, 0.56), 0.2 * u, dark)
    if collar == 0:
        draw.rounded_rectangle(box(0, 1.55, 0.5, 0.17), 0.1 * u, mix(cloth, ink, 0.2))
    if collar == 1:
        poly(draw, dark, (-0.5, 1.48), (0.5, 1.48), (0, 2.1))
    for e in (-1, 1):
        if collar == 2:
            points = (0.3 * e, 1.3), (0.02 * e, 1.76), (0.44 * e, 1.98), (0.66 * e, 1.5)
            poly(draw, mix(cloth, white, 0.5), *points)
        draw.ellipse(box(e, 0.12, 0.2, 0.25), dark if e == side else skin)
        if rings and long:
            draw.ellipse(box(1.07 * e, 0.45, 0.09, 0.09), gold)

    skull, jaw = box(0, -0.1, 1, 1.08), box(0, 0.16, 0.86 + 0.05 * wide, 1.06)
    for brush, colour in (draw, skin), (on_head, 255):
        brush.ellipse(skull, colour)
        brush.ellipse(jaw, colour)
    glow(head, 1.05 * side, 0.75, 1.3, dark)
    glow(head, fx - 0.5 * side, -0.2, 1.1, light)
    if beard and not long:
        draw.chord(jaw, 5, 175, mix(hair, shade, 0.5))
        draw.ellipse(box(fx, 0.1, 0.74, 0.5), skin)
    for e in (-1, 1):
        x, pupil = fx + 0.43 * e, fx + 0.43 * e + 0.06 * gaze
        glow(head, fx + 0.56 * e, 0.36, 0.36, mix(skin, (235, 80, 80), 0.3))
        draw.ellipse(box(x, 0, 0.2, 0.18), white)
        draw.ellipse(box(pupil, 0.01, 0.13, 0.13), iris)
        draw.ellipse(box(pupil, 0.01, 0.07, 0.07), ink)
        draw.ellipse(box(pupil - 0.045, -0.04, 0.045, 0.045), white)
        draw.arc(box(x, 0.02, 0.23, 0.22), 195, 345, ink, round(0.06 * u))
        tilt = 12 * brow * e
        draw.arc(box(x, -0.18, 0.27, 0.2), 212 + tilt, 328 + tilt, shade, round(0.09 * u))
    draw.arc(box(fx * 1.6, 0.24, 0.13, 0.14), 20, 160, dark, round(0.06 * u))
    lips, width, depth = mix(dark, lips, 0.75), 0.32 + 0.07 * smile, (0, 0, 0.28, 0.2, 0.08)[mouth]
    if mouth < 2:  # laughing
        draw.chord(box(fx, 0.54, width, 0.3), 0, 180, mix(lips, ink, 0.4))
        draw.chord(box(fx, 0.54, width * 0.86, 0.16), 0, 180, white)
    else:
        draw.arc(box(fx, 0.66 - depth, width, depth), 20, 160, lips, round(0.09 * u))

    on_cap.ellipse(box(0, -0.2, 1.13, 1.16), 255)  # hair in front, less an opening for the face
    tufts = {0: [], 2: [(0.3 * side, -1.15, 0.72, 0.38)], 3: [(0, -1.42, 0.36, 0.33)] * long,
             1: [(1.05 * np.cos(a), -0.3 - np.sin(a), 0.3, 0.3) for a in np.linspace(0, 3.14, 8)]}
    for tuft in tufts[top]:
        on_cap.ellipse(box(*tuft), 255)
    for x in np.linspace(-0.8, 0.6, 5) if top == 3 and not long else ():
        poly(on_cap, 255, (x - 0.2, -0.95), (x + 0.3, -1.58 + 0.25 * abs(x)), (x + 0.5, -0.95))
    openings = ([(0, 0.42, 0.88, 1.15)], [(0, 0.5, 0.95, 0.98), (0, 0.9, 0.9, 1.3)],
                [(-0.26 * side, 0.32, 0.72, 0.98), (0.3 * side, 0.52, 0.6, 0.8)],
                [(-0.42, 0.4, 0.5, 0.98), (0.42, 0.4, 0.5, 0.98), (0, 0.7, 0.86, 0.9)])
    for x, *rest in openings[fringe]:
        on_cap.ellipse(box(fx + x, *rest), 0)
    if not long:
        on_cap.rectangle([0, cy + 0.12 * u, s, s], 0)
    image.paste(hair, mask=cap)
    glow(cap, -0.5 * side, -0.95, 0.85, shine)
    glow(cap, 1.0 * side, -0.2, 0.9, shade)
    for e in (-1, 1) if glasses else ():
        x, w, glass = fx + 0.43 * e, round(0.08 * u), (38, 38, 48) if sunny else None
        rx, ry, corner = ((0.34, 0.34, 0.34), (0.36, 0.3, 0.14), (0.37, 0.25, 0.14))[lens]
        draw.rounded_rectangle(box(x, 0.02, rx, ry), corner * u, glass, frame, w)
        draw.line([cx + u * (x + 0.34 * e), cy, cx + u * e, cy - 0.04 * u], frame, w)
        draw.line([cx + u * (fx + 0.1 * e), cy, cx + u * fx, cy], frame, w)
    return np.asarray(image.reduce(4)), 2 * long + glasses


# ---- The writer: the folder is complete or absent.

OUTPUTS = {"train.npy", "val.npy", "train_labels.npy", "val_labels.npy", "meta.json", "preview.png"}


def prepare(src=None, out=None, size=None, channels=3, fit="crop", background="white",
            val_frac=0.05, strict=False, force=False, preview=False, seed=0, labels=None):
    """Makes the data set and returns its folder."""
    title = "built-in faces" if src is None else os.path.basename(os.path.realpath(src))
    shown = os.fspath(out or os.path.join("data", "faces" if src is None else title.split(".")[0]))
    out = os.path.realpath(shown)  # behind a link, the folder itself is replaced
    try:
        inside = os.listdir(out) if os.path.exists(out) else []
        need(force or not inside, f"{shown} exists: --force replaces it, --out names another place")
        need(set(inside) <= OUTPUTS and not os.path.realpath(src or "").startswith(out + os.sep),
             f"{shown} holds more than a data set, which would be lost: choose another --out")
        os.makedirs(os.path.dirname(out), exist_ok=True)
        with ExitStack() as stack:
            place = tempfile.TemporaryDirectory(dir=os.path.dirname(out), suffix=".tmp")
            place = stack.enter_context(place)
            work, old = f"{place}/new", f"{place}/old"
            os.mkdir(work)
            source = open_source(src, stack, labels, size or 64, seed)
            settings = {"size": size or source.size or 64, "channels": channels, "fit": fit,
                        "background": background}
            meta = write(source, work, title, settings, val_frac, strict, seed)
            if preview and meta["dtype"] == "uint8":
                image_grid(load_array(f"{work}/train.npy")[:100]).save(f"{work}/preview.png")
            if os.path.exists(out):
                os.rename(out, old)
                stack.callback(lambda: os.path.exists(out) or os.rename(old, out))
            os.rename(work, out)
    except OSError as error:
        sys.exit(f"cannot write {shown} ({error.strerror or error}): nothing there was changed")
    print(f"{shown}: {meta['num_train']} training and {meta['num_val']} validation images of side "
          f"{meta['size']}, {len(meta['class_names'] or [])} classes", file=sys.stderr)
    return shown


def write(source, work, title, settings, val_frac, strict, seed):
    """Images in order of path -> a raw file; then, shuffled, -> train.npy and val.npy; -> meta."""
    rejects, kept, digest, sigma = [], [], hashlib.sha256(), 0.5
    with open(f"{work}/raw", "w+b") as raw:
        images = iter_images(source, rejects=rejects, **settings)
        for _, image, label in tqdm(images, title, len(source.names), unit=" images"):
            raw.write(image)
            kept.append(label)
        for name, reason in rejects[:20]:
            print(f"  rejected {str(name)!r}: {reason}", file=sys.stderr)
        count, harmful = len(kept), sum(reason != CLUTTER for _, reason in rejects)
        found = f"{title}: {len(rejects)} of {len(rejects) + count} files rejected"
        print(found, file=sys.stderr)
        need(count, f"{found}, no image is left: expected files like .png, .jpg or .webp")
        need(harmful <= count, f"{found}, more than half: is this the right source?")
        need(not (strict and rejects), f"{found}, and --strict allows none: mend or remove them")

        own = source.num_val
        held = own or min(max(1, round(val_frac * count)), count - 1)
        lots = np.random.Generator(np.random.PCG64(seed))
        order = [*lots.permutation(count - own), *range(count - own, count)]

        def row(i):
            raw.seek(i * image.nbytes)
            pixels = raw.read(image.nbytes)
            digest.update(pixels)
            return pixels

        train, val = order[: count - held], order[count - held :] or order  # a single one is both
        for split, rows in ("train", train), ("val", val):
            with open(f"{work}/{split}.npy", "wb") as file:
                write_npy(file, image.dtype, (len(rows), *image.shape), map(row, rows))
            if source.labels:
                numbers = np.array([kept[i] for i in rows], np.int64)
                np.save(f"{work}/{split}_labels.npy", numbers)
                digest.update(numbers)
    os.remove(f"{work}/raw")
    if image.dtype == np.float32:  # latents
        values = map(np.float64, load_array(f"{work}/train.npy"))
        mean, square = np.mean([(x.mean(), np.square(x).mean()) for x in values], axis=0)
        sigma = math.sqrt(max(0, square - mean * mean))
        need(sigma, f"{title}: all values are the same")
    meta = {
        "source": title, "num_train": len(train), "num_val": len(val), "size": image.shape[0],
        "channels": image.shape[2], "dtype": str(image.dtype), "layout": "NHWC",
        "class_names": source.class_names, "sigma_data": sigma, "hash": digest.hexdigest(),
        "rejected": len(rejects),
        "preprocessing": {**settings, "resize": "lanczos", "val_frac": val_frac, "seed": seed},
    }
    Path(work, "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
    return meta


def write_npy(file, dtype, shape, rows):
    """Row by row, because the pages of a memmap would count as memory in use."""
    header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    for row in rows:
        file.write(row)


def main(argv=None):
    parser = Parser(description=__doc__)
    add, flag = parser.add_argument, argparse.BooleanOptionalAction
    add("src", nargs="?", metavar="SRC", help="folder, .zip, .tar(.gz), .npy or .npz; none: faces")
    add("--out", help="folder to write (data/NAME_OF_SRC)")
    add("--size", type=number(int, 1, 4097), help="side of an image (64; arrays keep theirs)")
    add("--channels", type=int, choices=(1, 3), default=3, help="1 is greyscale (%(default)s)")
    add("--fit", choices=("crop", "pad", "stretch"), default="crop", help="to square (%(default)s)")
    add("--background", type=colour, default="white", help="behind transparency and padding")
    add("--val_frac", type=number(float, 0, 1), default=0.05, help="share of val.npy (%(default)s)")
    add("--labels", help="labels.npy, integers (N,), for a source that is an array")
    add("--seed", type=number(int, 0), default=0, help="of the shuffle and the faces (%(default)s)")
    add("--strict", action=flag, default=False, help="any rejected file is an error")
    add("--force", action=flag, default=False, help="replace an existing data set")
    add("--preview", action=flag, default=False, help="add a contact sheet, preview.png")
    prepare(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # like an error: cleans up
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
