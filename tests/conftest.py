"""Shared by all tests: scripts and tests/tools are importable from anywhere, torch has one thread."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "tools")]
torch.set_num_threads(1)  # small tensors: a second thread gains little, and loses much on busy cores


def make_dataset(folder, n=24, size=16, channels=3, classes=0, seed=0, n_val=8, dtype=np.uint8):
    """A prepared data set of smooth random pictures, written without prepare_data.py."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for split, count in (("train", n), ("val", n_val)):
        coarse = rng.integers(0, 256, (count, size // 4, size // 4, channels))
        images = coarse.repeat(4, axis=1).repeat(4, axis=2)
        images = images.astype(np.uint8) if dtype == np.uint8 else (images / 100 - 1).astype(dtype)
        np.save(folder / f"{split}.npy", images)
        if classes:
            np.save(folder / f"{split}_labels.npy", np.arange(count) % classes)
        if split == "train" and dtype != np.uint8:
            values = images.astype(np.float64).reshape(-1, channels)
            latent = [values.mean(0).tolist(), values.std(0).tolist()]
    meta = dict(num_train=n, num_val=n_val, size=size, channels=channels, dtype=np.dtype(dtype).name,
                class_names=[f"class {i}" for i in range(classes)] or None, hash=f"test-{seed}",
                latent=None if dtype == np.uint8 else latent)
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="session")
def labelled(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data") / "labelled", classes=3)


@contextmanager
def few_images(n=32):
    """Runs estimate importance on the first n images of their batch alone: 512 take seconds."""
    import train

    original = train.fisher_information

    def of_few(denoiser, batch, autocast):
        return original(denoiser, {k: t[:n] for k, t in batch.items()}, autocast)

    train.fisher_information = of_few
    yield
    train.fisher_information = original


def run(script, *args, processes=1, timeout=240, **environment):
    """Run a script of the project as a user would; returns the finished process."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}",
                    "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", "--"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command + [str(ROOT / script), *map(str, args)], capture_output=True,
                          text=True, timeout=timeout, env=environment)


def run_two(tmp_path, module, *args):
    """Run a script's main in two processes; it fails if one is left with a process group or its threads.

    The threads of an open group sometimes abort a process at its end, and torchrun then ends all.
    """
    (tmp_path / "two.py").write_text(f"import glob, sys, {module}, torch.distributed as dist\n"
                                     f"{module}.main(sys.argv[1:])\n"
                                     "threads = [open(path).read() for path in glob.glob('/proc/self/task/*/comm')]\n"
                                     "group = dist.is_initialized() or 'gloo' in ''.join(threads)\n"
                                     "sys.exit(f'open group: {threads}' if group else 0)\n")
    result = run(tmp_path / "two.py", *args, processes=2, PYTHONPATH=str(ROOT))
    assert result.returncode == 0, result.stderr


def mistake(call, *args):
    """The one sentence with which `call(args)` is refused: a ValueError raised by one of our `check`s."""
    with pytest.raises((ValueError, OSError)) as e:
        call([str(a) for a in args])
    if not isinstance(e.value, OSError):
        assert e.traceback[-1].name == "check", e.value
    assert "\n" not in str(e.value).strip(), e.value
    return str(e.value)


TINY = ["--dim=32", "--depth=2", "--heads=2", "--patch_size=4", "--device=cpu", "--dtype=float32",
        "--eval_every=0", "--sample_every=0", "--save_every=0", "--lr=1e-3", "--warmup=2"]
