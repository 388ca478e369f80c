"""Runs the scripts on a pretended GPU: what CUDA would refuse is refused, every wait for it is counted.

python tests/tools/pretend.py JOBS.json     # [{"script": "train", "args": [...], "edit": [FILE, OLD, NEW]}, ...]

A tensor on the device "gpu:0" holds one on the CPU and computes with it. Tensors of both places do not mix, a
generator belongs to its place, and the host waits where it reads a result or copies without non_blocking. Each job
runs in a fork of its own, with its edit to a copy of the scripts if it has one, and prints a line of JSON: the error
with which it ended or null, and the waits of the main thread by step. Kernels, memory and speed are not pretended.
"""

import importlib
import json
import os
import shutil
import sys
import tempfile
import threading
import traceback
from pathlib import Path

import torch
import torch._dynamo  # noqa: F401, by optimizers: here once and not in every fork
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

ROOT = Path(__file__).resolve().parent.parent.parent
aten = torch.ops.aten
TRANSFERS = (aten._to_copy.default, aten.copy_.default, aten._foreach_copy_.default)
READS = (aten._local_scalar_dense.default, aten.is_nonzero.default, aten.nonzero.default, aten.equal.default,
         aten.masked_select.default)  # the host needs their result
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
JOINS = (aten.cat.default, aten.stack.default)  # take no number from elsewhere
waits = [[]]  # of the main thread: before the first step, in it, in the second, ...


class Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


class OnGPU(torch.Tensor):
    """A tensor that claims to be on gpu:0."""

    @staticmethod
    def __new__(cls, held):
        t = torch.Tensor._make_wrapper_subclass(cls, held.shape, strides=held.stride(), dtype=held.dtype,
                                                device="gpu:0", storage_offset=held.storage_offset())
        t.held = held
        return t

    def __reduce_ex__(self, protocol):  # saved like any other tensor
        return self.held.__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.numpy, torch.Tensor.__array__):
            raise TypeError("can't convert a tensor on gpu:0 to numpy")
        if func is torch.Tensor.tolist:
            wait("tolist")
            return args[0].held.tolist()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


def wait(what):
    if threading.current_thread() is threading.main_thread():
        waits[-1].append(what)


def held(tree):
    return tree_map(lambda x: x.held if isinstance(x, OnGPU) else x, tree)


def compute(func, args, kwargs):
    """One operation: refuses or counts what a GPU would refuse or wait for, then computes on the CPU."""
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    mine = [t for t in tensors if isinstance(t, OnGPU)]
    device = kwargs.get("device")
    asked = device is not None and torch.device(device).type == "gpu"
    others = [t for t in tensors if not isinstance(t, OnGPU) and (t.dim() or func in JOINS)]  # numbers may be anywhere
    if func in INDEXING and isinstance(args[0], OnGPU):
        indices = [index for index in args[1] if index is not None]
        if any(index.dtype == torch.bool for index in indices):
            wait("the number of chosen elements")
        if any(not isinstance(index, OnGPU) for index in indices):  # may be anywhere, but has to be copied
            wait("an index")
        others = [t for t in others if not any(t is index for index in indices)]
    if mine and others and func not in TRANSFERS:
        raise RuntimeError(f"{func}: {len(mine)} tensors are on gpu:0 and {len(others)} on the CPU")
    # The host waits for what it reads, and for copies from and to memory that is not pinned, unless told not to.
    moved = func in TRANSFERS and (bool(mine) != asked if func is TRANSFERS[0] else len(mine) not in (0, len(tensors)))
    blocking = not kwargs.get("non_blocking") and not (func is aten.copy_.default and len(args) > 2 and args[2])
    if mine and func in READS or moved and blocking:
        wait(str(func))
    there = {k: torch.device("cpu") if k == "device" and asked else False if k == "pin_memory" else v
             for k, v in kwargs.items()}
    if moved and func is TRANSFERS[0]:
        result = held(args[0]).to(kwargs.get("dtype") or args[0].dtype, copy=True)
    else:
        result = func(*held(args), **held(there))
    if func is READS[0] or not (asked if device is not None else isinstance(tree_leaves(args)[0], OnGPU)
                                if func in TRANSFERS else mine):
        return result
    if any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments):  # in place
        return kwargs.get("out", args[0]) if func._schema.returns else None
    return tree_map(lambda x: OnGPU(x) if isinstance(x, torch.Tensor) else x, result)


Plain = torch.Generator


class Generator(Plain):
    """A generator with a place, which a build of torch without a GPU does not have."""

    def __new__(cls, device="cpu"):
        g = Plain.__new__(cls)
        g.place = torch.device(device).type
        return g

    def __init__(self, device="cpu"):
        pass


class Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        generator, place = kwargs.get("generator"), torch.device(kwargs.get("device") or "cpu").type
        if isinstance(generator, Generator) and generator.place != place:
            raise RuntimeError(f"{func.__name__}: a generator on {generator.place} for a tensor on {place}")
        return func(*args, **kwargs)


class Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


def pretend():
    """From here on this thread has a GPU."""
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) copies what it made
    Functions().__enter__()
    Operations().__enter__()


def run(job, scripts):
    """Run one job with the scripts of a folder."""
    torch.set_num_threads(1)
    sys.path.insert(0, str(scripts))
    torch.Generator = Generator
    torch.inference_mode = torch.no_grad  # the other one does not show its operations one by one
    sample, train = importlib.import_module("sample"), importlib.import_module("train")
    sample.pick_device = lambda name: torch.device("gpu", 0)
    sample.pick_dtype = lambda name, device: torch.float32
    pool, set_rates, importance = train.ThreadPoolExecutor, train.set_learning_rates, train.fisher_information

    def new_step(optimizers, cfg, step):  # called once a step
        waits.append([])
        set_rates(optimizers, cfg, step)

    def importance_of_few(denoiser, batch, autocast):  # 512 images would take long
        return importance(denoiser, {name: t[:8] for name, t in batch.items()}, autocast)

    train.ThreadPoolExecutor = lambda n: pool(n, initializer=pretend)  # modes are those of a thread
    train.set_learning_rates = new_step
    train.fisher_information = importance_of_few
    pretend()
    with torch.autocast("gpu", enabled=False):
        importlib.import_module(job["script"]).main(job["args"])


def main(jobs):
    _setup_privateuseone_for_python_backend("gpu", Backend())
    for job in jobs:
        with tempfile.TemporaryDirectory() as folder:
            for path in ROOT.glob("*.py"):
                shutil.copy(path, folder)
            if job.get("edit"):
                name, old, new = job["edit"]
                text = Path(folder, name).read_text()
                assert text.count(old) == 1, f"{name} holds {old!r} {text.count(old)} times"
                Path(folder, name).write_text(text.replace(old, new))
            sys.stdout.flush()
            if (child := os.fork()) == 0:
                error = None
                try:
                    run(job, folder)
                except BaseException as e:  # noqa: BLE001 (also an exit)
                    error = f"{e!r:.300}"
                    traceback.print_exc()
                print(json.dumps(dict(error=error, waits=waits)), flush=True)
                os._exit(0)
            os.waitpid(child, 0)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
