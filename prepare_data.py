"""Make a data set for train.py out of images, or out of nothing.

    python prepare_data.py                                       # built-in faces -> data/faces
    python prepare_data.py photos/ --size 64 --out data/photos   # images: folder, .zip, .tar(.gz)
    python prepare_data.py mnist/ --out data/mnist               # arrays: MNIST, CIFAR, .npz, .npy
    python prepare_data.py latents.npy --labels labels.npy --out data/latents   # float (N,C,H,W)
    python prepare_data.py data/march --num 512 --out data/march-512            # part of a data set

A data set is a folder: train.npy and val.npy, uint8 (N,H,W,C), or float32 for latents; with
classes also train_labels.npy and val_labels.npy, int64 (N,); and meta.json, which describes them.
"""

import argparse
import codecs
import gzip
import json
import math
import os
import pickle
import re
import shutil
import signal
import sys
import tarfile
import traceback
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageOps
from tqdm import tqdm

def check(condition, message):
    """A user's mistake is a ValueError with one sentence, which `run_script` prints."""
    if not condition:
        raise ValueError(message)

def say(text):
    """Print above a progress bar, if there is one."""
    tqdm.write(text, file=sys.stderr)

def progress_bar(*args, **how):
    """tqdm; where stderr is no terminal but a log, a line at most every 30 seconds."""
    def write(text):
        if text.strip():
            print(text.strip(), file=sys.stderr)
    if sys.stderr.isatty():
        return tqdm(*args, **how)
    lines = SimpleNamespace(write=write, flush=sys.stderr.flush)
    return tqdm(*args, mininterval=30, file=lines, **how)

# ---- What training reads.
def open_folder(folder, split="train"):
    """One split of a data set: images, memory-mapped (N,H,W,C); labels (N,), -1 = none; meta."""
    try:
        meta = json.loads(Path(folder, "meta.json").read_text(encoding="utf-8"))
        meta.setdefault("latent", None)  # which sets of older versions do not say
        images = np.load(f"{folder}/{split}.npy", mmap_mode="r")
        labels = np.full(len(images), -1)
        if meta["class_names"]:
            labels = np.load(f"{folder}/{split}_labels.npy")
        shape = (meta[f"num_{split}"], meta["size"], meta["size"], meta["channels"])
        known = range(-1, len(meta["class_names"] or []))
        check(images.shape == shape and images.dtype == meta["dtype"] and len(labels) == shape[0]
              and set(labels.tolist()) <= set(known),
              f"{split}.npy is {images.dtype} {images.shape} with {len(labels)} labels")
    except Exception as error:  # noqa: BLE001 (damaged or foreign files can raise anything)
        check(False, f"{folder} is not a complete data set ({type(error).__name__}: {error}): make "
              f"it with prepare_data.py SRC --out {folder}")
    return images, labels, meta

class Images:
    """The images of one or several data sets ("data/a,data/b"), as one list.
    To train on something else, write a class with these four: `len`; `labels`, int64 (N,), -1 = no
    class; `meta`, a dictionary with size, channels, class_names (or None) and latent (None, or mean
    and deviation of each channel); and `read`. Classes are united by name, after `class_names`,
    those that a checkpoint knows."""
    def __init__(self, folders, split="train", patch_size=1, class_names=()):
        self.patch_size = patch_size
        self.arrays = []  # of each folder, (N, H, W, C)
        labels = []
        metas = []
        names = list(class_names)
        for folder in folders.split(","):
            array, own_labels, meta = open_folder(folder, split)
            own_names = meta["class_names"] or []
            names += [name for name in own_names if name not in names]
            united = [names.index(name) for name in own_names] + [-1]  # united[-1] is -1, no class
            labels += [united[label] for label in own_labels]
            self.arrays.append(array)
            metas.append(meta)
        formats = {(meta["size"], meta["channels"], meta["dtype"]) for meta in metas}
        check(len(formats) == 1, f"{folders} hold images of {formats}: prepare them alike")
        self.labels = np.array(labels, np.int64)
        self.meta = metas[0] | {"class_names": names or None}

    def __len__(self):
        return len(self.labels)

    def read(self, index, visible, flip):
        """Patches (b, K, p*p*C) of the images `index` (b,), without touching any other patch.
        visible: (b, K) patch numbers, None = all. flip: (b,) bool, which images to mirror; their
        `visible` counts the patches of the mirrored image."""
        p = self.patch_size
        c = self.meta["channels"]
        grid = self.meta["size"] // p  # patches per side
        if visible is None:
            visible = np.tile(np.arange(grid**2), (len(index), 1))
        row, col = np.divmod(visible, grid)
        col = np.where(flip[:, None], grid - 1 - col, col)
        out = np.empty((*visible.shape, p, p, c), self.meta["dtype"])
        start = 0
        for array in self.arrays:
            patches = array.reshape(-1, grid, p, grid, p, c)  # a view: nothing is read yet
            own = (start <= index) & (index < start + len(array))
            # numpy puts the indexed axes first: (own, K, p, p, c)
            out[own] = patches[index[own, None] - start, row[own], :, col[own]]
            start += len(array)
        out[flip] = out[flip][:, :, :, ::-1]  # the pixels inside each patch, too
        return out.reshape(*visible.shape, p * p * c)

