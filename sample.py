"""Draw images from a checkpoint.

python sample.py --ckpt out/ft.pt                                        # out/samples.png, a grid
python sample.py --ckpt out/ft.pt --labels cat,dog --cfg_scale 2         # classes, guided
python sample.py --ckpt out/cm.pt --steps 2                              # a consistency model
python sample.py --ckpt out/ft.pt --num 50000 --out out/samples.npz      # arr_0 uint8 (N, H, W, C)
torchrun --nproc_per_node=8 -- sample.py --ckpt out/ft.pt --num 50000 --out out/pngs   # a folder

Image i depends only on (seed, i), whatever the batch size and the number of processes. An
interrupted run that writes a folder or .npz continues when the same command is given again.
"""

import hashlib
import json
import math
import os
import shutil
from datetime import timedelta
from functools import partial
from itertools import chain, pairwise

import numpy as np
import torch
import torch.distributed as dist

from model import (
    SIGMA_DATA, Denoiser, ModelConfig, check_noise, check_writable, load_checkpoint, patchify,
    replace_file, sampler_levels, unpatchify)
from prepare_data import Parser, check, progress_bar, run_script, say, to_image

# Set by torchrun: this process, all processes.
RANK = int(os.environ.get("RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))

def print0(text):
    if RANK == 0:
        say(text)

# ---- Random numbers.
def seed_of(*numbers):
    """One 63-bit seed for a tuple of non-negative numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1

def seeded(*numbers, device="cpu"):
    """A generator for a purpose, such as (seed, i) for the noise of image i."""
    return torch.Generator(device).manual_seed(seed_of(*numbers))

# ---- Samplers: from noise x of deviation sigmas[0] to data; sigmas (n + 1,) descend to 0.
# denoise(x, sigma) -> D(x; sigma) for a float sigma; draw() -> fresh standard normal noise like x.
def euler(denoise, x, sigmas, draw):
    """The DDIM step; n evaluations."""
    for s, s_next in pairwise(sigmas):
        slope = (x - denoise(x, s)) / s
        x = x + (s_next - s) * slope
    return x

def heun(denoise, x, sigmas, draw):
    """Second order, 2n - 1 evaluations (EDM algorithm 1)."""
    for s, s_next in pairwise(sigmas):
        slope = (x - denoise(x, s)) / s
        x_next = x + (s_next - s) * slope
        if s_next > 0:
            slope_next = (x_next - denoise(x_next, s_next)) / s_next
            x_next = x + (s_next - s) * (slope + slope_next) / 2
        x = x_next
    return x

def consistency(denoise, x, sigmas, draw):
    """Denoise, and add the noise of the next level; n evaluations."""
    for s, s_next in pairwise(sigmas):
        x = denoise(x, s)
        if s_next > 0:
            x = x + s_next * draw()
    return x

SAMPLERS = {"heun": heun, "euler": euler, "consistency": consistency}

def noise_levels(config, sampler=None, steps=None, mid_sigma=0.821):
    """(sampler, sigmas) for a model; None: heun with 18 steps, or one step of a consistency model,
    whose further steps go from 80 to mid_sigma evenly in ln sigma."""
    if not sampler:
        sampler = "consistency" if config.consistency else "heun"
    check(sampler == "consistency" or not config.consistency, "this is a consistency model, which "
          "has a sampler of its own: leave out --sampler")
    if sampler == "consistency":
        check_noise("edm", "--sampler consistency")
        return sampler, [*np.geomspace(80.0, mid_sigma, steps or 1).tolist(), 0.0]
    return sampler, sampler_levels(steps or 18).tolist()

def guided(denoiser, labels, scale, interval=None, guide=None):
    """denoise(x, sigma) with guidance, D_bad + g (D - D_bad). D_bad is the answer for no class, or
    that of a worse model `guide` (autoguidance, arXiv 2406.02507). Scale 1 evaluates only D, 0 only
    D_bad. Guidance acts only where low < sigma <= high (arXiv 2404.07724)."""
    low, high = interval or (0, math.inf)
    check(low < high, f"--cfg_interval {low} {high}: expected LOW below HIGH")
    if labels is None and guide is None:
        scale = 1

    def denoise(x, sigma):
        s = x.new_full((len(x),), sigma)
        if scale == 1 or not low < sigma <= high:
            return denoiser(x, s, labels=labels)
        if guide:
            bad = guide(x, s, labels=labels)
        else:
            bad = denoiser(x, s, labels=torch.full_like(labels, -1))
        if scale == 0:
            return bad
        good = denoiser(x, s, labels=labels)
        return bad + scale * (good - bad)
    return denoise

# ---- From a checkpoint to images.
WEIGHTS = {"ema": "ema", "raw": "model"}  # keys of a checkpoint

def load_denoiser(path, weights="ema", device="cpu"):
    """(denoiser in eval mode on `device`, checkpoint dict). `weights` is "ema" or "raw"."""
    checkpoint = load_checkpoint(path)
    denoiser = Denoiser(ModelConfig(**checkpoint["architecture"]))
    denoiser.load_state_dict(checkpoint[WEIGHTS[weights]])
    if not denoiser.config.num_classes:
        checkpoint["class_names"] = []  # its data may have some
    return denoiser.to(device).eval().requires_grad_(False), checkpoint

@torch.inference_mode()
def generate(denoiser, indices, *, seed=0, sampler=None, steps=None, mid_sigma=0.821,
             cfg_scale=1.0, cfg_interval=None, guide=None, labels=None, batch_size=64,
             dtype=torch.float32):
    """Yield the images of some indices by batches, numpy uint8 (b, H, W, C), or latents, float32
    (b, C, H, W). labels: class numbers, in turn (default: all). Image i depends on (seed, i)."""
    c = denoiser.config
    device = next(denoiser.parameters()).device
    labels = labels or range(c.num_classes)
    sampler, sigmas = noise_levels(c, sampler, steps, mid_sigma)
    for start in range(0, len(indices), batch_size):
        batch = list(indices[start : start + batch_size])
        generators = [seeded(seed, i) for i in batch]
        def draw():
            shape = (c.image_size, c.image_size, c.channels)
            noise = torch.stack([torch.randn(shape, generator=g) for g in generators])
            return patchify(noise, c.patch_size).to(device, torch.float64)  # as in EDM
        classes = None
        if labels:
            cycled = [labels[i % len(labels)] for i in batch]
            classes = torch.tensor(cycled, device=device)
        denoise = guided(denoiser, classes, cfg_scale, cfg_interval, guide)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            x = SAMPLERS[sampler](denoise, draw() * sigmas[0], sigmas, draw)
        images = unpatchify(x, c.patch_size).float().cpu()
        if c.latent:
            mean, deviation = torch.tensor(c.latent)
            images = images * (deviation / SIGMA_DATA) + mean
            yield images.permute(0, 3, 1, 2).numpy()
        else:
            images = (images * 127.5 + 127.5).round().clamp(0, 255)
            yield images.to(torch.uint8).numpy()

# ---- Writers.
def write_all(out, draw, num, batch_size, recipe, class_names):
    """Write images, which draw(numbers) makes, and labels to an .npz, or to a folder of PNGs. Parts
    that an interrupted run left, in a folder named by a hash of the recipe, are used again."""
    digest = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()
    folder = f"{out}.{digest[:8]}.parts"
    os.makedirs(folder, exist_ok=True)
    starts = range(0, num, batch_size)
    for start in progress_bar(starts[RANK::WORLD_SIZE], "sampling", disable=RANK > 0):
        path = f"{folder}/{start:06d}.npy"
        if not os.path.exists(path):
            numbers = range(start, min(start + batch_size, num))
            images = np.concatenate(list(draw(numbers)))
            replace_file(path, lambda file: np.save(file, images))
    if WORLD_SIZE > 1:
        dist.barrier()
    if RANK > 0:
        return
    parts = [np.load(f"{folder}/{start:06d}.npy", mmap_mode="r") for start in starts]
    if out.lower().endswith(".npz"):
        arrays = dict(arr_0=np.concatenate(parts))
        if class_names:
            arrays["arr_1"] = np.resize(recipe["labels"], num)
            arrays["class_names"] = class_names
        replace_file(out, lambda file: np.savez(file, **arrays))
    else:
        pngs = f"{folder}/png"
        os.makedirs(pngs, exist_ok=True)
        for i, image in enumerate(chain.from_iterable(parts)):
            to_image(image).save(f"{pngs}/{i:06d}.png")
        os.rename(pngs, out)
    shutil.rmtree(folder)

def save_grid(path, images):
    """Write images uint8 (N, H, W, C) as one PNG."""
    num, height, width, channels = images.shape
    columns = math.ceil(num**0.5)
    gap = max(1, width // 32)  # above and to the left of every image
    white = partial(np.pad, constant_values=255)
    cells = white(images, ((0, -num % columns), (gap, 0), (gap, 0), (0, 0)))
    height += gap
    width += gap
    # (rows, columns, height, width, C) -> (rows, height, columns, width, C)
    cells = cells.reshape(-1, columns, height, width, channels).swapaxes(1, 2)
    sheet = cells.reshape(-1, columns * width, channels)
    sheet = white(sheet, ((0, gap), (0, gap), (0, 0)))
    replace_file(path, lambda file: to_image(sheet).save(file, "PNG"))

# ---- The command line; train.py and fid.py use its parts.
def pick_device(name):
    """auto -> cuda if there is a GPU, else cpu, as a torch.device."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if gpus else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    check(local_processes <= gpus, f"{local_processes} processes for the {gpus} GPUs of this "
          "machine: give torchrun a smaller --nproc_per_node, or --device cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))

def pick_dtype(name, device):
    """auto: bfloat16 where the processor multiplies faster in it, else float32."""
    if name != "auto":
        return getattr(torch, name)
    cpu = torch.cpu.get_capabilities()
    # Intel's AVX-512 is slower in bfloat16, AMD's is faster.
    fast_avx512 = cpu.get("avx512_bf16") and "Intel" not in cpu.get("cpu_name", "")
    fast = cpu.get("amx_bf16") or fast_avx512
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(False)  # not emulated
    return torch.bfloat16 if fast else torch.float32

def images_per_pass(num_images, num_tokens, config, device):
    """How many images at once: all, or on a CPU half of them, a quarter, ... to fit its caches."""
    if device.type == "cpu":
        while num_images % 2 == 0 and num_images * num_tokens * config.dim > 2**20:
            num_images //= 2
    return num_images

def add_flags(parser, batch_size):
    """The flags that sample.py and fid.py share; `sampling_settings` reads most of them."""
    add = parser.add
    add("steps", None, "steps of the sampler; None = 18, or 1 of a consistency model", int, low=1)
    add("sampler", None, "None = heun, or consistency for such a model", choices=SAMPLERS)
    add("mid_sigma", 0.821, "second noise level of a consistency model; ImageNet-64: 1.526")
    add("cfg_scale", 1.0, "guidance scale; 1 = none")
    add("cfg_interval", None, "guide only above LOW and up to HIGH; None = everywhere", float,
        nargs=2)
    add("guide_ckpt", None, "a worse model to guide by, averaged weights; None = no class")
    add("seed", 0, "seed of the noise")
    add("batch_size", batch_size, "images at a time", low=1)
    add("device", "auto", "where to run", choices=("auto", "cpu", "cuda"))
    add("dtype", "float32", "dtype of the sampled network", choices=("float32", "bfloat16"))

def sampling_settings(args, denoiser, checkpoint):
    """What `generate` is told by the flags of `add_flags`."""
    config = checkpoint["config"]
    has_null = denoiser.config.num_classes and config.get("label_dropout", 0.1)
    check(args.cfg_scale == 1 or has_null or args.guide_ckpt, "--cfg_scale needs a model that was "
          "trained with --class_cond and --label_dropout, or --guide_ckpt")
    check(args.cfg_scale != 1 or not args.guide_ckpt, "--guide_ckpt needs a --cfg_scale, such as 2")
    sampler, sigmas = noise_levels(denoiser.config, args.sampler, args.steps, args.mid_sigma)
    return dict(seed=args.seed, sampler=sampler, steps=len(sigmas) - 1, mid_sigma=args.mid_sigma,
                cfg_scale=args.cfg_scale, cfg_interval=args.cfg_interval)

def same_task(a, b):
    """Whether the answers of two networks (their ModelConfig) mean the same, but for classes."""
    names = ("image_size", "channels", "patch_size", "latent", "consistency")
    return all(getattr(a, name) == getattr(b, name) for name in names)

def drawer(args, denoiser, checkpoint, settings):
    """draw(numbers) -> `generate` with the flags and the settings."""
    guide = None
    if args.guide_ckpt:
        device = next(denoiser.parameters()).device
        guide, stored = load_denoiser(args.guide_ckpt, device=device)
        same_classes = stored["class_names"] == checkpoint["class_names"]
        check(same_classes and same_task(guide.config, denoiser.config),
              f"{args.guide_ckpt} differs from the model in images, classes, patches or loss")
    return partial(generate, denoiser, guide=guide, batch_size=args.batch_size,
                   dtype=getattr(torch, args.dtype), **settings)

def class_numbers(text, names):
    """Numbers of the classes to draw, given by their names ("cat,dog"); None = all."""
    chosen = text.split(",") if text else names
    unknown = set(chosen) - set(names)
    check(not unknown, f"--labels: the model has no class {unknown}, it has {names}")
    return [names.index(name) for name in chosen]

def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add
    add("ckpt", "out/ft.pt", "checkpoint that train.py wrote")
    add("num", 64, "number of images", low=1)
    add("out", "out/samples.png", ".png: a grid; .npz: arr_0; else a folder of PNGs")
    add("weights", "ema", "which weights of the checkpoint", choices=WEIGHTS)
    add("labels", None, "names of the classes to draw in turn: cat,cat,dog; None = all")
    add_flags(parser, batch_size=64 if torch.cuda.is_available() else 8)  # a CPU's caches are small
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    denoiser, checkpoint = load_denoiser(args.ckpt, args.weights, device)
    names = checkpoint["class_names"]
    settings = sampling_settings(args, denoiser, checkpoint)
    settings["labels"] = class_numbers(args.labels, names)
    args.out = os.path.normpath(args.out)
    suffix = os.path.splitext(args.out.lower())[1]
    check(suffix in (".png", ".npz", ""), f"--out {args.out}: expected a grid .png, an .npz, or a "
          "folder without a suffix")
    check(suffix == ".npz" or not denoiser.config.latent, "this model makes latents: give an --out "
          "that ends in .npz, and decode that")
    check(suffix or not os.path.exists(args.out), f"{args.out} exists: give another --out")
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    if RANK == 0:
        check_writable(args.out)
    if WORLD_SIZE > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=7))  # they meet before and after

    draw = drawer(args, denoiser, checkpoint, settings)
    print0(f"{args.num} samples of {args.ckpt} at step {checkpoint['step']}: {settings}")
    if suffix != ".png":
        modified = [os.path.getmtime(file) for file in (args.ckpt, args.guide_ckpt) if file]
        recipe = vars(args) | settings | dict(modified=modified)
        write_all(args.out, draw, args.num, args.batch_size, recipe, names)
    elif RANK == 0:
        num_batches = math.ceil(args.num / args.batch_size)
        made = progress_bar(draw(range(args.num)), "sampling", num_batches)
        save_grid(args.out, np.concatenate(list(made)))
    if WORLD_SIZE > 1:
        dist.destroy_process_group()
    print0(f"wrote {args.out}")

if __name__ == "__main__":
    run_script(main)
