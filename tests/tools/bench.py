"""Where the time of a training step goes, on this machine, as ratios within one run.

python tests/tools/bench.py                      # everything (about 35 minutes on two cores)
python tests/tools/bench.py steps --only demo    # sections (see --help), cases whose name contains a word
python tests/tools/bench.py steps --against other.py  # a step of ours and of another network in turns
python tests/tools/bench.py plan --preset dit-xl --size 32 --channels 4 --ratio 0.5 --batch 1024 --gpus 8

Every case of a section runs in a process of its own, so that its peak memory is its own; times are
medians. MFU is the token FLOPs of a step (weights and attention, three forward passes' worth) over
the bfloat16 matrix product of 2048 x 2048 x 2048 timed in the same run. `plan` runs nothing but the loader: it
counts a step on tensors without memory, beside the peak of an H100 or of what --peak, --memory, --network say.

The file of --against makes the other network. It has a function

    make(size, channels, patch_size, dim, depth, heads, visible) -> module, loss

where loss(images), a scalar, is that of a batch (B, channels, size, size) in [-1, 1] of whose patches `visible` are
seen. It may have NAME, and CONFIG, a dict of what differs from --preset=maskdm-64 at 64 px in our ModelConfig.
"""

import argparse
import ctypes
import importlib.util
import json
import math
import mmap
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import model
import prepare_data
import sample
import train
from reproduce import where_from

DEVICE = sample.pick_device("auto")
SMALL = DEVICE.type == "cpu"  # batches that two cores finish in minutes


def clock(work, repeats=5, warm=1):
    """Median seconds of work()."""
    times = []
    for i in range(warm + repeats):
        start = now()
        work()
        times.append(now() - start)
    return statistics.median(times[warm:])


def now():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory():
    """Largest memory of this process so far, in bytes (on a GPU: of its allocator)."""
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def matmul_peak(dtype, n=2048):
    a, b = torch.randn(2, n, n, device=DEVICE, dtype=dtype)
    return 2 * n**3 / clock(lambda: a @ b, repeats=15, warm=3)


def token_flops(config, k):
    """FLOPs of forward and backward of one image with k visible tokens, adaLN left out."""
    def blocks(depth, tokens, width):
        return depth * tokens * (2 * 12 * width**2 + 4 * tokens * width)

    c, n, width = config, config.grid**2, config.decoder_dim or config.dim
    routed = c.route[1] - c.route[0] if c.route else c.depth
    first, last = n if c.route else k, n if c.takes_all else k
    forward = (2 * c.token_dim * (first * c.dim + last * width) + blocks(c.depth - routed, n, c.dim)
               + blocks(routed, k, c.dim) + blocks(c.decoder_depth, n, width))
    return 3 * (forward + (2 * k * c.dim * width if c.decoder_depth else 0))


def products_share(work, dtype):
    """Share of the time of forward and backward that goes into matrix products, by the profiler."""
    with torch.profiler.profile() as p, torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
        work()
    times = {e.key: e.self_cpu_time_total if DEVICE.type == "cpu" else e.self_device_time_total
             for e in p.key_averages()}
    products = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
    return sum(times.get(key, 0) for key in products) / sum(times.values())


def random_set(folder, n, size, channels=3, patch_size=4):
    """A prepared set of noise; big enough sets do not fit the processor's caches."""
    rng = np.random.default_rng(0)
    images = np.lib.format.open_memmap(folder + "/train.npy", "w+", np.uint8, (n, size, size, channels))
    for i in range(0, n, 512):
        images[i : i + 512] = rng.integers(0, 256, images[i : i + 512].shape, dtype=np.uint8)
    images.flush()
    meta = dict(num_train=n, size=size, channels=channels, dtype="uint8", class_names=None, hash="bench")
    Path(folder, "meta.json").write_text(json.dumps(meta))
    return model.Images(folder, "train", patch_size)


def settings(**changes):
    """train.py's settings, as if typed."""
    return train.parse([f"--{name}={value}" for name, value in changes.items()])[0]


# -- a run that has not been started --------------------------------------------------------------


