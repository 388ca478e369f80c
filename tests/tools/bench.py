"""What a training step costs on this machine, as ratios within one run.

python tests/tools/bench.py steps --only x1            # cases whose name contains this
python tests/tools/bench.py steps --against other.py   # a step of ours and of another network in turns
python tests/tools/bench.py attention                  # the fused kernel and plain products
python tests/tools/bench.py demo --keep assets         # README's first command, and its picture, curve and weights
python tests/tools/bench.py plan --preset=maskdit-xl --mask_ratio=0.5 --size 32 --channels 4 --gpus 8

A step is forward, backward, clipping and AdamW of a batch of noise, without data and average. Every
network takes its steps in a process of its own, so that its peak memory is its own, and the least time
counts. MFU is the FLOPs of a step over those of a product of 2048 x 2048 matrices in the same time.

The file of --against makes the other network. It has a function

    make(size, channels, patch_size, dim, depth, heads, visible) -> module, loss

where loss(images), a scalar, is that of a batch (B, channels, size, size) in [-1, 1] of whose patches `visible` are
seen. It may have NAME, and CONFIG, a dict of what differs from --preset=maskdm-64 at 64 px in our ModelConfig.
"""

import json
import resource
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from common import ROOT, markdown, typed, where_from  # puts the project on the path

import numpy as np
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import curves
import model
import sample
import train
from prepare_data import Images, Parser, check, run_script

DEVICE = sample.pick_device("auto")
DTYPE = sample.pick_dtype("auto", DEVICE)

def now():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()

def clock(work, repeats=5):
    """Median seconds of work(), after a first time."""
    times = []
    for _ in range(1 + repeats):
        begin = now()
        work()
        times.append(now() - begin)
    return statistics.median(times[1:])

def preset_config(preset, **more):
    """The ModelConfig of a preset, for images that `more` tells of."""
    cfg, _, _ = train.parse(["--device=cpu", f"--preset={preset}"])
    sizes = {name: getattr(cfg, name) for name in train.NETWORK_SETTINGS}
    return model.ModelConfig(**sizes | more)

def draw_batch(config, n, ratio, mask_type="patch", block_size=1, device="cpu"):
    """A batch of noise, as a network takes it."""
    batch = dict(sigma=model.sigma_of(torch.randn(n)), weight=torch.ones(n))
    num_tokens = config.grid**2
    if ratio:
        num_visible, draw = model.make_mask(mask_type, config.grid, ratio, block_size)
        batch["visible"] = draw(n, None, slice(None))
        if not config.takes_all:
            num_tokens = num_visible
    if config.num_classes:
        batch["labels"] = torch.zeros(n, dtype=torch.int64)
    for name in ("clean", "noise"):
        batch[name] = torch.randn(n, num_tokens, config.token_dim)
    return {name: tensor.to(device) for name, tensor in batch.items()}

def our_loss(denoiser, batch):
    settings = SimpleNamespace(loss="diffusion", decoder_depth=denoiser.config.decoder_depth, mae_weight=0.1)
    return sum(model.objective(denoiser, batch, settings, 0).values()).mean()

