"""What a training step costs on this machine, as ratios within one run.

python tests/tools/bench.py steps --only x1            # cases whose name contains this
python tests/tools/bench.py steps --against other.py   # a step of ours and of another network in turns
python tests/tools/bench.py attention                  # the fused kernel and plain products
python tests/tools/bench.py demo --keep assets         # README's first command, and its picture, curve and weights
python tests/tools/bench.py plan --preset=maskdit-xl --mask_ratio=0.5 --size 32 --channels 4 --gpus 8

A step is forward, backward, clipping and AdamW of a batch of noise, without data and average. The least time counts.
MFU is the FLOPs of a step over those of a product of 2048 x 2048 matrices in the same time.

The file of --against makes the other network, by
    make(size, channels, patch_size, dim, depth, heads, visible) -> module, loss
where loss(images) is a scalar, for a batch (B, channels, size, size) in [-1, 1] of whose patches `visible` are seen.
It may have NAME, and CONFIG, a dict of what differs from --preset=maskdm-64 at 64 px in our ModelConfig.
"""

import json
import resource
import runpy
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from common import ROOT, markdown, records, typed, where_from  # puts the project on the path

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
    return float(np.median(times[1:]))

def parse(flags, **more):
    """Settings of train.py, and their ModelConfig for images that `more` tells of."""
    cfg, _, _ = train.parse(["--device=cpu", *flags])
    sizes = {name: getattr(cfg, name) for name in train.NETWORK_SETTINGS}
    return cfg, model.ModelConfig(**sizes | more)

def draw_batch(config, n, ratio, mask_type="patch", block_size=1, device="cpu"):
    """A batch of noise, as a network takes it."""
    batch = dict(sigma=model.sigma_of(torch.randn(n)))
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

def make_step(case):
    """-> a function that takes a training step and returns its seconds; the number of weights."""
    _, c = parse([f"--preset={case['preset']}"], **case["changes"])
    batch_size = micro_batch = case["batch"]
    ratio = case["ratio"]
    num_visible = c.grid**2
    if ratio:
        num_visible, _ = model.make_mask("patch", c.grid, ratio)
    if "adapter" in case:
        make = runpy.run_path(case["adapter"])["make"]
        network, loss = make(c.image_size, c.channels, c.patch_size, c.dim, c.depth, c.heads, num_visible)
    else:
        network = model.Denoiser(c)
        num_tokens = c.grid**2 if c.takes_all else num_visible
        micro_batch = sample.images_per_pass(batch_size, num_tokens, c, DEVICE)
        loss = lambda images: our_loss(network, draw_batch(c, len(images), ratio, device=DEVICE))
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

def measure(case):
    """Milliseconds of a step after a first one, GB at the peak of this process, millions of weights."""
    step, num_weights = make_step(case)
    step()
    ms = 1e3 * step()
    memory = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if DEVICE.type == "cuda":
        memory = torch.cuda.max_memory_allocated()
    return ms, memory / 1e9, num_weights / 1e6

def in_turns(cases, repeats):
    """What `measure` finds for each case at its fastest. Each time has a process, and so a peak, of its own."""
    found = []
    for case in cases * repeats:
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            found.append(process.submit(measure, case).result())
    return [min(found[i :: len(cases)]) for i in range(len(cases))]

# ---- Sections: they yield rows (case, values).
STEPS = {
    **{f"512x13 64px ratio {ratio}": ("maskdm-64", 64, 64, ratio) for ratio in (0, 0.5, 0.75, 0.9)},
    **{f"512x13 64px ratio {ratio} batch 8": ("maskdm-64", 64, 8, ratio) for ratio in (0, 0.5, 0.9)},
    **{f"768x13 256px ratio {ratio}": ("maskdm-256", 256, 2, ratio) for ratio in (0, 0.9)}}