def count_step(config, ratio, batch, mask_type="block", block_size=2):
    """FLOPs of forward and backward and the bytes that autograd keeps for it, of `batch` images in bfloat16.

    Counted by running the step on tensors without memory, with the fused attention of a GPU. Among what is kept are
    the weights in bfloat16, once, whatever the batch.
    """
    kept, plain = {}, model.attention
    with FakeTensorMode(allow_non_fake_inputs=True):
        denoiser = model.Denoiser(config)
        weights = {p.untyped_storage()._cdata for p in denoiser.parameters()}
        visible = model.sample_visible(batch, config.grid, ratio, mask_type, block_size)
        tokens = config.grid**2 if config.takes_all or visible is None else visible.shape[1]
        clean, noise = (torch.empty(batch, tokens, config.token_dim) for _ in range(2))
        labels = torch.zeros(batch, dtype=torch.int64) if config.num_classes else None

        def keep(t):
            storage = t.untyped_storage()
            if storage._cdata not in weights:
                kept[storage._cdata] = storage.nbytes()
            return t

        model.attention = torch.nn.functional.scaled_dot_product_attention
        try:
            with FlopCounterMode(display=False) as counter, torch.autocast("cpu", torch.bfloat16):
                with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                    loss = model.diffusion_objective(denoiser, config, clean, noise, torch.ones(batch), visible, labels)
                loss.mean().backward()
        finally:
            model.attention = plain
    return counter.get_total_flops(), sum(kept.values())


def plan(argv):
    """Will it fit, and what limits it?"""
    parser = argparse.ArgumentParser(description=plan.__doc__)
    for name, default, what in (("preset", "maskdm-64", "of train.py"), ("size", 64, "side of an image or latent"),
                                ("channels", 3, "of it"), ("classes", 0, "0: none"), ("ratio", 0.9, "share hidden"),
                                ("block_size", 2, "of the mask"), ("decoder_depth", 0, "MaskDiT's"),
                                ("decoder_dim", 0, "its width"), ("batch", 256, "images a step, in all"),
                                ("gpus", 8, "in all"), ("peak", 989e12, "FLOP/s of one, bfloat16, dense"),
                                ("share", 0.4, "of the peak that is reached"), ("memory", 80e9, "bytes of one"),
                                ("network", 50e9, "bytes/s of one to the others")):
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{what} ({default})")
    a = parser.parse_args(argv)
    sizes = model.PRESETS[a.preset] | dict(image_size=a.size, channels=a.channels, num_classes=a.classes,
                                           decoder_depth=a.decoder_depth, decoder_dim=a.decoder_dim)
    config, mine = model.ModelConfig(**sizes), a.batch // a.gpus
    with torch.device("meta"):
        n = sum(p.numel() for p in model.Denoiser(config).parameters())
    (flops, one), (_, two) = (count_step(config, a.ratio, b, block_size=a.block_size) for b in (mine, 2 * mine))
    activations = two - one  # without the weights
    fixed = {"weights": 4 * n, "gradients": 4 * n, "AdamW": 8 * n, "average": 4 * n, "weights in bfloat16": 2 * n}
    with tempfile.TemporaryDirectory() as folder:
        images = random_set(folder, max(a.batch, 512), a.size, a.channels, config.patch_size)
        cfg = settings(batch_size=a.batch, mask_ratio=a.ratio, block_size=a.block_size, device="cpu")
        stream = train.Stream(images, len(images), cfg, config, torch.device("cpu"), 0, a.gpus)
        torch.set_num_threads(1)  # as in a run
        loader = clock(lambda: stream.load(0))
    sent = 2 * (a.gpus - 1) / a.gpus * 4 * n  # a ring: each gradient goes out and comes back
    times = {"computing": flops / (a.peak * a.share), "loading (this machine)": loader, "network": sent / a.network}
    total = sum(fixed.values()) + activations
    print(f"{n / 1e6:.1f} M weights, {mine} of {a.batch} images on each of {a.gpus} GPUs\n"
          f"{flops / 1e12:.3g} TFLOP a step and GPU, {sent / 1e6:.4g} MB a step over the network")
    print("".join(f"{v / 1e9:8.2f} GB {name}\n" for name, v in (fixed | {"activations": activations}).items())
          + f"{total / 1e9:8.2f} GB in all: {'fits in' if total < a.memory else 'does NOT fit in'} {a.memory / 1e9:.0f} GB")
    print("".join(f"{v * 1e3:8.1f} ms {name}\n" for name, v in times.items())
          + f"the limit is {max(times, key=times.get)}: {a.batch / max(times.values()):.0f} images/s")