# ---- Sources: images that are not decoded yet.
# names: of each image, for messages. load: number -> path of a file, or array (H, W, C).
# classes: the class of each image, "" = none. class_names: their order, if the source has one.
# num_val: how many at the end the source itself holds out. Defaults begin at `classes`.
Source = namedtuple("Source", "names load classes class_names num_val size channels dtype latent",
                    defaults=(None, None, 0, 64, 3, "uint8", None))

def open_source(src, temp_dir, labels=None):
    """Find the images of a folder or a file. An archive is unpacked into a folder in temp_dir."""
    check(os.path.exists(src), f"there is no {src}")
    try:
        if src.endswith((".npy", ".npz")):
            return array_source(**load_arrays(src, labels))
        check(not labels, "--labels belongs to an .npy or .npz file")
        root = src
        if os.path.isfile(src):  # .zip, .tar, .tar.gz and others
            root = mkdtemp(dir=temp_dir)
            if tarfile.is_tarfile(src):  # nothing is unpacked outside root (Python 3.11.4 or newer)
                tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)
            shutil.unpack_archive(src, root)
        paths = list_files(root)
        if {"meta.json", "train.npy", "val.npy"} <= set(paths):
            return array_source(**prepared_arrays(root))
        arrays = idx_arrays(root, paths) or cifar_arrays(root, paths)
        if arrays:
            return array_source(**arrays)
        return file_source(root, paths)
    except ValueError as error:
        check(False, f"{src}: {error}")
    except Exception as error:  # noqa: BLE001 (a damaged archive can raise nearly anything)
        check(False, f"cannot read {src} ({type(error).__name__}: {error}): expected a folder, or "
              "a complete .zip, .tar(.gz), .npz or .npy")

def list_files(root):
    """Sorted paths inside a folder of all its files, without .DS_Store, @eaDir, __MACOSX, ..."""
    paths = []
    visited = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        if os.path.realpath(folder) in visited:
            subfolders.clear()  # a link that leads back up
            continue
        visited.add(os.path.realpath(folder))
        subfolders.sort()
        files = [Path(folder, name) for name in names]
        # Opening a named pipe would wait for ever.
        paths += [file.relative_to(root).as_posix() for file in files if not file.is_fifo()]
    return [path for path in sorted(paths) if not re.search(r"(^|/)(\.|@|__)", path)]

SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
# Such as trainA, test2017, val_64, testset and dev, but neither trains nor valley nor device.
LOOKS_LIKE_SPLIT = r"(?i:(train|val|valid|validation|test|dev)(ing|set)?)([A-Z]|[^a-zA-Z].*)?"

