"""prepare_data.py: sources, image rules, rejects, and an output that is complete or absent."""

import hashlib
import io
import json
import os
import pickle
import posixpath
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import time
import tracemalloc
import zipfile
from argparse import Namespace
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from conftest import make_dataset, mistake
from PIL import Image

import prepare_data
from model import Images
from prepare_data import Parser, iter_images, main, make_face, open_folder, open_source

SCRIPT, SPLITS = Path(prepare_data.__file__), ("train", "val")


def noise(seed, height=12, width=12, channels=3):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def png(pixels, **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", **options)
    return file.getvalue()


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
    """What the reader yields of all candidates of a source: names, and the rejects."""
    rejects = []
    with ExitStack() as stack:
        source = open_source(str(src), stack)
        images = iter_images(source, range(len(source.names)), rejects)
        return [source.names[i] for i, _ in images], rejects


def one(data, **rules):
    """What the reader makes of one encoded image."""
    rules = {"size": None, "channels": 3, "fit": "crop", "background": (255, 255, 255), **rules}
    return prepare_data.to_pixels(io.BytesIO(data), **rules)


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
    hashes = {open_folder(out)[2]["hash"] for out in outs}
    (train, labels, meta), (val, val_labels, _) = (open_folder(outs[0], s) for s in SPLITS)
    assert hashes == {hashlib.sha256((outs[0] / "train.npy").read_bytes()).hexdigest()}
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


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (["1.png", "2.png"], None),
        (["wrap/1.png", "wrap/2.png"], None),
        (["a/1.png", "b/2.png"], ["a", "b"]),
        (["wrap/b/1.png", "wrap/a/2.png"], ["a", "b"]),
        (["x/deep/a/1.png", "y/b/2.png"], ["x", "y"]),
        (["a/1.png", "b/2.png", "README.md", ".DS_Store", "__MACOSX/a/._1.png"], ["a", "b"]),
    ],
)
def test_the_class_is_the_first_folder_below_those_of_all_images(
    tmp_path, names, classes
):
    src = zipped(tmp_path / "src.zip", {name: png(noise(0)) for name in names})
    assert open_folder(prepare(src, tmp_path / "out"))[2]["class_names"] == classes


def test_edm_zip_labels_come_from_dataset_json(tmp_path):
    names = [f"00000/img{i:08d}.png" for i in range(10)]
    labels = [[name, i % 3] for i, name in enumerate(names)]
    files = {name: png(np.full((4, 4, 3), i, np.uint8)) for i, name in enumerate(names)}
    for table, expected in (labels, ["0", "1", "2"]), (None, None):
        files["dataset.json"] = json.dumps({"labels": table}).encode()
        out = prepare(zipped(tmp_path / "edm.zip", files), tmp_path / "out", "--size=4", "--force")
        images, found, meta = open_folder(out)
        assert meta["class_names"] == expected and meta["num_train"] == 9 and meta["rejected"] == 0
        assert expected is None or (images[:, 0, 0, 0] % 3 == found).all()
    for broken in b'{"labels": [["a", 1', b'{"labels": 3}':
        files["dataset.json"] = broken
        refused(zipped(tmp_path / "bad.zip", files), "--out", tmp_path / "bad")


def cifar(path, poison=None):
    """The published layout: rows of 3*32*32 bytes, one pickled dictionary a batch."""
    files, pixels, labels = {}, [], []
    for name in ["data_batch_1", "data_batch_2", "test_batch"]:
        data = noise(len(files), 6, 3 * 32 * 32, 1)[..., 0]
        table = {"data": data, "labels": [len(files)] * 5 + [2]}
        files[name] = pickle.dumps(table, protocol=2)
        pixels.append(data.reshape(6, 3, 32, 32))
        labels += table["labels"]
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


def test_latents_round_trip_with_the_mean_and_deviation_of_each_channel(tmp_path):
    latents = np.random.default_rng(0).normal(0.3, 1.7, (50, 4, 6, 6))
    latents = latents * np.array([1, 10, 0.1, 3])[:, None, None] + np.arange(4)[:, None, None]
    np.save(tmp_path / "z.npy", latents)
    np.save(tmp_path / "labels.npy", np.arange(50) % 5)
    out = prepare(tmp_path / "z.npy", tmp_path / "out", f"--labels={tmp_path}/labels.npy")
    sets = [open_folder(out, split) for split in SPLITS]
    (train, labels, meta), (val, val_labels, _) = sets
    assert train.dtype == np.float32 and train.shape[1:] == (6, 6, 4) and len(train) == 48
    stored = latents.transpose(0, 2, 3, 1).astype(np.float32)
    position = {z.tobytes(): i for i, z in enumerate(stored)}  # as they are, not normalised
    for split, numbers in (train, labels), (val, val_labels):
        assert [position[z.tobytes()] % 5 for z in split] == numbers.tolist()
    own = stored[[position[z.tobytes()] for z in train]].astype(np.float64)
    np.testing.assert_allclose(meta["latent"], [own.mean((0, 1, 2)), own.std((0, 1, 2))], rtol=1e-9)
    refused(tmp_path / "z.npy", "--out", tmp_path / "b", "--size", 8)
    np.save(tmp_path / "labels.npy", np.arange(49))
    argv = tmp_path / "z.npy", "--labels", tmp_path / "labels.npy", "--out", tmp_path / "b"
    assert "50 class numbers" in refused(*argv) and "z.npy" in refused(*argv)


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])  # the last is infinite as float32
def test_latents_that_are_not_finite_are_refused(tmp_path, value):
    np.save(tmp_path / "z.npy", np.full((9, 4, 6, 6), value))
    assert "can be read" in refused(tmp_path / "z.npy", "--out", tmp_path / "out")


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


