"""Runs the scripts on a pretended GPU: what CUDA would refuse is refused, every wait for it is counted.

python tests/pretend_gpu.py JOBS.json     # [{"script": "train", "args": [...], "edit": [FILE, OLD, NEW]}, ...]

A tensor on the device "gpu:0" holds one on the CPU and computes with it. Tensors of both places do not mix, a
generator belongs to its place, autocast casts what it casts on CUDA, and the host waits where it reads a result or
copies without non_blocking or from memory that is not pinned. Each job runs in a fork of its own ("processes": 2: in
two), with its edit to a copy of the scripts if it has one. Where these ask for the type "cuda", the pretended GPU
counts. A job prints a line of JSON: the error with which it ended or null, the waits of the main thread by step, and
those of other threads. Kernels, memory and speed are not pretended, and torch.compile only reads its options.
"""

import importlib
import json
import os
import signal
import sys
import tempfile
import threading
import traceback
from pathlib import Path

import torch
import torch._dynamo  # noqa: F401, by optimizers: here once and not in every fork
import torch.distributed as dist
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

ROOT = Path(__file__).resolve().parent.parent
aten = torch.ops.aten
TRANSFERS = (aten._to_copy.default, aten.copy_.default, aten._foreach_copy_.default)
READS = (aten._local_scalar_dense.default, aten.is_nonzero.default, aten.nonzero.default, aten.equal.default,
         aten.masked_select.default)  # the host needs their result
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
JOINS = (aten.cat.default, aten.stack.default)  # take no number from elsewhere
# What autocast does on CUDA, as far as the scripts use it: these take bfloat16, these float32, these the wider type.
LOW = (F.linear, F.scaled_dot_product_attention, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.addmm)
HIGH = (F.layer_norm, torch.softmax, torch.Tensor.softmax, torch.exp, torch.Tensor.exp, torch.Tensor.log,
        torch.Tensor.sum, torch.Tensor.__pow__, torch.Tensor.rsqrt, torch.linalg.vector_norm)
WIDEST = (torch.cat, torch.stack, torch.addcmul)
waits = [[]]  # of the main thread: before the first step, in it, in the second, ...
waits_elsewhere = []  # of other threads
this_thread = threading.local()  # .device, once torch.cuda.set_device was called


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
    main = threading.current_thread() is threading.main_thread()
    (waits[-1] if main else waits_elsewhere).append(what)


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
    if func is TRANSFERS[0]:
        moved = device is not None and bool(mine) != asked
    else:
        moved = func in TRANSFERS and len(mine) not in (0, len(tensors))
    blocking = not kwargs.get("non_blocking") and not (func is aten.copy_.default and len(args) > 2 and args[2])
    pageable = not mine and any(t.nbytes > 1024 and not hasattr(t, "pinned") for t in tensors)  # small ones are staged
    if mine and func in READS or moved and (blocking or pageable):
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
        if getattr(this_thread, "autocast", None):
            args, kwargs = cast(func, args, kwargs, this_thread.autocast)
        return func(*args, **kwargs)


class Autocast:
    """torch.autocast, which has no rules for this device."""

    def __init__(self, device_type, dtype, enabled=True):
        self.dtype = dtype if enabled else None

    def __enter__(self):
        this_thread.autocast = self.dtype

    def __exit__(self, *error):
        this_thread.autocast = None


def cast(func, args, kwargs, lower):
    """The arguments in the types in which autocast to `lower` would compute."""
    floats = [t.dtype for t in tree_leaves((args, kwargs)) if isinstance(t, OnGPU) and t.dtype in (lower, torch.float32)]
    wanted = lower if func in LOW else torch.float32 if func in HIGH or func in WIDEST and torch.float32 in floats else None
    if wanted is None:
        return args, kwargs
    return tree_map(lambda t: t.to(wanted) if isinstance(t, OnGPU) and t.dtype in floats else t, (args, kwargs))


class Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


def pretend():
    """From here on this thread has a GPU."""
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) copies what it made
    Functions().__enter__()
    Operations().__enter__()


def pin_memory(tensor):
    if not hasattr(this_thread, "device"):
        raise RuntimeError("memory is pinned by a thread without set_device: all would start on the first GPU")
    tensor = tensor.clone(memory_format=torch.contiguous_format)
    tensor.pinned = True
    return tensor


