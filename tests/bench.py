"""Where the time of a training step goes, on this machine, as ratios within one run.

python tests/bench.py                      # everything (about 20 minutes on two cores)
python tests/bench.py steps --only demo    # one section: peak, attention, steps, curve, sampling, data
                                           # and, with --only, the cases whose name contains a word

Every case of a section runs in a process of its own, so that its peak memory is its own; times are
medians. MFU is the token FLOPs of a step (weights and attention, three forward passes' worth) over
the bfloat16 matrix product of 2048 x 2048 x 2048 timed in the same run.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

import model
import prepare_data
import sample
import train

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


def token_flops(config, tokens, images):
    """FLOPs of forward and backward over `tokens` visible tokens of `images` images, adaLN left out."""
    k, d = tokens / images, config.dim
    per_token = config.depth * (2 * 12 * d * d + 4 * k * d) + 2 * 2 * config.token_dim * d
    return 3 * per_token * tokens


def products_share(work, dtype):
    """Share of the time of forward and backward that goes into matrix products, by the profiler."""
    with torch.profiler.profile() as p, torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
        work()
    times = {e.key: e.self_cpu_time_total if DEVICE.type == "cpu" else e.self_device_time_total
             for e in p.key_averages()}
    products = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
    return sum(times.get(key, 0) for key in products) / sum(times.values())


def random_set(folder, n, size, channels=3):
    """A prepared set of noise; big enough sets do not fit the processor's caches."""
    rng = np.random.default_rng(0)
    images = np.lib.format.open_memmap(folder + "/train.npy", "w+", np.uint8, (n, size, size, channels))
    for i in range(0, n, 512):
        images[i : i + 512] = rng.integers(0, 256, images[i : i + 512].shape, dtype=np.uint8)
    images.flush()
    return np.load(folder + "/train.npy", mmap_mode="r")


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
    """One training step, its parts timed apart."""
    config = model.ModelConfig(image_size=case["size"], **model.PRESETS[case["preset"]])
    cfg = train.Config(batch_size=case["batch"], mask_ratio=case["ratio"], mask_type="patch", lr=1e-4)
    dtype = train.pick_dtype("auto", DEVICE)
    parts = dict(data=0.0, forward=0.0, backward=0.0, clip=0.0, optimizer=0.0, ema=0.0)
    torch.manual_seed(0)
    denoiser, ema = model.Denoiser(config).to(DEVICE), model.Denoiser(config).to(DEVICE).requires_grad_(False)
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=1e-4, fused=True)
    with tempfile.TemporaryDirectory() as folder:
        stream = train.Stream(random_set(folder, 2048, case["size"]), None, cfg, config, DEVICE)
        records, warm = [], 1
        for step in range(warm + case.get("repeats", 3)):
            t = [now()]
            batch = stream.load(step)
            del batch["index"]
            t.append(now())
            with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
                loss = train.objective(denoiser, config, **batch).mean()
            t.append(now())
            loss.backward()
            t.append(now())
            torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
            t.append(now())
            optimizer.step()
            t.append(now())
            train.update_ema(ema, denoiser, 0.999, step)
            optimizer.zero_grad(set_to_none=True)
            t.append(now())
            records.append([b - a for a, b in zip(t, t[1:])])
        memory = peak_memory() / 1e9
        outside = 1 - products_share(lambda: train.objective(denoiser, config, **batch).mean().backward(), dtype)
    parts = dict(zip(parts, (statistics.median(c) for c in zip(*records[warm:]))))
    total = sum(parts.values())
    k = model.count_visible(config.grid, case["ratio"])
    flops = token_flops(config, case["batch"] * k, case["batch"])
    bf16 = matmul_peak(torch.bfloat16)
    return dict(visible=k, step_ms=total * 1e3, images_per_s=case["batch"] / total,
                tokens_per_s=case["batch"] * k / total, gflops=flops / total / 1e9,
                mfu=flops / total / bf16, outside_products=outside, peak_gb=memory,
                **{f"{name}_ms": value * 1e3 for name, value in parts.items()})


def sampling(case):
    config = model.ModelConfig(**model.PRESETS["demo"])
    denoiser = model.Denoiser(config).to(DEVICE).eval()
    n = 64
    seconds = clock(lambda: list(sample.generate(denoiser, range(n), batch_size=n, sampler=case["sampler"],
                                                 steps=case["steps"])), repeats=1, warm=0)
    return dict(images_per_s=n / seconds)