# ---- Layouts that people bring, each with others of its kind.


def images_of(*names):
    return {name: png(noise(i)) for i, name in enumerate(names)}


def classes_of(tmp_path, files, *flags, capsys=None):
    """-> class names, {class: training images}, validation images of each class, what was printed."""
    src = zipped(tmp_path / f"{len(list(tmp_path.iterdir()))}.zip", files)
    out = prepare(src, tmp_path / f"{src.stem}-out", "--size=8", "--val_frac=0.01", *flags)
    (x, y, meta), (x_val, y_val, _) = (open_folder(out, s) for s in SPLITS)
    names = meta["class_names"]
    where = {prepare_data.to_pixels(io.BytesIO(data), 8, 3, "crop", "white").tobytes(): name
             for name, data in files.items() if name.endswith("png")}
    found = [{(where[image.tobytes()], names and (names[label] if label >= 0 else None)) for image, label in zip(*part)}
             for part in ((x, y), (x_val, y_val))]
    return names, *found, capsys.readouterr().err if capsys else ""


@pytest.mark.parametrize("train, val, test", [("train", "val", "test"), ("Train", "Valid", "Test"),
                                              ("training", "validation", "testing"), ("train2017", "val2017", "test2017"),
                                              ("train_set", "val_set", "test-images")])
def test_splits_are_no_classes_and_what_is_held_out_stays_so(tmp_path, capsys, train, val, test):
    files = images_of(*(f"{train}/{c}/images/{i}.png" for c in "ab" for i in range(3)), f"{val}/a/images/0.png",
                      f"{val}/b/images/0.png", f"{test}/images/0.png")
    for wrap in ("", "top/deep/"):
        names, kept, held, said = classes_of(tmp_path, {wrap + name: data for name, data in files.items()}, capsys=capsys)
        assert names == ["a", "b"] and "'test images': 1" in said and "{'a': 3, 'b': 3}" in said
        assert {wrap + f"{train}/{c}/images/{i}.png" for c in "ab" for i in range(3)} == {name for name, _ in kept}
        assert {(name.split("/")[-3], c) for name, c in kept | held} == {("a", "a"), ("b", "b")} and len(held) == 2


def test_a_val_without_classes_beside_a_train_with_classes_is_left_out(tmp_path, capsys):
    tiny = images_of(*(f"tiny/train/n{c}/images/n{c}_{i}.png" for c in (1, 2) for i in range(3)),
                     "tiny/val/images/0.png", "tiny/val/images/1.png", "tiny/test/images/0.png")  # Tiny ImageNet
    tiny["tiny/val/val_annotations.txt"] = b"0.png n1"
    names, kept, held, said = classes_of(tmp_path, tiny, capsys=capsys)
    assert names == ["n1", "n2"] and "'val images': 2" in said and "'.txt': 1" in said
    assert not any("val/" in name or "test/" in name for name, _ in kept | held)
    unlabelled = images_of(*(f"train/{i}.png" for i in range(4)), "val/0.png", "val/1.png")
    names, kept, held, _ = classes_of(tmp_path, unlabelled)
    assert names is None and {name for name, _ in held} == {"val/0.png", "val/1.png"} and len(kept) == 4


def test_strays_beside_class_folders_make_no_class(tmp_path, capsys):
    files = images_of(*(f"{c}/{i}.png" for c in "ab" for i in range(4)), "logo.png")
    files |= {"LICENSE": b"text", "devkit/x.mat": b"\0", "photo.HEIC": b"\0"}
    names, kept, held, said = classes_of(tmp_path, files, capsys=capsys)
    assert names == ["a", "b"] and not any("logo" in name for name, _ in kept | held)
    assert all(word in said for word in ("'no suffix': 1", "'.mat': 1", "'.heic': 1", "'train images': 1"))
    # Where most images lie beside the folders these are no classes.
    names, kept, held, _ = classes_of(tmp_path, images_of(*(f"{i}.png" for i in range(9)), "a/0.png", "b/0.png"))
    assert names is None and len(kept | held) == 11
    # One folder beside others' images is no class either, and files without a suffix are read where there are no others.
    assert classes_of(tmp_path, images_of("img_align/img_align/1.png", "img_align/img_align/2.png"))[0] is None
    bare = zipped(tmp_path / "bare.zip", {f"{c}/{i}": png(noise(i)) for c in "ab" for i in range(3)})
    assert open_folder(prepare(bare, tmp_path / "bare"))[2]["class_names"] == ["a", "b"]
    assert "'.heic': 2" in refused(zipped(tmp_path / "heic.zip", {"1.HEIC": b"", "2.heic": b""}), "--out", tmp_path / "x")


