"""Make a data set folder for train.py and fid.py out of images, or out of nothing.

    python prepare_data.py                                       # built-in faces -> data/faces
    python prepare_data.py photos/ --size 64 --out data/photos   # a folder, .zip, .tar, .npy, .npz
    python prepare_data.py latents.npy --labels labels.npy --out data/latents   # float (N,C,H,W)
    python prepare_data.py data/march --num 512 --classes cat,dog --out data/march-512   # a subset

The folder holds train.npy and val.npy, uint8 (N,H,W,C), or float32 for latents; with classes also
train_labels.npy and val_labels.npy, int64 (N,); and meta.json, which says what is in them.
"""

import argparse
import codecs
import difflib
import hashlib
import io
import json
import os
import pickle
import posixpath
import re
import shutil
import signal
import sys
import tarfile
import zipfile
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
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
        message += f", did you mean {near[0]}?" if near else ""
        need(False, f"{self.prog}: {message} (--help lists the settings)")

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
    expected = tuple(meta[k] for k in (f"num_{split}", "size", "size", "channels"))
    need(images.shape == expected and images.dtype == meta["dtype"] and len(labels) == len(images)
         and (images.dtype == np.uint8 or meta["latent"]) and -1 <= labels.min()
         and labels.max() < len(meta["class_names"] or [0]),
         f"{folder}/{split}.npy {images.shape} is not what meta.json says: make the set again")
    return images, labels, meta

# ---- Sources: a list of candidates and a way to load each.
# names, classes: of all candidates; load(index): a binary file or an array (H,W,C); order: of the
# class names; num_val: so many at the end are held out.
Source = namedtuple("Source", "names load classes order size channels num_val",
                    defaults=(None, None, None, 3, 0))