def data(case):
    """Batches of the stream alone, and the reader of prepare_data on PNG files."""
    if case["what"] == "prepare":
        with tempfile.TemporaryDirectory() as folder:
            os.makedirs(folder + "/png")
            for i in range(600):
                image = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
                sample.Image.fromarray(image).resize((256, 256)).save(f"{folder}/png/{i}.png")
            seconds = clock(lambda: prepare_data.prepare(folder + "/png", folder + "/set", size=64, force=True),
                            repeats=3, warm=1)
        return dict(images_per_s=600 / seconds)
    config = model.ModelConfig(image_size=case["size"], **model.PRESETS["demo"])
    cfg = train.Config(batch_size=case["batch"], mask_ratio=case["ratio"], mask_type="patch")
    with tempfile.TemporaryDirectory() as folder:
        stream = train.Stream(random_set(folder, 8192, case["size"]), None, cfg, config, DEVICE)
        counter = iter(range(10**6))
        base = peak_memory()
        seconds = clock(lambda: stream.load(next(counter)), repeats=20, warm=3)
    return dict(images_per_s=case["batch"] / seconds, batch_ms=seconds * 1e3, grown_mb=(peak_memory() - base) / 1e6)


def big(n):
    return n if SMALL else 4 * n


CASES = {
    "peak": {"matrix products and copy": {}},
    "attention": {f"{s}": dict(shape=s) for s in [(256, 4, 16, 32), (192, 4, 28, 32), (64, 8, 26, 64),
                                                  (32, 4, 256, 32), (8, 8, 256, 64), (2, 12, 410, 64),
                                                  (1, 12, 1024, 64)]},
    "steps": {
        **{f"512x13 64px ratio {r}": dict(size=64, preset="maskdm-64", batch=big(64), ratio=r)
           for r in (0, 0.5, 0.75, 0.9)},
        **{f"512x13 64px ratio {r} batch 8": dict(size=64, preset="maskdm-64", batch=8, ratio=r)
           for r in (0, 0.9)},
        **{f"512x13 64px ratio {r} batch 128": dict(size=64, preset="maskdm-64", batch=128, ratio=r, repeats=1)
           for r in (0, 0.9)},
        **{f"768x12 256px ratio {r}": dict(size=256, preset="maskdm-256", batch=big(2), ratio=r)
           for r in (0, 0.9)},
        "demo 64px ratio 0.9": dict(size=64, preset="demo", batch=192, ratio=0.9, repeats=10),
        "demo 64px ratio 0": dict(size=64, preset="demo", batch=32, ratio=0, repeats=10)},
    "curve": {f"512x13 64px ratio {r}": dict(size=64, preset="maskdm-64", batch=big(16), ratio=r)
              for r in (0, 0.25, 0.5, 0.625, 0.75, 0.875, 0.9, 0.95)},
    "sampling": {f"{s} {n}": dict(sampler=s, steps=n) for s, n in
                 (("heun", 18), ("euler", 50), ("consistency", 1), ("consistency", 2))},
    "data": {**{f"stream 64px ratio {r}": dict(what="stream", size=64, batch=256, ratio=r) for r in (0, 0.9)},
             **{f"stream 256px ratio {r}": dict(what="stream", size=256, batch=32, ratio=r) for r in (0, 0.9)},
             "prepare 256 px PNG to 64 px": dict(what="prepare")},
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


def report(section, rows):
    """What the ratios of a section say."""
    values = dict(rows)
    if section == "steps":
        for name, masked in values.items():
            whole = values.get(name.replace("ratio 0.9", "ratio 0"))
            if "ratio 0.9" in name and whole and "step_ms" in whole and "demo" not in name:
                print(f"\n{name}: time 1/{whole['step_ms'] / masked['step_ms']:.1f}, peak memory "
                      f"1/{whole['peak_gb'] / masked['peak_gb']:.1f} of ratio 0")
    if section == "curve":
        k, t = (np.array([v[c] for v in values.values()]) for c in ("visible", "step_ms"))
        c, b, a = np.polyfit(k, t, 2)
        ideal = t[0] * k / k[0]
        print(f"\nt = {a:.3g} + {b:.3g} K + {c:.3g} K^2 ms; at ratio 0.9 the step takes "
              f"{t[6] / ideal[6]:.2f} x the ideal share K/N of the whole step")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("section", nargs="*", help=f"of {', '.join(CASES)} (default: all)")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        section, case = json.loads(args.case)
        print(json.dumps(globals()["steps" if section == "curve" else section](case)))
        return
    print(f"torch {torch.__version__}, {DEVICE}, {torch.get_num_threads()} threads")
    for section in args.section or CASES:
        cases = {n: c for n, c in CASES[section].items() if args.only in n}
        rows = [(name, run_case(section, case)) for name, case in cases.items()]
        print(f"\n## {section}\n")
        table(rows)
        report(section, rows)


if __name__ == "__main__":
    main()