def test_the_class_is_the_first_folder_or_if_asked_the_last(tmp_path):
    files = images_of(*(f"{kind}/{breed}/{i}.png" for kind, breed in (("cat", "manx"), ("cat", "burma"), ("dog", "pug"))
                        for i in range(2)))
    assert classes_of(tmp_path, files)[0] == ["cat", "dog"]
    assert classes_of(tmp_path, files, "--class_from=last")[0] == ["burma", "manx", "pug"]


def test_classes_that_are_numbers_sort_as_numbers_and_mean_the_same_in_an_array(tmp_path):
    src = zipped(tmp_path / "n.zip", images_of(*(f"{c}/{i}.png" for c in range(12) for i in range(2))))
    folder = prepare(src, tmp_path / "folder", "--size=12")
    np.savez(tmp_path / "n.npz", np.stack([noise(i) for i in range(24)]), np.repeat(np.arange(12), 2))
    array = prepare(tmp_path / "n.npz", tmp_path / "array")
    both = Images(f"{folder},{array}")
    assert both.meta["class_names"] == [str(i) for i in range(12)]
    sizes = [len(open_folder(f)[1]) for f in (folder, array)]
    assert np.array_equal(both.labels, np.concatenate([open_folder(f)[1] for f in (folder, array)])) and len(sizes) == 2


@pytest.mark.parametrize("layout", ["{split}_64x64/{c}", "DIV2K_{split}_HR/{c}", "seg_{split}/seg_{split}/{c}",
                                    "{split}ing data/{c}", "{c}/{split}", "top/{c}/{split}/images"])
def test_splits_are_known_by_a_part_of_their_names_and_below_the_classes(tmp_path, capsys, layout):
    where = {s: [layout.format(split=s, c=c) for c in ("cat", "dog")] for s in ("train", "test")}
    files = images_of(*(f"{folder}/{s}{i}.png" for s, folders in where.items() for folder in folders for i in range(3)))
    names, kept, held, said = classes_of(tmp_path, files, capsys=capsys)
    assert names == ["cat", "dog"] and "'test images': 6" in said
    assert not any("/test" in name.replace(layout.split("/")[0], "") and name.endswith(("test0.png", "test1.png"))
                   for name, _ in kept | held)


def test_a_stray_above_the_class_folders_changes_nothing(tmp_path, capsys):
    for stray, top in (("Screenshot.png", "train/"), ("a/preview.png", "a/b/"), ("deep/er/x.png", "deep/er/set/")):
        files = images_of(*(f"{top}{c}/{i}.png" for c in ("cat", "dog") for i in range(4)), stray)
        names, kept, held, said = classes_of(tmp_path, files, capsys=capsys)
        assert names == ["cat", "dog"] and stray not in {name for name, _ in kept | held} and "'train images': 1" in said


def test_latents_of_other_shapes_are_rejected_by_name(tmp_path, capsys):
    for i in range(12):
        (tmp_path / "z").mkdir(exist_ok=True)
        np.save(tmp_path / f"z/{i:02d}.npy", np.full((8, 8, 8) if i == 5 else (4, 8, 12) if i == 6 else (4, 8, 8), i, np.float32))
    out = prepare(tmp_path / "z", tmp_path / "out", "--val_frac=0.2")
    said = capsys.readouterr().err
    assert "rejected 05.npy" in said and "rejected 06.npy" in said and open_folder(out)[2]["rejected"] == 2
    images = np.concatenate([open_folder(out, s)[0] for s in SPLITS])
    assert sorted(images[:, 0, 0, 0]) == [0, 1, 2, 3, 4, 7, 8, 9, 10, 11] and (images == images[:, :1, :1, :1]).all()
    (tmp_path / "z/preview.png").write_bytes(png(noise(0)))  # of two kinds the one with more files is meant
    assert open_folder(prepare(tmp_path / "z", tmp_path / "more"))[0].dtype == np.float32


def test_a_label_that_says_none_is_none(tmp_path):
    names = [f"x/{i}.png" for i in range(12)]
    rows = [[f"./{name}" if i % 2 else name.replace("/", "\\"), (None, -1)[i % 2] if i > 7 else i % 2] for i, name in enumerate(names)]
    files = images_of(*names) | {"dataset.json": json.dumps({"labels": rows}).encode()}
    meta_names, kept, held, _ = classes_of(tmp_path, files)
    assert meta_names == ["0", "1"] and {name for name, _ in kept | held} == {*names[:8]}
    assert all(c == str(int(name[2:-4]) % 2) for name, c in kept)