def steps(args):
    a, b = torch.randn(2, 2048, 2048, device=DEVICE, dtype=DTYPE)
    peak = 2 * 2048**3 / clock(lambda: a @ b, repeats=15)
    for name, (preset, size, batch, ratio) in STEPS.items():
        if args.only in name:
            case = dict(preset=preset, batch=batch, ratio=ratio, changes=dict(image_size=size))
            ((ms, gb, _),) = in_turns([case], args.repeats)
            _, flops, *_ = count(parse([f"--preset={preset}"], image_size=size)[1], batch, ratio)
            yield name, dict(step_ms=ms, images_per_s=1e3 * batch / ms, mfu=1e3 * flops / ms / peak, peak_gb=gb)

def against(args):
    """A step of our network, and of that of each adapter."""
    for path, batch, ratio in product(args.against, (8, 64), (0, 0.5, 0.9)):
        adapter = runpy.run_path(path)
        name = adapter.get("NAME", Path(path).stem)
        title = f"{name}, batch {batch}, ratio {ratio}"
        changes = dict(image_size=64) | adapter.get("CONFIG", {})
        if args.only in title:
            case = dict(preset="maskdm-64", batch=batch, ratio=ratio, changes=changes)
            ours, theirs = in_turns([case, case | dict(adapter=path)], args.repeats)
            yield title, dict(network=name, batch=batch, ratio=ratio, dtype=str(DTYPE).removeprefix("torch."),
                              ours_ms=ours[0], theirs_ms=theirs[0], times_faster=theirs[0] / ours[0], ours_gb=ours[1],
                              theirs_gb=theirs[1], ours_m_weights=ours[2], theirs_m_weights=theirs[2])

def attention(args):
    """Forward and backward of the fused kernel, of two batched products and of ours."""
    products = lambda q, k, v: ((q * q.shape[3] ** -0.5) @ k.transpose(2, 3)).softmax(dim=3) @ v
    ways = dict(fused_ms=F.scaled_dot_product_attention, products_ms=products, ours_ms=model.attention)
    for shape in ((256, 4, 16, 32), (192, 4, 28, 32), (64, 8, 26, 64), (32, 4, 256, 32), (8, 8, 256, 64),
                  (2, 12, 410, 64), (1, 12, 1024, 64)):
        q, k, v = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        yield str(shape), {name: 1e3 * clock(lambda: way(q, k, v).sum().backward()) for name, way in ways.items()}

def keep_demo(out, folder):
    """The samples, the losses against seconds, and the averaged weights in float16."""
    Path(folder, "samples.png").write_bytes(Path(out, "samples.png").read_bytes())
    curves.main([out, "--x", "seconds", "--out", f"{folder}/demo-loss.png"])
    checkpoint = model.load_checkpoint(f"{out}/ft.pt")
    del checkpoint["model"], checkpoint["optimizer"]
    checkpoint["ema"] = {name: weight.half() for name, weight in checkpoint["ema"].items()}
    torch.save(checkpoint, f"{folder}/demo.pt")

def demo(args):
    """README's one line without the set-up, in an empty folder: seconds of all, validation loss of each run."""
    command = next(line for line in open(ROOT / "README.md") if line.startswith("python3 -m venv") and "train.py" in line)
    with tempfile.TemporaryDirectory() as folder:
        begin = time.time()
        for part in command.split(" && ")[3:]:
            name, *flags = part.split()[1:]
            subprocess.run([sys.executable, ROOT / name, *flags], cwd=folder, check=True, capture_output=True)
        values = dict(all_s=time.time() - begin)
        if args.keep:
            keep_demo(f"{folder}/out", args.keep)
        for record in records(f"{folder}/out"):  # the last of each run stays
            values |= {f"{record['run']}_{key}": record[key] for key in ("seconds", "val_loss") if key in record}
    yield "README's first command", values

# ---- Tables of README and of the results, from what --json stored.
def summary(results):
    """Of the section steps."""
    times = {STEPS[r["case"]]: r["step_ms"] / 1e3 for r in results}
    lines = []
    for r in results:
        preset, size, batch, ratio = STEPS[r["case"]]
        own = times[preset, size, batch, ratio]
        share = f"1/{times[preset, size, batch, 0] / own:.3g}" if ratio else ""
        lines.append([f"{r['case'].split()[0]} at {size} px, {batch}", str(ratio), f"{own:.3g} s", share,
                      f"{r['images_per_s']:.3g}", f"{r['mfu']:.0%}", f"{r['peak_gb']:.2g} GB"])
    return markdown(["network, batch", "mask ratio", "step", "against ratio 0", "images/s",
                     "share of the matmul peak", "peak memory"], lines)