FUSED_ATTENTION = {  # which torch's counter passes over on a CPU; backward works out the scores again
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        lambda q, k, v, *args, **how: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda grad, q, k, v, *args, **how: 5 * sdpa_flop_count(q, k, v) // 2}

def count_step(config, batch_size, *mask):
    """Weights, FLOPs of forward and backward, and the bytes that autograd keeps for it, in bfloat16.

    Counted by running the step on tensors without memory, with the fused attention of a GPU. Among what is kept are
    the weights in bfloat16, once, whatever the batch.
    """
    kept = {}
    attention = model.attention
    model.attention = F.scaled_dot_product_attention
    with FakeTensorMode(allow_non_fake_inputs=True):
        denoiser = model.Denoiser(config)
        batch = draw_batch(config, batch_size, *mask)
        own = {p.untyped_storage()._cdata for p in denoiser.parameters()}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage.nbytes()
            return tensor

        counter = FlopCounterMode(display=False, custom_mapping=FUSED_ATTENTION)
        with counter, torch.autocast("cpu", torch.bfloat16):
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = our_loss(denoiser, batch)
            loss.backward()
    model.attention = attention
    return sum(p.numel() for p in denoiser.parameters()), counter.get_total_flops(), sum(kept.values())

# ---- Steps of one network, or of two in turns.
def make_step(case):
    """-> a function that takes a training step and returns its seconds; the number of weights."""
    c = preset_config(case["preset"], **case["changes"])
    batch_size, ratio = case["batch"], case["ratio"]
    num_visible = c.grid**2
    if ratio:
        num_visible, _ = model.make_mask("patch", c.grid, ratio)
    num_tokens = c.grid**2 if c.takes_all else num_visible
    torch.manual_seed(0)
    if "adapter" in case:
        make = runpy.run_path(case["adapter"])["make"]
        network, loss = make(c.image_size, c.channels, c.patch_size, c.dim, c.depth, c.heads, num_visible)
        micro_batch = batch_size
    else:
        network = model.Denoiser(c)
        micro_batch = sample.images_per_pass(batch_size, num_tokens, c, DEVICE)

        def loss(images):
            return our_loss(network, draw_batch(c, len(images), ratio, device=DEVICE))

    network.to(DEVICE).train()
    weights = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=True)

    def step():
        images = torch.rand(batch_size, c.channels, c.image_size, c.image_size, device=DEVICE) * 2 - 1
        begin = now()
        with torch.autocast(DEVICE.type, DTYPE, enabled=DTYPE != torch.float32):
            for part in images.split(micro_batch):
                (loss(part) * len(part) / batch_size).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return now() - begin

    return step, sum(p.numel() for p in weights)

def take_steps(case):
    """A process that takes a step for each line of stdin and prints its seconds, at the end its peak memory."""
    out, sys.stdout = sys.stdout, sys.stderr  # other code may print
    step, num_weights = make_step(case)
    print(num_weights, file=out, flush=True)
    for _ in sys.stdin:
        print(step(), file=out, flush=True)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if DEVICE.type == "cuda":
        memory = torch.cuda.max_memory_allocated()
    print(memory, file=out)

def in_turns(cases, repeats):
    """Steps of several networks in turns -> of each the least ms, the GB and the millions of weights."""
    processes = []
    for case in cases:
        command = [sys.executable, __file__, "--take", json.dumps(case)]
        processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    weights = [process.stdout.readline() for process in processes]
    if "" in weights:
        for process in processes:
            process.kill()
        check(False, f"the network of {cases} could not be made; its error is above")
    times = [[] for _ in cases]
    for _ in range(1 + repeats):  # the first warms up
        for process, seconds in zip(processes, times):
            process.stdin.write("\n")
            process.stdin.flush()
            seconds.append(float(process.stdout.readline()))
    peaks = [float(process.communicate()[0]) for process in processes]
    return [(min(seconds[1:]) * 1e3, peak / 1e9, int(n) / 1e6) for seconds, peak, n in zip(times, peaks, weights)]

def against(path, args):
    """Rows (case, values): a step of our network and of the adapter's."""
    adapter = runpy.run_path(path)
    name = adapter.get("NAME", Path(path).stem)
    for batch, ratio in ((b, r) for b in (8, 64) for r in (0, 0.5, 0.9)):
        title = f"{name}, batch {batch}, ratio {ratio}"
        if args.only in title:
            changes = dict(image_size=64) | adapter.get("CONFIG", {})
            case = dict(preset="maskdm-64", batch=batch, ratio=ratio, changes=changes)
            ours, theirs = in_turns([case, case | dict(adapter=path)], args.repeats)
            yield title, dict(network=name, batch=batch, ratio=ratio, dtype=str(DTYPE)[6:], ours_ms=ours[0],
                              theirs_ms=theirs[0], times_faster=theirs[0] / ours[0], ours_gb=ours[1],
                              theirs_gb=theirs[1], ours_m_weights=ours[2], theirs_m_weights=theirs[2])

# ---- Sections: rows (case, values).
STEPS = {
    **{f"512x13 64px ratio {ratio}": ("maskdm-64", 64, 64, ratio) for ratio in (0, 0.5, 0.75, 0.9)},
    **{f"512x13 64px ratio {ratio} batch 8": ("maskdm-64", 64, 8, ratio) for ratio in (0, 0.5, 0.9)},
    **{f"768x13 256px ratio {ratio}": ("maskdm-256", 256, 2, ratio) for ratio in (0, 0.9)}}

