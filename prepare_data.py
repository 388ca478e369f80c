"""Make a data set folder for train.py and fid.py out of images, or out of nothing.

    python prepare_data.py                                       # built-in faces -> data/faces
    python prepare_data.py photos/ --size 64 --out data/photos   # sub-folders are classes
    python prepare_data.py cifar-10-python.tar.gz --out data/cifar10   # or a .zip, .tar of images
    python prepare_data.py latents.npy --labels labels.npy --out data/latents   # float (N,C,H,W)
    python prepare_data.py data/march --num 512 --classes cat,dog --out data/march-512   # a subset

The folder holds train.npy and val.npy, uint8 (N,H,W,C), or float32 for latents; with classes also
train_labels.npy and val_labels.npy, int64 (N,); and meta.json, which says what is in them.
"""

import argparse
import difflib
import hashlib
import io
import json
import os
import pickle
import posixpath
import re
import signal
import sys
import tarfile
import zipfile
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image, ImageChops, ImageColor, ImageDraw, ImageOps
from tqdm import tqdm

def need(fact, message):
    """A user's mistake ends the script with one sentence, told by one process of each machine."""
    if not fact:
        sys.exit(message if os.environ.get("LOCAL_RANK", "0") == "0" else 1)

class Parser(argparse.ArgumentParser):
    """argparse with one line a setting; a complaint is one sentence and exit code 1."""

    def add(self, name, default, help, **how):
        """The setting --name, of its default's type (None: text)."""
        kind = str if default is None else type(default)
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind} | how
        self.add_argument(f"--{name}", default=default, help=f"{help} ({default})", **how)

    def error(self, message):
        unknown = re.findall(r"^unrecog.*?(--[^\s=]+)", message)
        near = unknown and difflib.get_close_matches(unknown[0], self._option_string_actions)
        hint = f", did you mean {near[0]}?" if near else ""
        need(False, f"{self.prog}: {message}{hint} (--help lists the settings)")

# ---- What training reads.
class Images:
    """The images of prepared folders (commas between), numbered through.
    To train on something else, write a class with len(), read(), labels (int64 (N,), -1: no class)
    and meta (size, channels, class_names or None, latent: None, or the mean and deviation of each
    channel). Classes are united by name, with `class_names` first."""

    def __init__(self, folders, split="train", patch_size=1, class_names=()):
        opened = [open_folder(folder, split) for folder in folders.split(",")]
        self.arrays, labels, metas = zip(*opened)  # arrays: memmaps (N, H, W, C)
        kinds = {(meta["size"], meta["channels"], meta["dtype"]) for meta in metas}
        need(len(kinds) == 1, f"{folders} hold {kinds}, which can't be mixed: prepare them alike")
        names = [*class_names, *(name for meta in metas for name in meta["class_names"] or ())]
        names = [*dict.fromkeys(names)]
        numbers = [[*map(names.index, meta["class_names"] or ()), -1] for meta in metas]
        self.labels = np.concatenate([np.array(n)[own] for n, own in zip(numbers, labels)])
        self.meta = metas[0] | dict(class_names=names or None)
        self.patch_size = patch_size

    def __len__(self):
        return sum(map(len, self.arrays))

    def read(self, index, visible, flip):
        """The visible patches (b, K, p*p*C) of the images `index` (b,), and no other byte of them.
        visible (b, K) patch numbers, None for all; flip (b,) bool: which images to mirror (then the
        patch numbers are those of the mirrored image)."""
        p, c, g = self.patch_size, self.meta["channels"], self.meta["size"] // self.patch_size
        visible = np.tile(np.arange(g * g), (len(index), 1)) if visible is None else visible
        row, col = visible // g, visible % g
        col = np.where(flip[:, None], g - 1 - col, col)
        out, start = np.empty((*visible.shape, p, p, c), self.meta["dtype"]), 0
        for array in self.arrays:
            patches = array.reshape(-1, g, p, g, p, c)  # a view: nothing is read yet
            own = (start <= index) & (index < start + len(array))
            out[own] = patches[index[own, None] - start, row[own], :, col[own]]
            start += len(array)
        out[flip] = out[flip][:, :, :, ::-1]
        return out.reshape(*visible.shape, p * p * c)