def against_table(results):
    """Of steps --against."""
    ratios = sorted({r["ratio"] for r in results})
    rows = {(r["network"], r["batch"], r["ratio"]): r for r in results}
    lines = []
    for network, batch in dict.fromkeys((network, batch) for network, batch, _ in rows):
        own = [rows[network, batch, ratio] for ratio in ratios]
        cells = [f"{r['theirs_ms'] / 1e3:.3g} s, ours {r['ours_ms'] / 1e3:.3g} s: {r['times_faster']:.2f}" for r in own]
        theirs, ours = (max(r[key] for r in own) for key in ("theirs_gb", "ours_gb"))
        lines.append([f"{network}, {batch}", *cells, f"{theirs:.2g} GB, ours {ours:.2g} GB"])
    return markdown(["network, batch", *(f"ratio {ratio}" for ratio in ratios), "peak memory"], lines)

FUSED_ATTENTION = {  # which torch's counter passes over on a CPU; backward works out the scores again
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *args, **how: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda grad, q, k, v, *args, **how: 5 * sdpa_flop_count(q, k, v) // 2}

class Launches(TorchDispatchMode):
    """Counts the operations that start a kernel."""
    count = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace == "aten" and not func.is_view and isinstance(result, torch.Tensor | tuple):
            self.count += 1
        return result

@mock.patch.object(model, "attention", F.scaled_dot_product_attention)  # as on a GPU
def count(config, batch_size, *mask):
    """Weights, FLOPs, bytes that autograd keeps (with a copy of the weights), and launches of a step in bfloat16."""
    kept = {}
    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor
    flops = FlopCounterMode(display=False, custom_mapping=FUSED_ATTENTION)
    with FakeTensorMode(allow_non_fake_inputs=True):
        denoiser = model.Denoiser(config)
        batch = draw_batch(config, batch_size, *mask)
        with flops, Launches() as launches, torch.autocast("cpu", torch.bfloat16):
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = our_loss(denoiser, batch)
            loss.backward()
    for p in denoiser.parameters():
        kept.pop(p.untyped_storage()._cdata, None)
    return sum(p.numel() for p in denoiser.parameters()), flops.get_total_flops(), sum(kept.values()), launches.count

def count_launches(config, *mask):
    """Kernels of a forward and backward pass with compiled blocks: what surrounds the blocks is not compiled."""
    shallow = [replace(config, depth=depth, decoder_depth=0, route=()) for depth in (1, 2)]
    one, two = (count(network, 2, *mask)[3] for network in shallow)
    around = 2 * one - two
    return around + COMPILED_BLOCK * (config.depth + config.decoder_depth)

def muon_flops(config):
    """Matrices of all blocks, and the FLOPs of five iterations on each (n, m) with n <= m."""
    denoiser = model.Denoiser(config).to("meta")
    shapes = [sorted(matrix.shape) for block in model.blocks_of(denoiser) for matrix in block.matrices()]
    return len(shapes), sum(5 * (4 * n**2 * m + 2 * n**3) for n, m in shapes)

SPEED = {"bfloat16": 0.4 * 989e12, "tf32": 0.4 * 494e12, "float32": 0.75 * 67e12}  # FLOP/s reached by an H100
COMPILED_BLOCK = 44  # launches of a compiled block, forward and backward, in Inductor's code for sm_90

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

def plan(args, flags):
    """Will a run with these flags of train.py fit on H100s, and what limits it? Arithmetic, but for the loader."""
    cfg, config = parse(["--preset=maskdm-64", "--no-class_cond", *flags], image_size=args.size, channels=args.channels)
    local_batch = cfg.batch_size // args.gpus
    micro_batch = cfg.micro_batch or local_batch
    mask = cfg.mask_ratio, cfg.mask_type, cfg.block_size
    n, flops, _, _ = count(config, local_batch, *mask)
    _, _, kept, _ = count(config, micro_batch, *mask)
    _, _, kept_by_two, _ = count(config, 2 * micro_batch, *mask)
    launches = count_launches(config, *mask) * local_batch // micro_batch
    if cfg.loss == "consistency":  # another forward pass
        flops = flops * 4 // 3
        launches = launches * 4 // 3
    update = 44 * n / 3.35e12  # bytes/s of the memory: AdamW moves 28 bytes a weight, the norm 4, the average 12
    if cfg.optimizer == "muon":
        matrices, products = muon_flops(config)
        update += products / SPEED["bfloat16"]
        launches += 27 * matrices  # in torch.optim.Muon
    precision = "bfloat16"
    if cfg.dtype == "float32":
        precision = "tf32" if cfg.tf32 else "float32"
    sent = 2 * (args.gpus - 1) / args.gpus * 4 * n  # a ring: each gradient goes out and comes back
    network = 350e9 if args.gpus <= 8 else 50e9  # bytes/s within a machine, and between machines
    sizes = {"weights": 4 * n, "gradients": 4 * n, "AdamW": 8 * n, "average": 4 * n, "weights in bfloat16": 2 * n,
             "activations": kept_by_two - kept}
    times = {"products and attention": flops / SPEED[precision], "optimizer and average": update,
             "launches": launches * 1e-5, "network": sent / network}
    fits = "fits in" if sum(sizes.values()) < args.memory else "does NOT fit in"
    sizes[f"in all: {fits} {args.memory / 1e9:.0f} GB"] = sum(sizes.values())
    print(f"{n / 1e6:.1f} M weights, {local_batch} of {cfg.batch_size} images on each of {args.gpus} GPUs")
    print(f"{flops / 1e12:.3g} TFLOP and {launches} launches a step and GPU, {sent / 1e6:.4g} MB over the network")
    for name, size in sizes.items():
        print(f"{size / 1e9:8.2f} GB {name}")
    for name, seconds in times.items():
        print(f"{1e3 * seconds:8.1f} ms {name}")
    print(f"{1e3 * load_seconds(config, cfg, args.gpus):8.1f} ms loading, on this machine and as busy as it is now")
    # The GPU computes while Python launches and the gradients travel.
    together = {"the GPU": times.pop("products and attention") + times.pop("optimizer and average"), **times}
    limit = max(together, key=together.get)
    rate = cfg.batch_size / together[limit]
    print(f"the limit is {limit}: {rate:.0f} images/s, {cfg.steps} steps in {cfg.steps * together[limit] / 3600:.3g} h")

def main(argv):
    sections = {"steps": steps, "attention": attention, "demo": demo, "plan": plan}
    parser = Parser(__doc__)
    parser.add_argument("section", choices=sections, help="plan takes the flags of train.py, too")
    parser.add("only", "", "steps whose name contains this")
    parser.add("against", [], "files that make other networks, for steps", nargs="+")
    parser.add("repeats", 3, "steps of each", low=1)
    parser.add("json", None, "file for the results, the commit and the machine")
    parser.add("keep", None, "folder for what demo made")
    parser.add("size", 64, "plan: side of an image or latent")
    parser.add("channels", 3, "plan: of an image or latent")
    parser.add("gpus", 8, "plan: in all")
    parser.add("memory", 80e9, "plan: bytes of a GPU")
    args, flags = parser.parse_known_args(argv)
    if args.section == "plan":
        return plan(args, flags)
    check(not flags, f"{args.section} does not know {flags}")
    about = where_from()  # before --keep changes the tree
    results = []
    section = against if args.against else sections[args.section]
    for name, values in section(args):
        print(f"{name}: {values}", flush=True)
        results.append(dict(section=args.section, case=name, **values, **about))
    if args.json:
        Path(args.json).write_text(json.dumps(dict(command=typed(__file__, argv), results=results), indent=1))

if __name__ == "__main__":
    run_script(main)