def file_source(root, paths):
    """Image files. What is a class is a rule, not a guess:
    1. Folders that all images share at the top are ignored.
    2. If every first folder that remains is one of SPLITS, train is trained on, val is held out,
       test is left out.
    3. The first folder that remains is the class; either all images have one, or none has."""
    suffixes = [end for end, kind in Image.registered_extensions().items() if kind in FORMATS]
    images = [path for path in paths if path.lower().endswith(tuple(suffixes))]
    left_out = Counter(os.path.splitext(path)[1] for path in set(paths) - set(images))
    check(images, f"it holds no images, but {dict(left_out)}")
    folders = [re.split(r"[/\\]", path)[:-1] for path in images]  # some .zip files hold a\b.png
    shared = len(os.path.commonprefix(folders))
    folders = [folder[shared:] or [""] for folder in folders]  # "" = in no folder
    splits = ["train"] * len(images)
    if all(folder[0].lower() in SPLITS for folder in folders):
        splits = [SPLITS[folder[0].lower()] for folder in folders]
        folders = [folder[1:] or [""] for folder in folders]
        check("train" in splits, "it has folders like val or test, but none called train")
    classes = [folder[0] for folder in folders]
    for name in classes:
        check(not re.fullmatch(LOOKS_LIKE_SPLIT, name), f"the folder {name} looks like a split, "
              "but not all first folders are train, val or test: rename it, or prepare one alone")
    classes = dataset_json(root, paths, images) or classes
    train_has_classes = any(c for c, split in zip(classes, splits) if split == "train")
    rows = []
    for split, image, name in zip(splits, images, classes):
        without_class = split == "val" and train_has_classes and not name
        if split == "test" or without_class:
            left_out[f"{split} images"] += 1
        else:
            rows.append((split, image, name))
    say(f"left out: {dict(left_out) or 'nothing'}")
    splits, names, classes = zip(*sorted(rows))  # "train" sorts before "val", as Source wants
    # "" sorts first: classes are mixed only if the first image has none and the last has one.
    first, last = min(zip(classes, names)), max(zip(classes, names))
    check(first[0] or not last[0], f"{last[1]} has a class, {first[1]} has none: put all images "
          "into folders of classes, or none")
    return Source(names, lambda i: f"{root}/{names[i]}", classes, num_val=splits.count("val"))

def dataset_json(root, paths, images):
    """Classes by EDM's dataset.json, {"labels": [["00000/img.png", 3], ...] or null}, or None."""
    if "dataset.json" not in paths:
        return None
    try:
        text = Path(root, "dataset.json").read_text(encoding="utf-8")
        rows = dict(json.loads(text)["labels"] or {})
    except (LookupError, TypeError, ValueError):
        return None
    labels = {name: str(label) for name, label in rows.items() if label not in (None, -1)}
    if labels and labels.keys().isdisjoint(images):
        return None
    return [labels.get(image, "") for image in images]

ARRAY_NAMES = dict(
    images=("arr_0", "x_train", "train_images", "images", "x", "data"),
    labels=("arr_1", "y_train", "train_labels", "labels", "y", "label"),
    val_images=("x_val", "val_images", "x_test", "test_images"),
    val_labels=("y_val", "val_labels", "y_test", "test_labels"), class_names=("class_names",))

def load_arrays(src, labels=None):
    """Arrays of an .npz or .npy file, by the keys of ARRAY_NAMES."""
    file = np.load(src, mmap_mode="r")
    if isinstance(file, np.ndarray):
        file = {"images": file}
    arrays = {}
    for key, names in ARRAY_NAMES.items():
        for name in names:
            if name in file:
                arrays.setdefault(key, file[name])
    check("images" in arrays, f"it holds {list(file)}, not one of {ARRAY_NAMES['images']}")
    if labels:
        arrays["labels"] = np.load(labels)
    for key, x in arrays.items():
        if x.dtype.kind == "f" and x.ndim == 4:
            arrays[key] = np.moveaxis(x, 1, 3)  # latents (N,C,S,S), as encoders give them
    return arrays

def prepared_arrays(folder):
    arrays = {}
    for prefix, split in ("", "train"), ("val_", "val"):
        arrays[f"{prefix}images"], labels, meta = open_folder(folder, split)
        arrays["latent"] = meta["latent"]
        if meta["class_names"]:
            arrays[f"{prefix}labels"] = labels
            arrays["class_names"] = meta["class_names"]
    return arrays