def test_labels_of_a_folder_are_refused_and_a_missing_file_is_named(tmp_path):
    tree(tmp_path / "src", images_of("1.png", "2.png"))
    assert "for arrays" in refused(tmp_path / "src", "--labels=x.npy", "--out", tmp_path / "out")
    np.save(tmp_path / "z.npy", np.zeros((4, 4, 8, 8)))
    assert "nowhere.npy" in refused(tmp_path / "z.npy", "--labels=nowhere.npy", "--out", tmp_path / "out")


def test_a_set_is_named_after_its_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for src, name in ((".imgs", "imgs"), ("v1.5", "v1.5"), ("v1.6", "v1.6")):
        tree(tmp_path / src, images_of("1.png", "2.png"))
        main([src])
        assert (tmp_path / "data" / name / "train.npy").exists()
    shutil.make_archive("x", "gztar", "v1.5")
    main(["x.tar.gz"])
    assert (tmp_path / "data/x/train.npy").exists()


def test_a_class_folder_may_be_a_link(tmp_path):
    tree(tmp_path / "set", images_of("a/0.png", "a/1.png", "b/0.png", "b/1.png"))
    tree(tmp_path / "elsewhere", images_of("c/0.png", "c/1.png"))
    (tmp_path / "set/c").symlink_to(tmp_path / "elsewhere/c")
    assert open_folder(prepare(tmp_path / "set", tmp_path / "out"))[2]["class_names"] == ["a", "b", "c"]


def test_many_classes_of_one_image_are_told(tmp_path, capsys):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "x.npz", rng.integers(0, 256, (1101, 2, 2, 3), np.uint8), np.arange(1101))
    prepare(tmp_path / "x.npz", tmp_path / "out")
    assert "one image each" in capsys.readouterr().err


def test_webdataset_tars_have_a_class_beside_each_image(tmp_path):
    files = {}
    for i in range(9):
        files |= {f"{i:06d}.png": png(noise(i)), f"{i:06d}.cls": f"{i % 3 + 9}\n".encode(), f"{i:06d}.json": b"{}"}
    images, labels, meta = open_folder(prepare(tarred(tmp_path / "shard.tar", files), tmp_path / "out", "--size=12"))
    assert meta["class_names"] == ["9", "10", "11"]
    number = {noise(i).tobytes(): i % 3 for i in range(9)}
    assert [number[x.tobytes()] for x in images] == labels.tolist()


@pytest.mark.parametrize("labels", [list, dict])
def test_latents_one_a_file_are_read_and_drawn_from_their_mean_and_deviation(tmp_path, labels):
    names = [f"00000/img-mean-std-{i:08d}.npy" for i in range(40)]
    rows = [[name, i % 3] for i, name in enumerate(names)]
    (tmp_path / "edm2/00000").mkdir(parents=True)
    for i, name in enumerate(names):
        np.save(tmp_path / "edm2" / name, np.concatenate([np.full((4, 8, 8), i), np.full((4, 8, 8), 0.5)]).astype(np.float32))
    (tmp_path / "edm2/dataset.json").write_text(json.dumps({"labels": labels(rows)}))
    images, found, meta = open_folder(prepare(tmp_path / "edm2", tmp_path / "out"))
    assert images.shape[1:] == (8, 8, 4) and images.dtype == np.float32 and meta["class_names"] == ["0", "1", "2"]
    number = images.mean((1, 2, 3)).round()  # the mean says which, the spread that it was drawn
    assert np.array_equal(number % 3, found) and abs((images - number[:, None, None, None]).std() - 0.5) < 0.02
    again = open_folder(prepare(tmp_path / "edm2", tmp_path / "again"))[0]
    assert np.array_equal(images, again)
    (tmp_path / "plain").mkdir()
    for i in range(4):  # without a deviation they are what they are
        np.save(tmp_path / f"plain/{i}.npy", np.full((4, 8, 8), i, np.float16))
    plain = open_folder(prepare(tmp_path / "plain", tmp_path / "plain_out"))[0]
    assert sorted({*plain.ravel()}) in ([0, 1, 2], [1, 2, 3], [0, 2, 3], [0, 1, 3])


def test_cifar_100_has_fine_classes_and_its_test_file_is_held_out(tmp_path):
    files, pixels = {"meta": pickle.dumps({"fine_label_names": [f"c{i}" for i in range(100)]}, 2)}, {}
    for split, n in ("train", 100), ("test", 50):
        pixels[split] = noise(n, n, 3 * 32 * 32, 1)[..., 0]
        files[split] = pickle.dumps(dict(data=pixels[split], fine_labels=[*range(n)], coarse_labels=[0] * n), 2)
    src = tarred(tmp_path / "cifar-100-python.tar.gz", {f"cifar-100-python/{n}": d for n, d in files.items()}, "w:gz")
    out = prepare(src, tmp_path / "out")
    (x, y, meta), (x_val, y_val, _) = (open_folder(out, s) for s in SPLITS)
    assert meta["class_names"] == [f"c{i}" for i in range(100)] and (len(x), len(x_val)) == (100, 50)
    for images, labels, split in (x, y, "train"), (x_val, y_val, "test"):
        assert np.array_equal(images, pixels[split].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)[labels])


