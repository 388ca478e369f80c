"""Draw images from a checkpoint.

python sample.py --ckpt out/ft.pt                                        # out/samples.png, a grid
python sample.py --ckpt out/ft.pt --labels cat,dog --cfg_scale 2         # classes, guided
python sample.py --ckpt out/cm.pt --steps 2                              # a consistency model
python sample.py --ckpt out/ft.pt --num 50000 --out out/samples.npz      # arr_0 uint8 (N, H, W, C)
torchrun --nproc_per_node=8 -- sample.py --ckpt out/ft.pt --num 50000 --out out/pngs   # a folder

Image i depends only on (seed, i), whatever the batch size and the number of processes. A run that
writes a folder or .npz continues where it was interrupted when the same command is given again.
"""

import json
import math
import os
import shutil
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from model import (
    SIGMA_DATA, Denoiser, ModelConfig, check_noise, load_checkpoint, patchify, replace_file,
    sampler_levels, unpatchify)
from prepare_data import Parser, check, progress_bar, run_script, say, to_image

# Set by torchrun: this process, all processes, this process on its machine.
RANK = int(os.environ.get("RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))

# ---- Random numbers.

def seed_of(*numbers):
    """One 63-bit seed for a tuple of non-negative numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1

def seeded(*numbers, device="cpu"):
    """A generator for a purpose, such as (seed, i) for the noise of image i."""
    return torch.Generator(device).manual_seed(seed_of(*numbers))

# ---- Samplers: from noise to data along the probability-flow ODE or an SDE. denoise(x, sigma) ->
# D(x; sigma) for a float sigma; x noise of deviation sigmas[0]; sigmas (n + 1,) floats descending
# to 0; draw() -> fresh standard normal noise like x.

def euler(denoise, x, sigmas, draw):
    """The DDIM step; n evaluations."""
    for s, s_next in pairwise(sigmas):
        slope = (x - denoise(x, s)) / s
        x = x + (s_next - s) * slope
    return x

def heun_step(denoise, x, s, s_next):
    slope = (x - denoise(x, s)) / s
    x_next = x + (s_next - s) * slope
    if s_next > 0:
        slope_next = (x_next - denoise(x_next, s_next)) / s_next
        x_next = x + (s_next - s) * (slope + slope_next) / 2
    return x_next

def heun(denoise, x, sigmas, draw):
    """Second order; 2n - 1 evaluations (EDM algorithm 1)."""
    for s, s_next in pairwise(sigmas):
        x = heun_step(denoise, x, s, s_next)
    return x

def churn(denoise, x, sigmas, draw, s_churn=40, s_min=0.05, s_max=50, s_noise=1.003):
    """Heun with noise added before each step (EDM algorithm 2; its settings for 256 steps)."""
    gamma = min(s_churn / (len(sigmas) - 1), 2**0.5 - 1)
    for s, s_next in pairwise(sigmas):
        if s_min <= s <= s_max:
            s_hat = s * (1 + gamma)
            x = x + (s_hat**2 - s**2) ** 0.5 * s_noise * draw()
            s = s_hat
        x = heun_step(denoise, x, s, s_next)
    return x

def consistency(denoise, x, sigmas, draw):
    """Denoise, and add the noise of the next level; n evaluations."""
    for s, s_next in pairwise(sigmas):
        x = denoise(x, s)
        if s_next > 0:
            x = x + s_next * draw()
    return x

SAMPLERS = {"heun": heun, "euler": euler, "churn": churn, "consistency": consistency}

def noise_levels(config, sampler=None, steps=None, mid_sigma=0.821):
    """(sampler, sigmas) for a model; None: heun with 18 steps, or one step of a consistency model,
    whose further steps go from 80 to mid_sigma evenly in ln sigma."""
    if sampler in ("churn", "consistency"):
        check_noise("edm", f"--sampler {sampler}")
    default = "consistency" if config.consistency else "heun"
    sampler = sampler or default
    check(sampler == "consistency" or not config.consistency, "this is a consistency model, which "
          "has a sampler of its own: leave out --sampler")
    if sampler == "consistency":
        return sampler, [*np.geomspace(80.0, mid_sigma, steps or 1).tolist(), 0.0]
    return sampler, sampler_levels(steps or 18).tolist()

def guided(denoiser, labels, scale):
    """denoise(x, sigma) with classifier-free guidance D_null + g (D_label - D_null).
    Scale 1 evaluates only the labels, 0 only the null class."""

    def denoise(x, sigma):
        sigma = torch.full((len(x),), sigma, dtype=x.dtype, device=x.device)
        if labels is None or scale == 1:
            return denoiser(x, sigma, labels=labels)
        null = torch.full_like(labels, -1)
        if scale == 0:
            return denoiser(x, sigma, labels=null)
        both = denoiser(x.repeat(2, 1, 1), sigma.repeat(2), labels=torch.cat([labels, null]))
        d_label, d_null = both.chunk(2)
        return d_null + scale * (d_label - d_null)

    return denoise

# ---- From a checkpoint to images.

WEIGHTS = {"ema": "ema", "raw": "model"}  # keys of a checkpoint

def load_denoiser(path, weights="ema", device="cpu"):
    """(denoiser in eval mode on `device`, checkpoint dict). `weights` is "ema" or "raw"."""
    checkpoint = load_checkpoint(path)
    denoiser = Denoiser(ModelConfig(**checkpoint["architecture"]))
    denoiser.load_state_dict(checkpoint[WEIGHTS[weights]])
    return denoiser.to(device).eval().requires_grad_(False), checkpoint

@torch.inference_mode()
def generate(denoiser, indices, *, seed=0, sampler=None, steps=None, mid_sigma=0.821,
             cfg_scale=1.0, labels=None, batch_size=64, dtype=torch.float32):
    """Yield (indices, images) batch by batch for the given image indices.
    images: numpy uint8 (b, H, W, C), or latents, float32 (b, C, H, W) on their own scale. `labels`:
    class numbers, cycled over the indices (default: all). Image i depends only on (seed, i)."""
    c = denoiser.config
    device = next(denoiser.parameters()).device
    state_dtype = torch.float32 if device.type == "mps" else torch.float64  # as in EDM
    labels = labels or range(c.num_classes)
    sampler, sigmas = noise_levels(c, sampler, steps, mid_sigma)
    for start in range(0, len(indices), batch_size):
        batch = list(indices[start : start + batch_size])
        generators = [seeded(seed, i) for i in batch]

        def draw():
            shape = (c.image_size, c.image_size, c.channels)
            noise = torch.stack([torch.randn(shape, generator=g) for g in generators])
            return patchify(noise, c.patch_size).to(device, state_dtype)

        classes = None
        if labels:
            classes = torch.tensor([labels[i % len(labels)] for i in batch], device=device)
        denoise = guided(denoiser, classes, cfg_scale)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            x = SAMPLERS[sampler](denoise, draw() * sigmas[0], sigmas, draw)
        images = unpatchify(x, c.patch_size).float().cpu()
        if c.latent:
            mean, deviation = torch.tensor(c.latent)
            images = images * (deviation / SIGMA_DATA) + mean
            yield batch, images.permute(0, 3, 1, 2).numpy()
        else:
            images = (images * 127.5 + 127.5).round().clamp(0, 255)
            yield batch, images.to(torch.uint8).numpy()

# ---- Writers. A long run writes finished batches to a folder, so that it can be continued.

def write_all(out, batches, num, batch_size, recipe, class_names):
    """Write images to a folder of PNGs or an .npz; every process its share. `batches(numbers)`
    generates, and `recipe` says how: what the folder holds of the same recipe is not made again.
    With classes an .npz has arr_1 (labels) and class_names."""
    is_npz = out.lower().endswith(".npz")
    folder = f"{out}.parts" if is_npz else out
    if RANK == 0:
        start_folder(folder, recipe)
    if WORLD_SIZE > 1:
        dist.barrier()
    starts = range(0, num, batch_size)
    for start in progress_bar(starts[RANK::WORLD_SIZE], "sampling", disable=RANK > 0):
        numbers = range(start, min(start + batch_size, num))
        paths = [f"{folder}/{i:06d}.png" for i in numbers]
        if is_npz:
            paths = [f"{folder}/{start:06d}.npy"]
        if os.path.exists(paths[-1]):
            continue
        images = np.concatenate([images for _, images in batches(numbers)])
        if is_npz:
            replace_file(paths[0], lambda file: np.save(file, images))
        else:
            for path, image in zip(paths, images):
                replace_file(path, lambda file: to_image(image).save(file, "PNG"))
    if WORLD_SIZE > 1:
        dist.barrier()
    if RANK == 0 and is_npz:
        parts = [np.load(f"{folder}/{start:06d}.npy") for start in starts]
        arrays = dict(arr_0=np.concatenate(parts))
        if class_names:
            arrays["arr_1"] = np.resize(recipe["labels"], num)
            arrays["class_names"] = class_names
        replace_file(out, lambda file: np.savez(file, **arrays))
        shutil.rmtree(folder)

def start_folder(folder, recipe):
    """Note in the folder what its samples are, unless it holds something else."""
    os.makedirs(folder, exist_ok=True)
    note = Path(folder, "sampling.json")
    text = json.dumps(recipe)
    same = note.exists() and note.read_text() == text
    check(same or not os.listdir(folder), f"{folder} holds other files, or samples of another "
          "recipe: give another --out")
    replace_file(note, lambda file: file.write(text.encode()))

def save_grid(path, images, columns=None):
    """Write images uint8 (N, H, W, C) as one picture; latents (N, C, H, W): the first channels."""
    if images.dtype != np.uint8:
        low, high = images.min(), images.max()
        images = np.uint8((images - low) / max(high - low, 1e-9) * 255)
        shown = 3 if images.shape[1] >= 3 else 1
        images = images.transpose(0, 2, 3, 1)[..., :shown]
    num, height, width, channels = images.shape
    columns = columns or math.ceil(num**0.5)
    rows = math.ceil(num / columns)
    gap = max(1, width // 32)  # white
    height += gap
    width += gap
    cells = np.full((rows * columns, height, width, channels), 255, np.uint8)
    cells[:num, gap:, gap:] = images
    sheet = cells.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    sheet = sheet.reshape(rows * height, columns * width, channels)
    sheet = np.pad(sheet, ((0, gap), (0, gap), (0, 0)), constant_values=255)
    kind = Image.registered_extensions()[os.path.splitext(path)[1].lower()]
    replace_file(path, lambda file: to_image(sheet).save(file, kind))

# ---- The command line; train.py and fid.py use its parts.

def pick_device(name):
    """auto -> cuda, else mps, else cpu, as a torch.device."""
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available = ["mps", *available]
    if torch.cuda.is_available():
        available = ["cuda", *available]
    if name == "auto":
        name = available[0]
    check(name in available, f"--device {name} is not available here, but {available}")
    if name != "cuda":
        return torch.device(name)
    gpus = torch.cuda.device_count()
    check(LOCAL_RANK < gpus, f"there are more processes than the {gpus} GPUs of this machine: give "
          f"torchrun --nproc_per_node={gpus}, or --device cpu")
    return torch.device(name, LOCAL_RANK)

def pick_dtype(name, device):
    """auto: bfloat16 where the processor multiplies faster in it, else float32."""
    if name != "auto":
        return getattr(torch, name)
    cpu = torch.cpu.get_capabilities()
    # Intel's AVX-512 is slower in bfloat16, AMD's is faster.
    fast_avx512 = cpu.get("avx512_bf16") and "Intel" not in cpu.get("cpu_name", "")
    fast = dict(
        mps=False,
        cuda=torch.cuda.is_bf16_supported(including_emulation=False),
        cpu=cpu.get("amx_bf16") or fast_avx512)
    return torch.bfloat16 if fast[device.type] else torch.float32

def add_flags(parser, batch_size):
    """The flags that sample.py and fid.py share; `sampling_settings` reads most of them."""
    add = parser.add
    add("steps", None, "steps of the sampler; None = 18, or 1 of a consistency model; churn: give "
        "256", int, low=1)
    add("sampler", None, "None = heun, or consistency for such a model", choices=SAMPLERS)
    add("mid_sigma", None, "second noise level of a consistency model", float)
    add("cfg_scale", 1.0, "guidance scale; 1 = none")
    add("seed", 0, "seed of the noise")
    add("batch_size", batch_size, "images at a time", low=1)
    add("device", "auto", "where to run", choices=("auto", "cpu", "cuda", "mps"))
    add("dtype", "float32", "dtype of the network", choices=("float32", "bfloat16"))

def sampling_settings(args, denoiser, checkpoint):
    """What `generate` is told by the flags of `add_flags`."""
    config = checkpoint["config"]
    has_null = denoiser.config.num_classes and config.get("label_dropout", 0.1)
    check(args.cfg_scale == 1 or has_null, "--cfg_scale needs a model that was trained with "
          "classes and without (--label_dropout)")
    mid_sigma = args.mid_sigma or config.get("mid_sigma", 0.821)
    sampler, sigmas = noise_levels(denoiser.config, args.sampler, args.steps, mid_sigma)
    return dict(seed=args.seed, sampler=sampler, steps=len(sigmas) - 1, mid_sigma=mid_sigma,
                cfg_scale=args.cfg_scale)

def class_numbers(text, names):
    """Numbers of the classes to draw, given by names or numbers ("cat,0"); None = all."""
    chosen = text.split(",") if text else names
    known = {str(i): i for i in range(len(names))} | {name: i for i, name in enumerate(names)}
    unknown = [name for name in chosen if name not in known]
    check(not unknown, f"--labels: the model has no class {unknown}, it has {names}")
    return [known[name] for name in chosen]

def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add
    add("ckpt", "out/ft.pt", "checkpoint that train.py wrote")
    add("num", 64, "number of images", low=1)
    add("out", "out/samples.png", ".png: a grid; .npz: arr_0; else a folder of PNGs")
    add("weights", "ema", "which weights of the checkpoint", choices=("ema", "raw"))
    add("labels", None, "classes to draw in turn, by name or number: cat,cat,dog; None = all")
    add_flags(parser, batch_size=64 if torch.cuda.is_available() else 8)  # a CPU's caches are small
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    denoiser, checkpoint = load_denoiser(args.ckpt, args.weights, device)
    names = checkpoint["class_names"] if denoiser.config.num_classes else []
    settings = sampling_settings(args, denoiser, checkpoint)
    settings["labels"] = class_numbers(args.labels, names)
    suffix = os.path.splitext(args.out.lower())[1]
    is_picture = Image.registered_extensions().get(suffix) in Image.SAVE
    check(suffix in ("", ".npz") or is_picture, f"--out {args.out}: expected a picture, .npz, or a "
          "folder without a suffix")
    check(suffix or not denoiser.config.latent, "this model makes latents: give an --out that ends "
          "in .npz, and decode that")
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    if WORLD_SIZE > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=7))  # they meet before and after

    def batches(numbers):
        return generate(denoiser, numbers, batch_size=args.batch_size,
                        dtype=getattr(torch, args.dtype), **settings)

    if RANK == 0:
        say(f"{args.num} samples of {args.ckpt}, step {checkpoint['step']}, {args.weights} weights,"
            f" {settings['sampler']} {settings['steps']}, on {device}, of classes "
            f"{args.labels or 'all'} of {dict(enumerate(names))}")
    if not is_picture:
        recipe = vars(args) | settings | dict(modified=os.path.getmtime(args.ckpt))
        write_all(args.out, batches, args.num, args.batch_size, recipe, names)
    elif RANK == 0:
        num_batches = math.ceil(args.num / args.batch_size)
        made = progress_bar(batches(range(args.num)), "sampling", num_batches)
        save_grid(args.out, np.concatenate([images for _, images in made]))
    if WORLD_SIZE > 1:
        dist.destroy_process_group()
    if RANK == 0:
        say(f"wrote {args.out}")

if __name__ == "__main__":
    run_script(main)
