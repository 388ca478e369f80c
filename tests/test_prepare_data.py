"""prepare_data.py: sources, image rules, rejects, and an output that is complete or absent."""

import hashlib
import io
import json
import os
import pickle
import signal
import stat
import subprocess
import sys
import tarfile
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import prepare_data
from prepare_data import Parser, image_grid, iter_images, main, make_face, open_dataset, prepare

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


def refused(*argv):
    """The sentence with which main() refuses these arguments."""
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in argv])
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code  # exit code 1
    return stop.value.code


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
    outs = [prepare(src, tmp_path / f"out{i}", size=8) for i, src in enumerate(sources)]
    for out in outs[1:]:
        assert content(out) == content(outs[0])
    hashes = {open_dataset(out)[2]["hash"] for out in outs}
    (train, labels, meta), (val, val_labels, _) = (open_dataset(outs[0], s) for s in SPLITS)
    parts = train.tobytes(), labels.tobytes(), val.tobytes(), val_labels.tobytes()
    assert hashes == {hashlib.sha256(b"".join(parts)).hexdigest()}
    assert meta["class_names"] == ["cat", "dog"] and len(train) == 24 and len(val) == 1
    assert np.bincount(np.concatenate([labels, val_labels])).tolist() == [16, 9]


def test_every_image_keeps_its_label_and_none_is_lost(tmp_path):
    files = {f"{i % 4}/{i}.png": png(np.full((4, 4, 3), i, np.uint8)) for i in range(40)}
    out = prepare(tree(tmp_path / "src", files), tmp_path / "out", size=4, val_frac=0.25)
    seen = []
    for split, count in ("train", 30), ("val", 10):
        images, labels, _ = open_dataset(out, split)
        assert images.shape == (count, 4, 4, 3) and labels.dtype == np.int64
        assert (images[:, 0, 0, 0] % 4 == labels).all()
        seen += images[:, 0, 0, 0].tolist()
    assert sorted(seen) == list(range(40)) and seen != sorted(seen)
    other = prepare(tmp_path / "src", tmp_path / "other", size=4, val_frac=0.25, seed=1)
    assert content(other) != content(out)


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (["1.png", "2.png"], None),
        (["wrap/1.png", "wrap/2.png"], None),
        (["a/1.png", "b/2.png"], ["a", "b"]),
        (["wrap/b/1.png", "wrap/a/2.png"], ["a", "b"]),
        (["x/deep/a/1.png", "y/b/2.png"], ["a", "b"]),
        (["a/1.png", "b/2.png", "README.md", ".DS_Store", "__MACOSX/a/._1.png"], ["a", "b"]),
    ],
)
def test_the_class_is_the_innermost_folder_and_one_wrapping_folder_is_ignored(
    tmp_path, names, classes
):
    src = zipped(tmp_path / "src.zip", {name: png(noise(0)) for name in names})
    assert open_dataset(prepare(src, tmp_path / "out"))[2]["class_names"] == classes


def test_edm_zip_labels_come_from_dataset_json(tmp_path):
    names = [f"00000/img{i:08d}.png" for i in range(10)]
    labels = [[name, i % 3] for i, name in enumerate(names)]
    files = {name: png(np.full((4, 4, 3), i, np.uint8)) for i, name in enumerate(names)}
    for table, expected in (labels, ["0", "1", "2"]), (None, None):
        files["dataset.json"] = json.dumps({"labels": table}).encode()
        out = prepare(zipped(tmp_path / "edm.zip", files), tmp_path / "out", size=4, force=True)
        images, found, meta = open_dataset(out)
        assert meta["class_names"] == expected and meta["num_train"] == 9 and meta["rejected"] == 0
        assert expected is None or (images[:, 0, 0, 0] % 3 == found).all()
    for broken in (b'{"labels": [["a", 1', b'{"labels": [["00000/img00000000.png", -1]]}'):
        files["dataset.json"] = broken
        refused(zipped(tmp_path / "bad.zip", files), "--out", tmp_path / "bad")


def cifar(path, poison=None):
    """The published layout: rows of 3*32*32 bytes, one pickled dictionary a batch."""
    files, pixels, labels = {}, [], []
    for name in ["data_batch_1", "data_batch_2", "test_batch"]:
        data = noise(len(files), 6, 3 * 32 * 32, 1)[..., 0]
        table = {"data": data, "labels": [len(files)] * 6}
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
    (train, labels, meta), (val, val_labels, _) = (open_dataset(out, s) for s in SPLITS)
    assert meta["class_names"] == ["plane", "car", "bird"] and meta["size"] == 32
    assert np.array_equal(val, pixels[2].transpose(0, 2, 3, 1)) and set(val_labels) == {2}
    expected = {p.transpose(1, 2, 0).tobytes(): n for n in (0, 1) for p in pixels[n]}
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
    elsewhere = pickled.replace(b"numpy\ndtype", b"numpy.f2py.__main__\ndtype")  # importing it would run a program
    with pytest.raises(pickle.UnpicklingError, match="refused"):
        prepare_data.SafeUnpickler(io.BytesIO(elsewhere), encoding="latin1").load()