def idx_arrays(root, paths):
    """MNIST, Fashion-MNIST, KMNIST, EMNIST: NAME-images-idx3-ubyte and its labels, perhaps .gz."""
    arrays = {}
    for path in paths:
        name = os.path.basename(path)
        kind = re.search("(images|labels).idx[13]-ubyte", name)
        if not kind or f"{path}.gz" in paths:  # torchvision keeps both: one of them is enough
            continue
        key = kind[1]
        if re.search("t10k|test", name):
            key = f"val_{key}"
        check(key not in arrays, f"it holds several sets, like {path}: keep one in the folder")
        data = Path(root, path).read_bytes()
        if path.endswith(".gz"):
            data = gzip.decompress(data)
        dims = data[3]  # the number of dimensions, which follow as int32, highest byte first
        shape = np.frombuffer(data, ">i4", dims, offset=4)
        arrays[key] = np.frombuffer(data, np.uint8, offset=4 + 4 * dims).reshape(shape)
    return arrays

class SafeUnpickler(pickle.Unpickler):
    """Unpickles arrays and nothing else, as other pickles can run any program."""
    # The last one is numpy's _reconstruct, whose module is not the same in all versions.
    PARTS = (np.ndarray, np.dtype, codecs.encode, np.zeros(1).__reduce_ex__(2)[0])

    def find_class(self, module, name):
        return {part.__name__: part for part in self.PARTS}[name]

def cifar_arrays(root, paths):
    """The python archives of CIFAR-10 and CIFAR-100 (fine classes); test is held out."""
    arrays = {}
    for path in paths:
        path = f"{root}/{path}"
        if not re.search(
                r"(^|/)(data_batch_\d|test_batch|batches.meta|cifar-100-python/+\w+)$", path):
            continue
        with open(path, "rb") as file:
            content = SafeUnpickler(file, encoding="latin1").load()
        prefix = ""
        if os.path.basename(path).startswith("test"):
            prefix = "val_"
        for key, value in content.items():
            if key == "data":
                images = np.reshape(value, (-1, 3, 32, 32)).transpose(0, 2, 3, 1)
                arrays.setdefault(f"{prefix}images", []).extend(images)
            elif key in ("labels", "fine_labels"):
                arrays.setdefault(f"{prefix}labels", []).extend(value)
            elif key in ("label_names", "fine_label_names"):
                arrays["class_names"] = value
    return arrays

def array_source(images, labels=None, val_images=(), val_labels=(), class_names=None, latent=None):
    """Images uint8 (N,H,W) or (N,H,W,C), or latents float (N,S,S,C); labels int (N,), -1 = none."""
    items = [*np.asarray(images), *np.asarray(val_images)]
    items = [np.atleast_3d(item) for item in items]  # (H,W,C), views: nothing is read yet
    height, width, channels = items[0].shape
    dtype = items[0].dtype
    is_image = dtype == np.uint8 and channels in (1, 3, 4) and min(height, width) > 1
    is_latent = dtype.kind == "f" and height == width
    check(is_image or is_latent, f"it holds {dtype} {np.shape(images)}, expected uint8 (N,H,W,C), "
          "or float (N,C,S,S) for latents")
    check(is_image or len({item.shape for item in items}) == 1, "its latents differ in shape")
    if is_image:
        channels = min(channels, 3)  # transparency is not kept
    classes = [""] * len(items)
    if labels is not None:
        y = np.array([*np.ravel(labels), *np.ravel(val_labels)])
        check(y.dtype.kind in "iu" and len(y) == len(items) and min(y) >= -1,
              f"labels {y.dtype} {np.shape(labels)} are not {len(items)} class numbers")
        if class_names is None:
            class_names = range(max(y) + 1)
        class_names = np.asarray(class_names).astype(str).tolist()  # of bytes or numbers, too
        check(max(y) < len(class_names), f"label {max(y)} has no name in class_names")
        classes = [class_names[label] if label >= 0 else "" for label in y]
    return Source(range(len(items)), items.__getitem__, classes, class_names, len(val_images),
                  min(height, width), channels, "uint8" if is_image else "float32", latent)

# ---- The rules of pixels.
# Formats that Pillow decodes by itself; EPS and others would start other programs.
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "ICO", "AVIF", "JPEG2000")

def to_image(pixels):
    """uint8 (H,W,C) -> a picture of Pillow."""
    if pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    return Image.fromarray(pixels)

def fit_adm(image, size):
    """As in ADM, EDM2, MaskDiT: halved while at least twice as large, then resized and cropped."""
    side, _ = size
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    image = ImageOps.scale(image, side / min(image.size), Image.Resampling.BICUBIC)
    left = (image.width - side) // 2
    top = (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))