def read_options(module, **how):
    """nn.Module.compile, which leaves the module as it is."""
    torch.compile(lambda x: x, **how)


# ---- Processes, which meet through gloo on the CPU, as the scripts on a GPU would through NCCL.
last_meeting = backend = None


def join(store):
    init = dist.init_process_group

    def init_process_group(name=None, device_id=None, timeout=None):
        global backend
        backend = name
        init("gloo", init_method=f"file://{store}", rank=int(os.environ["RANK"]), world_size=2)

    dist.init_process_group = init_process_group
    reduce, barrier, leave = dist.all_reduce, dist.barrier, dist.destroy_process_group

    def all_reduce(tensor):
        global last_meeting
        last_meeting = "sum"
        if backend == "gloo" and isinstance(tensor, OnGPU):
            raise RuntimeError("gloo for tensors on gpu:0")
        reduce(held(tensor))

    def wait_for_all():
        global last_meeting
        last_meeting = "barrier"
        barrier()

    def destroy_process_group():
        if last_meeting != "barrier":
            raise RuntimeError("a process leaves while others may still send")
        leave()

    dist.all_reduce, dist.barrier, dist.destroy_process_group = all_reduce, wait_for_all, destroy_process_group


class DDP(torch.nn.Module):
    """Averages each gradient when it is complete."""

    def __init__(self, module, gradient_as_bucket_view, forward_sync_buffers):
        super().__init__()
        self.module = module
        self.require_backward_grad_sync = True
        for p in module.parameters():
            p.register_post_accumulate_grad_hook(self.average)

    def average(self, p):
        if self.require_backward_grad_sync:
            dist.all_reduce(p.grad)
            p.grad.held.div_(dist.get_world_size())

    def forward(self, *args):
        return self.module(*args)


def run(job, scripts, rank):
    """Run one process of a job with the scripts of a folder."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job.get("processes", 1)), CC="cc")
    join(f"{scripts}/store")
    sys.path.insert(0, str(scripts))
    torch.Generator, torch.autocast = Generator, Autocast
    torch.Tensor.pin_memory = pin_memory
    torch.nn.Module.compile = read_options
    torch.cuda.set_device = lambda device: setattr(this_thread, "device", device)
    torch.inference_mode = torch.no_grad  # the other one does not show its operations one by one
    sample, train = importlib.import_module("sample"), importlib.import_module("train")
    train.DDP = DDP
    train.sysconfig.get_path = lambda name: str(scripts)  # where Python.h is
    sample.pick_device = lambda name: torch.device("gpu", 0)
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
    importlib.import_module(job["script"]).main(job["args"])


def copy_scripts(folder, edit):
    for path in ROOT.glob("*.py"):
        text = path.read_text()
        if edit and edit[0] == path.name:
            assert text.count(edit[1]) == 1, f"{path.name} holds {edit[1]!r} {text.count(edit[1])} times"
            text = text.replace(*edit[1:])
        text = text.replace('type == "cuda"', 'type == "gpu"').replace('importlib.util.find_spec("triton")', "True")
        Path(folder, path.name).write_text(text)
    Path(folder, "Python.h").touch()


def main(jobs):
    _setup_privateuseone_for_python_backend("gpu", _DummyBackendModule())
    for job in jobs:
        with tempfile.TemporaryDirectory() as folder:
            copy_scripts(folder, job.get("edit"))
            sys.stdout.flush()
            children = []
            for rank in range(job.get("processes", 1)):
                if (child := os.fork()) == 0:
                    error = None
                    try:
                        run(job, folder, rank)
                    except BaseException as e:  # noqa: BLE001 (also an exit)
                        error = f"{e!r:.300}"
                        traceback.print_exc()
                    if rank == 0 or error:
                        Path(folder, f"result{rank}").write_text(json.dumps(
                            dict(error=error, waits=waits, waits_elsewhere=waits_elsewhere)))
                    os._exit(0)
                children.append(child)
            while children:
                children.remove(os.wait()[0])
                results = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("result*"))]
                worst = max(results, key=lambda r: r["error"] is not None, default=None)
                for child in children if worst and worst["error"] else ():
                    os.kill(child, signal.SIGKILL)  # it waits for the one that failed
            print(json.dumps(worst or dict(error="no result", waits=[[]], waits_elsewhere=[])), flush=True)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