def test_a_pickle_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    src, _ = cifar("cifar-10-python.tar.gz", Bomb())
    assert "mkdir" in refused(src, "--out", "out")
    np.save("objects.npy", np.array([Bomb()], object), allow_pickle=True)
    refused("objects.npy", "--out", "out")
    assert not os.path.exists("exploded") and not os.path.exists("out")


def test_latents_round_trip_with_their_standard_deviation(tmp_path):
    latents = np.random.default_rng(0).normal(0.3, 1.7, (50, 4, 6, 6))
    np.save(tmp_path / "z.npy", latents)
    np.save(tmp_path / "labels.npy", np.arange(50) % 5)
    main([f"{tmp_path}/z.npy", f"--labels={tmp_path}/labels.npy", f"--out={tmp_path}/out"])
    sets = [open_dataset(tmp_path / "out", split) for split in SPLITS]
    (train, labels, meta), (val, val_labels, _) = sets
    assert train.dtype == np.float32 and train.shape[1:] == (6, 6, 4) and meta["layout"] == "NHWC"
    stored = latents.transpose(0, 2, 3, 1).astype(np.float32)
    expected = {z.tobytes(): i % 5 for i, z in enumerate(stored)}
    found = zip([*train, *val], [*labels, *val_labels])
    assert {z.tobytes(): label for z, label in found} == expected
    assert meta["sigma_data"] == pytest.approx(train.astype(np.float64).std(), rel=1e-9)
    refused(tmp_path / "z.npy", "--out", tmp_path / "b", "--size", 8)
    np.save(tmp_path / "labels.npy", np.arange(49))
    argv = tmp_path / "z.npy", "--labels", tmp_path / "labels.npy", "--out", tmp_path / "b"
    assert "50 class numbers" in refused(*argv)


def test_generated_images_become_a_data_set(tmp_path):
    images = noise(0, 7 * 16, 16).reshape(7, 16, 16, 3)
    np.savez_compressed(tmp_path / "samples.npz", images, np.arange(7) % 2)
    out = prepare(tmp_path / "samples.npz", tmp_path / "out")
    train, labels, meta = open_dataset(out)
    assert meta["size"] == 16 and meta["sigma_data"] == 0.5
    position = {image.tobytes(): i for i, image in enumerate(images)}
    assert all(position[x.tobytes()] % 2 == y for x, y in zip(train, labels))
    np.save(tmp_path / "grey.npy", images[..., :1])
    grey = open_dataset(prepare(tmp_path / "grey.npy", tmp_path / "grey", channels=1))[0]
    assert grey.shape == (6, 16, 16, 1)


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
    squeezed = one(png(bands), size=12, fit="stretch")
    assert (squeezed[:, 1].argmax(-1) == 0).all() and (squeezed[:, 10].argmax(-1) == 2).all()


def test_reducing_is_antialiased_and_an_image_of_the_right_size_is_untouched():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(one(png(stripes), size=8)[:, 1:-1].astype(int) - 127).max() <= 2
    assert np.array_equal(one(png(noise(0)), size=12), noise(0))


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (5, 5), colour) for colour in ("red", "blue")]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    assert (one(file.getvalue()) == (255, 0, 0)).all()


# ---- Rejects.


def test_rejects_are_named_with_their_reason_and_counted(tmp_path, capsys):
    good = {f"{i}.png": png(noise(i)) for i in range(9)}
    bad = {"cut.png": good["0.png"][:-40], "words.jpg": b"no image", "nested.zip": b"PK",
           "empty.png": b"", "notes.txt": b"hello", ".DS_Store": b"\0"}
    rejects = []
    src = tree(tmp_path / "src", good | bad)
    assert [name for name, _, _ in iter_images(src, rejects=rejects)] == sorted(good)
    assert sorted(name for name, _ in rejects) == sorted(bad)
    out = prepare(src, tmp_path / "out", size=12)
    printed = capsys.readouterr().err
    assert all(repr(name) in printed for name in bad) and "6 of 15" in printed
    assert open_dataset(out)[2]["rejected"] == 6
    assert content(out) == content(prepare(tree(tmp_path / "b", good), tmp_path / "b_out", size=12))
    assert "--strict" in refused(src, "--out", tmp_path / "c", "--strict")
    assert not (tmp_path / "c").exists()