FITS = {"lanczos": partial(ImageOps.fit, method=Image.Resampling.LANCZOS), "adm": fit_adm}

@dataclass
class Decoder:
    """Turns files into uint8 (size,size,channels), and keeps account of what it can't use."""
    size: int = None  # None = of each image
    channels: int = 3
    fit: str = "lanczos"
    grey_range: tuple = None  # black and white of images of more than 8 bits
    grey_values: list = field(default_factory=list)  # smallest and largest of each such image
    extra_frames: list = field(default_factory=list)  # of each file
    rejected: list = field(default_factory=list)  # (name, reason)

    def iter_images(self, source, numbers):
        """Yield (number, pixels) of the images that can be read; threads decode 64 at a time."""
        def attempt(i):
            try:
                return self.decode(source.load(i))
            except Exception as error:  # noqa: BLE001 (damaged files can raise anything)
                return repr(error)
        numbers = iter(numbers)
        with ThreadPoolExecutor() as pool:
            while batch := list(islice(numbers, 64)):
                for i, result in zip(batch, pool.map(attempt, batch)):
                    if isinstance(result, str):  # why it failed
                        self.rejected.append((source.names[i], result))
                    else:
                        yield i, result
        # Without --range 65535 is white. If no value reaches half of it, all would be near black.
        if self.grey_values and not self.grey_range:
            low, high = np.min(self.grey_values), np.max(self.grey_values)
            check(low >= 0 and 2**15 <= high < 2**16, f"grey images of more than 8 bits hold "
                  f"{low:g} to {high:g}: name black and white with prepare_data.py --range")

    def decode(self, item):
        """The path of a file, or an array -> pixels."""
        if isinstance(item, str):
            image = Image.open(item, formats=FORMATS)
            self.extra_frames.append(getattr(image, "n_frames", 1) - 1)
        elif item.dtype == np.uint8:
            image = to_image(item)
        else:
            latent = np.ascontiguousarray(item, np.float32)
            check(np.isfinite(latent).all(), "values that are not finite")
            return latent
        image = ImageOps.exif_transpose(image)  # decodes everything: a truncated file fails here
        if image.mode.startswith(("I", "F")):  # grey of more than 8 bits, which Pillow would clip
            values = np.asarray(image).astype(float)
            check(np.isfinite(values).all(), "values that are not finite")
            self.grey_values.append((values.min(), values.max()))
            low, high = self.grey_range or (0, 65535)
            values = np.clip((values - low) / (high - low), 0, 1)
            image = Image.fromarray(np.uint8(np.rint(255 * values)))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
        if self.size:
            image = FITS[self.fit](image, (self.size, self.size))
        if self.channels == 1:
            return np.asarray(image.convert("L"))[..., None]
        return np.asarray(image)

# ---- The writer.
def choose(source, num=None, classes=None, val_frac=0.05, seed=0):
    """Numbers of the images to hold out and to train on, shuffled by the seed. classes: only these;
    num: so many to train on, as many of each class as possible."""
    names = source.classes  # of each image
    wanted = set(names)
    if classes:
        wanted = set(classes.split(","))
        check(wanted <= set(names), f"--classes {classes}: there are {sorted(set(names))}")
    num_train = len(names) - source.num_val
    val = [i for i in range(num_train, len(names)) if names[i] in wanted]
    order = np.random.default_rng(seed).permutation(num_train).tolist()
    order = [i for i in order if names[i] in wanted]
    rank = {}  # how many images of the same class come before this one
    counts = Counter()
    for i in order:
        rank[i] = counts[names[i]]
        counts[names[i]] += 1
    if not val and val_frac:
        spare = [i for i in order if rank[i] > 0]  # each class keeps one to train on
        val = spare[-max(1, min(round(val_frac * len(order)), 10_000)) :]
    held_out = set(val)
    train = [i for i in order if i not in held_out]
    if num:
        train = sorted(train, key=lambda i: (rank[i], names[i]))[:num]
    if not val and val_frac:
        val = train  # a single image is both
    return val, train