@pytest.mark.parametrize("names", [("x_train", "y_train", "x_test", "y_test"), ("images", "labels"), ("x", "y"),
                                   ("train_images", "train_labels", "val_images", "val_labels"), ("arr_0", "arr_1")])
@pytest.mark.parametrize("shape", [(28, 28), (28, 28, 1), (28, 28, 3)])
def test_arrays_of_several_names_and_grey_ones_are_read(tmp_path, names, shape):
    rng, kept = np.random.default_rng(0), {}
    for (images, labels), n in zip((names[:2], names[2:]), (30, 10)):
        kept |= {images: rng.integers(0, 256, (n, *shape), np.uint8), labels: np.arange(n).reshape(-1, 1) % 10} \
            if images else {}
        if len(names) == 2:
            break
    np.savez(tmp_path / "a.npz", **kept)
    out = prepare(tmp_path / "a.npz", tmp_path / "out")
    (x, y, meta), (x_val, y_val, _) = (open_folder(out, s) for s in SPLITS)
    assert x.shape[1:] == (28, 28, shape[2] if len(shape) == 3 else 1) and meta["class_names"] == [*"0123456789"]
    stored = {a.tobytes(): i % 10 for i, a in enumerate(kept[names[0]])}
    assert all(stored[a.tobytes()] == label for a, label in zip(x, y))
    if len(names) == 4:
        assert len(x) == 30 and np.array_equal(x_val.squeeze(), kept[names[2]].squeeze()) and y_val.tolist() == [*range(10)]


def test_an_archive_of_other_arrays_names_them(tmp_path):
    np.savez(tmp_path / "a.npz", moments=np.zeros((3, 3)))
    assert "moments" in refused(tmp_path / "a.npz", "--out", tmp_path / "out")


def test_no_more_than_ten_thousand_images_are_held_out_and_never_the_last_of_a_class():
    many = prepare_data.Source(range(300_000), None)
    parts = prepare_data.split(many, None, None, 0.05, 0)
    assert len(parts["val"]) == 10_000 and len(parts["train"]) == 290_000
    few = prepare_data.Source(range(6), None, [*"aabbbc"])
    for seed in range(20):
        parts = prepare_data.split(few, None, None, 0.5, seed)
        assert {few.classes[i] for i in parts["train"]} == {*"abc"} and not {*parts["train"]} & {*parts["val"]}


def test_incomplete_is_said_of_incomplete_files_alone(tmp_path):
    whole = zipped(tmp_path / "whole.zip", images_of("1.png", "2.png")).read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[:-30])
    assert "complete?" in refused(tmp_path / "cut.zip", "--out", tmp_path / "out")
    np.savez(tmp_path / "a.npz", moments=np.zeros((3, 3)))
    assert "complete?" not in refused(tmp_path / "a.npz", "--out", tmp_path / "out")
    broken = zipped(tmp_path / "json.zip", images_of("1.png") | {"dataset.json": b"{"})
    assert "complete?" not in refused(broken, "--out", tmp_path / "out")


def test_a_full_disk_is_told_before_the_work_and_names_the_folder(tmp_path, monkeypatch):
    src = tree(tmp_path / "src", images_of("1.png", "2.png"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Namespace(free=1000))
    assert "no room" in refused(src, "--out", tmp_path / "out") and not (tmp_path / "out").exists()
    monkeypatch.undo()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "extractall", full)
    said = refused(tarred(tmp_path / "a.tar", images_of("1.png")), "--out", tmp_path / "out")
    assert "No space left" in said and str(tmp_path) in said


def test_a_comma_in_the_name_of_a_set_is_refused(tmp_path):
    src = tree(tmp_path / "cats, dogs", images_of("1.png", "2.png"))
    assert "comma" in refused(src, "--out", tmp_path / "cats, dogs, too")
    prepare(src, tmp_path / "pets")  # where it comes from may have one


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
    train, val = (open_folder(prepare(src, tmp_path / "out", "--size=4", "--num=40", "--force"), s)[0]
                  for s in SPLITS)
    assert len(train) == 40 and not {x.tobytes() for x in train} & {x.tobytes() for x in val}


# ---- What training reads.


def test_images_read_as_slices_of_the_whole_images_of_several_folders(tmp_path):
    folders = [make_dataset(tmp_path / f"{i}", n=n, seed=i) for i, n in enumerate((5, 9, 3))]
    rng, p = np.random.default_rng(0), 4
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
    assert "no prepared data set" in mistake(lambda folders: Images(*folders), tmp_path)


# ---- Image rules.


def test_exif_orientation_is_applied():
    pixels = noise(0, 8, 12)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated clockwise
    assert np.array_equal(one(png(pixels, exif=exif)), np.rot90(pixels, -1))