# -- beside other code ----------------------------------------------------------------------------


def load_adapter(path):
    spec = importlib.util.spec_from_file_location("adapter", path)
    adapter = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(adapter)
    return adapter


def stepper(path, whose, batch, ratio, dtype):
    """A function that takes one training step of our network or of the adapter's: forward, backward, clip, AdamW."""
    adapter = load_adapter(path)
    config = model.ModelConfig(**dict(image_size=64, **model.PRESETS["maskdm-64"]) | getattr(adapter, "CONFIG", {}))
    c, k = config, model.count_visible(config.grid, ratio)
    shape, micro = (batch, c.channels, c.image_size, c.image_size), batch
    torch.manual_seed(0)
    if whose == "ours":
        network, held = model.Denoiser(config).to(DEVICE), k if not c.takes_all else c.grid**2
        if DEVICE.type == "cpu":  # as in train.py
            micro = max((m for m in range(1, batch + 1) if batch % m == 0 and m * held * c.dim <= 2**20), default=1)

        def loss(images):
            visible, n = model.sample_visible(len(images), c.grid, ratio), len(images)
            clean = model.patchify(images.permute(0, 2, 3, 1), c.patch_size)
            clean = clean if c.takes_all or visible is None else model.take(clean, visible.to(DEVICE))
            labels = torch.zeros(n, dtype=torch.int64, device=DEVICE) if c.num_classes else None
            sigma = model.sigma_of(torch.randn(n, device=DEVICE))
            return model.diffusion_objective(network, c, clean, torch.randn(n, held, c.token_dim, device=DEVICE), sigma,
                                             None if visible is None else visible.to(DEVICE), labels, 0.1).mean()
    else:
        network, loss = adapter.make(c.image_size, c.channels, c.patch_size, c.dim, c.depth, c.heads, k)
        network.to(DEVICE).train()
    weights = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=True)

    def step():
        images = torch.rand(shape, device=DEVICE) * 2 - 1
        begun = now()
        with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
            for part in images.split(micro):
                (loss(part) * len(part) / batch).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return now() - begun

    return step, sum(p.numel() for p in weights)


def take_steps(path, whose, batch, ratio, dtype):
    """A process that takes a step for each line of stdin and prints its seconds, at the end its peak memory."""
    out, sys.stdout = sys.stdout, sys.stderr  # what other code prints is no answer
    step, n = stepper(path, whose, batch, ratio, dtype)
    print(n, file=out, flush=True)
    for _ in sys.stdin:
        print(step(), file=out, flush=True)
    print(peak_memory(), file=out)


def against(path, dtype, repeats, only=""):
    """Rows of (case, values): a step of each network, taken in turns, the minimum of `repeats`; peak memory."""
    rows, network = [], getattr(load_adapter(path), "NAME", Path(path).stem)
    for batch, ratio in ((b, r) for b in (8, 64) for r in (0, 0.5, 0.9)):
        name = f"{network}, batch {batch}, ratio {ratio}"
        if only not in name:
            continue
        command = [sys.executable, __file__, "--take"]
        both = [subprocess.Popen([*command, json.dumps([path, whose, batch, ratio, str(dtype)[6:]])], stdin=subprocess.PIPE,
                                 stdout=subprocess.PIPE, text=True) for whose in ("ours", "theirs")]
        weights, times = [p.stdout.readline() for p in both], ([], [])
        if "" in weights:
            for p in both:
                p.kill()
            sys.exit(f"{path}: the network of {name} could not be made; its error is above")
        for _ in range(1 + repeats):  # the first warms up
            for p, seconds in zip(both, times):
                p.stdin.write("\n")
                p.stdin.flush()
                seconds.append(float(p.stdout.readline()))
        peaks = [float(p.communicate()[0]) for p in both]
        ours, theirs = (min(t[1:]) for t in times)
        rows.append((name, dict(network=network, batch=batch, ratio=ratio, dtype=str(dtype)[6:], ours_ms=ours * 1e3, theirs_ms=theirs * 1e3, times_faster=theirs / ours,
                                ours_gb=peaks[0] / 1e9, theirs_gb=peaks[1] / 1e9, ours_m_weights=int(weights[0]) / 1e6,
                                theirs_m_weights=int(weights[1]) / 1e6)))
    return rows


# -- sections -------------------------------------------------------------------------------------