def test_more_than_half_rejected_is_an_error_and_clutter_does_not_count(tmp_path):
    clutter = {f"__MACOSX/._{i}.png": b"x" for i in range(9)}
    mixed = {"a.png": png(noise(0)), "b.png": png(noise(1)), "c.png": b"x", "d.png": b"x"}
    prepare(zipped(tmp_path / "half.zip", mixed | clutter), tmp_path / "half")
    src = zipped(tmp_path / "more.zip", mixed | {"e.png": b"x"})
    assert "half" in refused(src, "--out", tmp_path / "more")
    (tmp_path / "empty").mkdir()
    for src in tmp_path / "empty", zipped(tmp_path / "none.zip", {"a.png": b"x"}):
        assert "no image" in refused(src, "--out", tmp_path / "none")


def test_archive_entries_that_climb_out_or_link_are_rejected(tmp_path):
    files = {f"{i}.png": png(noise(i)) for i in range(4)}
    climbing = {"../up.png": b"x", "/abs.png": b"x", "a/../../b.png": b"x"}
    zipped(tmp_path / "a.zip", files | climbing | {"c:/d.png": b"x"})
    with zipfile.ZipFile(tmp_path / "a.zip", "a") as archive:
        info = zipfile.ZipInfo("link.png")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    tarred(tmp_path / "a.tar", files | climbing)
    with tarfile.open(tmp_path / "a.tar", "a") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo(f"link{kind!r}.png")
            info.type, info.linkname = kind, "0.png"
            archive.addfile(info)
    for path, count in (tmp_path / "a.zip", 5), (tmp_path / "a.tar", 6):
        rejects = []
        assert [name for name, _, _ in iter_images(path, rejects=rejects)] == sorted(files)
        assert len(rejects) == count
    assert not (tmp_path.parent / "up.png").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs links and pipes")