def test_transparency_shows_the_background():
    rgba = noise(1, 9, 9, 4)
    for background in (255, 255, 255), (200, 10, 90):
        alpha = rgba[..., 3:] / 255
        expected = alpha * rgba[..., :3] + (1 - alpha) * background
        assert np.abs(one(png(rgba), background=background) - expected).max() <= 1
    palette = Image.fromarray(np.arange(4, dtype=np.uint8).reshape(2, 2), "P")
    palette.putpalette([10, 20, 30] * 4)
    file = io.BytesIO()
    palette.save(file, "PNG", transparency=3)
    assert one(file.getvalue())[..., 0].tolist() == [[10, 10], [10, 255]]


def test_sixteen_bits_are_scaled_and_not_clipped():
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    assert np.array_equal(one(png(values))[..., 1], np.round(values / 257).astype(np.uint8))


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "I;16", "YCbCr"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_becomes_grey_or_rgb(mode, channels):
    source = Image.new("L", (6, 5), 255)
    image = Image.new("I;16", (6, 5), 65535) if mode == "I;16" else source.convert(mode)
    file = io.BytesIO()
    image.save(file, "TIFF")
    pixels = one(file.getvalue(), channels=channels)
    assert pixels.shape == (5, 6, channels) and pixels.min() >= 254


def test_fit_modes_on_a_picture_of_three_bands():
    bands = np.zeros((4, 12, 3), np.uint8)
    bands[:, :4, 0] = bands[:, 4:8, 1] = bands[:, 8:, 2] = 255  # red, green, blue squares
    assert np.array_equal(one(png(bands), size=4), bands[:, 4:8])  # the middle, not resampled
    padded = one(png(bands), size=12, fit="pad", background=(7, 8, 9))
    assert np.array_equal(padded[4:8], bands) and (padded[[0, 3, 8, 11]] == (7, 8, 9)).all()


def test_reducing_is_antialiased_and_an_image_of_the_right_size_is_untouched():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(one(png(stripes), size=8)[:, 1:-1].astype(int) - 127).max() <= 2
    assert np.array_equal(one(png(noise(0)), size=12), noise(0))


def test_formats_that_decode_by_themselves_are_read_and_no_other(tmp_path):
    files = {}
    for form in ("png", "jpeg", "gif", "webp", "bmp", "tiff", "ppm", "ico", "jp2", "eps", "pcx"):
        file = io.BytesIO()
        Image.fromarray(noise(0, 16, 16)).save(file, "JPEG2000" if form == "jp2" else form)
        files[f"a.{form}"] = file.getvalue()
    names, rejects = read_all(tree(tmp_path / "src", files))
    assert {*files} - {*names} == {name for name, _ in rejects} == {"a.eps", "a.pcx"}
    # A picture of a kind that runs another program stays shut under any name.
    assert not read_all(tree(tmp_path / "eps", {"a.png": files["a.eps"]}))[0]


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (5, 5), colour) for colour in ("red", "blue")]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    assert (one(file.getvalue()) == (255, 0, 0)).all()


# ---- Rejects.


def test_rejects_are_named_with_their_reason_and_counted(tmp_path, capsys):
    good = {f"{i:02d}.png": png(noise(i)) for i in range(20)}
    bad = {"cut.png": good["00.png"][:-40], "words.jpg": b"no image", "empty.png": b""}
    others = {"notes.txt": b"hello", ".DS_Store": b"\0", ".hid/a.png": b"x"}
    src = tree(tmp_path / "src", good | bad | others)
    names, rejects = read_all(src)
    assert names == sorted(good)
    assert sorted(name for name, _ in rejects) == sorted(bad) and all(why for _, why in rejects)
    out = prepare(src, tmp_path / "out", "--size=12", "--val_frac=0.3")
    printed = capsys.readouterr().err
    assert all(f"rejected {name}: " in printed for name in bad)
    assert not any(name in printed for name in others) and "{'.txt': 1}" in printed  # of a kind that is not read
    assert open_folder(out)[2]["rejected"] == 3
    kept = np.concatenate([open_folder(out, split)[0] for split in SPLITS])
    assert sorted(x.tobytes() for x in kept) == sorted(noise(i).tobytes() for i in range(20))


def test_one_damaged_file_of_twenty_is_left_out_whichever_it_is(tmp_path):
    files = {f"{i:02d}.png": png(noise(i)) for i in range(20)}
    for i in range(20):
        src = zipped(tmp_path / f"{i}.zip", files | {f"{i:02d}.png": b"x"})
        meta = open_folder(prepare(src, tmp_path / f"{i}", "--size=12", "--val_frac=0.1"))[2]
        assert (meta["num_train"] + meta["num_val"], meta["rejected"]) == (19, 1)