def peak(case):
    a = torch.randn(64 * 2**20, device=DEVICE)
    b = torch.empty_like(a)
    return dict(fp32_gflops=matmul_peak(torch.float32) / 1e9, bf16_gflops=matmul_peak(torch.bfloat16) / 1e9,
                copy_gb_per_s=2 * 4 * a.numel() / clock(lambda: b.copy_(a)) / 1e9)


def attention(case):
    """Forward and backward of the fused kernel against two batched products."""
    q, k, v = (torch.randn(case["shape"], device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
               for _ in range(3))

    def fused():
        torch.nn.functional.scaled_dot_product_attention(q, k, v).sum().backward()

    def products():
        weights = ((q * q.shape[3] ** -0.5) @ k.transpose(2, 3)).softmax(dim=3, dtype=torch.float32)
        (weights.to(v.dtype) @ v).sum().backward()

    def ours():
        model.attention(q, k, v).sum().backward()

    return dict(fused_ms=clock(fused) * 1e3, products_ms=clock(products) * 1e3, ours_ms=clock(ours) * 1e3)


def steps(case):
    """One training step as train.py does it, its parts timed apart."""
    config = model.ModelConfig(image_size=case["size"], channels=case.get("channels", 3),
                               **model.PRESETS[case["preset"]] | case.get("decoder", {}))
    cfg = settings(batch_size=case["batch"], mask_ratio=case["ratio"], mask_type="patch", steps=1)
    dtype = sample.pick_dtype("auto", DEVICE)
    torch.manual_seed(0)
    denoiser, ema = model.Denoiser(config).to(DEVICE), model.Denoiser(config).to(DEVICE).requires_grad_(False)
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=1e-4, fused=True)
    if case.get("compile"):
        denoiser.compile(dynamic=False)
    k = model.count_visible(config.grid, case["ratio"])
    held = config.grid**2 if config.takes_all else k
    fits = [m for m in range(1, case["batch"] + 1)  # as in train.py
            if case["batch"] % m == 0 and (DEVICE.type != "cpu" or m * held * config.dim <= 2**20)]
    micro = case.get("micro") or max(fits, default=1)
    autocast = torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32)

    def forward(batch, i):
        part = {key: None if t is None else t[i : i + micro] for key, t in batch.items()}
        return model.diffusion_objective(denoiser, config, **part, mae_weight=0.1).mean() / (case["batch"] / micro)

    with tempfile.TemporaryDirectory() as folder:
        images = random_set(folder, 2048, case["size"], config.channels, config.patch_size)
        stream = train.Stream(images, len(images), cfg, config, DEVICE)
        records, begun = [], now()
        for step in range(1 + case.get("repeats", 3)):
            parts = dict(data=0.0, forward=0.0, backward=0.0, clip=0.0, optimizer=0.0, ema=0.0)
            t = now()

            def lap(name):
                nonlocal t
                t, parts[name] = now(), parts[name] + now() - t

            batch = stream.load(step)
            del batch["index"]
            lap("data")
            with autocast:
                for i in range(0, case["batch"], micro):
                    loss = forward(batch, i)
                    lap("forward")
                    loss.backward()
                    lap("backward")
            torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0).item()
            lap("clip")
            optimizer.step()
            lap("optimizer")
            weights = [p.detach() for p in denoiser.parameters()]
            torch._foreach_lerp_(list(ema.parameters()), weights, 1e-3)
            optimizer.zero_grad(set_to_none=True)
            lap("ema")
            records.append(parts)
            if step == 0:
                first_s = now() - begun  # with compilation, if any
        memory = peak_memory() / 1e9
        outside = 1 - products_share(lambda: forward(batch, 0).backward(), dtype)
    parts = {name: statistics.median(r[name] for r in records[1:]) for name in parts}
    total = sum(parts.values())
    flops = token_flops(config, k) * case["batch"]
    return dict(visible=k, at_once=micro, step_ms=total * 1e3, images_per_s=case["batch"] / total,
                tokens_per_s=case["batch"] * k / total, gflops=flops / total / 1e9,
                mfu=flops / total / matmul_peak(dtype), outside_products=outside, peak_gb=memory, first_s=first_s,
                **{f"{name}_ms": value * 1e3 for name, value in parts.items()})


