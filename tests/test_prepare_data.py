"""prepare_data.py: sources, image rules, rejects, and an output that is complete or absent."""

import gzip
import io
import json
import os
import pickle
import posixpath
import re
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import time
import tracemalloc
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from conftest import make_dataset, mistake
from PIL import Image, ImageOps

import prepare_data
from model import normalised
from prepare_data import FACE_CLASSES, FITS, Decoder, Images, Parser, main, make_face, open_folder, open_source

SCRIPT = Path(prepare_data.__file__)
SPLITS = ("train", "val")


def noise(seed, height=12, width=12, channels=3):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def encoded(image, form="PNG", **options):
    """The bytes of a picture of Pillow in a file of this format."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def png(pixels, **options):
    return encoded(Image.fromarray(pixels), **options)


def images_of(*names):
    """{name: a picture}: the i-th shows noise(i)."""
    return {name: png(noise(i)) for i, name in enumerate(names)}


def tree(root, files):
    for name, data in files.items():
        path = os.path.join(root, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(data)
    return root


def zipped(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in reversed(files.items()):
            archive.writestr(name, data)
    return path


def tarred(path, files, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def prepare(src, out, *flags):
    """Runs main() -> the folder that it made."""
    main([str(src), f"--out={out}", *flags])
    return Path(out)


def refused(*argv):
    """The sentence with which main() refuses these arguments."""
    return mistake(main, *argv)


def read_all(src):
    """What the decoder yields of all candidates of a source: names, and the rejects."""
    decoder = Decoder()
    with TemporaryDirectory() as temp_dir:
        source = open_source(str(src), temp_dir)
        numbers = [i for i, _ in decoder.iter_images(source, range(len(source.names)))]
    return [source.names[i] for i in numbers], decoder.rejected


def one(data, **rules):
    """What the decoder makes of one encoded image."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "image")
        path.write_bytes(data)
        return Decoder(**rules).decode(str(path))


def content(folder):
    names = ("train.npy", "val.npy", "train_labels.npy", "val_labels.npy")
    return [Path(folder, name).read_bytes() for name in names if Path(folder, name).exists()]


# ---- Sources.


def test_folder_zip_and_tar_give_the_same_bytes(tmp_path):
    files = {f"{'cat' if i % 3 else 'dog'}/{i:02d}.png": png(noise(i, 20, 30)) for i in range(25)}
    wrapped = {f"set/{name}": data for name, data in files.items()}
    sources = [
        tree(tmp_path / "plain", files),
        zipped(tmp_path / "a.zip", wrapped),
        tarred(tmp_path / "b.tar", wrapped),
        tarred(tmp_path / "c.tar.gz", {f"./{name}": data for name, data in files.items()}, "w:gz"),
    ]
    outs = [prepare(src, tmp_path / f"out{i}", "--size=8") for i, src in enumerate(sources)]
    for out in outs[1:]:
        assert content(out) == content(outs[0])
    (train, labels, meta), (val, val_labels, _) = (open_folder(outs[0], s) for s in SPLITS)
    assert meta["class_names"] == ["cat", "dog"] and len(train) == 24 and len(val) == 1
    assert np.bincount(np.concatenate([labels, val_labels])).tolist() == [16, 9]


def test_every_image_keeps_its_label_and_none_is_lost(tmp_path):
    files = {f"{i % 4}/{i}.png": png(np.full((4, 4, 3), i, np.uint8)) for i in range(40)}
    out = prepare(tree(tmp_path / "src", files), tmp_path / "out", "--size=4", "--val_frac=0.25")
    seen = []
    for split, count in ("train", 30), ("val", 10):
        images, labels, _ = open_folder(out, split)
        assert images.shape == (count, 4, 4, 3) and labels.dtype == np.int64
        assert (images[:, 0, 0, 0] % 4 == labels).all()
        seen += images[:, 0, 0, 0].tolist()
    assert sorted(seen) == list(range(40)) and seen != sorted(seen)
    other = prepare(tmp_path / "src", tmp_path / "other", "--size=4", "--val_frac=0.25", "--seed=1")
    assert content(other) != content(out)


def cifar(path, poison=None):
    """The published layout: rows of 3*32*32 bytes, one pickled dictionary a batch."""
    files = {}
    pixels = []
    for name in ["data_batch_1", "data_batch_2", "test_batch"]:
        data = noise(len(files), 6, 3 * 32 * 32, 1)[..., 0]
        files[name] = pickle.dumps({"data": data, "labels": [len(files)] * 5 + [2]}, protocol=2)
        pixels.append(data.reshape(6, 3, 32, 32))
    files["batches.meta"] = pickle.dumps({"label_names": ["plane", "car", "bird"]}, protocol=2)
    if poison is not None:
        files["data_batch_2"] = pickle.dumps(poison)
    return tarred(path, {f"cifar-10-batches-py/{n}": d for n, d in files.items()}, "w:gz"), pixels


def test_cifar_archive_keeps_its_own_test_batch(tmp_path):
    src, pixels = cifar(tmp_path / "cifar-10-python.tar.gz")
    out = prepare(src, tmp_path / "out")
    (train, labels, meta), (val, val_labels, _) = (open_folder(out, s) for s in SPLITS)
    assert meta["class_names"] == ["plane", "car", "bird"] and meta["size"] == 32
    assert np.array_equal(val, pixels[2].transpose(0, 2, 3, 1)) and set(val_labels) == {2}
    expected = {p.transpose(1, 2, 0).tobytes(): n if i < 5 else 2 for n in (0, 1) for i, p in enumerate(pixels[n])}
    assert {image.tobytes(): label for image, label in zip(train, labels)} == expected


def test_cifar_100_has_fine_classes_and_its_test_file_is_held_out(tmp_path, monkeypatch):
    files = {"meta": pickle.dumps({"fine_label_names": [f"c{i}" for i in range(100)]}, 2)}
    pixels = {}
    for split, n in ("train", 100), ("test", 50):
        pixels[split] = noise(n, n, 3 * 32 * 32, 1)[..., 0]
        files[split] = pickle.dumps(dict(data=pixels[split], fine_labels=[*range(n)], coarse_labels=[0] * n), 2)
    src = tarred(tmp_path / "cifar-100-python.tar.gz", {f"cifar-100-python/{n}": d for n, d in files.items()}, "w:gz")
    out = prepare(src, tmp_path / "out")
    (x, y, meta), (x_val, y_val, _) = (open_folder(out, s) for s in SPLITS)
    assert meta["class_names"] == [f"c{i}" for i in range(100)] and (len(x), len(x_val)) == (100, 50)
    for images, labels, split in (x, y, "train"), (x_val, y_val, "test"):
        assert np.array_equal(images, pixels[split].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)[labels])
    # Unpacked by hand and named in several ways it is the same.
    tree(tmp_path / "cifar-100-python", files)
    monkeypatch.chdir(tmp_path)
    for src in "cifar-100-python", "cifar-100-python/", f"{tmp_path}/cifar-100-python":
        assert np.array_equal(open_folder(prepare(src, tmp_path / "again", "--force"))[0], x)


@pytest.mark.parametrize("name", ["test_batch", "data_batch_1", "my_data_batch_7"])
def test_photos_in_a_folder_that_is_called_like_a_file_of_cifar_are_photos(tmp_path, name):
    tree(tmp_path / name, images_of(*(f"{i}.png" for i in range(4))))
    assert len(open_folder(prepare(tmp_path / name, tmp_path / "out"))[0]) == 3


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_an_array_pickled_by_python_2_is_read():
    """As in the CIFAR-10 archive: numpy's module under its old name, byte strings as text."""
    pickled = (b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
               b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xff"
               b"J\xff\xff\xff\xffK\x00tb\x89U\x02\x80\xfftb.")
    assert prepare_data.SafeUnpickler(io.BytesIO(pickled), encoding="latin1").load().tolist() == [128, 255]
    # Importing this module would run a program: it is not imported.
    elsewhere = pickled.replace(b"numpy\ndtype", b"numpy.f2py.__main__\ndtype")
    assert prepare_data.SafeUnpickler(io.BytesIO(elsewhere), encoding="latin1").load().tolist() == [128, 255]
    assert "numpy.f2py.__main__" not in sys.modules


def test_a_pickle_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    src, _ = cifar("cifar-10-python.tar.gz", Bomb())
    assert "mkdir" in refused(src, "--out", "out")
    np.save("objects.npy", np.array([Bomb()], object), allow_pickle=True)
    refused("objects.npy", "--out", "out")
    assert not os.path.exists("exploded") and not os.path.exists("out")