def open_folder(folder, split="train"):
    """-> images, a memmap (N,H,W,C) of uint8 or float32; labels int64 (N,), -1 if none; meta."""
    table = Path(folder, "meta.json")
    need(table.is_file(), f"{folder} is no prepared data set (it has no meta.json): make one with "
         f"prepare_data.py SRC --out {folder}")
    meta = {"latent": None} | json.loads(table.read_text(encoding="utf-8"))
    images = np.load(f"{folder}/{split}.npy", mmap_mode="r")
    labels = np.full(len(images), -1)
    if meta["class_names"]:
        labels = np.load(f"{folder}/{split}_labels.npy")
    found = [*images.shape, str(images.dtype), len(labels)]
    n, size, channels, dtype = (meta[k] for k in (f"num_{split}", "size", "channels", "dtype"))
    need(found == [n, size, size, channels, dtype, n] and (dtype == "uint8" or meta["latent"])
         and -1 <= labels.min() and labels.max() < len(meta["class_names"] or [0]),
         f"{folder}/{split}.npy is {found}, which is not what meta.json says: make the set again")
    return images, labels, meta

# ---- Sources: a list of candidates and a way to load each.
# names, classes: of all candidates; load(index): a binary file or an array (H,W,C); order: of the
# class names, if not that of the alphabet; num_val: so many at the end are held out.
Source = namedtuple("Source", "names load classes order size channels num_val",
                    defaults=(None, None, None, 3, 0))

def open_source(src, stack, labels=None, size=64, seed=0):
    """Lists the candidates and decodes none. What this opens, the ExitStack closes."""
    if src is None:
        classes = [FACE_CLASSES[i % 4] for i in range(NUM_FACES)]
        return Source(range(NUM_FACES), lambda i: make_face(i, size, seed)[0], classes,
                      FACE_CLASSES, size)
    kind = "folder" if os.path.isdir(src) else posixpath.splitext(src.lower())[1]
    kinds = "folder", ".zip", ".tar", ".gz", ".tgz", ".npy", ".npz"
    need(os.path.exists(src) and kind in kinds, f"there is no {src}, or it is none of: {kinds}")
    try:
        if os.path.exists(os.path.join(src, "meta.json")):  # a prepared set; val.npy stays held out
            (train, labels, meta), (val, more, _) = open_folder(src), open_folder(src, "val")
            n, names = len(train), meta["class_names"]
            classes = names and [names[label] for label in (*labels, *more)]
            return Source(range(n + len(val)), lambda i: train[i] if i < n else val[i - n],
                          classes, names, meta["size"], meta["channels"], len(val))
        if kind in (".npy", ".npz"):
            return array_source(src, stack, labels)
        return file_source(*list_files(src, kind, stack))
    except Exception as error:  # noqa: BLE001 (a damaged archive can raise nearly anything)
        sys.exit(f"cannot read {src} ({error!r:.300}): is the file complete?")

def list_files(src, kind, stack):
    """-> {path: key} of all files in a folder or an archive, and read(key) -> binary file."""
    if kind == ".zip":
        # Given an open file, ZipFile leaves its closing to us; its own count is not thread-safe.
        archive = zipfile.ZipFile(stack.enter_context(io.FileIO(src)))
        return {info.filename.replace("\\", "/"): info for info in archive.infolist()
                if not info.is_dir()}, lambda info: io.BytesIO(archive.read(info))
    if kind != "folder":
        archive, src = tarfile.open(src), stack.enter_context(TemporaryDirectory())
        archive.extractall(src, filter="data")
    return {path.relative_to(src).as_posix(): path for path in Path(src).rglob("*")
            if path.is_file() or not path.exists()}, lambda path: path.open("rb")