def tuning(case):
    """What the reference images of SCT cost: reading them, their mean, and the whole step."""
    config = model.ModelConfig(image_size=case["size"], consistency=True, **model.PRESETS["demo"])
    cfg = settings(batch_size=case["batch"], loss="consistency", steps=8, cm_stages=8, ref_batch=case["references"])
    denoiser = model.Denoiser(config).to(DEVICE)
    dtype = torch.float32  # pairs this close are too close for bfloat16
    with tempfile.TemporaryDirectory() as folder:
        stream = train.Stream(random_set(folder, 8192, case["size"]), 8192, cfg, config, DEVICE)
        batch = stream.load(4)
        del batch["index"]
        noisy = model.noised(batch["clean"], batch["noise"], batch["sigma"])
        reading = clock(lambda: stream.references(4))
        before = peak_memory()
        averaging = clock(lambda: model.posterior_mean(noisy, batch["clean"], batch["sigma"], batch["references"]))
        grown = peak_memory() - before

        def step():
            with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
                model.consistency_objective(denoiser, config, cfg, 4, **batch).mean().backward()

        whole = clock(step, repeats=3) if case["batch"] < 100 else math.nan
    return dict(read_ms=reading * 1e3, mean_ms=averaging * 1e3, grown_mb=grown / 1e6, step_ms=whole * 1e3,
                share_of_step=averaging / whole)


def sampling(case):
    config = model.ModelConfig(**model.PRESETS["demo"])
    denoiser = model.Denoiser(config).to(DEVICE).eval()
    n = 64
    seconds = clock(lambda: list(sample.generate(denoiser, range(n), batch_size=n, sampler=case["sampler"],
                                                 steps=case["steps"])), repeats=1, warm=0)
    return dict(images_per_s=n / seconds)


def waiting(case):
    """Share of the time that train.py waits for data, from a file of which nothing is in memory.

    The file is written, synced and dropped from the page cache; the run reads random images of it,
    each for the first time. The first batch, which nothing can hide, is told apart.
    """
    with tempfile.TemporaryDirectory() as folder:
        shape = (case["images"], case["size"], case["size"], 3)
        chunk = np.random.default_rng(0).integers(0, 256, (256, *shape[1:]), dtype=np.uint8)
        for name, n in (("train", shape[0]), ("val", 8)):
            with open(f"{folder}/{name}.npy", "wb") as f:
                header = dict(descr="|u1", fortran_order=False, shape=(n, *shape[1:]))
                np.lib.format.write_array_header_1_0(f, header)
                for i in range(0, n, 256):
                    f.write(chunk[: n - i])
                f.flush()
                os.fsync(f.fileno())
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        meta = dict(num_train=shape[0], num_val=8, size=shape[1], channels=3, dtype="uint8", hash="bench",
                    class_names=None)
        Path(folder, "meta.json").write_text(json.dumps(meta))
        in_memory = resident_share(f"{folder}/train.npy")
        train.ThreadPoolExecutor = Timed
        train.main([f"--data={folder}", f"--out_dir={folder}", f"--steps={case['steps']}", "--log_every=1",
                    "--eval_every=0", "--save_every=0", "--sample_every=0", "--seed=1", *case["flags"]])
        seconds = [r["seconds"] for r in map(json.loads, open(folder + "/log.jsonl")) if "images_per_s" in r]
    first, *then = Timed.waited
    return dict(file_gb=np.prod(shape) / 1e9, in_memory_before=in_memory, steps=case["steps"], s=seconds[-1],
                first_batch_s=first, then_waited_s=sum(then), share=sum(then) / (seconds[-1] - seconds[0]))


class Timed(ThreadPoolExecutor):
    """The loader's pool, which notes how long its results are waited for."""
    waited = []

    def submit(self, *args):
        future = super().submit(*args)
        result = future.result

        def timed(*wait):
            start = time.time()
            try:
                return result(*wait)
            finally:
                if args[0] is not torch.set_num_threads:
                    self.waited.append(time.time() - start)

        future.result = timed
        return future


def resident_share(path):
    """Share of a file's pages that are in the page cache (mincore; Linux)."""
    size = os.path.getsize(path)
    with open(path, "rb") as f, mmap.mmap(f.fileno(), size, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED) as m:
        pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        view = np.frombuffer(m, np.uint8)
        if ctypes.CDLL(None).mincore(ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(size), pages):
            return math.nan
        share = float((np.frombuffer(pages, np.uint8) & 1).mean())
        del view
    return share