def idx(array):
    """The format of MNIST's files (LeCun et al.): 0, 0, 8 = uint8, the number of dimensions and, as
    big-endian int32, each of them; then the values."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()


@pytest.mark.parametrize("pack", ["plain", "gz", "both", "zip"])
@pytest.mark.parametrize(("train", "test"), [
    ("train-{}-{}-ubyte", "t10k-{}-{}-ubyte"),
    ("raw/train-{}.{}-ubyte", "raw/t10k-{}.{}-ubyte"),
    ("emnist-letters-train-{}-{}-ubyte", "emnist-letters-test-{}-{}-ubyte"),
])
def test_mnist_is_read_as_downloaded_and_its_test_images_are_held_out(tmp_path, pack, train, test):
    x, y = noise(0, 50 * 28, 28, 1).reshape(50, 28, 28), np.arange(50, dtype=np.uint8) % 10
    files = {}
    for name, part in (train, slice(0, 40)), (test, slice(40, 50)):
        files[name.format("images", "idx3")] = idx(x[part])
        files[name.format("labels", "idx1")] = idx(y[part])
    compressed = {f"{name}.gz": gzip.compress(data) for name, data in files.items()}
    if pack == "zip":
        src = zipped(tmp_path / "mnist.zip", compressed)
    else:
        src = tree(tmp_path / "mnist", dict(plain=files, gz=compressed, both=files | compressed)[pack])
    out = prepare(src, tmp_path / "out")
    (train_x, train_y, meta), (val_x, val_y, _) = (open_folder(out, s) for s in SPLITS)
    assert (meta["size"], meta["channels"], meta["class_names"]) == (28, 1, [*"0123456789"])
    assert np.array_equal(val_x[..., 0], x[40:]) and val_y.tolist() == y[40:].tolist()
    number = {image.tobytes(): label for image, label in zip(x[:40], y[:40])}
    assert len(train_x) == 40 and [number[image.tobytes()] for image in train_x] == train_y.tolist()


def test_a_damaged_idx_file_is_refused_and_so_are_two_sets_in_one_folder(tmp_path):
    x, y = idx(noise(0, 9 * 4, 4, 1).reshape(9, 4, 4)), idx(np.zeros(9, np.uint8))
    one_less = idx(np.zeros(8, np.uint8))
    names = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
    for i, pair in enumerate([(x[:-7], y), (x, y[:-1]), (b"", y), (x + b"0", y), (x, one_less)]):
        src = tree(tmp_path / str(i), dict(zip(names, pair)))
        assert str(src) in refused(src, "--out", tmp_path / "out")
    two = tree(tmp_path / "two", {f"{name}-{names[0]}": x for name in ("letters", "digits")})
    assert "several sets" in refused(two, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("names", [("x_train", "y_train", "x_test", "y_test"), ("images", "labels"), ("x", "y"),
                                   ("train_images", "train_labels", "val_images", "val_labels"), ("arr_0", "arr_1")])
@pytest.mark.parametrize("shape", [(28, 28), (28, 28, 1), (28, 28, 3)])
def test_arrays_of_several_names_and_grey_ones_are_read(tmp_path, names, shape):
    rng = np.random.default_rng(0)
    kept = {}
    for images, labels, n in zip(names[::2], names[1::2], (30, 10)):
        kept |= {images: rng.integers(0, 256, (n, *shape), np.uint8), labels: np.arange(n).reshape(-1, 1) % 10}
    np.savez(tmp_path / "a.npz", **kept)
    out = prepare(tmp_path / "a.npz", tmp_path / "out")
    (x, y, meta), (x_val, y_val, _) = (open_folder(out, s) for s in SPLITS)
    assert x.shape[1:] == (28, 28, shape[2] if len(shape) == 3 else 1) and meta["class_names"] == [*"0123456789"]
    stored = {a.tobytes(): i % 10 for i, a in enumerate(kept[names[0]])}
    assert all(stored[a.tobytes()] == label for a, label in zip(x, y))
    if len(names) == 4:
        assert len(x) == 30 and y_val.tolist() == [*range(10)]
        assert np.array_equal(x_val.squeeze(), kept[names[2]].squeeze())


@pytest.mark.parametrize("names", [["cat", "dog", "owl"], [b"cat", b"dog", b"owl"], [3, 12, 7], np.array([2.5, 0, 1])])
def test_class_names_in_an_archive_may_be_text_bytes_or_numbers(tmp_path, names):
    np.savez(tmp_path / "a.npz", x=noise(0, 12 * 4, 4).reshape(12, 4, 4, 3), y=np.arange(12) % 3, class_names=names)
    _, labels, meta = open_folder(prepare(tmp_path / "a.npz", tmp_path / "out"))
    assert meta["class_names"] == [name.decode() if isinstance(name, bytes) else str(name) for name in names]
    assert {*labels} == {0, 1, 2}
    np.savez(tmp_path / "b.npz", x=noise(0, 12 * 4, 4).reshape(12, 4, 4, 3), y=np.arange(12) % 4, class_names=names)
    assert "class_names" in refused(tmp_path / "b.npz", "--out", tmp_path / "b")


@pytest.mark.parametrize("array", [
    np.zeros((9, 784), np.uint8), np.zeros((9, 64)), np.zeros(9, np.uint8), np.zeros((2, 9, 4, 4, 3), np.uint8),
    np.zeros((9, 4, 4, 7), np.uint8), np.zeros((9, 3, 6, 6), np.uint8), np.zeros((9, 4, 4, 3), bool),
    np.zeros((9, 4, 4, 3), int), np.zeros((9, 4, 6, 8)), np.zeros((0, 4, 4, 3), np.uint8), np.zeros((9, 4, 4, 3), "U1"),
], ids=lambda a: f"{a.dtype}{a.shape}")
def test_arrays_that_are_neither_images_nor_latents_are_refused_by_name(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    assert "a.npy" in refused(tmp_path / "a.npy", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_archive_of_other_arrays_names_them(tmp_path):
    np.savez(tmp_path / "a.npz", moments=np.zeros((3, 3)))
    assert "moments" in refused(tmp_path / "a.npz", "--out", tmp_path / "out")


def test_latents_round_trip_with_the_mean_and_deviation_of_each_channel(tmp_path):
    latents = np.random.default_rng(0).normal(0.3, 1.7, (50, 4, 6, 6))
    latents = latents * np.array([1, 10, 0.1, 3])[:, None, None] + np.arange(4)[:, None, None]
    np.save(tmp_path / "z.npy", latents)
    np.save(tmp_path / "labels.npy", np.arange(50) % 5)
    out = prepare(tmp_path / "z.npy", tmp_path / "out", f"--labels={tmp_path}/labels.npy")
    (train, labels, meta), (val, val_labels, _) = (open_folder(out, split) for split in SPLITS)
    assert train.dtype == np.float32 and train.shape[1:] == (6, 6, 4) and len(train) == 48
    stored = latents.transpose(0, 2, 3, 1).astype(np.float32)
    position = {z.tobytes(): i for i, z in enumerate(stored)}  # as they are, not normalised
    for split, numbers in (train, labels), (val, val_labels):
        assert [position[z.tobytes()] % 5 for z in split] == numbers.tolist()
    own = stored[[position[z.tobytes()] for z in train]].astype(np.float64)
    np.testing.assert_allclose(meta["latent"], [own.mean((0, 1, 2)), own.std((0, 1, 2))], rtol=1e-9)
    refused(tmp_path / "z.npy", "--out", tmp_path / "b", "--size", 8)
    for wrong in np.arange(49), np.arange(50) / 2, np.eye(50):
        np.save(tmp_path / "labels.npy", wrong)
        argv = tmp_path / "z.npy", "--labels", tmp_path / "labels.npy", "--out", tmp_path / "b"
        assert "50 class numbers" in refused(*argv) and "z.npy" in refused(*argv)


@pytest.mark.parametrize("value", [0, 0.1, -3.7, 1e5])
def test_a_constant_channel_of_latents_keeps_its_scale(tmp_path, value):
    latents = np.random.default_rng(0).normal(size=(30, 4, 6, 6)).astype(np.float32)
    latents[:, 2] = value
    np.save(tmp_path / "z.npy", latents)
    out = prepare(tmp_path / "z.npy", tmp_path / "out")
    mean, deviation = open_folder(out)[2]["latent"]
    assert deviation[2] == 1 and mean[2] == pytest.approx(value, abs=1e-6) and min(deviation) > 0.5
    patches = Images(str(out)).read(np.arange(9), None, np.zeros(9, bool))
    seen = normalised(torch.from_numpy(patches), (mean, deviation)).unflatten(-1, (-1, 4))  # in training
    assert seen.isfinite().all() and seen[..., 2].abs().max() < 1e-6


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])  # the last is infinite as float32
def test_latents_that_are_not_finite_are_rejected(tmp_path, capsys, value):
    z = np.ones((20, 4, 6, 6))
    z[7, 0, 3, 3] = value
    np.save(tmp_path / "z.npy", z)
    meta = open_folder(prepare(tmp_path / "z.npy", tmp_path / "out"))[2]
    assert "rejected 7: " in capsys.readouterr().err and meta["num_train"] + meta["num_val"] == 19
    np.save(tmp_path / "z.npy", np.full((9, 4, 6, 6), value))
    assert "can't be read" in refused(tmp_path / "z.npy", "--out", tmp_path / "none")


def test_latents_of_another_size_than_the_first_are_refused(tmp_path):
    np.savez(tmp_path / "z.npz", x_train=np.zeros((9, 4, 8, 8)), x_test=np.ones((3, 4, 16, 16)))
    assert "z.npz" in refused(tmp_path / "z.npz", "--out", tmp_path / "out")


def test_generated_images_become_a_data_set(tmp_path):
    images = noise(0, 7 * 16, 16).reshape(7, 16, 16, 3)
    np.savez_compressed(tmp_path / "samples.npz", images, np.arange(7) % 2)
    out = prepare(tmp_path / "samples.npz", tmp_path / "out")
    train, labels, meta = open_folder(out)
    assert meta["size"] == 16 and meta["latent"] is None and meta["class_names"] == ["0", "1"]
    position = {image.tobytes(): i for i, image in enumerate(images)}
    assert all(position[x.tobytes()] % 2 == y for x, y in zip(train, labels))
    np.save(tmp_path / "grey.npy", images[..., :1])
    grey = open_folder(prepare(tmp_path / "grey.npy", tmp_path / "grey", "--channels=1"))[0]
    assert grey.shape == (6, 16, 16, 1)


# ---- What is a class: layouts that people bring, each with others of its kind.


def layout(tmp_path, files, *flags):
    """Prepares files of `images_of` -> class names or None, and for training and held-out images
    {path: class or None}."""
    number = len(list(tmp_path.iterdir()))
    src = zipped(tmp_path / f"{number}.zip", files)
    out = prepare(src, tmp_path / f"{number}-out", "--size=12", "--val_frac=0.01", *flags)
    pictures = [name for name, data in files.items() if data.startswith(b"\x89PNG")]
    path_of = {noise(i).tobytes(): name for i, name in enumerate(pictures)}
    found = []
    for split in SPLITS:
        images, labels, meta = open_folder(out, split)
        names = meta["class_names"]
        found.append({path_of[x.tobytes()]: names[y] if names and y >= 0 else None for x, y in zip(images, labels)})
        assert len(found[-1]) == len(images)
    return names, *found


def told(capsys):
    """What was printed under "left out" about files."""
    lines = capsys.readouterr().err.splitlines()
    return next(line for line in lines if line.startswith("left out: "))


@pytest.mark.parametrize(("names", "classes"), [
    (["1.png", "2.png"], None),
    (["wrap/1.png", "wrap/2.png"], None),
    (["img_align/img_align/1.png", "img_align/img_align/2.png"], None),
    (["a/1.png", "b/2.png"], ["a", "b"]),
    (["wrap/b/1.png", "wrap/a/2.png"], ["a", "b"]),
    (["wrap\\b\\1.png", "wrap\\a\\2.png"], ["a", "b"]),
    (["x/deep/a/1.png", "y/b/2.png"], ["x", "y"]),
    (["cat/manx/1.png", "cat/burma/2.png", "dog/pug/3.png"], ["cat", "dog"]),
    (["cat/train/1.png", "cat/test/2.png", "dog/train/3.png"], ["cat", "dog"]),
    (["a/1.png", "b/2.png", "README.md", "docs/more.txt"], ["a", "b"]),
    (["train/a/1.png", "train/b/2.png"], ["a", "b"]),
    (["test/1.png", "test/2.png"], None),
])
def test_the_class_is_the_first_folder_below_those_of_all_images(tmp_path, names, classes):
    src = zipped(tmp_path / "src.zip", {name: png(noise(0)) for name in names})
    assert open_folder(prepare(src, tmp_path / "out"))[2]["class_names"] == classes


@pytest.mark.parametrize(("train", "val", "test"), [
    ("train", "val", "test"), ("Train", "Valid", "Test"), ("TRAIN", "validation", "TEST")])
@pytest.mark.parametrize("wrap", ["", "top/deep/"])
def test_splits_are_no_classes_and_what_is_held_out_stays_so(tmp_path, capsys, train, val, test, wrap):
    trained = [f"{wrap}{train}/{c}/images/{i}.png" for c in "ab" for i in range(3)]
    held = [f"{wrap}{val}/{c}/images/0.png" for c in "ab"]
    names, kept, held_out = layout(tmp_path, images_of(*trained, *held, f"{wrap}{test}/images/0.png"))
    said = capsys.readouterr().err
    assert names == ["a", "b"] and {*kept} == {*trained} and {*held_out} == {*held}
    assert all(path.split("/")[-3] == name for path, name in (kept | held_out).items())
    assert "'test images': 1" in said and "class a: 3 images" in said and "class b: 3 images" in said


def test_a_val_without_classes_beside_a_train_with_classes_is_left_out(tmp_path, capsys):
    trained = [f"tiny/train/n{c}/images/n{c}_{i}.png" for c in (1, 2) for i in range(3)]
    tiny = images_of(*trained, "tiny/val/images/0.png", "tiny/val/images/1.png", "tiny/test/images/0.png")
    flat = {path.replace("val/images", "val").replace("test/images", "test"): data for path, data in tiny.items()}
    flat["tiny/val/val_annotations.txt"] = b"0.png n1"
    names, kept, held = layout(tmp_path, flat)
    said = told(capsys)
    assert names == ["n1", "n2"] and {*kept, *held} == {*trained} and len(held) == 1
    assert re.search("'val images[^']*': 2", said) and "'test images': 1" in said and "'.txt': 1" in said
    unlabelled = images_of(*(f"train/{i}.png" for i in range(4)), "val/0.png", "val/1.png")
    names, kept, held = layout(tmp_path, unlabelled)
    assert names is None and {*held} == {"val/0.png", "val/1.png"} and len(kept) == 4


@pytest.mark.parametrize("name", [
    "trainA", "TrainB", "testset", "dev", "train_64", "test2017", "val-1", "training", "Validation (1)", "test images",
    "training_data", "testing-set", "train", "TEST"])
def test_a_folder_that_looks_like_a_split_but_is_none_is_refused_by_name(tmp_path, name):
    files = images_of(f"{name}/1.png", f"{name}/2.png")
    assert layout(tmp_path, files)[0] is None  # alone it means nothing
    src = zipped(tmp_path / "src.zip", files | images_of("cat/1.png"))
    assert f"folder {name} looks like a split" in refused(src, "--out", tmp_path / "out")


@pytest.mark.parametrize("names", [["trains", "valley"], ["device", "tester"], ["Valentine", "trainers"]])
def test_a_word_that_only_begins_like_a_split_is_a_class(tmp_path, names):
    files = images_of(*(f"{name}/{i}.png" for name in names for i in range(2)))
    assert layout(tmp_path, files)[0] == sorted(names)


def test_splits_without_training_images_are_refused(tmp_path):
    src = zipped(tmp_path / "src.zip", images_of("val/1.png", "test/2.png"))
    assert "none called train" in refused(src, "--out", tmp_path / "out")


@pytest.mark.parametrize("files", [
    ["a/1.png", "b/2.png", "logo.png"], ["0.png", "1.png", "2.png", "a/0.png"],
    ["set/deep/1.png", "set/2.png"], ["train/1.png", "train/2.png", "train/a/3.png", "val/4.png"]])
def test_a_set_of_which_some_have_a_class_is_refused_with_two_examples(tmp_path, files):
    sentence = refused(zipped(tmp_path / "src.zip", images_of(*files)), "--out", tmp_path / "out")
    with_class, without = sentence.split(": ", 1)[1].split(" has a class, ")
    without = without.split(" has none")[0]
    assert {with_class, without} <= {*files} and with_class.count("/") > without.count("/")


@pytest.mark.parametrize("wrap", ["", "cat/", "cat/deep/"])
def test_names_of_programs_and_systems_are_skipped_at_any_depth(tmp_path, capsys, wrap):
    clutter = [".DS_Store", ".thumbs/1.png", "@eaDir/1.png/SYNOPHOTO.png", "__MACOSX/cat/._1.png", "._1.png", "@x.png",
               "__pycache__/1.png"]
    good = images_of("cat/1.png", "cat/2.png", "dog/1.png", "dog/a__b.png", "dog/me@home.png", "dog/x.y.png")
    names, kept, held = layout(tmp_path, good | {wrap + path: b"x" for path in clutter})
    assert names == ["cat", "dog"] and {*kept, *held} == {*good}
    said = capsys.readouterr().err
    assert "left out: nothing" in said


def test_what_is_not_read_is_told_and_refused_by_its_kind_where_there_is_nothing_else(tmp_path, capsys):
    strays = {"LICENSE": b"text", "devkit/x.mat": b"\0", "photo.heic": b"\0", "a/1.cls": b"3"}
    files = images_of(*(f"{c}/{i}.png" for c in "ab" for i in range(4))) | strays
    assert layout(tmp_path, files)[0] == ["a", "b"]
    said = told(capsys)
    assert all(word in said for word in ("'': 1", "'.mat': 1", "'.heic': 1", "'.cls': 1"))
    latents = {f"{i}.npy": b"" for i in range(3)}
    for files in latents, {"1.HEIC": b"", "2.HEIC": b""}, {"a/1": png(noise(0)), "b/2": png(noise(1))}:
        sentence = refused(zipped(tmp_path / "x.zip", files), "--out", tmp_path / "x")
        assert "no images" in sentence and f"'{Path([*files][0]).suffix}': {len(files)}" in sentence


def test_classes_that_are_numbers_sort_as_numbers_and_mean_the_same_in_an_array(tmp_path):
    src = zipped(tmp_path / "n.zip", images_of(*(f"{c}/{i}.png" for c in range(12) for i in range(2))))
    folder = prepare(src, tmp_path / "folder", "--size=12")
    np.savez(tmp_path / "n.npz", np.stack([noise(i) for i in range(24)]), np.repeat(np.arange(12), 2))
    array = prepare(tmp_path / "n.npz", tmp_path / "array")
    both = Images(f"{folder},{array}")
    assert both.meta["class_names"] == [str(i) for i in range(12)]
    assert np.array_equal(both.labels, np.concatenate([open_folder(f)[1] for f in (folder, array)]))


def edm(names, labels):
    """A dataset.json of EDM beside images."""
    return images_of(*names) | {"dataset.json": json.dumps({"labels": labels}).encode()}


@pytest.mark.parametrize("as_rows", [list, dict])
def test_the_classes_of_edm_override_the_folders(tmp_path, as_rows):
    names = [f"0000{i % 2}/img{i:08d}.png" for i in range(12)]
    classes = {name: i % 3 for i, name in enumerate(names)}
    found, kept, held = layout(tmp_path, edm(names, as_rows(classes.items())))
    assert found == ["0", "1", "2"] and (kept | held) == {name: str(label) for name, label in classes.items()}
    assert layout(tmp_path, edm(names, None))[0] is None
    assert layout(tmp_path, edm(names, [[name, -1] for name in names]))[0] is None
    some = zipped(tmp_path / "some.zip", edm(names, [[name, None if "1/" in name else 0] for name in names]))
    assert "has a class" in refused(some, "--out", tmp_path / "out")


@pytest.mark.parametrize("table", [
    b'{"labels": {"background": 0, "kidney": 1}, "numTraining": 9}',  # nnU-Net
    b'{"labels": {"0": "background", "1": "liver"}, "training": [{"image": "a/1.png", "label": "b/1.png"}]}',
    b'{"labels": [["elsewhere.png", 3]]}', b'{"labels": 3}', b'{"labels": [["a/1.png", 0, 0]]}',
    b'[{"file_name": "a/1.png"}]', b"[]", b"null", b'{"images": []}', b'{"labels": [["a/1.png", 1', b"", b"\xff\0",
])
def test_a_dataset_json_of_another_kind_leaves_the_folders_in_force(tmp_path, table):
    files = images_of("a/1.png", "a/2.png", "b/1.png", "b/2.png")
    names, kept, held = layout(tmp_path, files | {"dataset.json": table})
    assert names == ["a", "b"] and (kept | held) == {path: path[0] for path in files}


@pytest.mark.parametrize("meta", [b"{}", b"[]", b'{"class_names": ["x"], "size": 8}', b"{", b""])
def test_a_meta_json_of_another_kind_does_not_make_a_folder_prepared(tmp_path, meta):
    files = images_of("a/1.png", "a/2.png", "b/1.png", "b/2.png")
    for beside in {}, {"train.npy": b"x"}:
        names, kept, held = layout(tmp_path, files | {"meta.json": meta} | beside)
        assert names == ["a", "b"] and {*kept, *held} == {*files}


def test_labels_of_a_folder_are_refused_and_a_missing_file_is_named(tmp_path):
    tree(tmp_path / "src", images_of("1.png", "2.png"))
    assert "--labels" in refused(tmp_path / "src", "--labels=x.npy", "--out", tmp_path / "out")
    np.save(tmp_path / "z.npy", np.zeros((4, 4, 8, 8)))
    assert "nowhere.npy" in refused(tmp_path / "z.npy", "--labels=nowhere.npy", "--out", tmp_path / "out")


def test_a_set_is_named_after_its_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tree(tmp_path / "photos", images_of("1.png", "2.png"))
    shutil.make_archive("x", "gztar", "photos")
    shutil.make_archive("y", "zip", "photos")
    for src, name in ("photos", "photos"), ("x.tar.gz", "x"), ("y.zip", "y"):
        main([src])
        assert (tmp_path / "data" / name / "train.npy").exists()


def test_a_class_folder_may_be_a_link(tmp_path):
    tree(tmp_path / "set", images_of("a/0.png", "a/1.png", "b/0.png", "b/1.png"))
    tree(tmp_path / "elsewhere", images_of("c/0.png", "c/1.png"))
    (tmp_path / "set/c").symlink_to(tmp_path / "elsewhere/c")
    assert open_folder(prepare(tmp_path / "set", tmp_path / "out"))[2]["class_names"] == ["a", "b", "c"]


def test_more_than_a_thousand_classes_or_one_image_a_class_are_told(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for n, classes in (1101, 1101), (2002, 1001), (9, 9), (2000, 1000):
        np.savez(tmp_path / "x.npz", rng.integers(0, 256, (n, 2, 2, 3), np.uint8), np.arange(n) % classes)
        prepare(tmp_path / "x.npz", tmp_path / "out", "--force")
        assert ("is this right?" in capsys.readouterr().err) == (n != 2000)


def test_no_more_than_ten_thousand_images_are_held_out_and_never_the_last_of_a_class():
    many = prepare_data.Source(range(300_000), None, [""] * 300_000)
    val, train = prepare_data.choose(many)
    assert len(val) == 10_000 and len(train) == 290_000
    few = prepare_data.Source(range(6), None, [*"aabbbc"])
    for seed in range(20):
        val, train = prepare_data.choose(few, val_frac=0.5, seed=seed)
        assert {few.classes[i] for i in train} == {*"abc"} and sorted(val + train) == [*range(6)]


def test_incomplete_is_said_of_incomplete_files_alone(tmp_path):
    whole = zipped(tmp_path / "whole.zip", images_of("1.png", "2.png")).read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[:-30])
    assert "a complete .zip" in refused(tmp_path / "cut.zip", "--out", tmp_path / "out")
    np.savez(tmp_path / "a.npz", moments=np.zeros((3, 3)))
    assert "a complete .zip" not in refused(tmp_path / "a.npz", "--out", tmp_path / "out")


def test_a_full_disk_is_told_while_unpacking(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "extractall", full)
    assert "No space left" in refused(tarred(tmp_path / "a.tar", images_of("1.png")), "--out", tmp_path / "out")


# ---- Classes, and subsets of a prepared folder.


def test_class_names_are_those_of_kept_images_and_integers_sort_as_numbers(tmp_path):
    files = {f"{name}/{i}.png": png(noise(i)) for name in ("10", "2", "1") for i in range(4)}
    src = tree(tmp_path / "src", files | {"7/broken.png": b"x", "8/notes.txt": b"x"})
    out = prepare(src, tmp_path / "out", "--size=12")
    images, labels, meta = open_folder(out)
    assert meta["class_names"] == ["1", "2", "10"]
    where = {noise(i).tobytes(): i for i in range(4)}  # each image is in every class once
    for number in range(3):
        mine = [where[image.tobytes()] for image in images[labels == number]]
        assert len(set(mine)) == len(mine) >= 3
    words = {f"{name}/{i}.png": png(noise(i)) for name in ("b10", "b2", "a") for i in range(2)}
    out = prepare(tree(tmp_path / "words", words), tmp_path / "words_out")
    assert open_folder(out)[2]["class_names"] == ["a", "b10", "b2"]  # as the alphabet has it


def test_a_prepared_folder_is_a_source_of_balanced_subsets_and_val_stays_held_out(tmp_path):
    counts = {"ant": 30, "bee": 12, "cow": 4}
    files = {f"{name}/{i}.png": png(noise([i, n], 4, 4))
             for n, (name, count) in enumerate(counts.items()) for i in range(count)}
    whole = prepare(tree(tmp_path / "src", files), tmp_path / "whole", "--size=4", "--val_frac=0.2")
    (images, labels, meta), (val, val_labels, _) = (open_folder(whole, s) for s in SPLITS)
    label_of = {image.tobytes(): meta["class_names"][n] for image, n in zip(images, labels)}

    def names(folder, split="train"):
        found, numbers, meta = open_folder(folder, split)
        return found, [meta["class_names"][n] for n in numbers]

    some = prepare(whole, tmp_path / "some", "--num=13")
    found, classes = names(some)
    rare = list(label_of.values()).count("cow")  # the even share would be 4 or 5 of each class
    assert len(found) == len({x.tobytes() for x in found}) == 13 and rare <= 4
    left = 13 - rare
    assert sorted(map(classes.count, counts)) == sorted([rare, left // 2, left - left // 2])
    assert classes == [label_of[x.tobytes()] for x in found]  # and no image of val.npy
    assert content(some)[1] == content(whole)[1]  # val.npy itself

    assert content(prepare(whole, tmp_path / "again", "--num=13")) == content(some)
    assert content(prepare(whole, tmp_path / "seed", "--num=13", "--seed=1")) != content(some)

    pair = prepare(whole, tmp_path / "pair", "--classes=cow,ant")
    found, classes = names(pair)
    assert open_folder(pair)[2]["class_names"] == ["ant", "cow"]  # in the order of the source
    expected = {x for x, name in label_of.items() if name != "bee"}
    assert {x.tobytes() for x in found} == expected and len(found) == len(expected)
    assert classes == [label_of[x.tobytes()] for x in found]
    held, held_classes = names(pair, "val")
    keep = [i for i, n in enumerate(val_labels) if meta["class_names"][n] != "bee"]
    assert np.array_equal(held, val[keep])
    assert held_classes == [meta["class_names"][val_labels[i]] for i in keep]

    assert "dog" in refused(whole, "--classes=ant,dog", "--out", tmp_path / "bad")
    plain = make_dataset(tmp_path / "plain")
    assert "ant" in refused(plain, "--classes=ant", "--out", tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_num_is_the_number_of_training_images_of_any_source(tmp_path):
    src = tree(tmp_path / "src", {f"{i}.png": png(noise(i, 4, 4)) for i in range(60)})
    out = prepare(src, tmp_path / "out", "--size=4", "--num=40")
    train, val = (open_folder(out, s)[0] for s in SPLITS)
    assert len(train) == 40 and not {x.tobytes() for x in train} & {x.tobytes() for x in val}


# ---- What training reads.


def test_images_read_as_slices_of_the_whole_images_of_several_folders(tmp_path):
    folders = [make_dataset(tmp_path / f"{i}", n=n, seed=i) for i, n in enumerate((5, 9, 3))]
    rng, p = np.random.default_rng(0), 4
    for folder, n in zip(folders, (5, 9, 3)):
        np.save(folder / "train.npy", noise(n, 16 * n, 16).reshape(n, 16, 16, 3))
    whole = np.concatenate([np.load(folder / "train.npy") for folder in folders])
    images = Images(",".join(map(str, folders)), patch_size=p)
    assert len(images) == 17 and images.meta["class_names"] is None
    assert images.labels.tolist() == [-1] * 17

    def patch(i, number, mirrored):
        image = whole[i][:, ::-1] if mirrored else whole[i]
        y, x = number // 4 * p, number % 4 * p
        return image[y : y + p, x : x + p].reshape(-1)

    index = rng.permutation(17).repeat(2)  # out of order, and some twice
    flip = rng.random(34) < 0.5
    visible = np.stack([rng.permutation(16)[:6] for _ in index])
    for shown in visible, None:
        expected = [[patch(i, number, f) for number in (range(16) if shown is None else shown[j])]
                    for j, (i, f) in enumerate(zip(index, flip))]
        found = images.read(index, shown, flip)
        assert found.dtype == np.uint8 and np.array_equal(found, expected)
    assert images.read(index[:0], visible[:0], flip[:0]).shape == (0, 6, 48)
    whole = np.load(folders[1] / "val.npy")
    val = Images(str(folders[1]), "val", patch_size=p).read(np.arange(8), None, np.zeros(8, bool))
    assert np.array_equal(val, [[patch(i, n, False) for n in range(16)] for i in range(8)])


def named(folder, names, **how):
    """A prepared folder with these class names (None: without classes)."""
    make_dataset(folder, classes=len(names or ()), **how)
    meta = json.loads((folder / "meta.json").read_text()) | {"class_names": names}
    (folder / "meta.json").write_text(json.dumps(meta))
    return str(folder)


def test_classes_of_several_folders_are_united_by_name(tmp_path):
    tables = [["cat", "dog"], None, ["fox", "dog", "ant"]]
    folders = [named(tmp_path / f"{i}", names, n=6, seed=i) for i, names in enumerate(tables)]
    said = [names[j % len(names)] if names else None for names in tables for j in range(6)]
    for first in [], ["fox", "owl"]:
        images = Images(",".join(folders), class_names=first)
        names = images.meta["class_names"]
        assert names[: len(first)] == first  # a model keeps its numbers
        assert len(set(names)) == len(names) and set(names) == {*first, "cat", "dog", "fox", "ant"}
        assert images.labels.dtype == np.int64 and len(images.labels) == len(images) == 18
        assert [None if n == -1 else names[n] for n in images.labels] == said
    alone = Images(folders[1], class_names=["owl"])
    assert alone.labels.tolist() == [-1] * 6 and alone.meta["class_names"] == ["owl"]


def test_folders_of_other_sizes_or_kinds_are_not_mixed(tmp_path):
    a, *others = (str(make_dataset(tmp_path / name, **how)) for name, how in {
        "a": {}, "size": {"size": 8}, "grey": {"channels": 1}, "latents": {"dtype": np.float32}}.items())
    for other in others:
        assert "alike" in mistake(lambda folders: Images(",".join(folders)), a, other)
    assert "not a complete data set" in mistake(lambda folders: Images(*folders), tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "dtype", "shape", "labels", "range", "negative",
                                    "meta", "count", "missing", "zip"])
def test_a_damaged_data_set_is_not_read(tmp_path, damage):
    files = {f"{i % 2}/{i}.png": png(noise(i)) for i in range(8)}
    out = prepare(tree(tmp_path / "src", files), tmp_path / "out", "--size=4")
    images, labels, meta = open_folder(out)
    images = np.array(images)
    if damage == "truncated":
        data = (out / "train.npy").read_bytes()
        (out / "train.npy").write_bytes(data[:-7])
    elif damage in ("dtype", "shape"):
        np.save(out / "train.npy", images.astype(int) if damage == "dtype" else images[:, 1:])
    elif damage in ("labels", "range", "negative"):
        wrong = {"labels": labels[1:], "range": labels + 1, "negative": labels - 2}[damage]
        np.save(out / "train_labels.npy", wrong)
    elif damage == "missing":
        (out / "train_labels.npy").unlink()
    elif damage == "zip":
        zipped(out / "train.npy", {"arr_0.npy": b""})
    else:
        text = "[" if damage == "meta" else json.dumps(meta | {"num_train": 99})
        (out / "meta.json").write_text(text)
    assert str(out) in mistake(lambda folders: Images(*folders), out)


# ---- Image rules.


def test_exif_orientation_is_applied():
    pixels = noise(0, 8, 12)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated clockwise
    assert np.array_equal(one(png(pixels, exif=exif)), np.rot90(pixels, -1))


def test_transparency_shows_white():
    rgba = noise(1, 9, 9, 4)
    alpha = rgba[..., 3:] / 255
    assert np.abs(one(png(rgba)) - (alpha * rgba[..., :3] + (1 - alpha) * 255)).max() <= 1
    palette = Image.fromarray(np.arange(4, dtype=np.uint8).reshape(2, 2), "P")
    palette.putpalette([10, 20, 30] * 4)
    assert one(encoded(palette, transparency=3))[..., 0].tolist() == [[10, 10], [10, 255]]


GREY = {  # how grey images of more than 8 bits come: what they hold, and the bytes of a file
    "16-bit PNG": (np.uint16, png),
    "16-bit TIFF": (np.uint16, lambda v: encoded(Image.fromarray(v), "TIFF")),
    "big-endian TIFF": (np.uint16, lambda v: encoded(Image.fromarray(v.astype(">u2")), "TIFF")),
    "signed 16-bit TIFF": (
        np.int16, lambda v: encoded(Image.fromarray(v.view(np.uint16)), "TIFF", tiffinfo={339: 2})),
    "signed 32-bit TIFF": (np.int32, lambda v: encoded(Image.fromarray(v), "TIFF")),
    "unsigned 32-bit TIFF": (
        np.uint32, lambda v: encoded(Image.fromarray(v.view(np.int32)), "TIFF", tiffinfo={339: 1})),
    "float TIFF": (np.float32, lambda v: encoded(Image.fromarray(v), "TIFF")),
}


def grey_files(form, low, high):
    """{name: file}: five images, whose values go from low to high only together; and the values."""
    dtype, encode = GREY[form]
    values = np.linspace(low, high, 5 * 64).astype(dtype).reshape(5, 8, 8)
    return {f"{i}.tif": encode(v) for i, v in enumerate(values)}, values.astype(float)


def prepared_grey(src, out, *flags):
    """The pixels of the training and held-out images, darkest first."""
    prepare(src, out, "--size=8", "--channels=1", *flags)
    images = np.concatenate([open_folder(out, s)[0] for s in SPLITS])
    return np.sort(images.reshape(len(images), 64), axis=0)


@pytest.mark.parametrize("form", [form for form in GREY if form != "signed 16-bit TIFF"])  # these end at 32767
@pytest.mark.parametrize("low, high", [(0, 65535), (0, 32768), (1200, 60000)])
def test_grey_of_the_full_16_bits_is_scaled_by_it(tmp_path, form, low, high):
    files, values = grey_files(form, low, high)
    found = prepared_grey(tree(tmp_path / "src", files), tmp_path / "out")
    assert np.array_equal(found, np.round(values / 257).reshape(5, 64))  # 65535 = 257 * 255


@pytest.mark.parametrize(("form", "low", "high"), [
    *((form, 0, 4095) for form in GREY),  # 12 bits
    ("16-bit PNG", 300, 900), ("16-bit PNG", 0, 32767), ("16-bit TIFF", 0, 1),
    ("signed 16-bit TIFF", -1024, 3071), ("signed 16-bit TIFF", -32768, 32767),  # the first: Hounsfield units
    ("signed 32-bit TIFF", -5, 65000), ("signed 32-bit TIFF", 0, 1_000_000),
    ("unsigned 32-bit TIFF", 0, 70_000), ("float TIFF", 0, 1), ("float TIFF", -0.5, 2.25)])
def test_grey_of_another_range_is_refused_once_and_scaled_as_told(tmp_path, capsys, form, low, high):
    files, values = grey_files(form, low, high)
    src = tree(tmp_path / "src", files)
    sentence = refused(src, "--out", tmp_path / "out")
    smallest, largest, option = f"{values.min():g}", f"{values.max():g}", "--range"
    assert {smallest, largest, option} <= {*sentence.replace(":", "").split()} and not (tmp_path / "out").exists()
    assert "rejected" not in capsys.readouterr().err
    for black, white in (low, high), (low + (high - low) / 4, high):
        found = prepared_grey(src, tmp_path / "out", "--force", "--range", f"{black:g}", f"{white:g}")
        expected = 255 * (values.clip(float(f"{black:g}"), None) - float(f"{black:g}"))
        expected /= float(f"{white:g}") - float(f"{black:g}")
        assert np.abs(found - expected.clip(0, 255).reshape(5, 64)).max() <= 0.5 + 1e-4


def test_grey_values_that_are_not_finite_and_an_empty_range_are_no_black(tmp_path, capsys):
    files, _ = grey_files("float TIFF", 0, 1)
    for i, odd in enumerate((np.nan, np.inf)):
        values = np.full((8, 8), 0.5, np.float32)
        values[2, 3] = odd
        files[f"odd{i}.tif"] = encoded(Image.fromarray(values), "TIFF")
    src = tree(tmp_path / "src", files)
    assert "0 to 1" in refused(src, "--out", tmp_path / "out")
    assert open_folder(prepare(src, tmp_path / "out", "--range", "0", "1"))[2]["rejected"] == 2
    assert "rejected odd1.tif" in capsys.readouterr().err
    assert "--range" in refused(src, "--range", "1", "1", "--out", tmp_path / "x")


def test_images_of_8_bits_beside_deep_ones_are_not_scaled_again(tmp_path):
    files, _ = grey_files("16-bit PNG", 0, 4095)
    src = tree(tmp_path / "src", files | {"plain.png": png(noise(0, 8, 8, 1)[..., 0])})
    found = prepared_grey(src, tmp_path / "out", "--range", "0", "4095")
    prepared_images = np.concatenate([open_folder(tmp_path / "out", s)[0] for s in SPLITS])
    assert len(found) == 6 and noise(0, 8, 8, 1).tobytes() in [x.tobytes() for x in prepared_images]


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "I;16", "YCbCr"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_becomes_grey_or_rgb(mode, channels):
    source = Image.new("L", (6, 5), 255)
    image = Image.new("I;16", (6, 5), 65535) if mode == "I;16" else source.convert(mode)
    pixels = one(encoded(image, "TIFF"), channels=channels)
    assert pixels.shape == (5, 6, channels) and pixels.min() >= 254


def test_the_middle_square_of_an_image_is_kept():
    bands = np.zeros((4, 12, 3), np.uint8)
    bands[:, :4, 0] = bands[:, 4:8, 1] = bands[:, 8:, 2] = 255  # red, green, blue squares
    assert np.array_equal(one(png(bands), size=4), bands[:, 4:8])  # the middle, not resampled
    assert np.array_equal(one(png(bands.swapaxes(0, 1)), size=4), bands[:, 4:8].swapaxes(0, 1))


def test_reducing_is_antialiased_and_an_image_of_the_right_size_is_untouched():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(one(png(stripes), size=8)[:, 1:-1].astype(int) - 127).max() <= 2
    assert np.array_equal(one(png(noise(0)), size=12), noise(0))


def test_formats_that_decode_by_themselves_are_read_and_no_other(tmp_path):
    files = {}
    for form in ("png", "jpeg", "gif", "webp", "bmp", "tiff", "ppm", "ico", "jp2", "eps", "pcx"):
        picture = Image.fromarray(noise(0, 16, 16))
        files[f"a.{form}"] = encoded(picture, "JPEG2000" if form == "jp2" else form)
    names, rejects = read_all(tree(tmp_path / "src", files))
    assert {*files} - {*names} == {"a.eps", "a.pcx"} and not rejects
    # A picture of a kind that runs another program stays shut under any name.
    assert not read_all(tree(tmp_path / "eps", {"a.png": files["a.eps"]}))[0]


@pytest.mark.parametrize("form", ["GIF", "WEBP", "TIFF", "PNG"])
def test_an_animation_or_a_stack_gives_its_first_frame_and_the_others_are_counted(tmp_path, capsys, form):
    lossless = {"lossless": True} if form == "WEBP" else {}
    colours = ["red", "blue", "lime", "black", "white"]
    files = {}
    for i, count in enumerate((1, 2, 5)):
        frames = [Image.new("RGB", (5, 5), colour) for colour in colours[:count]]
        files[f"{i}.{form}"] = encoded(frames[0], form, save_all=True, append_images=frames[1:], **lossless)
    out = prepare(tree(tmp_path / "src", files), tmp_path / "out", "--size=5")
    images = np.concatenate([open_folder(out, s)[0] for s in SPLITS])
    assert len(images) == 3 and (images == (255, 0, 0)).all()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "later frames" in line]
    assert line.startswith("left out: ") and "5 later frames" in line


# ---- Rejects.


def test_rejects_are_named_with_their_reason_and_counted(tmp_path, capsys):
    good = {f"{i:02d}.png": png(noise(i)) for i in range(20)}
    bad = {"cut.png": good["00.png"][:-40], "words.jpg": b"no image", "empty.png": b""}
    others = {"notes.txt": b"hello", ".DS_Store": b"\0", ".hid/a.png": b"x"}
    src = tree(tmp_path / "src", good | bad | others)
    names, rejects = read_all(src)
    assert names == sorted(good)
    assert sorted(name for name, _ in rejects) == sorted(bad) and all(why for _, why in rejects)
    capsys.readouterr()
    out = prepare(src, tmp_path / "out", "--size=12", "--val_frac=0.3")
    printed = capsys.readouterr().err
    assert all(f"rejected {name}: " in printed for name in bad) and "later frames" not in printed
    assert not any(name in printed for name in others) and "{'.txt': 1}" in printed  # of a kind that is not read
    assert open_folder(out)[2]["rejected"] == 3
    kept = np.concatenate([open_folder(out, split)[0] for split in SPLITS])
    assert sorted(x.tobytes() for x in kept) == sorted(noise(i).tobytes() for i in range(20))


def test_one_damaged_file_of_twenty_is_left_out_and_as_many_held_out_whichever_it_is(tmp_path):
    files = images_of(*(f"{i:02d}.png" for i in range(20)))
    for i in range(20):
        src = zipped(tmp_path / f"{i}.zip", files | {f"{i:02d}.png": b"x"})
        out = prepare(src, tmp_path / f"{i}", "--size=12", "--val_frac=0.1")
        train, val = ({x.tobytes() for x in open_folder(out, s)[0]} for s in SPLITS)
        assert len(val) == 2 and train | val == {noise(j).tobytes() for j in range(20) if j != i}
        assert not train & val and open_folder(out)[2]["rejected"] == 1


def test_more_than_half_rejected_is_an_error_and_clutter_does_not_count(tmp_path):
    clutter = {f"__MACOSX/._{i}.png": b"x" for i in range(9)} | {f"{i}.txt": b"x" for i in range(9)}
    mixed = {f"{i}.png": png(noise(i)) for i in range(18)} | {f"x{i}.png": b"x" for i in range(6)}
    out = prepare(zipped(tmp_path / "some.zip", mixed | clutter), tmp_path / "some", "--val_frac=0.3")
    assert open_folder(out)[2]["rejected"] == 6
    src = zipped(tmp_path / "more.zip", mixed | {f"y{i}.png": b"x" for i in range(14)})
    assert "the right source" in refused(src, "--out", tmp_path / "more")
    (tmp_path / "empty").mkdir()
    broken = zipped(tmp_path / "none.zip", {"a.png": b"x"})
    for src, words in (tmp_path / "empty", "no images"), (broken, "can't be read"):
        assert words in refused(src, "--out", tmp_path / "none")
    assert not any((tmp_path / name).exists() for name in ("more", "none"))


def test_archive_entries_that_climb_out_or_link_are_not_read(tmp_path):
    files = {f"{i}.png": png(noise(i)) for i in range(4)}
    zipped(tmp_path / "a.zip", files | {"../up.png": b"x", "/abs.png": b"x", "a/../../b.png": b"x"})
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(noise(9)))
    with zipfile.ZipFile(tmp_path / "a.zip", "a") as archive:
        info = zipfile.ZipInfo("link.png")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, str(secret))
    assert read_all(tmp_path / "a.zip")[0] == sorted(files)
    for kind, name, target in [
        (tarfile.REGTYPE, "../up.png", ""), (tarfile.REGTYPE, "a/../../b.png", ""),
        (tarfile.SYMTYPE, "link.png", str(secret)), (tarfile.SYMTYPE, "link.png", "../secret.png"),
        (tarfile.LNKTYPE, "link.png", "../secret.png"), (tarfile.FIFOTYPE, "pipe.png", ""),
        (tarfile.CHRTYPE, "device.png", ""),
    ]:
        tarred(tmp_path / "a.tar", files)
        with tarfile.open(tmp_path / "a.tar", "a") as archive:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            archive.addfile(info)
        sentence = refused(tmp_path / "a.tar", "--out", tmp_path / "out")
        assert "a.tar" in sentence and posixpath.basename(name) in sentence
    assert sorted(os.listdir(tmp_path)) == ["a.tar", "a.zip", "secret.png"]
    assert not (tmp_path.parent / "up.png").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs links and pipes")
def test_a_link_to_a_folder_is_followed_but_not_in_a_circle_and_a_pipe_is_not_read(tmp_path):
    tree(tmp_path / "other", {"a.png": png(noise(0))})
    tree(tmp_path / "src", {"b/b.png": png(noise(1))})
    (tmp_path / "src/out").symlink_to(tmp_path / "other")
    (tmp_path / "src/loop").symlink_to(tmp_path / "src")
    (tmp_path / "other/back").symlink_to(tmp_path / "src")
    (tmp_path / "src/b/gone.png").symlink_to(tmp_path / "nowhere")
    names, rejects = read_all(tmp_path / "src")
    assert names == ["b/b.png", "out/a.png"] and [name for name, _ in rejects] == ["b/gone.png"]
    os.mkfifo(tmp_path / "src/b/pipe.png")  # to open it would take until somebody writes to it
    assert "b/pipe.png" not in prepare_data.list_files(str(tmp_path / "src"))


def test_decompression_bombs_are_refused(monkeypatch):
    huge = png(np.zeros((64, 64, 3), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(Image.DecompressionBombError):
        one(huge)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems restrict file names")
def test_any_file_name_is_read_and_printed(tmp_path):
    names = [b"with space.png", b"new\nline.png", "\u732b.png".encode(), b"\xff\xfe.png"]
    os.mkdir(tmp_path / "src")
    for i, name in enumerate(names):
        Path(tmp_path / "src", os.fsdecode(name)).write_bytes(png(noise(i)))
        Path(tmp_path / "src", os.fsdecode(b"b" + name)).write_bytes(b"x" if i < 2 else png(noise(9)))
    env = {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    out = tmp_path / "\u00e9 out"
    command = [sys.executable, SCRIPT, tmp_path / "src", "--out", out]
    run = subprocess.run(command, cwd="/", env=env, capture_output=True, check=False)
    assert run.returncode == 0 and b"rejected bwith space.png" in run.stderr, run.stderr
    kept = [open_folder(out, split)[0] for split in SPLITS]
    assert sum(map(len, kept)) == 6 and kept[0].shape[1:] == (64, 64, 3)


# ---- The writer.


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), OSError(28, "No space left")])
def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch, error):
    src = tree(tmp_path / "src", {f"{name}/{i}.png": png(noise(i)) for i in range(9) for name in "ab"})
    old = prepare(src, tmp_path / "old", "--size=4")
    before = content(old)
    listing = sorted(os.listdir(tmp_path))

    def fail(*_, **__):
        raise error

    for module, name in (np.lib.format, "write_array_header_1_0"), (np, "save"), (json, "dumps"), (os, "rename"):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, fail)
            for argv in ["new"], ["old", "--force", "--seed=1"]:
                with pytest.raises(type(error)):
                    prepare(src, tmp_path / argv[0], *argv[1:])
                assert sorted(os.listdir(tmp_path)) == listing and content(old) == before
    rename = os.rename

    def fail_to_put_it_there(a, b):  # after the old one has been moved out of the way
        fail() if str(a).endswith("new") else rename(a, b)

    monkeypatch.setattr(os, "rename", fail_to_put_it_there)
    with pytest.raises(type(error)):
        prepare(src, old, "--force", "--seed=1")
    assert before in [content(folder) for folder in tmp_path.iterdir()]  # it is whole, perhaps under another name


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_sigterm_ends_with_143_and_without_output(tmp_path):
    command = [sys.executable, SCRIPT, "--out", tmp_path / "faces", "--size", "256"]
    run = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 20
    while not list(tmp_path.glob("*.tmp/new/val.npy")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert os.listdir(tmp_path) and not (tmp_path / "faces").exists()
    run.send_signal(signal.SIGTERM)
    assert run.wait(20) == 143 and os.listdir(tmp_path) == []


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_signal_is_heard_while_many_names_are_sorted_out():
    """Some loops of numpy swallow what a handler raises, so that the run would go on."""
    classes = ["cat", "dog"] * 100_000
    source = prepare_data.Source(range(len(classes)), None, classes)

    def stop(*_):
        raise KeyboardInterrupt

    started = time.monotonic()
    prepare_data.choose(source)
    takes = time.monotonic() - started
    before = signal.signal(signal.SIGALRM, stop)
    try:
        for share in 0.15, 0.3, 0.45, 0.6:
            with pytest.raises(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, share * takes)
                deadline = time.monotonic() + 2 * takes
                while time.monotonic() < deadline:
                    prepare_data.choose(source)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_force_replaces_a_data_set_and_nothing_beside_it(tmp_path):
    src = tree(tmp_path / "src", images_of(*(f"{i}.png" for i in range(5))))
    out = tmp_path / "out"
    precious = {"out.old/thesis.tex": b"1", "out.tmp/thesis.tex": b"2", "out.new/thesis.tex": b"3"}
    tree(tmp_path, precious)
    prepare(src, out, "--size=4")
    assert "--force" in refused(src, "--out", out, "--size", 8)
    assert open_folder(out)[2]["size"] == 4
    (out / "classifier.pt").write_text("features learned from the set, which go with it")
    prepare(src, out, "--size=8", "--force")
    assert open_folder(out)[2]["size"] == 8 and not (out / "classifier.pt").exists()
    assert all((tmp_path / path).read_bytes() == data for path, data in precious.items())
    assert sorted(os.listdir(tmp_path)) == ["out", "out.new", "out.old", "out.tmp", "src"]


@pytest.mark.parametrize("files", [
    {"thesis.tex": b"1"}, {"train.npy": b"my own array"}, {"meta.json": b"{}"}, {".git/config": b"1"}, {"": b"a file"},
    {"train/1.png": b"1", "val/2.png": b"2"}, {"train.npy": b"1", "val.npy": b"2", "meta.json": b"{}", "a.tex": b"3"},
])
@pytest.mark.parametrize("flags", [[], ["--force"]])
def test_an_output_that_is_no_data_set_is_never_replaced(tmp_path, files, flags):
    src = tree(tmp_path / "src", images_of("1.png", "2.png"))
    out = tmp_path / "out"
    if "" in files:
        out.write_bytes(files[""])
    else:
        tree(out, files)
    refused(src, "--out", out, *flags)
    refused(src, "--out", src, *flags)
    assert {name: (out / name).read_bytes() for name in files} == files
    assert sorted(os.listdir(src)) == ["1.png", "2.png"] and sorted(os.listdir(tmp_path)) == ["out", "src"]


def test_an_empty_folder_is_filled_and_a_link_to_a_set_stays_a_link(tmp_path):
    src = tree(tmp_path / "src", images_of("1.png", "2.png"))
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    prepare(src, tmp_path / "link", "--size=4")
    prepare(src, tmp_path / "link", "--size=8", "--force")
    assert (tmp_path / "link").is_symlink() and open_folder(tmp_path / "out")[2]["size"] == 8


def test_one_image_serves_for_training_and_validation(tmp_path):
    out = prepare(tree(tmp_path / "src", {"a.png": png(noise(0))}), tmp_path / "out", "--size=12")
    for split in SPLITS:
        assert np.array_equal(open_folder(out, split)[0][0], noise(0))


def test_memory_is_flat_in_the_number_of_images(tmp_path):
    peaks = []
    data = png(noise(0, 64, 64))
    for count in (100, 1000):
        src = zipped(tmp_path / f"{count}.zip", {f"{i}.png": data for i in range(count)})
        tracemalloc.start()
        prepare(src, tmp_path / f"out{count}")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    pixels = 900 * 64 * 64 * 3
    assert peaks[1] - peaks[0] < pixels / 8, peaks


# ---- Built-in faces, the command line.


def test_faces_are_deterministic():
    image = make_face(5, 32, seed=3)
    assert image.shape == (32, 32, 3) and image.dtype == np.uint8
    assert np.array_equal(image, make_face(5, 32, seed=3))
    assert not np.array_equal(image, make_face(5, 32, seed=4)) and not np.array_equal(image, make_face(9, 32, seed=3))


def test_glasses_are_seen_at_the_eyes_and_long_hair_below_the_chin(monkeypatch):
    def changed(index, part):
        """Pixels that are not the same if frames (or hair) are black and if they are white."""
        faces = []
        for colour in "#000000", "#ffffff":
            row = " ".join([colour] * len(prepare_data.COLOURS[part].split()))  # as many: the same person
            with monkeypatch.context() as patch:
                patch.setitem(prepare_data.COLOURS, part, row)
                faces.append(make_face(index, 64).astype(int))
        return np.abs(faces[0] - faces[1]).max(-1) > 30

    for index, name in enumerate(4 * FACE_CLASSES):
        frames, hair = changed(index, "frame"), changed(index, "hair")
        assert (40 < frames.sum() < 1200) == ("glasses" in name) and not frames[:16].any() and not frames[48:].any()
        assert (hair[52:].sum() > 50) == ("long_hair" in name) and hair[:32].sum() > 100


def test_without_a_source_faces_are_made_in_four_balanced_classes(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data, "NUM_FACES", 40)
    monkeypatch.chdir(tmp_path)
    main(["--size=16", "--val_frac", "0.1"])
    (train, labels, meta), (_, val_labels, _) = (open_folder("data/faces", s) for s in SPLITS)
    assert train.shape == (36, 16, 16, 3) and len(meta["class_names"]) == 4
    assert np.bincount(np.concatenate([labels, val_labels])).tolist() == [10] * 4
    name_of = {make_face(i, 16).tobytes(): FACE_CLASSES[i % 4] for i in range(40)}
    assert all(name_of[x.tobytes()] == meta["class_names"][y] for x, y in zip(train, labels))


@pytest.mark.parametrize(("argv", "words"), [
    (["--sizes=3"], ["--sizes"]),
    (["--val-frac", "0.1"], ["--val-frac"]),
    (["--size", "big"], ["--size", "big"]),
    (["--size=0"], ["--size", "0", ">= 1"]),
    (["--val_frac=1.5"], ["--val_frac", "1.5", "< 1"]),
    (["--channels=2"], ["--channels", "2"]),
    (["--range", "3"], ["--range", "2"]),
    (["nowhere.zip"], ["there is no nowhere.zip"]),
    ([str(SCRIPT)], [SCRIPT.name, ".zip"]),
])
def test_a_wrong_flag_gets_one_sentence_that_names_it(argv, words, tmp_path):
    sentence = refused(*argv, "--out", tmp_path / "out")
    assert all(word in sentence for word in words)
    assert os.listdir(tmp_path) == []


def test_the_command_line_exits_with_1_and_no_traceback(tmp_path):
    command = [sys.executable, SCRIPT, "--sice", "3"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 1 and run.stdout == "" and run.stderr.count("\n") == 1
    assert "--sice" in run.stderr


def test_parser_takes_values_both_ways_and_negative_numbers():
    parser = Parser("What it does.")
    parser.add_argument("--mask_ratio", type=float)
    parser.add_argument("words", nargs="*")
    assert parser.parse_args(["--mask_ratio=-1.5"]).mask_ratio == -1.5
    assert parser.parse_args(["--mask_ratio", "-1.5", "a"]).mask_ratio == -1.5
    assert parser.parse_args(["--", "--free"]).words == ["--free"]
    assert "--mask" in mistake(parser.parse_args, "--mask", "1")  # no abbreviations


def test_a_setting_has_the_type_of_its_default_and_its_range():
    parser = Parser("What it does.")
    for name, default in {"steps": 3, "lr": 0.5, "strict": False, "out": None, "only": ()}.items():
        parser.add(name, default, "what it is")
    args = parser.parse_args(["--steps=4", "--lr=1", "--strict", "--out=5", "--only=2,9"])
    assert vars(args) == dict(steps=4, lr=1.0, strict=True, out="5", only=(2, 9))
    assert not parser.parse_args(["--no-strict"]).strict
    for wrong in "--steps=4.5", "--steps=-1", "--lr=-0.1", "--lr=nan", "--only=a":
        assert wrong.split("=")[0] in mistake(parser.parse_args, wrong)


# ---- As others prepare.
def test_adms_crop_step_by_step(tmp_path):
    """300 x 220 for 64: halved once, to 150 x 110; then 64 / 110 of that, 87 x 64; then 11 columns are cut off."""
    pixels = np.random.default_rng(0).integers(0, 256, (220, 300, 3), dtype=np.uint8)
    found = FITS["adm"](Image.fromarray(pixels), (64, 64))
    halved = np.rint(pixels.reshape(110, 2, 150, 2, 3).mean((1, 3)) + 1e-9).astype(np.uint8)  # halves are rounded up
    resized = np.asarray(Image.fromarray(halved).resize((87, 64), Image.Resampling.BICUBIC))
    assert np.abs(np.asarray(found).astype(int) - resized[:, 11:75]).max() <= 2  # where a half was rounded down
    small = np.asarray(FITS["adm"](Image.fromarray(pixels[:40, :50]), (64, 64)))  # enlarged: 80 x 64, 8 cut off
    enlarged = np.asarray(Image.fromarray(pixels[:40, :50]).resize((80, 64), Image.Resampling.BICUBIC))
    assert np.array_equal(small, enlarged[:, 8:72])


@pytest.mark.parametrize("fit", ["adm", "lanczos"])
def test_a_picture_is_fitted_as_the_flag_says(tmp_path, fit):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8))
    (tmp_path / "src").mkdir()
    for i in range(2):
        picture.save(tmp_path / f"src/{i}.png")
    out = prepare(tmp_path / "src", tmp_path / "out", "--size=16", f"--fit={fit}")
    assert np.array_equal(open_folder(out)[0][0], FITS[fit](picture, (16, 16)))
    one_step = ImageOps.fit(picture, (16, 16), Image.Resampling.LANCZOS)
    assert np.array_equal(open_folder(out)[0][0], one_step) == (fit == "lanczos")


def test_nothing_is_held_out_if_so_asked(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", arr_0=pixels, arr_1=np.arange(30) % 3)
    out = prepare(tmp_path / "x.npz", tmp_path / "out", "--val_frac=0")
    (train, labels, meta), (val, val_labels, _) = (open_folder(out, split) for split in SPLITS)
    assert len(train) == len(labels) == 30 and len(val) == len(val_labels) == 0 and meta["num_val"] == 0
    assert sorted(x.tobytes() for x in train) == sorted(x.tobytes() for x in pixels)
    part = prepare(out, tmp_path / "part", "--val_frac=0", "--num=6")
    assert [len(open_folder(part, split)[0]) for split in SPLITS] == [6, 0]


def test_latents_are_multiplied_by_the_scale_instead_of_normalised(tmp_path):
    z = np.random.default_rng(0).normal(3, 5, (20, 4, 6, 6)).astype(np.float32)
    np.save(tmp_path / "z.npy", z)
    out = prepare(tmp_path / "z.npy", tmp_path / "out", "--latent_scale=0.18215")
    images = Images(str(out))
    patches = torch.from_numpy(images.read(np.arange(19), None, np.zeros(19, bool)))
    torch.testing.assert_close(normalised(patches, images.meta["latent"]), 0.18215 * patches)
    part = prepare(out, tmp_path / "part", "--num=5")  # a part of a set means the same
    assert open_folder(part)[2]["latent"] == images.meta["latent"]
    np.savez(tmp_path / "x.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    assert "latents" in refused(tmp_path / "x.npz", "--out", tmp_path / "b", "--latent_scale=0.18215")