def file_source(found, read):
    """Chooses files by their names and finds their classes."""
    found = {posixpath.normpath(path): key for path, key in found.items()}
    by_name = {posixpath.basename(path): path for path in found}
    if {"data_batch_1", "test_batch"} <= by_name.keys():
        return cifar_source({name: read(found[path]) for name, path in by_name.items()})
    suffixes = {"", *Image.registered_extensions()}
    names = sorted(path for path in found if posixpath.splitext(path)[1].lower() in suffixes
                   and not re.search(r"(^|/)(\.|__MACOSX)", path))
    if table := by_name.get("dataset.json"):  # the EDM layout: {"labels": [[path, label], ...]}
        labels, top = json.load(read(found[table]))["labels"] or (), posixpath.dirname(table)
        class_of = {posixpath.join(top, path): str(label) for path, label in labels}
        names = [name for name in names if name in class_of or not class_of]
        classes = class_of and [class_of[name] for name in names]
    else:  # the class is the innermost folder; one folder around everything is none
        paths = [name.split("/")[:-1] for name in names]
        if len({path[0] if path else "" for path in paths}) == 1:
            paths = [path[1:] for path in paths]
        classes = any(paths) and [path[-1] if path else "." for path in paths]
    return Source(names, lambda i: read(found[names[i]]), classes or None)

class SafeUnpickler(pickle.Unpickler):
    """Admits what arrays are made of, so that no pickle can run anything."""

    def find_class(self, module, name):
        safe = (r"(numpy(\._?core\.(multiarray|numeric))?|_codecs)\."
                r"(ndarray|dtype|encode|_reconstruct|_frombuffer)")
        need(re.fullmatch(safe, f"{module}.{name}"), f"refused: a pickle asks for {module}.{name}")
        return super().find_class(module, name)

def cifar_source(files):
    """The python archive of CIFAR-10; its test batch becomes val.npy."""
    names = sorted(name for name in files if name.startswith("data_batch_"))
    *batches, table = [SafeUnpickler(files[name], encoding="latin1").load()
                       for name in (*names, "test_batch", "batches.meta")]
    pixels = np.concatenate([np.asarray(batch["data"], np.uint8) for batch in batches])
    pixels, order = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), table["label_names"]
    classes = [order[label] for batch in batches for label in batch["labels"]]
    return Source(range(len(pixels)), lambda i: pixels[i], classes, order, 32, 3,
                  len(batches[-1]["data"]))

def array_source(path, stack, labels=None):
    """Images, uint8 (N,H,W,C), or latents, float (N,C,H,W), in an .npy or .npz file."""
    file, order = path, None
    if path.lower().endswith(".npz"):  # unpacked, so that memory stays flat
        folder = stack.enter_context(TemporaryDirectory())
        zipfile.ZipFile(path).extractall(folder)
        file, arr_1, names = (f"{folder}/{name}.npy" for name in ("arr_0", "arr_1", "class_names"))
        labels = labels or (arr_1 if os.path.exists(arr_1) else None)
        order = np.load(names).tolist() if os.path.exists(names) else None
    array = np.load(file, mmap_mode="r")
    n, latents = len(array), array.dtype.kind == "f"
    need(array.size and array.ndim == 4 and (array.shape[2] == array.shape[3] if latents else
         array.dtype == np.uint8 and array.shape[3] in (1, 3, 4)), f"{path} is {array.dtype} "
         f"{array.shape}: expected float (N,C,S,S) for latents or uint8 (N,H,W,C) for images")
    if labels is not None:
        labels = np.load(labels)
        need(labels.shape == (n,) and labels.dtype.kind in "iu" and labels.min() >= 0,
             f"the labels of {path} are {labels.dtype} {labels.shape}: expected {n} class numbers")
        labels = [order[i] if order else str(i) for i in labels]
    array = array.transpose(0, 2, 3, 1) if latents else array
    return Source(range(n), lambda i: array[i], labels, order, min(array.shape[1:3]))

def split(source, num, classes, val_frac, seed):
    """{"train": candidates, "val": candidates}, shuffled by the seed. classes: these alone; num: so
    many training images, alike many of each class. What the source holds out stays held out."""
    names = source.classes or [""] * len(source.names)  # sets of numpy's strings are slow
    wanted = classes.split(",") if classes else sorted({*names})
    need({*wanted} <= {*names}, f"--classes {classes}: expected some of {','.join({*names})}")
    names, n = np.array(names), len(names) - source.num_val
    order = np.random.Generator(np.random.PCG64(seed)).permutation(n)
    order = order[np.isin(names[order], wanted)]
    val = [i for i in range(n, len(names)) if names[i] in wanted]
    held = 0 if val else min(max(1, round(val_frac * len(order))), len(order) - 1)
    train, val = order[: len(order) - held], val or order[len(order) - held :]
    if num:  # one of each class in turn
        pools = [train[names[train] == name] for name in wanted]
        train = [i for row in zip_longest(*pools) for i in row if i is not None][:num]
    return {"train": [*train], "val": [*val] or [*train]}  # a single image is both