def steps(args):
    if args.against:
        for path in args.against:
            yield from against(path, args)
        return
    a, b = torch.randn(2, 2048, 2048, device=DEVICE, dtype=DTYPE)
    peak = 2 * 2048**3 / clock(lambda: a @ b, repeats=15)
    for name, (preset, size, batch, ratio) in STEPS.items():
        if args.only in name:
            changes = dict(image_size=size)
            ((ms, gb, _),) = in_turns([dict(preset=preset, batch=batch, ratio=ratio, changes=changes)], args.repeats)
            _, flops, _ = count_step(preset_config(preset, **changes), batch, ratio)
            yield name, dict(step_ms=ms, images_per_s=1e3 * batch / ms, mfu=1e3 * flops / ms / peak, peak_gb=gb)

def attention(args):
    """Forward and backward of the fused kernel, of two batched products and of ours."""
    def products(q, k, v):
        scores = (q * q.shape[3] ** -0.5) @ k.transpose(2, 3)
        return scores.softmax(dim=3) @ v

    ways = dict(fused_ms=F.scaled_dot_product_attention, products_ms=products, ours_ms=model.attention)
    for shape in ((256, 4, 16, 32), (192, 4, 28, 32), (64, 8, 26, 64), (32, 4, 256, 32), (8, 8, 256, 64),
                  (2, 12, 410, 64), (1, 12, 1024, 64)):
        q, k, v = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        yield str(shape), {name: 1e3 * clock(lambda: way(q, k, v).sum().backward()) for name, way in ways.items()}

def keep_demo(out, folder):
    """The samples, the losses against seconds, and the averaged weights in float16."""
    shutil.copy(f"{out}/samples.png", folder)
    curves.main([out, "--x", "seconds", "--out", f"{folder}/demo-loss.png"])
    checkpoint = model.load_checkpoint(f"{out}/ft.pt")
    known = {name: checkpoint[name] for name in ("architecture", "noise", "network", "step", "class_names", "config")}
    known["config"] = {name: value for name, value in known["config"].items() if name != "out_dir"}
    torch.save(known | dict(ema={name: w.half() for name, w in checkpoint["ema"].items()}), f"{folder}/demo.pt")

def demo(args):
    """README's first command without the set-up, in an empty folder: seconds of all, validation loss of each run."""
    lines = (ROOT / "README.md").read_text().splitlines()
    command = next(line for line in lines if line.startswith("python3 -m venv"))
    with tempfile.TemporaryDirectory() as folder:
        begin = time.time()
        for part in command.split(" && ")[3:]:
            name, *flags = part.split()[1:]
            subprocess.run([sys.executable, ROOT / name, *flags], cwd=folder, check=True, capture_output=True)
        values = dict(all_s=time.time() - begin)
        if args.keep:
            keep_demo(f"{folder}/out", args.keep)
        for line in open(f"{folder}/out/log.jsonl"):
            record = json.loads(line)
            for key in ("seconds", "val_loss"):
                if key in record:
                    values[f"{record['run']}_{key}"] = record[key]  # the last of each run stays
    yield "README's first command", values

SECTIONS = {"steps": steps, "attention": attention, "demo": demo}

# ---- Tables of README and of the results, from what --json stored.
def summary(results):
    """Of the section steps."""
    rows = {r["case"]: r for r in results}
    lines = []
    for name, r in rows.items():
        sizes, pixels, _, ratio, *batch = name.split()
        whole = rows[" ".join([sizes, pixels, "ratio 0", *batch])]
        share = "" if r is whole else f"1/{whole['step_ms'] / r['step_ms']:.3g}"
        images = round(r["images_per_s"] * r["step_ms"] / 1e3)
        lines.append([f"{sizes} at {pixels[:-2]} px, {images}", ratio, f"{r['step_ms'] / 1e3:.3g} s", share,
                      f"{r['images_per_s']:.3g}", f"{r['mfu']:.0%}", f"{r['peak_gb']:.2g} GB"])
    return markdown(["network, batch", "mask ratio", "step", "against ratio 0", "images/s",
                     "share of the matmul peak", "peak memory"], lines)

def against_table(results):
    """Of steps --against."""
    ratios = sorted({r["ratio"] for r in results})
    lines = []
    for network, batch in dict.fromkeys((r["network"], r["batch"]) for r in results):
        own = sorted((r for r in results if (r["network"], r["batch"]) == (network, batch)), key=lambda r: r["ratio"])
        cells = [f"{r['theirs_ms'] / 1e3:.3g} s, ours {r['ours_ms'] / 1e3:.3g} s: {r['times_faster']:.2f}" for r in own]
        theirs, ours = (max(r[key] for r in own) for key in ("theirs_gb", "ours_gb"))
        lines.append([f"{network}, {batch}", *cells, f"{theirs:.2g} GB, ours {ours:.2g} GB"])
    return markdown(["network, batch", *(f"ratio {ratio}" for ratio in ratios), "peak memory"], lines)