def data(case):
    """Batches of the stream alone, and the reader of prepare_data on PNG files."""
    if case["what"] == "prepare":
        with tempfile.TemporaryDirectory() as folder:
            os.makedirs(folder + "/png")
            for i in range(600):
                image = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
                prepare_data.Image.fromarray(image).resize((256, 256)).save(f"{folder}/png/{i}.png")
            command = [folder + "/png", "--out", folder + "/set", "--size", "64", "--force"]
            seconds = clock(lambda: prepare_data.main(command), repeats=3, warm=1)
        return dict(images_per_s=600 / seconds)
    config = model.ModelConfig(image_size=case["size"], **model.PRESETS["demo"])
    cfg = settings(batch_size=case["batch"], mask_ratio=case["ratio"], mask_type="patch", steps=1)
    with tempfile.TemporaryDirectory() as folder:
        stream = train.Stream(random_set(folder, 8192, case["size"]), 8192, cfg, config, DEVICE)
        counter = iter(range(10**6))
        base = peak_memory()
        seconds = clock(lambda: stream.load(next(counter)), repeats=20, warm=3)
    return dict(images_per_s=case["batch"] / seconds, batch_ms=seconds * 1e3, grown_mb=(peak_memory() - base) / 1e6)


def demo(case):
    """README's first command without the set-up, in an empty folder: seconds of all, validation loss of each run."""
    lines = (ROOT / "README.md").read_text().splitlines()
    commands = next(line for line in lines if line.startswith("python3 -m venv")).split(" && ")[3:]
    with tempfile.TemporaryDirectory() as folder:
        start = time.time()
        for command in commands:
            name, *flags = command.split()[1:]
            subprocess.run([sys.executable, ROOT / name, *flags], cwd=folder, check=True, capture_output=True)
        all_s = time.time() - start
        records = [json.loads(line) for line in open(folder + "/out/log.jsonl")]
    return dict(all_s=all_s, **{f"{r['run']}_{key}": r[key] for r in records for key in ("seconds", "val_loss")
                                if key in r})  # the last of each run


def big(n):
    return n if SMALL else 4 * n