# ---- The rules of pixels.
# Formats that show themselves by their first bytes, and none that runs another program.
FORMATS = "PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "ICO", "AVIF", "JPEG2000"

def iter_images(source, order, rejects, size=None, channels=3, fit="crop", background="white"):
    """Yields (i, uint8 (H,W,channels)) for i in `order`, latents as they are; `rejects`, a list,
    gets (name, reason). Threads decode a few images ahead, so memory stays flat."""

    def decode(i):
        try:
            return to_pixels(source.load(i), size, channels, fit, background)
        except Exception as error:  # noqa: BLE001 (what a decoder says is the reason)
            return f"{type(error).__name__}: {error}"

    with ThreadPoolExecutor() as pool:
        for start in range(0, len(order), 64):
            part = order[start : start + 64]
            for i, pixels in zip(part, pool.map(decode, part)):
                if isinstance(pixels, str):
                    rejects.append((source.names[i], pixels))
                else:
                    yield i, pixels

def to_pixels(item, size, channels, fit, background):
    """A binary file or an array -> uint8 (H,W,channels); latents are only checked."""
    if isinstance(item, np.ndarray) and item.dtype.kind == "f":
        item = np.ascontiguousarray(item, np.float32)
        if not np.isfinite(item).all() or size not in (None, item.shape[0]):
            raise ValueError(f"a latent of side {item.shape[0]} cannot be resized or infinite")
        return item
    image = to_image(item) if isinstance(item, np.ndarray) else Image.open(item, formats=FORMATS)
    image = ImageOps.exif_transpose(image)  # decodes everything: a truncated file fails here
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

def to_image(pixels):  # uint8 (H,W,C), C = 1, 3 or 4 -> a picture of Pillow
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)

# ---- The writer: the folder is complete or absent.
def write(source, folder, parts, settings, strict):
    """Decodes the candidates `parts`, {split: numbers}, into the folder -> what meta.json says."""
    digest, kept, rejects = hashlib.sha256(), {name: [] for name in parts}, []
    for name, part in parts.items():
        with open(f"{folder}/{name}.npy", "wb") as file:
            file.seek(128)  # past the header, which says how many images there are
            images = iter_images(source, part, rejects, **settings)
            for i, image in tqdm(images, name, len(part), unit=" images"):
                file.write(image)
                digest.update(image)
                kept[name].append(i)
            need(kept[name], f"none of {len(part)} images for {name}.npy can be read {rejects[:1]}")
            file.seek(0)
            np.lib.format.write_array_header_1_0(file, dict(
                descr=image.dtype.str, fortran_order=False, shape=(len(kept[name]), *image.shape)))
    for reject in rejects[:20]:
        print("  rejected {}: {}".format(*reject), file=sys.stderr)
    total = sum(map(len, parts.values()))
    need(2 * len(rejects) <= total and not (strict and rejects),
         f"{total - len(rejects)} of {total} images can be read: is this the right source?")
    used = {source.classes[i] for i in sum(kept.values(), [])} if source.classes else ()
    by_number = sorted(used, key=lambda name: (int(name) if name.isdecimal() else -1, name))
    order = [name for name in source.order or by_number if name in used]
    for name in parts if used else ():
        labels = np.array([order.index(source.classes[i]) for i in kept[name]], np.int64)
        np.save(f"{folder}/{name}_labels.npy", labels)
        digest.update(labels)
    meta = {f"num_{name}": len(done) for name, done in kept.items()}
    meta |= {"size": len(image), "channels": image.shape[2], "dtype": str(image.dtype),
             "class_names": order or None, "hash": digest.hexdigest(), "rejected": len(rejects)}
    if image.dtype == np.float32:
        some = np.load(f"{folder}/train.npy", mmap_mode="r")[:4096].astype(np.float64)
        meta["latent"] = [f(some, axis=(0, 1, 2)).tolist() for f in (np.mean, np.std)]
    return meta