def open_source(src, stack, labels=None, size=64, seed=0, class_from="first", place=None):
    """Lists the candidates and decodes none. A tar is unpacked in the folder `place`; what this
    opens, the ExitStack closes."""
    if src is None:
        return Source(range(NUM_FACES), lambda i: make_face(i, size, seed)[0],
                      FACE_CLASSES * (NUM_FACES // 4), FACE_CLASSES, size)
    known = os.path.isfile(src) and re.search(r"\.(zip|tgz|tar|tar\.\w+|np[yz])$", src.lower())
    need(known or os.path.isdir(src), f"there is no {src}, or no folder, .zip, .tar, .npy or .npz")
    need(not labels or known and known[1][:2] == "np", f"--labels is for arrays, and {src} is none")
    try:
        if os.path.exists(os.path.join(src, "meta.json")):  # a prepared set
            (x, y, meta), (x_val, y_val, _) = open_folder(src), open_folder(src, "val")
            names = dict(y=y, y_val=y_val, class_names=meta["class_names"])
            return array_source(dict(x=x, x_val=x_val) | (names if meta["class_names"] else {}))
        if src.lower().endswith((".npy", ".npz")):
            file = np.load(src, mmap_mode="r")  # an .npz: whole arrays, when they are asked for
            return array_source({"x": file} if isinstance(file, np.ndarray) else file, 1, labels)
        place = place or stack.enter_context(TemporaryDirectory())
        return file_source(list_files(src, stack, place), class_from, seed)
    except Exception as error:  # noqa: BLE001 (a damaged archive can raise nearly anything)
        cut = isinstance(error, (zipfile.BadZipFile, tarfile.TarError, EOFError))
        where = f", unpacking to {place}" * (getattr(error, "errno", 0) == 28)  # no space left
        error = f"{type(error).__name__}: {error}"
        sys.exit(f"cannot read {src}{where} ({error:.300})" + ": is the file complete?" * cut)

def list_files(src, stack, place):
    """-> {name: a function that opens it} of all files in a folder or an archive."""
    if src.lower().endswith(".zip"):
        # Given an open file, ZipFile leaves its closing to us; its own count is not thread-safe.
        archive = zipfile.ZipFile(stack.enter_context(io.FileIO(src)))
        return {info.filename.replace("\\", "/"): lambda i=info: io.BytesIO(archive.read(i))
                for info in archive.infolist() if not info.is_dir()}
    if os.path.isfile(src):
        with tarfile.open(src) as archive:
            src = os.path.join(place, "tar")
            archive.extractall(src, filter="data")
    found, todo = {}, [(src, ())]
    while todo:
        path, above = todo.pop()
        if os.path.isdir(path):
            real = os.path.realpath(path)  # links are followed, but not round in a circle
            inside = [] if real in above else os.listdir(path)
            todo += [(os.path.join(path, name), (*above, real)) for name in inside]
        elif os.path.isfile(path) or not os.path.exists(path):  # a broken link is rejected later
            found[os.path.relpath(path, src).replace(os.sep, "/")] = partial(open, path, "rb")
    return found

def trim(folders):
    """Lists of components without what all that have any begin with, and then end with."""
    while start := len(os.path.commonprefix([folder for folder in folders if folder])):
        folders = [folder[start:] for folder in folders]
    end = len(os.path.commonprefix([folder[::-1] for folder in folders if folder]))
    return [folder[: max(0, len(folder) - end)] for folder in folders]

def file_source(found, class_from, seed):
    """Chooses files by their names. Classes come from a table or the folders: what all begin or end
    with means nothing, train, val and test are splits, then the first (or last) is the class."""
    found = {posixpath.normpath(path): found[path] for path in sorted(found)
             if not re.search(r"(^|/)(\.\w|__MACOSX)", path)}
    by_name = {posixpath.basename(path): path for path in found}
    ten = sorted(name for name in by_name if name.startswith("data_batch_"))
    for files in [*ten, "test_batch", "batches.meta"], ["train", "test", "meta"]:
        if {*files} <= by_name.keys():
            return cifar_source([found[by_name[name]]() for name in files], "fine_" * (not ten))
    suffix = {path: posixpath.splitext(path)[1].lower() for path in found}
    latents = [path for path in found if suffix[path] == ".npy"]
    names = [path for path in found if suffix[path] in Image.registered_extensions()]
    names = max(names, latents, key=len) or [path for path in found if not suffix[path]]
    left_out = Counter(suffix[path] or "no suffix" for path in found.keys() - {*names})
    need(names, f"no images were found, but files with {dict(left_out)}: convert or unpack them")
    # {path, perhaps without its suffix: class} by WebDataset's or EDM's tables beside the images.
    table = {p[:-4]: f().read().decode().strip() for p, f in found.items() if suffix[p] == ".cls"}
    if path := by_name.get("dataset.json"):  # its rows may be lists
        for name, label in dict(json.load(found[path]()).get("labels") or {}).items():
            table[posixpath.normpath(path[:-12] + name.replace("\\", "/"))] = str(label)
    table = {name: label for name, label in table.items() if label not in ("None", "-1")}
    folders = trim([path.split("/")[:-1] for path in names])
    split = re.compile(r"(.*[^a-z])?(train|val|test)(ing|id|idation|val)?([^a-z].*)?", re.I)
    for place in 0, 1:  # of the folder that names it: above the classes, or below each
        heads = [split.fullmatch((*folder, "", "")[place]) for folder in folders]
        splits = [head[2].lower() if head else "other" for head in heads]
        if {"train"} < {*splits} - {"other"} and 2 * splits.count("other") < len(splits):
            folders = [folder[:place] + folder[place + 1:] for folder in folders]
            break
    else:
        splits = ["train"] * len(names)
    used = [i for split in ("train", "val") for i, s in enumerate(splits) if s == split]
    if not table and "dataset.json" not in by_name:
        folders, which = trim([folders[i] for i in used]), -(class_from == "last")
        table = {names[i]: folder[which] for i, folder in zip(used, folders) if folder}
    classes = {i: table.get(names[i], table.get(posixpath.splitext(names[i])[0])) for i in used}
    counts = Counter(classes[i] for i in used if splits[i] == "train")
    trained = counts.keys() - {None}
    if len(trained) > 1 and 2 * counts[None] < counts.total():  # otherwise there are no classes
        used = [i for i in used if classes[i] in trained]
    else:
        classes = None
    left_out.update(f"{splits[i]} images" for i in {*range(len(names))} - {*used})
    print(f"left out: {dict(left_out) or None}", file=sys.stderr)

    def load(i):
        file = found[names[used[i]]]()
        if names is not latents:
            return file
        latent = np.load(file)
        if "mean-std" in names[used[i]]:  # EDM2's encoder gives both: drawn from once, here
            latent = np.random.default_rng([seed, i]).normal(*np.split(latent, 2))
        return latent.transpose(1, 2, 0)

    size, channels = load(0).shape[1:] if names is latents else (None, 3)
    return Source([names[i] for i in used], load, classes and [classes[i] for i in used], None,
                  size, channels, sum(splits[i] == "val" for i in used))

class SafeUnpickler(pickle.Unpickler):
    """Admits what arrays are made of, so that no pickle can run anything."""

    def find_class(self, module, name):
        parts = [np.zeros(1).__reduce_ex__(protocol)[0] for protocol in (2, 5)]
        return {p.__name__: p for p in (np.ndarray, np.dtype, codecs.encode, *parts)}[name]

def cifar_source(files, fine):
    """The python archives of CIFAR-10 and CIFAR-100 (fine classes); the test images are val."""
    *batches, table = [SafeUnpickler(file, encoding="latin1").load() for file in files]
    x = [np.reshape(batch["data"], (-1, 3, 32, 32)).transpose(0, 2, 3, 1) for batch in batches]
    y = [np.array(batch[f"{fine}labels"]) for batch in batches]
    return array_source(dict(x=np.concatenate(x[:-1]), y=np.concatenate(y[:-1]), x_val=x[-1],
                             y_val=y[-1], class_names=table[f"{fine}label_names"]))

ARRAYS = ("arr_0 x_train train_images images x data", "arr_1 y_train train_labels labels y label",
          "x_val val_images x_test test_images", "y_val val_labels y_test test_labels")

def array_source(file, latent_axis=3, labels=None):
    """A mapping of arrays: images uint8 (N,H,W,C) or (N,H,W), or latents float, whose channels are
    the axis `latent_axis`, classes (N,), the same of images to be held out, and class_names."""
    x, y, x_val, y_val = (next((file[name] for name in row.split() if name in file), None)
                          for row in ARRAYS)
    if x is None:
        raise ValueError(f"it holds the arrays {[*file]}, expected one of {ARRAYS[0]}")
    arrays = [a[..., None] if a.ndim == 3 else a for a in (x, x_val) if a is not None]
    arrays = [np.moveaxis(a, latent_axis, 3) if a.dtype.kind == "f" else a for a in arrays]
    for a in arrays:
        if not a.size or a.ndim != 4 or (a.shape[1] != a.shape[2] if a.dtype.kind == "f" else
                                         a.dtype != np.uint8 or a.shape[3] not in (1, 3, 4)):
            raise ValueError(f"it holds {a.dtype} {a.shape}, expected uint8 (N,H,W,C), or float "
                             "(N,C,S,S) for latents")
    n, total, shape = len(arrays[0]), sum(map(len, arrays)), arrays[0].shape
    names, classes = np.asarray(file.get("class_names", ())).tolist(), None
    y = np.load(labels) if labels else y
    if y is not None:
        y = np.concatenate([part.reshape(-1) for part in (y, y_val) if part is not None])
        if len(y) != total or y.dtype.kind not in "iu" or y.min() < -1:
            raise ValueError(f"labels {y.dtype} {y.shape}, expected {total} class numbers")
        classes = ["" if i < 0 else names[i] if names else str(i) for i in y]
    channels = min(shape[3], 3) if x.dtype == np.uint8 else shape[3]
    return Source(range(total), lambda i: arrays[0][i] if i < n else arrays[1][i - n], classes,
                  names, min(shape[1:3]), channels, total - n)

def split(source, num, classes, val_frac, seed):
    """{"train": candidates, "val": candidates}, shuffled by the seed. classes: these alone; num: so
    many training images, alike many of each class. What the source holds out stays held out."""
    names = source.classes or [""] * len(source.names)  # sets of numpy's strings are slow
    wanted = [*dict.fromkeys(classes.split(","))] if classes else sorted({*names})
    need({*wanted} <= {*names}, f"--classes {classes}: expected some of {','.join({*names})}")
    names, n = np.array(names), len(names) - source.num_val
    order = np.random.Generator(np.random.PCG64(seed)).permutation(n)
    order = order[np.isin(names[order], wanted)]
    val = [i for i in range(n, len(names)) if names[i] in wanted]
    held = 0 if val else min(max(1, round(val_frac * len(order))), len(order) - 1, 10_000)
    first = np.unique(names[order], return_index=True)[1]  # of each class: it is not held out
    late = np.setdiff1d(np.arange(len(order)), first)[-held:] if held else []
    train, val = np.delete(order, late), val or order[late]
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
        if not np.isfinite(item).all() or size and item.shape != (size, size, channels):
            raise ValueError(f"a latent {item.shape}, expected finite {(size, size, channels)}")
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
        image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    elif size:
        image = ImageOps.pad(image, (size, size), Image.Resampling.LANCZOS, background)
    return np.asarray(image) if channels == 3 else np.asarray(image.convert("L"))[..., None]

def to_image(pixels):  # uint8 (H,W,C), C = 1, 3 or 4 -> a picture of Pillow
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)

# ---- The writer: the folder is complete or absent.
def write(source, folder, parts, settings):
    """Decodes the candidates `parts`, {split: numbers}, into the folder -> what meta.json says."""
    kept, rejects = {name: [] for name in parts}, []
    for name, part in parts.items():
        with open(f"{folder}/{name}.npy", "wb") as file:
            file.seek(128)  # past the header, which says how many images there are
            images = iter_images(source, part, rejects, **settings)
            for i, image in tqdm(images, name, len(part), unit=" images"):
                file.write(image)
                kept[name].append(i)
            need(kept[name], f"none of {len(part)} images for {name}.npy can be read {rejects[:1]}")
            file.seek(0)
            np.lib.format.write_array_header_1_0(file, dict(
                descr=image.dtype.str, fortran_order=False, shape=(len(kept[name]), *image.shape)))
    sys.stderr.writelines(f"  rejected {name}: {why}\n" for name, why in rejects[:20])
    total = sum(map(len, parts.values()))
    need(2 * len(rejects) <= total,
         f"{total - len(rejects)} of {total} images can be read: is this the right source?")
    classes = source.classes or [""] * len(source.names)  # "": none
    counts = Counter(classes[i] for i in kept["train"] if classes[i])
    by_number = sorted(counts, key=lambda name: (int(name) if name.isdecimal() else -1, name))
    order = [name for name in dict.fromkeys(source.order or by_number) if name in counts]
    number = {name: i for i, name in enumerate(order)}  # a class without training images: -1, none
    for name in kept if order else ():
        labels = np.array([number.get(classes[i], -1) for i in kept[name]], np.int64)
        np.save(f"{folder}/{name}_labels.npy", labels)
    odd = "; one image each: see --class_from" * (1000 < len(counts) == len(kept["train"]))
    print(f"classes: { {name: counts[name] for name in order} or None}{odd}", file=sys.stderr)
    digest = hashlib.file_digest(open(f"{folder}/train.npy", "rb"), "sha256").hexdigest()
    meta = {"num_train": len(kept["train"]), "num_val": len(kept["val"]), "size": len(image),
            "channels": image.shape[2], "dtype": str(image.dtype), "class_names": order or None,
            "hash": digest, "rejected": len(rejects)}
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
    add("fit", "crop", "to square", choices=("crop", "pad"))
    add("background", "white", "behind transparency and padding", type=ImageColor.getrgb)
    add("val_frac", 0.05, "share of val.npy, where the source holds nothing out")
    add("num", None, "training images, as many of each class as possible", type=int)
    add("classes", None, "take these alone, names with commas between")
    add("labels", None, "labels.npy, integers (N,), for a source that is an array")
    add("class_from", "first", "which folder, below those of all images", choices=("first", "last"))
    add("seed", 0, "of the shuffle and the faces")
    add("force", False, "replace an existing data set")
    a = parser.parse_args(argv)
    title = re.sub(r"^\.+|\.(zip|tgz|tar|gz|np[yz])\b", "", Path(a.src or "faces").resolve().name)
    shown = a.out or os.path.join("data", title)
    out = os.path.realpath(shown)  # behind a link, the folder itself is replaced
    inside = {*os.listdir(out)} if os.path.exists(out) else set()
    known = re.fullmatch("((train|val)(_labels)?.npy|(meta|judge).(json|pt)| )*", " ".join(inside))
    need("," not in shown, f"{shown}: a comma separates data sets in train.py, name another --out")
    need(not inside or a.force and known, f"{shown} is there already: name another --out, or give "
         "--force, which replaces a data set (but no folder that holds anything else)")
    os.makedirs(os.path.dirname(out), exist_ok=True)
    with ExitStack() as stack:
        place = stack.enter_context(TemporaryDirectory(".tmp", dir=os.path.dirname(out)))
        source = open_source(a.src, stack, a.labels, a.size or 64, a.seed, a.class_from, place)
        settings = {"size": a.size or source.size or 64, "channels": a.channels or source.channels,
                    "fit": a.fit, "background": a.background}
        parts = split(source, a.num, a.classes, a.val_frac, a.seed)
        takes = sum(map(len, parts.values())) * settings["size"] ** 2 * settings["channels"]
        need(takes < shutil.disk_usage(place).free, f"no room for the {takes} bytes of {shown}")
        os.mkdir(f"{place}/new")
        meta = write(source, f"{place}/new", parts, settings)
        meta["preprocessing"] = settings | {"source": title, "seed": a.seed}
        Path(place, "new", "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
        if os.path.exists(out):
            os.rename(out, f"{place}/old")
            stack.callback(lambda: os.path.exists(out) or os.rename(f"{place}/old", out))
        os.rename(f"{place}/new", out)
    print(f"{shown}: {meta['num_train']} images, {meta['num_val']} held out", file=sys.stderr)

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
