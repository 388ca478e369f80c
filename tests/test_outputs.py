"""Outputs: what cannot be written is told before the work, what was computed is shown, and logs stay readable."""

import os
from datetime import timedelta

import pytest
import torch.distributed
from conftest import TINY, mistake

import fid
import prepare_data
import sample
import train


@pytest.fixture
def places(tmp_path):
    """A file where a folder is asked for, and a folder where a file is."""
    (tmp_path / "file").write_text("something of the user's")
    for name in ("folder.png", "folder.npz"):
        (tmp_path / name).mkdir()
    return tmp_path


def refuse(*args, **kwargs):
    raise AssertionError("the work has begun")


@pytest.mark.parametrize("out", ["folder.png", "folder.npz", "file/x.png", "file/x.npz", "file/pngs", "/proc/none/x.npz"])
def test_sampling_tells_before_it_draws_that_it_cannot_write(dataset, places, monkeypatch, out):
    train.main([f"--data={dataset}", f"--out_dir={places}/run", "--batch_size=12", "--steps=1", *TINY])
    monkeypatch.setattr(sample, "generate", refuse)
    sentence = mistake(sample.main, "--ckpt", places / "run/ft.pt", "--num=2", "--out", places / out)
    assert out.split("/")[0] in sentence or "/proc" in sentence
    assert (places / "file").read_text() == "something of the user's"
    assert not list(places.rglob("*.tmp")) and not list(places.rglob("*.parts"))


@pytest.mark.parametrize("stats", ["folder.npz", "file/x.npz", "none/such/x.npz", "/proc/none.npz"])
def test_statistics_that_cannot_be_written_are_told_before_anything_is_measured(dataset, places, monkeypatch, stats):
    monkeypatch.setattr(fid, "measure", refuse)
    assert mistake(fid.main, dataset, "--features=random", "--stats", places / stats)


@pytest.mark.parametrize("out_dir", ["file", "file/run", "/proc/none"])
def test_training_tells_that_its_folder_cannot_be_made(dataset, places, monkeypatch, out_dir):
    monkeypatch.setattr(train, "build", refuse)
    assert mistake(train.main, f"--data={dataset}", f"--out_dir={places / out_dir}", *TINY)
    assert (places / "file").read_text() == "something of the user's"


@pytest.mark.parametrize("out", ["file", "file/set", "/proc/none"])
def test_preparing_tells_that_its_folder_cannot_be_made(places, monkeypatch, out):
    monkeypatch.setattr(prepare_data, "write_set", refuse)
    for force in [], ["--force"]:
        assert mistake(prepare_data.main, "--out", places / out, *force)
    assert (places / "file").read_text() == "something of the user's"


def test_distances_are_printed_before_the_statistics_are_written(dataset, tmp_path, monkeypatch, capsys):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fid, "replace_file", full)
    with pytest.raises(OSError):
        fid.main([str(dataset), str(dataset), "--features=random", "--num=4", "--stats", f"{tmp_path}/x.npz"])
    assert capsys.readouterr().out.startswith("random_fd ")


def test_in_a_log_a_progress_bar_is_a_line_now_and_then_and_sentences_have_lines_of_their_own(capsys):
    bar = prepare_data.progress_bar(total=1000, desc="pt")
    for i in range(1000):
        bar.update()
        bar.set_postfix_str(f"loss {i}", refresh=False)
        if i % 400 == 0:
            prepare_data.say(f"step {i}: validation loss 1.5")
    bar.close()
    err = capsys.readouterr().err
    assert "\r" not in err
    lines = err.splitlines()
    assert [line for line in lines if not line.startswith("pt:")] == [
        f"step {i}: validation loss 1.5" for i in (0, 400, 800)]
    assert 1 <= len([line for line in lines if line.startswith("pt:")]) <= 2  # the first and the last state


def test_a_long_save_does_not_end_the_run(monkeypatch):
    asked = {}
    monkeypatch.setattr(train, "WORLD_SIZE", 2)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda **how: asked.update(how))
    train.setup(train.parse(["--device=cpu"])[0])
    assert asked["timeout"] >= timedelta(hours=1)


def test_leading_folders_of_outputs_are_made(dataset, tmp_path):
    train.main([f"--data={dataset}", f"--out_dir={tmp_path}/a/b", "--batch_size=12", "--steps=1", *TINY])
    sample.main(["--ckpt", f"{tmp_path}/a/b/ft.pt", "--num=1", "--steps=1", "--out", f"{tmp_path}/c/d/x.png"])
    assert os.path.exists(tmp_path / "c/d/x.png")