def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("src", nargs="?", metavar="SRC", help="none: the built-in faces")
    add = parser.add
    add("out", None, "folder to write; default data/NAME_OF_SRC")
    add("size", None, "side of an image; default 64, arrays keep theirs", type=int)
    add("channels", None, "1 is greyscale; default 3", type=int, choices=(1, 3))
    add("fit", "crop", "to square", choices=("crop", "pad", "stretch"))
    add("background", "white", "behind transparency and padding", type=ImageColor.getrgb)
    add("val_frac", 0.05, "share of val.npy, where the source holds nothing out")
    add("num", None, "training images, as many of each class as possible", type=int)
    add("classes", None, "take these alone, names with commas between")
    add("labels", None, "labels.npy, integers (N,), for a source that is an array")
    add("seed", 0, "of the shuffle and the faces")
    add("strict", False, "any file that cannot be read is an error")
    add("force", False, "replace an existing data set")
    add("preview", False, "add a contact sheet, preview.png")
    a = parser.parse_args(argv)
    title = "faces" if a.src is None else os.path.basename(os.path.realpath(a.src))
    shown = a.out or os.path.join("data", title.split(".")[0])
    out = os.path.realpath(shown)  # behind a link, the folder itself is replaced
    inside = {*os.listdir(out)} if os.path.exists(out) else set()
    known = re.fullmatch("((train|val)(_labels)?.npy|meta.json|preview.png| )*", " ".join(inside))
    need(not inside or a.force and known, f"{shown} is there already: name another --out, or give "
         "--force, which replaces a data set (but no folder that holds anything else)")
    os.makedirs(os.path.dirname(out), exist_ok=True)
    with ExitStack() as stack:
        place = stack.enter_context(TemporaryDirectory(".tmp", dir=os.path.dirname(out)))
        os.mkdir(f"{place}/new")
        source = open_source(a.src, stack, a.labels, a.size or 64, a.seed)
        settings = {"size": a.size or source.size or 64, "channels": a.channels or source.channels,
                    "fit": a.fit, "background": a.background}
        parts = split(source, a.num, a.classes, a.val_frac, a.seed)
        meta = write(source, f"{place}/new", parts, settings, a.strict)
        meta["preprocessing"] = settings | {"source": title, "seed": a.seed}
        Path(place, "new", "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
        if a.preview and meta["dtype"] == "uint8":
            some = np.load(f"{place}/new/train.npy", mmap_mode="r")[:100]
            columns = [np.vstack(some[i : i + 10]) for i in range(0, max(1, len(some) - 9), 10)]
            to_image(np.hstack(columns)).save(f"{place}/new/preview.png")
        if os.path.exists(out):
            os.rename(out, f"{place}/old")
            stack.callback(lambda: os.path.exists(out) or os.rename(f"{place}/old", out))
        os.rename(f"{place}/new", out)
    print(f"{shown}: {meta['num_train']} training and {meta['num_val']} validation images of side "
          f"{meta['size']}, classes {meta['class_names']}", file=sys.stderr)

# ---- The built-in data: faces.
NUM_FACES = 12_000
FACE_CLASSES = ["short_hair", "short_hair_glasses", "long_hair", "long_hair_glasses"]
SKIN = "#ffe3cf #f9d0ae #efb98f #d99a6c #b9794e #8f5a3c #693f2b"
HAIR = "#241a17 #3d271d #6a4027 #94602f #c98f45 #ecc673 #b04a2a #d9773b #8d8f98 #e9e5df"
IRIS = "#4a2f1d #3a6ea5 #4b8a57 #7a5a35 #5d6d7e"
CLOTH = "#e4572e #2e86ab #f2b134 #3d9970 #7b5ea7 #f4f1ea #364152 #e87ea1 #58b5b0 #a63d40"
FRAME = "#22252b #7a3b2e #c79a3b #b3263c #3b5b8c"
WALL = "#cfe6f5 #fbe3c8 #d9efd5 #f6d5dc #e2dbf3 #fdf0bd #cdeae6 #d8dde6"
GLOW = Image.radial_gradient("L").point(lambda v: max(0, 255 - round(1.41 * v)))  # soft disc

def make_face(index, size=64, seed=0, label=None):
    """Face `index` -> (uint8 (size,size,3), label); another label is the same person restyled."""
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

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # like an error: cleans up
    main()