def write_images(path, images, shape, dtype):
    """Write (number, image) pairs to an .npy file -> the numbers."""
    numbers = []
    with open(path, "wb") as file:
        file.seek(128)  # past the header, which is written last: it says how many there are
        for i, image in images:
            file.write(image)
            numbers.append(i)
        file.seek(0)
        header = dict(descr=np.dtype(dtype).str, fortran_order=False, shape=(len(numbers), *shape))
        np.lib.format.write_array_header_1_0(file, header)
    return numbers

def write_set(folder, source, decoder, val, train):
    """Decode the images `val` and `train` into the folder -> what its meta.json says."""
    shape = (decoder.size, decoder.size, decoder.channels)
    # The first that can be read are held out: a damaged image is replaced by the next one.
    images = decoder.iter_images(source, progress_bar(val + train))
    val = write_images(f"{folder}/val.npy", islice(images, len(val)), shape, source.dtype)
    train = write_images(f"{folder}/train.npy", images, shape, source.dtype)
    num_rejected = len(decoder.rejected)
    for name, reason in decoder.rejected[:20]:
        say(f"  rejected {name}: {reason}")
    num_frames = sum(decoder.extra_frames)
    if num_frames:
        say(f"left out: {num_frames} later frames")
    check(len(train) > num_rejected, f"{num_rejected} images can't be read, too many: is "
          "this the right source?")

    class_names = class_order(source, train)
    label = {name: i for i, name in enumerate(class_names)}
    for split, numbers in ("train", train), ("val", val):
        labels = [label.get(source.classes[i], -1) for i in numbers]
        if class_names:
            np.save(f"{folder}/{split}_labels.npy", np.array(labels, np.int64))
    latent = source.latent
    if source.dtype == "float32" and not latent:
        sample = np.load(f"{folder}/train.npy", mmap_mode="r")[:4096].astype(float)
        mean, deviation = sample.mean(axis=(0, 1, 2)), sample.std(axis=(0, 1, 2))
        deviation[deviation == 0] = 1  # a channel that is constant
        latent = [mean.tolist(), deviation.tolist()]
    return dict(num_train=len(train), num_val=len(val), size=decoder.size,
                channels=decoder.channels, dtype=source.dtype, class_names=class_names or None,
                latent=latent, rejected=num_rejected)

def class_order(source, train):
    """Print the classes that have training images -> their names in order."""
    members = {}  # class: its images
    for i in train:
        members.setdefault(source.classes[i], []).append(source.names[i])
    names = sorted(members.keys() - {""})
    if all(name.isdecimal() for name in names):
        names.sort(key=int)
    if source.class_names:
        names = [name for name in source.class_names if name in members]
    for name in names:
        say(f"  class {name}: {len(members[name])} images, e.g. {members[name][0]}")
    if len(names) > 1000 or 0 < len(names) == len(train):
        say(f"{len(names)} classes of {len(train)} images: is this right?")
    return names

# ---- The command line. The other scripts use its parts.
# SIGUSR1 is what `#SBATCH --signal=USR1@120` sends before the time is up.
STOP_SIGNALS = [s for s in signal.Signals if s.name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")]

def on_stop_signals(handler):
    """Call handler(number, frame) on a signal to stop. What nohup ignores stays ignored."""
    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)

def number_type(kind, low, high):
    """A type for argparse: numbers of a kind (int or float) from low on and below high."""
    def number(text):
        value = kind(text)
        if not low <= value < high:
            raise argparse.ArgumentTypeError(f"{text}: expected a number >= {low} and < {high}")
        return value
    return number

def integers(text):
    """A type for argparse: "2,9" -> (2, 9)."""
    return tuple(int(part) for part in text.split(",") if part)

class Parser(argparse.ArgumentParser):
    """argparse with one line per setting, whose complaints are one sentence."""
    def __init__(self, script_doc):
        super().__init__(description=script_doc.splitlines()[0], allow_abbrev=False)

    def add(self, name, default, help, kind=None, low=0, high=math.inf, **how):
        """The setting --name; kind: int, float, tuple, bool or str; None = that of `default`."""
        kind = kind or type(default)
        if kind is bool:
            how["action"] = argparse.BooleanOptionalAction
        elif kind is tuple:
            how["type"] = integers
        elif kind in (int, float):
            how["type"] = number_type(kind, low, high)
        self.add_argument(f"--{name}", default=default, help=f"{help} (%(default)s)", **how)

    def error(self, message):  # argparse itself would print the usage and exit with code 2
        check(False, f"{self.prog}: {message} (--help lists the settings)")