def factors_table(results):
    """The same in short: how many times faster ours is, a line for each network."""
    columns = sorted({(r["batch"], r["ratio"]) for r in results})
    lines = []
    for network in dict.fromkeys(r["network"] for r in results):
        factors = {(r["batch"], r["ratio"]): r["times_faster"] for r in results if r["network"] == network}
        lines.append([network, *(f"{factors[column]:.2f}" for column in columns)])
    return markdown(["network", *(f"batch {batch}, ratio {ratio}" for batch, ratio in columns)], lines)

# ---- A run that has not been started.
COMPILED_BLOCK = 44  # launches of a compiled block, forward and backward, in Inductor's code for sm_90
MUON_LAUNCHES = 27  # of torch.optim.Muon for a matrix

class Launches(TorchDispatchMode):
    """Counts the operations that start a kernel."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.count += not func.is_view and func.namespace == "aten" and isinstance(result, torch.Tensor | tuple)
        return result

def count_launches(config, *mask):
    """Kernels of a forward and backward pass with compiled blocks: what surrounds the blocks is not compiled."""
    counts = []
    for depth in (1, 2):
        shallow = replace(config, depth=depth, decoder_depth=0, route=())
        with FakeTensorMode(allow_non_fake_inputs=True):
            denoiser = model.Denoiser(shallow)
            batch = draw_batch(shallow, 2, *mask)
            with Launches() as launches, torch.autocast("cpu", torch.bfloat16):
                our_loss(denoiser, batch).backward()
        counts.append(launches.count)
    around = 2 * counts[0] - counts[1]
    return around + COMPILED_BLOCK * (config.depth + config.decoder_depth)

def muon_flops(config):
    """FLOPs of five iterations on the matrices of all blocks, (n, m) with n <= m."""
    denoiser = model.Denoiser(config).to("meta")
    shapes = [sorted(matrix.shape) for block in model.blocks_of(denoiser) for matrix in block.matrices()]
    return len(shapes), sum(5 * (4 * n**2 * m + 2 * n**3) for n, m in shapes)

def load_seconds(config, cfg, gpus):
    """Median seconds in which one thread loads a process's part of a batch for a GPU, which converts the pixels and
    draws the noise itself."""
    shape = (max(cfg.batch_size, 512), config.image_size, config.image_size, config.channels)
    meta = dict(num_train=shape[0], size=shape[1], channels=shape[3], dtype="uint8", class_names=None)
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/train.npy", np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
        Path(folder, "meta.json").write_text(json.dumps(meta))
        images = Images(folder, "train", config.patch_size)
        stream = train.Stream(images, len(images), cfg, config, torch.device("meta"), 0, gpus)
        torch.set_num_threads(1)  # as in a run
        seeded = sample.seeded
        on_host = lambda *numbers, device="cpu": seeded(*numbers) if device == "cpu" else None
        with mock.patch.object(sample, "seeded", on_host):
            return clock(lambda: stream.load(0))

def plan(argv):
    """Will a run fit, and what limits it? Only the loader is run; FLOPs, launches and memory are counted on tensors
    without memory, beside an H100 or what the flags say. Flags that are not listed are those of train.py.
    """
    parser = Parser(plan.__doc__)
    add = parser.add
    add("size", 64, "side of an image or latent")
    add("channels", 3, "of an image or latent")
    add("gpus", 8, "in all")
    add("peak", None, "FLOP/s of a GPU, dense; None = 989e12 in bfloat16, 67e12 in float32, 494e12 with --tf32", float)
    add("share", None, "share of the peak that is reached; None = 0.4, in float32 0.75", float)
    add("memory", 80e9, "bytes of a GPU")
    add("bandwidth", 3.35e12, "bytes/s of its memory")
    add("network", None, "bytes/s of a GPU to the others; None = 350e9, or 50e9 for more than 8 GPUs", float)
    add("launch", 1e-5, "seconds in which Python starts a kernel")
    args, flags = parser.parse_known_args(argv)
    cfg, _, _ = train.parse(["--device=cpu", "--preset=maskdm-64", "--no-class_cond", *flags])
    exact = cfg.dtype == "float32" and not cfg.tf32
    peak = args.peak or (67e12 if exact else 494e12 if cfg.dtype == "float32" else 989e12)
    share = args.share or (0.75 if exact else 0.4)
    network = args.network or (350e9 if args.gpus <= 8 else 50e9)
    sizes = {name: getattr(cfg, name) for name in train.NETWORK_SETTINGS}
    config = model.ModelConfig(**sizes, image_size=args.size, channels=args.channels)
    local_batch = cfg.batch_size // args.gpus
    micro_batch = cfg.micro_batch or local_batch
    mask = cfg.mask_ratio, cfg.mask_type, cfg.block_size
    n, flops, _ = count_step(config, local_batch, *mask)
    _, _, kept = count_step(config, micro_batch, *mask)
    _, _, kept_by_two = count_step(config, 2 * micro_batch, *mask)
    launches = count_launches(config, *mask) * local_batch // micro_batch
    if cfg.loss == "consistency":  # another forward pass
        flops = flops * 4 // 3
        launches = launches * 4 // 3
    gigabytes = {"weights": 4 * n, "gradients": 4 * n, "AdamW": 8 * n, "average": 4 * n, "weights in bfloat16": 2 * n,
                 "activations": kept_by_two - kept}
    sent = 2 * (args.gpus - 1) / args.gpus * 4 * n  # a ring: each gradient goes out and comes back
    optimizer = 44 * n / args.bandwidth  # AdamW 28 bytes a weight, the norm 4, the average 12
    if cfg.optimizer == "muon":
        matrices, products = muon_flops(config)
        optimizer += products / (989e12 * 0.4)
        launches += MUON_LAUNCHES * matrices
    seconds = {"products and attention": flops / (peak * share), "optimizer and average": optimizer,
               "launches": launches * args.launch, "loading (this machine)": load_seconds(config, cfg, args.gpus),
               "network": sent / network}
    total = sum(gigabytes.values())
    fits = "fits in" if total < args.memory else "does NOT fit in"
    print(f"{n / 1e6:.1f} M weights, {local_batch} of {cfg.batch_size} images on each of {args.gpus} GPUs")
    print(f"{flops / 1e12:.3g} TFLOP and {launches} launches a step and GPU, {sent / 1e6:.4g} MB over the network")
    for name, size in gigabytes.items():
        print(f"{size / 1e9:8.2f} GB {name}")
    print(f"{total / 1e9:8.2f} GB in all: {fits} {args.memory / 1e9:.0f} GB")
    for name, duration in seconds.items():
        print(f"{duration * 1e3:8.1f} ms {name}")
    # The GPU computes while Python launches, the loader reads and the gradients travel.
    together = {"the GPU": seconds.pop("products and attention") + seconds.pop("optimizer and average"), **seconds}
    limit = max(together, key=together.get)
    rate = cfg.batch_size / together[limit]
    print(f"the limit is {limit}: {rate:.0f} images/s, {cfg.steps} steps in {cfg.steps * together[limit] / 3600:.3g} h")

def main(argv):
    if argv[:1] == ["plan"]:
        return plan(argv[1:])
    if argv[:1] == ["--take"]:
        return take_steps(json.loads(argv[1]))
    parser = Parser(__doc__)
    parser.add_argument("section", choices=SECTIONS, help="or plan, which has flags of its own")
    parser.add("only", "", "steps whose name contains this")
    parser.add("against", [], "files that make other networks, for steps", nargs="+")
    parser.add("repeats", 3, "steps of each", low=1)
    parser.add("json", None, "file for the results, the commit and the machine")
    parser.add("keep", None, "folder for what demo made")
    args = parser.parse_args(argv)
    about = where_from()  # before --keep changes the tree
    rows = list(SECTIONS[args.section](args))
    check(rows, f"--only {args.only}: expected a part of one of {', '.join(STEPS)}")
    cells = [[name, *(format(v, ".4g") if isinstance(v, float) else str(v) for v in values.values())]
             for name, values in rows]
    print(markdown(["case", *rows[0][1]], cells))
    results = [dict(section=args.section, case=name, **values, **about) for name, values in rows]
    if args.json:
        Path(args.json).write_text(json.dumps(dict(command=typed(__file__, argv), results=results), indent=1))

if __name__ == "__main__":
    run_script(main)