def test_more_than_half_rejected_is_an_error_and_clutter_does_not_count(tmp_path):
    clutter = {f"__MACOSX/._{i}.png": b"x" for i in range(9)} | {f"{i}.txt": b"x" for i in range(9)}
    mixed = {f"{i}.png": png(noise(i)) for i in range(18)} | {f"x{i}.png": b"x" for i in range(6)}
    out = prepare(zipped(tmp_path / "some.zip", mixed | clutter), tmp_path / "some", "--val_frac=0.3")
    assert open_folder(out)[2]["rejected"] == 6
    src = zipped(tmp_path / "more.zip", mixed | {f"y{i}.png": b"x" for i in range(14)})
    assert "the right source" in refused(src, "--out", tmp_path / "more")
    (tmp_path / "empty").mkdir()
    for src, words in (tmp_path / "empty", "no images"), (zipped(tmp_path / "none.zip", {"a.png": b"x"}), "can be read"):
        assert words in refused(src, "--out", tmp_path / "none")
    assert not any((tmp_path / name).exists() for name in ("more", "none"))


def test_archive_entries_that_climb_out_or_link_are_not_read(tmp_path):
    files = {f"{i}.png": png(noise(i)) for i in range(4)}
    climbing = {"../up.png": b"x", "/abs.png": b"x", "a/../../b.png": b"x", "c:/d.png": b"x"}
    zipped(tmp_path / "a.zip", files | climbing)
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
    tree(tmp_path / "src", {"b.png": png(noise(1))})
    (tmp_path / "src/out").symlink_to(tmp_path / "other")
    (tmp_path / "src/loop").symlink_to(tmp_path / "src")
    (tmp_path / "other/back").symlink_to(tmp_path / "src")
    (tmp_path / "src/gone.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "src/pipe.png")
    names, rejects = read_all(tmp_path / "src")
    assert names == ["b.png", "out/a.png"] and [name for name, _ in rejects] == ["gone.png"]


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
    tree(tmp_path / "src", {f"{i}.png": png(noise(i)) for i in range(30)})
    tree(tmp_path / "classes", {f"{name}/{i}.png": png(noise(i)) for i in range(3) for name in "ab"})
    old = prepare(tmp_path / "src", tmp_path / "old", "--size=4")
    before, listing, rename = content(old), sorted(os.listdir(tmp_path)), os.rename

    def fail(*_, **__):
        raise error

    def fail_to_put_it_there(a, b):  # after the old one has been moved out of the way
        fail() if a.endswith("new") else rename(a, b)

    for module, name, how in ((np.lib.format, "write_array_header_1_0", fail), (np, "save", fail),
                              (hashlib, "file_digest", fail), (os, "rename", fail_to_put_it_there)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, how)
            for argv in ["new"], ["old", "--force", "--seed=1"]:
                src = tmp_path / ("classes" if name == "save" else "src")
                with pytest.raises(type(error)):
                    prepare(src, tmp_path / argv[0], *argv[1:])
                assert sorted(os.listdir(tmp_path)) == listing and content(old) == before


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_sigterm_ends_with_143_and_without_output(tmp_path):
    command = [sys.executable, SCRIPT, "--out", tmp_path / "faces", "--size", "256"]
    run = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 20
    while not list(tmp_path.glob("*.tmp/new/train.npy")) and time.monotonic() < deadline:
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
    prepare_data.split(source, None, None, 0.05, 0)
    takes = time.monotonic() - started
    before = signal.signal(signal.SIGALRM, stop)
    try:
        for share in 0.15, 0.3, 0.45, 0.6:
            with pytest.raises(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, share * takes)
                deadline = time.monotonic() + 2 * takes
                while time.monotonic() < deadline:
                    prepare_data.split(source, None, None, 0.05, 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_force_replaces_a_data_set_and_nothing_else(tmp_path):
    files = {f"{i}.png": png(noise(i)) for i in range(5)}
    src = tree(tmp_path / "src", files)
    out = tmp_path / "out"
    prepare(src, out, "--size=4")
    assert "--force" in refused(src, "--out", out, "--size", 8)
    assert open_folder(out)[2]["size"] == 4
    (out / "judge.pt").write_text("features learned from the set, which go with it")
    prepare(src, out, "--size=8", "--force")
    assert open_folder(out)[2]["size"] == 8 and not (out / "judge.pt").exists()
    assert sorted(os.listdir(tmp_path)) == ["out", "src"]
    (out / "thesis.tex").write_text("precious")
    for target in (out, src):
        refused(src, "--out", target, "--force")
    assert (out / "thesis.tex").exists() and len(os.listdir(src)) == 5


def test_one_image_serves_for_training_and_validation(tmp_path):
    out = prepare(tree(tmp_path / "src", {"a.png": png(noise(0))}), tmp_path / "out", "--size=12")
    for split in ("train", "val"):
        assert np.array_equal(open_folder(out, split)[0][0], noise(0))


def test_memory_is_flat_in_the_number_of_images(tmp_path):
    peaks, data = [], png(noise(0, 64, 64))
    for count in (100, 1000):
        src = zipped(tmp_path / f"{count}.zip", {f"{i}.png": data for i in range(count)})
        tracemalloc.start()
        prepare(src, tmp_path / f"out{count}")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    pixels = 900 * 64 * 64 * 3
    assert peaks[1] - peaks[0] < pixels / 8, peaks


@pytest.mark.parametrize("damage", ["truncated", "dtype", "shape", "labels", "range", "negative",
                                    "meta", "count", "missing", "zip", "no latent"])
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
    elif damage == "no latent":
        np.save(out / "train.npy", images.astype(np.float32))
        (out / "meta.json").write_text(json.dumps(meta | {"dtype": "float32"}))
    else:
        text = "[" if damage == "meta" else json.dumps(meta | {"num_train": 99})
        (out / "meta.json").write_text(text)
    with pytest.raises((SystemExit, ValueError, IndexError, OSError, AttributeError)) as stop:
        Images(str(out)).read(np.arange(7), None, np.zeros(7, bool))
    if isinstance(stop.value, SystemExit):
        assert isinstance(stop.value.code, str) and str(out) in stop.value.code


# ---- Built-in faces, the grid, the command line.


def test_faces_are_deterministic_and_glasses_are_seen():
    image, label = make_face(5, 32, seed=3)
    assert image.shape == (32, 32, 3) and image.dtype == np.uint8 and label == 1
    assert np.array_equal(image, make_face(5, 32, seed=3)[0])
    assert not np.array_equal(image, make_face(5, 32, seed=4)[0])
    for index in range(8):
        bare, glasses, long_hair = (make_face(index, 64, label=n)[0].astype(int) for n in (0, 1, 2))
        changed = np.abs(glasses - bare).max(-1) > 30
        assert 40 < changed.sum() < 1200 and changed[:16].sum() == 0  # frames, at the eyes only
        assert (np.abs(long_hair - bare).max(-1) > 30).sum() > 100


def test_without_a_source_faces_are_made_in_four_balanced_classes(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data, "NUM_FACES", 40)
    monkeypatch.chdir(tmp_path)
    main(["--size=16", "--val_frac", "0.1"])
    (train, labels, meta), (_, val_labels, _) = (open_folder("data/faces", s) for s in SPLITS)
    assert train.shape == (36, 16, 16, 3) and len(meta["class_names"]) == 4
    assert np.bincount(np.concatenate([labels, val_labels])).tolist() == [10] * 4
    faces = {make_face(i, 16)[0].tobytes(): i % 4 for i in range(40)}
    assert all(faces[x.tobytes()] == y for x, y in zip(train, labels))


@pytest.mark.parametrize(("argv", "words"), [
    (["--sizes=3"], ["--sizes", "did you mean --size?"]),
    (["--val-frac", "0.1"], ["--val-frac", "--val_frac"]),
    (["--no_force"], ["--no-force"]),
    (["--size", "big"], ["--size", "'big'", "int"]),
    (["--fit=squeeze"], ["squeeze", "crop"]),
    (["--channels=2"], ["--channels", "2"]),
    (["--background=bluish"], ["--background", "bluish"]),
    (["nowhere.zip"], ["there is no nowhere.zip"]),
    ([str(SCRIPT)], [SCRIPT.name, ".zip"]),
])
def test_a_wrong_flag_gets_one_sentence_that_names_the_right_one(argv, words, tmp_path):
    sentence = refused(*argv, "--out", tmp_path / "out")
    assert all(word in sentence for word in words)
    assert os.listdir(tmp_path) == []


def test_the_command_line_exits_with_1_and_no_traceback(tmp_path):
    command = [sys.executable, SCRIPT, "--sice", "3"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 1 and run.stdout == "" and run.stderr.count("\n") == 1
    assert "did you mean --size" in run.stderr


def test_parser_takes_values_both_ways_and_negative_numbers():
    parser = Parser(prog="x", allow_abbrev=False)
    parser.add_argument("--mask_ratio", type=float)
    parser.add_argument("words", nargs="*")
    assert parser.parse_args(["--mask_ratio=-1.5"]).mask_ratio == -1.5
    assert parser.parse_args(["--mask_ratio", "-1.5", "a"]).mask_ratio == -1.5
    assert parser.parse_args(["--", "--free"]).words == ["--free"]
    with pytest.raises(SystemExit):  # no abbreviations
        parser.parse_args(["--mask", "1"])


def test_a_setting_has_the_type_of_its_default():
    parser = Parser(prog="x", allow_abbrev=False)
    for name, default in {"steps": 3, "lr": 0.5, "strict": False, "out": None, "only": ()}.items():
        parser.add(name, default, "what it is", **({"type": tuple} if name == "only" else {}))
    args = parser.parse_args(["--steps=4", "--lr=1", "--strict", "--out=5", "--only=ab"])
    assert vars(args) == dict(steps=4, lr=1.0, strict=True, out="5", only=("a", "b"))
    assert not parser.parse_args(["--no-strict"]).strict
    assert "--steps" in mistake(parser.parse_args, "--steps=4.5")