def run_script(main):
    """Run a script. A user's mistake is one sentence, once on each machine, and exit code 1."""
    on_stop_signals(lambda number, frame: sys.exit(128 + number))  # cleans up, like an error
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        raised_in = traceback.extract_tb(error.__traceback__)[-1].name
        if isinstance(error, ValueError) and raised_in != "check":
            raise  # not a user's mistake but a bug, of ours or of a library: show where
        if os.environ.get("LOCAL_RANK", "0") == "0":
            say(str(error))
        sys.exit(1)

DATA_FILES = {"train.npy", "val.npy", "train_labels.npy", "val_labels.npy", "meta.json",
              "classifier.pt"}  # the last one is written by tests/tools/classifier.py

def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("src", nargs="?", metavar="SRC",
                        help="folder, archive, arrays or data set; not given = built-in faces")
    add = parser.add
    add("out", None, "folder to write; None = data/NAME_OF_SRC")
    add("size", None, "side of the images in pixels; None = 64, or that of arrays", int, low=1)
    add("channels", None, "1 = grey, 3 = colour; None = 3, or as many as arrays have", int,
        choices=(1, 3))
    add("range", None, "values of black and white in grey images of more than 8 bits", float,
        low=-math.inf, nargs=2)
    add("fit", "lanczos", "how images are cropped and resized; adm = as in ADM", choices=FITS)
    add("latent_scale", None, "training multiplies latents by this (Stable Diffusion: 0.18215); "
        "None = it normalises each channel", float)
    add("val_frac", 0.05, "share of images to hold out, unless the source has its own", high=1)
    add("num", None, "number of training images, as many of each class as possible", int, low=1)
    add("classes", None, "use only these classes, separated by commas")
    add("labels", None, "class numbers for an array: labels.npy, integers (N,)")
    add("seed", 0, "seed of the order of the images, and of the faces")
    add("force", False, "replace an existing data set")
    args = parser.parse_args(argv)
    check(not args.range or args.range[0] < args.range[1], "--range expects black below white")

    name = Path(args.src or "faces").resolve().stem.removesuffix(".tar")
    out = os.path.realpath(args.out or f"data/{name}")
    parent = os.path.dirname(out)
    if os.path.exists(out) and os.listdir(out):
        is_set = {"train.npy", "meta.json"} <= set(os.listdir(out)) <= DATA_FILES
        check(args.force and is_set, f"{out} exists: give another --out, or --force, which only "
              "replaces data sets")
    os.makedirs(parent, exist_ok=True)
    # The set is written beside its place and moved there when complete.
    with TemporaryDirectory(".tmp", dir=parent) as temp_dir:
        source = Source(range(NUM_FACES), partial(make_face, size=args.size or 64, seed=args.seed),
                        FACE_CLASSES * (NUM_FACES // 4), FACE_CLASSES)
        if args.src:  # no face has been painted yet
            source = open_source(args.src, temp_dir, args.labels)
        size = args.size or source.size
        channels = args.channels or source.channels
        check(source.dtype == "uint8" or (size, channels) == (source.size, source.channels),
              f"latents keep their size {source.size} and {source.channels} channels")
        if args.latent_scale:
            check(source.dtype == "float32", "--latent_scale is for latents, not for images")
            deviation = 0.5 / args.latent_scale  # training divides by it and multiplies by 0.5
            source = source._replace(latent=[[0.0] * channels, [deviation] * channels])
        val, train = choose(source, args.num, args.classes, args.val_frac, args.seed)
        decoder = Decoder(size, channels, args.fit, args.range)
        new = Path(temp_dir, "new")
        new.mkdir()
        meta = write_set(new, source, decoder, val, train)
        meta["preprocessing"] = vars(args)
        Path(new, "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
        if os.path.exists(out):
            os.rename(out, f"{temp_dir}.old")  # not inside, where cleaning up would delete it
        os.rename(new, out)
        shutil.rmtree(f"{temp_dir}.old", ignore_errors=True)
    say(f"{out}: {meta['num_train']} images, {meta['num_val']} held out, {meta['rejected']} "
        "rejected")

# ---- The built-in data: faces, painted with ovals.
NUM_FACES = 12_000
FACE_CLASSES = ["short_hair", "short_hair_glasses", "long_hair", "long_hair_glasses"]
COLOURS = {  # make_face draws one of each, in this order
    "skin": "#ffe0c8 #f7cba8 #e9b088 #cf9062 #a96c44 #7f4d32",
    "hair": "#2a1f1c #4a2f20 #7a4a2a #a86c35 #d9a850 #eccb80 #b5502c #8e9099 #ddd8d2",
    "cloth": "#e4572e #2e86ab #f2b134 #3d9970 #7b5ea7 #e87ea1 #58b5b0 #364152",
    "wall": "#cfe6f5 #fbe3c8 #d9efd5 #f6d5dc #e2dbf3 #fdf0bd #cdeae6",
    "frame": "#22252b #7a3b2e #b3263c #3b5b8c",
    "iris": "#3d2a20 #2a5a94 #2f6e46 #5d4a26",
}
INK = "#3c1e28"
SHADOW = Image.radial_gradient("L").crop((96, 96, 256, 256)).point(lambda v: 0.4 * v)

def make_face(index, size=64, seed=0):
    """Face `index`, uint8 (size,size,3); its class is FACE_CLASSES[index % 4]."""
    rng = np.random.default_rng([seed, index])
    skin, hair, cloth, wall, frame, iris = [rng.choice(row.split()) for row in COLOURS.values()]
    turn, shift, smile, brow, parting = rng.uniform(-0.1, 0.1, 5)
    label = index % 4
    canvas = 3 * size  # painted large and reduced at the end, for smooth edges
    unit = 0.27 * canvas  # half the width of a head
    line = round(0.09 * unit)  # width of a drawn line
    image = Image.new("RGB", (canvas, canvas), wall)
    draw = ImageDraw.Draw(image, "RGBA")
    shadow = SHADOW.resize(image.size)

    def box(x, y, rx, ry):  # of an oval: its centre, and half its width and height
        x, y = x + 1.85 + shift, y + 1.75  # 1.85 units from the left is the middle
        return [unit * v for v in (x - rx, y - ry, x + rx, y + ry)]

    def paint(colour, *ovals, openings=()):
        """Ovals as one shape, with light from the upper left."""
        mask = Image.new("L", image.size)
        brush = ImageDraw.Draw(mask)
        for level, group in (255, ovals), (0, openings):
            for oval in group:
                brush.ellipse(box(*oval), level)
        image.paste(colour, mask=mask)
        image.paste(INK, mask=ImageChops.multiply(mask, shadow))
    if label >= 2:
        paint(hair, (0, -0.1, 1.2, 1.2), (0, 1, 1.22, 1.1))
    paint(cloth, (0, 2.5, 1.5, 1.1))
    paint(skin, (0, 1.2, 0.36, 0.5), (-1, 0.15, 0.2, 0.25), (1, 0.15, 0.2, 0.25))
    paint(skin, (0, -0.1, 1, 1.05), (0, 0.2, 0.88, 1))
    for side in -1, 1:
        x = turn + 0.42 * side
        draw.ellipse(box(x, 0.05, 0.2, 0.2), "white")
        draw.ellipse(box(x + turn / 2, 0.07, 0.14, 0.15), iris)
        draw.ellipse(box(x + turn / 2 - 0.05, 0, 0.05, 0.05), "white")
        draw.arc(box(x, brow - 0.15, 0.26, 0.2), 210, 330, INK, line)
    draw.arc(box(turn, 0.42, 0.36, 0.22 + smile), 20, 160, "#b03c46", line)
    cut_outs = [(2 * parting, 0.45, 0.86, 1), (0, 1.25, 1.3, 1.1)]
    paint(hair, (0, -0.18, 1.1, 1.12), openings=cut_outs)
    if label % 2:
        for x in turn - 0.43, turn + 0.43:
            draw.ellipse(box(x, 0.06, 0.36, 0.34), None, frame, line)
        draw.line(box(turn, 0.02, 0.1, 0), frame, line)  # the bridge, from left to right
    return np.asarray(image.reduce(3))

if __name__ == "__main__":
    run_script(main)