DECODER = dict(decoder_depth=4, decoder_dim=256, decoder_heads=4)
ROUTED = dict(route=(1, 5))
CASES = {
    "peak": {"matrix products and copy": {}},
    "attention": {f"{s}": dict(shape=s) for s in [(256, 4, 16, 32), (192, 4, 28, 32), (64, 8, 26, 64),
                                                  (32, 4, 256, 32), (8, 8, 256, 64), (2, 12, 410, 64),
                                                  (1, 12, 1024, 64)]},
    "steps": {
        **{f"512x13 64px ratio {r}": dict(size=64, preset="maskdm-64", batch=big(64), ratio=r)
           for r in (0, 0.5, 0.75, 0.9)},
        **{f"512x13 64px ratio {r} batch 8": dict(size=64, preset="maskdm-64", batch=8, ratio=r, repeats=10)
           for r in (0, 0.5, 0.9)},
        **{f"768x13 256px ratio {r}": dict(size=256, preset="maskdm-256", batch=big(2), ratio=r)
           for r in (0, 0.9)},
        "demo 64px ratio 0.9": dict(size=64, preset="demo", batch=48, ratio=0.9, repeats=20),
        "demo 64px ratio 0": dict(size=64, preset="demo", batch=16, ratio=0, repeats=20)},
    "micro": {f"512x13 64px ratio {r}, {m} at once": dict(size=64, preset="maskdm-64", batch=64, ratio=r, micro=m,
                                                          repeats=1)
              for r, m in ((0, 64), (0, 16), (0, 8), (0, 4), (0, 2), (0.5, 64), (0.5, 16), (0.5, 8), (0.9, 64),
                           (0.9, 16))},
    "compile": {f"{name} {'compiled' if c else 'plain'}": dict(case, compile=c)
                for name, case in {
                    "demo 64px ratio 0.9": dict(size=64, preset="demo", batch=48, ratio=0.9, repeats=20),
                    "demo 64px ratio 0": dict(size=64, preset="demo", batch=16, ratio=0, repeats=20),
                    "512x13 64px ratio 0.9": dict(size=64, preset="maskdm-64", batch=64, ratio=0.9)}.items()
                for c in (False, True)},
    "decoder": {f"384x12 32x32x4 latents ratio {r}{name}": dict(size=32, channels=4, preset="dit-s", batch=big(16),
                                                                ratio=r, decoder=decoder)
                for r, name, decoder in ((0, "", {}), (0.5, "", {}), (0.5, ", decoder 4x256", DECODER),
                                         (0.75, ", decoder 4x256", DECODER), (0.5, ", routed 1 to 5", ROUTED),
                                         (0.75, ", routed 1 to 5", ROUTED))},
    "curve": {f"512x13 64px ratio {r}": dict(size=64, preset="maskdm-64", batch=big(16), ratio=r)
              for r in (0, 0.25, 0.5, 0.625, 0.75, 0.875, 0.9, 0.95)},
    "sampling": {f"{s} {n}": dict(sampler=s, steps=n) for s, n in
                 (("heun", 18), ("euler", 50), ("consistency", 1), ("consistency", 2))},
    "tuning": {f"{b} images, {r} references of {s} px": dict(batch=b, references=r, size=s)
               for b, r, s in ((32, 256, 64), (32, 4096, 64), (256, 4096, 32))},
    "data": {**{f"stream 64px ratio {r}": dict(what="stream", size=64, batch=256, ratio=r) for r in (0, 0.9)},
             **{f"stream 256px ratio {r}": dict(what="stream", size=256, batch=32, ratio=r) for r in (0, 0.9)},
             "prepare 256 px PNG to 64 px": dict(what="prepare")},
    "waiting": {
        "demo 64px ratio 0.9": dict(images=200_000, size=64, steps=200, flags=["--mask_ratio=0.9"]),
        "demo 64px ratio 0": dict(images=200_000, size=64, steps=60, flags=[]),
        "512x13 64px ratio 0.9": dict(images=200_000, size=64, steps=20,
                                      flags=["--mask_ratio=0.9", "--preset=maskdm-64", "--batch_size=64"]),
        "512x13 64px ratio 0": dict(images=200_000, size=64, steps=8, flags=["--preset=maskdm-64", "--batch_size=8"]),
        "768x13 256px ratio 0.9": dict(images=12_000, size=256, steps=20, flags=[
            "--mask_ratio=0.9", "--preset=maskdm-256", "--batch_size=2", "--block_size=4"])},
    "demo": {"README's first command": {}},
}


def run_case(section, case):
    """In a process of its own."""
    result = subprocess.run([sys.executable, __file__, "--case", json.dumps([section, case])],
                            capture_output=True, text=True)
    if result.returncode:
        return {"failed": result.stderr.strip().splitlines()[-1][:70]}
    return json.loads(result.stdout.splitlines()[-1])