def test_a_link_to_a_folder_and_a_pipe_are_not_read(tmp_path):
    tree(tmp_path / "other", {"a.png": png(noise(0))})
    tree(tmp_path / "src", {"b.png": png(noise(1))})
    (tmp_path / "src/out").symlink_to(tmp_path / "other")
    (tmp_path / "src/loop").symlink_to(tmp_path / "src")
    (tmp_path / "src/gone.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "src/pipe.png")
    rejects = []
    assert [name for name, _, _ in iter_images(tmp_path / "src", rejects=rejects)] == ["b.png"]
    assert len(rejects) == 4


def test_decompression_bombs_are_refused(tmp_path, monkeypatch):
    huge = png(np.zeros((64, 64, 3), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(Image.DecompressionBombError):
        one(huge)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros.png", bytes(1 << 25))
        archive.writestr("good.png", png(noise(0)))
    monkeypatch.setattr(prepare_data, "MAX_FILE", 1 << 24)
    rejects = []
    assert len(list(iter_images(tmp_path / "a.zip", rejects=rejects))) == 1
    ((name, reason),) = rejects
    assert name == "zeros.png" and "too large" in reason


@pytest.mark.skipif(sys.platform != "linux", reason="other systems restrict file names")
def test_any_file_name_is_read_and_printed(tmp_path):
    names = [b"with space.png", b"new\nline.png", "\u732b.png".encode(), b"\xff\xfe.png"]
    os.mkdir(tmp_path / "src")
    for i, name in enumerate(names):
        Path(tmp_path / "src", os.fsdecode(name)).write_bytes(png(noise(i)) if i % 2 else b"x")
    env = {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    out = tmp_path / "\u00e9 out"
    command = [sys.executable, SCRIPT, tmp_path / "src", "--out", out, "--preview"]
    run = subprocess.run(command, cwd="/", env=env, capture_output=True, check=False)
    assert run.returncode == 0 and b"2 of 4" in run.stderr and b"with space.png" in run.stderr
    assert open_dataset(out)[0].shape == (1, 64, 64, 3)


# ---- The writer.


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    tree(tmp_path / "src", {f"{i}.png": png(noise(i)) for i in range(30)})
    old = prepare(tmp_path / "src", tmp_path / "old", size=4)
    before, listing = content(old), sorted(os.listdir(tmp_path))
    for error in (KeyboardInterrupt, SystemExit(143), OSError(28, "No space left on device")):
        for target in ("write_npy", "image_grid"):
            def fail(*_, error=error):
                raise error

            with monkeypatch.context() as patch:
                patch.setattr(prepare_data, target, fail)
                for out, force in ("new", False), ("old", True):
                    with pytest.raises((KeyboardInterrupt, SystemExit)):
                        prepare(tmp_path / "src", tmp_path / out, force=force, preview=True)
                    assert sorted(os.listdir(tmp_path)) == listing and content(old) == before


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_sigterm_ends_with_143_and_without_output(tmp_path):
    command = [sys.executable, SCRIPT, "--out", tmp_path / "faces", "--size", "256"]
    run = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 20
    while not os.listdir(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert os.listdir(tmp_path) and not (tmp_path / "faces").exists()
    run.send_signal(signal.SIGTERM)
    assert run.wait(20) == 143 and os.listdir(tmp_path) == []


def test_force_replaces_a_data_set_and_nothing_else(tmp_path):
    files = {f"{i}.png": png(noise(i)) for i in range(5)}
    src = tree(tmp_path / "src", files)
    out = tmp_path / "out"
    prepare(src, out, size=4, preview=True)
    assert "--force" in refused(src, "--out", out, "--size", 8)
    assert open_dataset(out)[2]["size"] == 4
    prepare(src, out, size=8, force=True)
    assert open_dataset(out)[2]["size"] == 8 and not (out / "preview.png").exists()
    assert sorted(os.listdir(tmp_path)) == ["out", "src"]
    (out / "thesis.tex").write_text("precious")
    for target in (out, src):
        refused(src, "--out", target, "--force")
    assert (out / "thesis.tex").exists() and len(os.listdir(src)) == 5


def test_one_image_serves_for_training_and_validation(tmp_path):
    out = prepare(tree(tmp_path / "src", {"a.png": png(noise(0))}), tmp_path / "out", size=12)
    for split in ("train", "val"):
        assert np.array_equal(open_dataset(out, split)[0][0], noise(0))


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


@pytest.mark.parametrize(
    "damage",
    ["truncated", "dtype", "shape", "labels", "range", "meta", "count", "missing", "zip"],
)
def test_a_damaged_data_set_is_refused(tmp_path, damage):
    files = {f"{i % 2}/{i}.png": png(noise(i)) for i in range(8)}
    out = Path(prepare(tree(tmp_path / "src", files), tmp_path / "out", size=4))
    images, labels, meta = open_dataset(out)
    images = np.array(images)
    if damage == "truncated":
        data = (out / "train.npy").read_bytes()
        (out / "train.npy").write_bytes(data[:-7])
    elif damage in ("dtype", "shape"):
        np.save(out / "train.npy", images.astype(int) if damage == "dtype" else images[:, 1:])
    elif damage in ("labels", "range"):
        np.save(out / "train_labels.npy", labels[1:] if damage == "labels" else labels + 1)
    elif damage == "missing":
        (out / "train_labels.npy").unlink()
    elif damage == "zip":
        zipped(out / "train.npy", {"arr_0.npy": b""})
    else:
        text = "[" if damage == "meta" else json.dumps(meta | {"num_train": 99})
        (out / "meta.json").write_text(text)
    with pytest.raises(SystemExit) as stop:
        open_dataset(out)
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
    main(["--size=16", "--preview", "--val_frac", "0.1"])
    (train, labels, meta), (_, val_labels, _) = (open_dataset("data/faces", s) for s in SPLITS)
    assert train.shape == (36, 16, 16, 3) and len(meta["class_names"]) == 4
    assert np.bincount(np.concatenate([labels, val_labels])).tolist() == [10] * 4
    faces = {make_face(i, 16)[0].tobytes(): i % 4 for i in range(40)}
    assert all(faces[x.tobytes()] == y for x, y in zip(train, labels))
    with Image.open("data/faces/preview.png") as sheet:
        assert sheet.size[0] > 6 * 16


def test_a_grid_shows_every_image_with_a_gap():
    images = np.stack([np.full((8, 8, 1), i, np.uint8) for i in range(5)])
    sheet = np.asarray(image_grid(images, columns=3))
    assert sheet.shape == (2 * 9 + 1, 3 * 9 + 1)
    assert [(sheet == i).sum() for i in range(5)] == [64] * 5


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--sizes=3"], ["--sizes", "--size"]),
        (["--val-frac", "0.1"], ["--val-frac", "--val_frac"]),
        (["--no_strict"], ["--no-strict"]),
        (["--size", "big"], ["--size", "'big'", "int"]),
        (["--fit=squeeze"], ["squeeze", "crop"]),
        (["--size=0"], ["--size"]),
        (["--val_frac=nan"], ["--val_frac"]),
        (["--background=bluish"], ["bluish"]),
        (["nowhere.zip"], ["nowhere.zip", "does not exist"]),
        ([str(SCRIPT)], [".py", "expected"]),
    ],
)
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
    parser = Parser(prog="x")
    parser.add_argument("--mask_ratio", type=float)
    parser.add_argument("words", nargs="*")
    assert parser.parse_args(["--mask_ratio=-1.5"]).mask_ratio == -1.5
    assert parser.parse_args(["--mask_ratio", "-1.5", "a"]).mask_ratio == -1.5
    assert parser.parse_args(["--", "--free"]).words == ["--free"]
    with pytest.raises(SystemExit):  # no abbreviations
        parser.parse_args(["--mask", "1"])
