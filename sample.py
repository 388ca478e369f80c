"""Draw images from a checkpoint.

python sample.py --ckpt out/ft.pt                                        # out/samples.png, a grid
python sample.py --ckpt out/ft.pt --labels cat,dog --cfg_scale 2         # classes, guided
python sample.py --ckpt out/cm.pt --steps 2                              # a consistency model
python sample.py --ckpt out/ft.pt --num 50000 --out out/samples.npz      # arr_0 uint8 (N, H, W, C)
torchrun --nproc_per_node=8 -- sample.py --ckpt out/ft.pt --num 50000 --out out/pngs   # a folder

Image i depends on (seed, i) alone, whatever the batch size and the number of processes. A run that
writes a folder or .npz goes on where it was interrupted when the same command is given again.
"""

import json
import math
import os
import shutil
import sys
from datetime import timedelta
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

from model import (SIGMA_DATA, Denoiser, Images, ModelConfig, load_checkpoint, need_noise, patchify,
                   replace_file, sampler_levels, unpatchify)
from prepare_data import Parser, need, to_image

# ---- Noise, noise levels, steps.
def seed_of(*numbers):
    """One 63-bit seed for a tuple of non-negative numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1

def seeded(*numbers, device="cpu"):
    """A generator for a purpose, such as (seed, i) for the noise of image i."""
    return torch.Generator(device).manual_seed(seed_of(*numbers))

def noise_levels(config, sampler=None, steps=None, mid_sigma=0.821):
    """(sampler, sigmas) for a model; what is None is chosen by its kind: heun, 18 steps, or of a
    consistency model one step; more go from 80 to mid_sigma evenly in ln sigma."""
    if sampler in ("churn", "consistency"):
        need_noise("edm", f"--sampler {sampler}")
    sampler = sampler or ("consistency" if config.consistency else "heun")
    need(not config.consistency or sampler == "consistency", "this is a consistency model: it has "
         "a sampler of its own, leave out --sampler")
    if sampler == "consistency":
        levels = [*np.geomspace(80.0, mid_sigma, steps or 1), 0.0]
        return sampler, torch.tensor(levels, dtype=torch.float64)
    return sampler, sampler_levels(steps or 18)

def sample_loop(denoise, x, sigmas, sampler="heun", draw=None, churn=(40, 0.05, 50, 1.003)):
    """Integrate the probability-flow ODE, or the SDE, from noise to data (EDM algorithms 1 and 2).
    denoise(x, sigma) -> D(x; sigma) for a float sigma; x standard normal of any shape; sigmas
    (n + 1,) descending to 0; draw() gives fresh noise like x. Samplers: "euler" (the DDIM step, n
    evaluations), "heun" (second order, 2n - 1), "churn" (heun with noise added before each step:
    S_churn, S_min, S_max, S_noise, EDM's for 256 steps), "consistency" (denoise, add noise)."""
    sigmas, (s_churn, s_min, s_max, s_noise) = [float(s) for s in sigmas], churn
    n = len(sigmas) - 1
    x = x * sigmas[0]
    for s, s_next in zip(sigmas[:-1], sigmas[1:]):
        if sampler == "consistency":
            x = denoise(x, s)
            x = x + s_next * draw() if s_next > 0 else x
            continue
        if sampler == "churn" and s_min <= s <= s_max:
            s_hat = s * (1 + min(s_churn / n, 2**0.5 - 1))
            x = x + (s_hat**2 - s**2) ** 0.5 * s_noise * draw()
            s = s_hat
        slope = (x - denoise(x, s)) / s
        x_next = x + (s_next - s) * slope
        if sampler != "euler" and s_next > 0:
            slope_next = (x_next - denoise(x_next, s_next)) / s_next
            x_next = x + (s_next - s) * (slope + slope_next) / 2
        x = x_next
    return x

def guided(denoiser, labels, scale):
    """denoise(x, sigma) with classifier-free guidance D_null + g (D_label - D_null).
    Scale 1 evaluates the labels only, 0 the null class only."""
    null = None if labels is None else torch.full_like(labels, -1)

    def denoise(x, sigma):
        sigma = torch.full((len(x),), sigma, dtype=x.dtype, device=x.device)
        if labels is None or scale in (0, 1):
            return denoiser(x, sigma, labels=null if scale == 0 else labels)
        both = denoiser(torch.cat([x, x]), torch.cat([sigma] * 2), labels=torch.cat([labels, null]))
        d_label, d_null = both.chunk(2)
        return d_null + scale * (d_label - d_null)

    return denoise

# ---- From a checkpoint to images.
def load_denoiser(path, weights="ema", device="cpu"):
    """(denoiser in eval mode on `device`, checkpoint dict). `weights` is "ema" or "raw"."""
    checkpoint = load_checkpoint(path)
    denoiser = Denoiser(ModelConfig(**checkpoint["architecture"]))
    denoiser.load_state_dict(checkpoint["ema" if weights == "ema" else "model"])
    return denoiser.to(device).eval().requires_grad_(False), checkpoint

@torch.inference_mode()
def generate(denoiser, indices, *, seed=0, sampler=None, steps=None, mid_sigma=0.821,
             cfg_scale=1.0, labels=None, batch_size=64, dtype=torch.float32):
    """Yield (indices, images) batch by batch for the given image indices.
    images: numpy uint8 (b, H, W, C), or latents, float32 (b, C, H, W) on their own scale. `labels`:
    class numbers, cycled over the indices (default: all). Image i depends on (seed, i) alone."""
    c = denoiser.config
    device = next(denoiser.parameters()).device
    wide = torch.float32 if device.type == "mps" else torch.float64  # of the state, as in EDM
    labels = labels or range(c.num_classes)
    sampler, sigmas = noise_levels(c, sampler, steps, mid_sigma)
    for start in range(0, len(indices), batch_size):
        batch = list(indices[start : start + batch_size])
        streams = [seeded(seed, i) for i in batch]

        def draw():
            shape = (c.image_size, c.image_size, c.channels)
            noise = torch.stack([torch.randn(shape, generator=g) for g in streams])
            return patchify(noise, c.patch_size).to(device, wide)

        cycled = [labels[i % len(labels)] for i in batch] if labels else None
        classes = torch.tensor(cycled, device=device) if labels else None
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            denoise = guided(denoiser, classes, cfg_scale)
            x = sample_loop(denoise, draw(), sigmas, sampler, draw)
        images = unpatchify(x, c.patch_size).float().cpu()
        if c.latent:
            mean, deviation = torch.tensor(c.latent)
            yield batch, (images * (deviation / SIGMA_DATA) + mean).permute(0, 3, 1, 2).numpy()
        else:
            yield batch, (images * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8).numpy()

# ---- Writers. A long run writes finished batches to a folder, so that it can be taken up again.
def write_all(out, batches, num, batch_size, describe, class_names, rank, world):
    """Write images to a folder of PNGs or an .npz, this process its share; rank 0 joins them.
    `batches(indices)` generates; `describe` says how, and guards against joining two recipes. What
    lies in the work folder is not made again. With classes an .npz has arr_1 and class_names."""
    work = out + ".parts" if out.lower().endswith(".npz") else out
    recipe = f"{work}/sampling.json"
    if rank == 0:
        os.makedirs(work, exist_ok=True)
        there = {*os.listdir(work)}
        need(not there or os.path.exists(recipe) and json.load(open(recipe)) == describe,
             f"{work} holds other files, or samples of another recipe: give another --out")
        replace_file(recipe, lambda f: f.write(json.dumps(describe).encode()))
    if world > 1:
        dist.barrier()
    chunks = [range(i, min(i + batch_size, num)) for i in range(0, num, batch_size)]
    for chunk in tqdm(chunks[rank::world], desc="sampling", unit="batch", disable=rank > 0):
        paths = [f"{work}/{i:06d}.png" for i in chunk]
        paths = paths if work == out else [f"{work}/{chunk[0]:06d}.npy"]
        if all(map(os.path.exists, paths)):
            continue
        images = np.concatenate([x for _, x in batches(chunk)])
        for path, image in zip(paths, images if work == out else [images]):
            replace_file(path, lambda f: np.save(f, image) if work != out else
                         to_image(image).save(f, "PNG"))
    if world > 1:
        dist.barrier()
    if rank == 0 and work != out:
        arrays = dict(arr_0=np.concatenate([np.load(f"{work}/{c[0]:06d}.npy") for c in chunks]))
        if describe["labels"]:
            arrays |= dict(arr_1=np.resize(describe["labels"], num), class_names=class_names)
        replace_file(out, lambda f: np.savez(f, **arrays))
        shutil.rmtree(work)

def save_grid(path, images, columns=None):
    """Write images uint8 (N, H, W, C) as one picture; latents (N, C, H, W): the first channels."""
    if images.dtype != np.uint8:
        low, high = images.min(), images.max()
        images = ((images - low) / max(high - low, 1e-9) * 255).astype(np.uint8)
        images = images.transpose(0, 2, 3, 1)[..., : 3 if images.shape[1] >= 3 else 1]
    columns, gap = columns or math.ceil(len(images) ** 0.5), max(1, images.shape[2] // 32)
    white = partial(np.pad, constant_values=255)
    cells = white(images, ((0, -len(images) % columns), (gap, 0), (gap, 0), (0, 0)))
    rows = [np.hstack(cells[i : i + columns]) for i in range(0, len(cells), columns)]
    sheet = white(np.vstack(rows), ((0, gap), (0, gap), (0, 0)))
    kind = Image.registered_extensions()[os.path.splitext(path)[1].lower()]
    replace_file(path, lambda f: to_image(sheet).save(f, kind))

# ---- The command.
def pick_device(name, local_rank=0):
    """auto -> cuda, else mps, else cpu, as a torch.device; exits if that asked for is not there."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": 1}
    name = next(d for d in here if here[d]) if name == "auto" else name
    need(here[name], f"--device {name} is not available here: use --device auto")
    if torch.version.cuda and not here["cuda"] and os.path.exists("/proc/driver/nvidia/version"):
        print("this machine has a GPU that torch cannot use: is its driver old?", file=sys.stderr)
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    need(name != "cuda" or processes <= gpus, f"{processes} processes for {gpus} GPUs of this "
         f"machine: give torchrun --nproc_per_node={gpus}, or --device cpu")
    return torch.device(name, local_rank) if name == "cuda" else torch.device(name)

def pick_dtype(name, device):
    """auto: bfloat16 where the processor multiplies faster in it, else float32."""
    cpu = torch.cpu.get_capabilities()
    fast = dict(mps=False, cuda=torch.cuda.is_bf16_supported(False), cpu=cpu.get("amx_bf16") or
                cpu.get("avx512_bf16") and "Intel" not in cpu["cpu_name"])  # theirs is slower
    auto = torch.bfloat16 if fast[device.type] else torch.float32
    return auto if name == "auto" else getattr(torch, name)

def add_flags(parser, batch_size):
    """The flags of drawing samples that fid.py has, too; `sampling_settings` reads most of them."""
    add = parser.add
    add("steps", None, "of the sampler; by the kind of model, 18 or 1; churn: give 256", type=int)
    add("sampler", None, "likewise", choices=("heun", "euler", "churn", "consistency"))
    add("mid_sigma", None, "second noise level of a consistency model", type=float)
    add("cfg_scale", 1.0, "guidance scale, 1 for none")
    add("seed", 0, "of the noise")
    add("batch_size", batch_size, "images at a time")
    add("device", "auto", "where to run", choices=("auto", "cpu", "cuda", "mps"))
    add("dtype", "float32", "of the network; fid.py: Inception", choices=("float32", "bfloat16"))

def sampling_settings(args, denoiser, checkpoint):
    """What `generate` is to be told, from the flags that sample.py and fid.py have in common."""
    trained, c = checkpoint["config"], denoiser.config
    need(args.cfg_scale == 1 or c.num_classes and trained.get("label_dropout", 0.1),
         "--cfg_scale needs a model that was trained with classes and without (--label_dropout)")
    # ECT's second noise level, by the preset that the model was tuned with
    mid = args.mid_sigma or {"imagenet64": 1.526}.get(trained.get("cm_preset"), 0.821)
    sampler, sigmas = noise_levels(c, args.sampler, args.steps, mid)
    return dict(seed=args.seed, sampler=sampler, steps=len(sigmas) - 1, mid_sigma=mid,
                cfg_scale=args.cfg_scale)

def class_numbers(text, names, data, num):
    """Numbers of the classes to draw: all (None), some by name or number ("cat,0"), or "data": in
    the shares of that prepared set. Exits if there is none such."""
    if text == "data" and names:
        labels = sorted(i for i in Images(data, "train", 1, names).labels if 0 <= i < len(names))
        return [int(labels[i * len(labels) // num]) for i in range(num)]
    known = {str(i): i for i in range(len(names))} | {name: i for i, name in enumerate(names)}
    chosen = text.split(",") if text else names
    unknown = [part for part in chosen if part not in known]
    need(not unknown, f"--labels: the model has no class {unknown}, it has {names}")
    return [known[part] for part in chosen]

def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add
    add("ckpt", "out/ft.pt", "checkpoint that train.py wrote")
    add("num", 64, "number of images")
    add("out", "out/samples.png", ".png: a grid; .npz: arr_0; else a folder of PNGs")
    add("weights", "ema", "of the checkpoint", choices=("ema", "raw"))
    add("labels", None, "names or numbers of classes, cycled; data: in its shares; default: all")
    add_flags(parser, batch_size=64 if torch.cuda.is_available() else 8)  # caches are small
    args = parser.parse_args(argv)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(args.device, int(os.environ.get("LOCAL_RANK", 0)))
    denoiser, checkpoint = load_denoiser(args.ckpt, args.weights, device)
    names = checkpoint["class_names"] if denoiser.config.num_classes else []
    labels = class_numbers(args.labels, names, checkpoint["config"].get("data"), args.num)
    settings = dict(sampling_settings(args, denoiser, checkpoint), labels=labels)
    suffix = os.path.splitext(args.out.lower())[1]
    picture = Image.registered_extensions().get(suffix) in Image.SAVE
    need(suffix == ".npz" or picture or not denoiser.config.latent,
         "this model makes latents: give an --out that ends in .npz, and decode that")
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(days=7))  # they meet before and after

    def batches(indices):
        return generate(denoiser, indices, batch_size=args.batch_size,
                        dtype=getattr(torch, args.dtype), **settings)

    if rank == 0:
        print(f"{args.num} samples of {args.ckpt}, step {checkpoint['step']}, {args.weights} "
              f"weights, {settings['sampler']} {settings['steps']}, on {device}, of classes "
              f"{args.labels or 'all'} of {dict(enumerate(names))}", file=sys.stderr)
    if not picture:
        describe = dict(settings, num=args.num, batch_size=args.batch_size, weights=args.weights,
                        dtype=args.dtype, model=[args.ckpt, os.path.getmtime(args.ckpt)])
        write_all(args.out, batches, args.num, args.batch_size, describe, names, rank, world)
    elif rank == 0:
        made = tqdm(batches(range(args.num)), "sampling", -(-args.num // args.batch_size))
        n = len({*labels})  # if few, a column is of one class, and the picture about square
        columns = n * max(1, round(args.num**0.5 / n)) if 1 < n <= 20 else None
        save_grid(args.out, np.concatenate([images for _, images in made]), columns)
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank == 0:
        print(f"wrote {args.out}", file=sys.stderr)

if __name__ == "__main__":
    main()