def table(rows):
    """Rows of (name, dict) as Markdown."""
    columns = list(next(values for _, values in rows))
    print("| case | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 1) + "|")
    for name, values in rows:
        print(f"| {name} | " + " | ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in values.values()) + " |")


def summary(results):
    """The table of README from what --json stored of the section steps."""
    lines = ["| network, batch | mask ratio | step | against ratio 0 | images/s | share of the matmul peak | peak memory |",
             "|---|---|---|---|---|---|---|"]
    rows = {r["case"]: r for r in results if r["section"] == "steps" and not r["case"].startswith("demo")}
    for name, r in rows.items():
        network, size, _, ratio, *batch = name.split()
        whole = rows[" ".join([network, size, "ratio 0", *batch])]
        again = "" if r is whole else f"1/{whole['step_ms'] / r['step_ms']:.3g}"
        lines.append(f"| {network} at {size[:-2]} px, {round(r['images_per_s'] * r['step_ms'] / 1e3)} | {ratio} "
                     f"| {r['step_ms'] / 1e3:.3g} s | {again} | {r['images_per_s']:.3g} | {r['mfu']:.0%} "
                     f"| {r['peak_gb']:.2g} GB |")
    return "\n".join(lines)


def against_table(results):
    """The table of README from what --json stored of steps --against."""
    ratios = sorted({r["ratio"] for r in results})
    lines = ["| network, batch | " + " | ".join(f"ratio {ratio}" for ratio in ratios) + " | peak memory |",
             "|---" * (len(ratios) + 2) + "|"]
    for network, batch in dict.fromkeys((r["network"], r["batch"]) for r in results):
        rows = {r["ratio"]: r for r in results if (r["network"], r["batch"]) == (network, batch)}
        cells = [f"{r['theirs_ms'] / 1e3:.3g} s, ours {r['ours_ms'] / 1e3:.3g} s: {r['times_faster']:.2f}"
                 for r in (rows[ratio] for ratio in ratios)]
        most = [max(r[f"{whose}_gb"] for r in rows.values()) for whose in ("theirs", "ours")]
        lines.append(f"| {network}, {batch} | {' | '.join(cells)} | {most[0]:.2g} GB, ours {most[1]:.2g} GB |")
    return "\n".join(lines)


def factors_table(results):
    """The same in short: how many times faster ours is, a line for each network."""
    columns = sorted({(r["batch"], r["ratio"]) for r in results})
    lines = ["| network | " + " | ".join(f"batch {b}, ratio {ratio}" for b, ratio in columns) + " |",
             "|---" * (len(columns) + 1) + "|"]
    for network in dict.fromkeys(r["network"] for r in results):
        rows = {(r["batch"], r["ratio"]): r for r in results if r["network"] == network}
        lines.append(f"| {network} | " + " | ".join(f"{rows[c]['times_faster']:.2f}" for c in columns) + " |")
    return "\n".join(lines)


def report(section, rows):
    """What the ratios of a section say."""
    values = dict(rows)
    if section == "steps":
        for name, masked in values.items():
            whole = values.get(name.replace("ratio 0.9", "ratio 0"))
            if "ratio 0.9" in name and whole and "step_ms" in whole and "demo" not in name:
                print(f"\n{name}: time 1/{whole['step_ms'] / masked['step_ms']:.1f}, peak memory "
                      f"1/{whole['peak_gb'] / masked['peak_gb']:.1f} of ratio 0")
    if section == "decoder":
        whole = rows[0][1]
        for name, row in rows[1:]:
            print(f"\n{name}: {row['step_ms'] / whole['step_ms']:.2f} of the time, {row['peak_gb'] / whole['peak_gb']:.2f} "
                  "of the peak memory of ratio 0 without a decoder")
    if section == "curve":
        k, t = (np.array([v[c] for v in values.values()]) for c in ("visible", "step_ms"))
        c, b, a = np.polyfit(k, t, 2)
        ideal = t[0] * k / k[0]
        print(f"\nt = {a:.3g} + {b:.3g} K + {c:.3g} K^2 ms; at ratio 0.9 the step takes "
              f"{t[6] / ideal[6]:.2f} x the ideal share K/N of the whole step")


def main():
    if sys.argv[1:2] == ["plan"]:
        return plan(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("section", nargs="*", help=f"of {', '.join(CASES)} (default: all)")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--json", help="file for the results, the commit and the machine")
    parser.add_argument("--against", nargs="+", help="files that make other networks, for the section steps")
    parser.add_argument("--dtype", default="auto", help="of --against: float32, bfloat16")
    parser.add_argument("--repeats", type=int, default=3, help="of --against: steps of each")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--take", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.take:
        *what, dtype = json.loads(args.take)
        return take_steps(*what, sample.pick_dtype(dtype, DEVICE))
    if args.case:
        section, case = json.loads(args.case)
        kind = globals()[section if section in globals() else "steps"]
        print(json.dumps(kind(case)))
        return
    print(f"torch {torch.__version__}, {DEVICE}, {torch.get_num_threads()} threads")
    results = []
    for section in args.section or CASES:
        cases = {n: c for n, c in CASES[section].items() if args.only in n or args.against}
        if not cases:
            continue
        print(f"\n## {section}\n")
        if args.against and section == "steps":
            dtype = sample.pick_dtype(args.dtype, DEVICE)
            rows = [row for path in args.against for row in against(path, dtype, args.repeats, args.only)]
            table(rows)
        else:
            rows = [(name, run_case(section, case)) for name, case in cases.items()]
            table(rows)
            report(section, rows)
        results += [dict(section=section, case=name, **values, **where_from()) for name, values in rows]
    if args.json:
        others = ["--against", *(Path(path).name for path in args.against)] if args.against else []
        about = dict(command=" ".join(["python tests/tools/bench.py", *args.section, *others]), results=results)
        Path(args.json).write_text(json.dumps(about, indent=1))


if __name__ == "__main__":
    main()
