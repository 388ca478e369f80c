"""Draw images from a checkpoint.

python sample.py --ckpt out/ft.pt                                        # out/samples.png, a grid
python sample.py --ckpt out/ft.pt --labels 0,1,2,3 --cfg_scale 2         # classes, guided
python sample.py --ckpt out/cm.pt --steps 2                              # a consistency model
python sample.py --ckpt out/ft.pt --num 50000 --out out/samples.npz      # arr_0 uint8 (N, H, W, C)
torchrun --nproc_per_node=8 -- sample.py --ckpt out/ft.pt --num 50000 --out out/pngs  # a folder

The architecture comes from the checkpoint. Image i depends on (seed, i) alone, whatever the batch
size and the number of processes. An interrupted run that writes a folder, .npz or .npy goes on
where it stopped when the same command is given again.
"""

import json
import math
import os
import shutil
import sys
import time
import zipfile

import numpy as np
import torch
from tqdm import tqdm

from model import denoiser_from_checkpoint, load_checkpoint, patchify, unpatchify
from prepare_data import Parser, image_grid, need, number, to_image, write_npy

# ---------------------------------------------------------------------------------------------
# Noise, noise levels, steps.


def seed_of(*numbers):
    """One 63-bit seed for a tuple of non-negative numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


def edm_sigmas(steps, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """Noise levels of the sampler, float64 (steps + 1,), from sigma_max to 0 (EDM eq. 5)."""
    i = torch.arange(steps, dtype=torch.float64) / max(steps - 1, 1)
    top, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return torch.cat([(top + i * (low - top)) ** rho, torch.zeros(1, dtype=torch.float64)])


def segment_edges(segments):
    """Edges of the segments of a consistency model, float64 (segments + 1,), from 80 to 0.

    The levels of `edm_sigmas` with one step more, without sigma_min: [80, 0], [80, 2.5, 0], ...
    """
    levels = edm_sigmas(segments + 1)
    return torch.cat([levels[:-2], levels[-1:]])


def noise_levels(config, sampler=None, steps=None, mid_sigma=0.821):
    """(sampler, sigmas) for a model; what is None is chosen by its kind.

    A diffusion model: heun with 18 steps. A consistency model: one step of "consistency"; more
    go from 80 to mid_sigma evenly in ln sigma. One of m segments: an Euler step through each, which
    is all that it can do. Exits with a sentence on what the model cannot do.
    """
    m = config.cm_segments
    if m > 1:
        need(sampler in (None, "euler") and steps in (None, m), f"this consistency model of {m} "
             f"segments is sampled by euler in {m} steps: leave --sampler and --steps out")
        return "euler", segment_edges(m)
    need(m == 0 or sampler in (None, "consistency"), f"--sampler {sampler} is for diffusion models,"
         " and this is a consistency model: leave it out")
    if m == 1 or sampler == "consistency":
        levels = [*np.geomspace(80.0, mid_sigma, steps or 1), 0.0]
        return "consistency", torch.tensor(levels, dtype=torch.float64)
    return sampler or "heun", edm_sigmas(steps or 18)


def sampling_settings(args, denoiser, checkpoint, guide=None):
    """What `generate` is to be told, from the flags that sample.py and fid.py have in common.

    Exits with a sentence if the model cannot be guided as asked; `guide` is a denoiser or None.
    """
    trained = checkpoint["config"]
    need(guide is None or args.cfg_scale != 1,
         "--guide_ckpt does nothing at --cfg_scale 1: give a scale above 1, such as 2")
    by_null = denoiser.config.num_classes and trained.get("label_dropout", 0.1)
    need(args.cfg_scale == 1 or guide is not None or by_null,
         "--cfg_scale needs a model with classes that saw the null class, too (train it with "
         "--class_cond and a --label_dropout above 0), or sample.py's --guide_ckpt")
    # ECT's second noise level, by the preset that the model was tuned with
    mid = args.mid_sigma or {"imagenet64": 1.526}.get(trained.get("cm_preset"), 0.821)
    sampler, sigmas = noise_levels(denoiser.config, args.sampler, args.steps, mid)
    return dict(seed=args.seed, sampler=sampler, steps=len(sigmas) - 1, mid_sigma=mid,
                cfg_scale=args.cfg_scale)


def sample_loop(denoise, x, sigmas, sampler="heun", draw=None, churn=40.0, s_min=0.05, s_max=50.0,
                s_noise=1.003):
    """Integrate the probability-flow ODE, or the SDE, from noise to data (EDM algorithms 1 and 2).

    denoise(x, sigma) -> D(x; sigma) of x's shape, for a float sigma; x standard normal of any shape
    and float type; sigmas (n + 1,) descending to 0; `draw()` gives fresh standard normal noise of
    x's shape. Samplers: "euler" (the DDIM step, n evaluations), "heun" (second order, 2n - 1),
    "churn" (heun with noise added before each step, EDM's stochastic sampler and its ImageNet-64
    settings), "consistency" (denoise, then add noise of the next level).
    """
    sigmas = [float(s) for s in sigmas]
    n = len(sigmas) - 1
    x = x * sigmas[0]
    for s, s_next in zip(sigmas[:-1], sigmas[1:]):
        if sampler == "consistency":
            x = denoise(x, s)
            x = x + s_next * draw() if s_next > 0 else x
            continue
        if sampler == "churn" and s_min <= s <= s_max:
            s_hat = s * (1 + min(churn / n, 2**0.5 - 1))
            x = x + (s_hat**2 - s**2) ** 0.5 * s_noise * draw()
            s = s_hat
        slope = (x - denoise(x, s)) / s
        x_next = x + (s_next - s) * slope
        if sampler != "euler" and s_next > 0:
            slope_next = (x_next - denoise(x_next, s_next)) / s_next
            x_next = x + (s_next - s) * (slope + slope_next) / 2
        x = x_next
    return x


def guided(denoiser, labels, cfg_scale, interval=(0.0, math.inf), guide=None):
    """denoise(x, sigma) with classifier-free guidance D_null + g (D_label - D_null).

    Scale 1 evaluates the labels only, scale 0 the null class only, anything else both in one batch.
    Outside low < sigma <= high of `interval` the scale is 1 (arXiv 2404.07724).
    With `guide`, a weaker denoiser, D_guide + g (D - D_guide) (autoguidance, arXiv 2406.02507).
    """
    null = None if labels is None else torch.full_like(labels, denoiser.config.num_classes)

    def denoise(x, sigma):
        scale = cfg_scale if interval[0] < sigma <= interval[1] else 1
        sigma = torch.full((len(x),), sigma, dtype=x.dtype, device=x.device)
        if guide is not None and scale != 1:
            weak = guide(x, sigma, labels=labels)
            return weak if scale == 0 else weak + scale * (denoiser(x, sigma, labels=labels) - weak)
        if labels is None or scale in (0, 1):
            return denoiser(x, sigma, labels=null if scale == 0 else labels)
        both = denoiser(torch.cat([x, x]), torch.cat([sigma] * 2), labels=torch.cat([labels, null]))
        d_label, d_null = both.chunk(2)
        return d_null + scale * (d_label - d_null)

    return denoise


# ---------------------------------------------------------------------------------------------
# From a checkpoint to images.


def load_denoiser(path, weights="ema", device="cpu", like=None, also=()):
    """(denoiser in eval mode on `device`, checkpoint dict). `weights` is "ema" or "raw".

    Exits with a sentence unless it agrees with the ModelConfig `like` in what makes two models
    work on the same tokens, and in the fields `also`.
    """
    checkpoint = load_checkpoint(path)
    denoiser = denoiser_from_checkpoint(checkpoint, weights).to(device).eval()
    same = ("image_size", "channels", "patch_size", "num_classes", "cm_segments", *also)
    differ = [k for k in same if like and getattr(denoiser.config, k) != getattr(like, k)]
    need(not differ, f"{path} differs in {', '.join(differ)} from the model it is to help: give an "
         "earlier checkpoint of the same run, or that of --init_from")
    return denoiser.requires_grad_(False), checkpoint


@torch.inference_mode()
def generate(denoiser, indices, *, seed=0, sampler=None, steps=None, mid_sigma=0.821,
             cfg_scale=1.0, cfg_interval=(0.0, math.inf), guide=None, labels=None, batch_size=64,
             dtype=torch.float32):
    """Yield (indices, images) batch by batch for the given image indices.

    images: numpy uint8 (b, H, W, C); float32 for a model of latents (where sigma_data is not 0.5 or
    channels are not 1 or 3). `labels`: class numbers that are cycled over the image indices (by
    default those that the model was trained on). Sampler and steps: see `noise_levels`; guidance:
    see `guided`. The image of an index depends on (seed, index).
    """
    c = denoiser.config
    device = next(denoiser.parameters()).device
    labels = labels_to_draw(c, labels)
    sampler, sigmas = noise_levels(c, sampler, steps, mid_sigma)
    for start in range(0, len(indices), batch_size):
        batch = list(indices[start : start + batch_size])
        streams = [torch.Generator().manual_seed(seed_of(seed, i)) for i in batch]

        def draw():
            shape = (c.image_size, c.image_size, c.channels)
            noise = torch.stack([torch.randn(shape, generator=g) for g in streams])
            return patchify(noise, c.patch_size).to(device)

        cycled = [labels[i % len(labels)] for i in batch] if labels else None
        classes = torch.tensor(cycled, device=device) if labels else None
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            denoise = guided(denoiser, classes, cfg_scale, cfg_interval, guide)
            x = sample_loop(denoise, draw(), sigmas, sampler, draw)
        images = unpatchify(x, c.patch_size).float().cpu()
        if not is_latent(c):
            images = (images * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
        yield batch, images.numpy()


def labels_to_draw(config, labels=None):
    """`labels`, or else those that the model knows; exits if it has no such class."""
    classes = range(config.num_classes)
    labels = list(labels or config.known_classes)
    known = f"has classes 0 to {len(classes) - 1}" if classes else "is one without classes"
    need(set(labels) <= set(classes), f"--labels does not fit the model, which {known}")
    return labels


def is_latent(config):
    """Whether the model's data are float latents rather than 8-bit images."""
    return config.channels not in (1, 3) or config.sigma_data != 0.5


# ---------------------------------------------------------------------------------------------
# Writers. A long run writes finished batches to a folder, so that it can be taken up again.


def write_all(out, batches, num, batch_size, describe, rank, world):
    """Write images to a folder of PNGs, .npz or .npy, this process its share; rank 0 joins them.

    `batches(indices)` generates; `describe` says how, and guards against joining two recipes. The
    work is cut into batches that are the same for any number of processes; what lies in the work
    folder is not made again. No collectives: a process only watches for the others' files.
    """
    is_folder = not out.endswith((".npz", ".npy"))
    work = out if is_folder else out + ".parts"
    recipe = os.path.join(work, "sampling.json")
    os.makedirs(work, exist_ok=True)
    there = {*os.listdir(work)}  # before the look at the recipe, which all processes write first
    if os.path.exists(recipe):
        with open(recipe) as f:
            need(json.load(f) == describe,
                 f"{work} holds samples of another recipe: remove it or give another --out")
    else:
        need(all(name.startswith("sampling.json") for name in there),
             f"{work} is a folder with other files in it: choose another --out")
    replace_file(recipe, lambda f: f.write(json.dumps(describe).encode()), rank)

    names = [f"{i:06d}.{'png' if is_folder else 'npy'}" for i in range(num)]

    def save(file, image):
        if is_folder:
            to_image(image).save(file, "PNG")
        else:  # latents go out as they came in
            np.save(file, image if image.dtype == np.uint8 else image.transpose(2, 0, 1))

    chunks = [range(i, min(i + batch_size, num)) for i in range(0, num, batch_size)]
    todo = [chunk for chunk in chunks[rank::world] if not there.issuperset(names[i] for i in chunk)]
    for chunk in tqdm(todo, desc="sampling", unit="batch", disable=rank > 0):
        for indices, images in batches(chunk):
            for i, image in zip(indices, images):
                replace_file(f"{work}/{names[i]}", lambda f: save(f, image), rank)
    if rank > 0 or is_folder:
        return
    while not {*os.listdir(work)}.issuperset(names):  # those of the other processes, too
        time.sleep(0.2)
    paths = [f"{work}/{name}" for name in names]
    replace_file(out, lambda f: join_images(f, out, paths, describe["labels"]))
    shutil.rmtree(work)


def replace_file(path, write, rank=0):
    """write(file) to a temporary file beside `path`, then rename: never half a file."""
    temporary = f"{path}.{rank}.tmp"
    with open(temporary, "wb") as f:
        write(f)
    os.replace(temporary, path)


def join_images(file, out, paths, labels):
    """Write the images of .npy files as one array, or what np.savez makes of it, one at a time."""
    first = np.load(paths[0])
    array = first.dtype, (len(paths), *first.shape), map(np.load, paths)
    if out.endswith(".npy"):
        return write_npy(file, *array)
    with zipfile.ZipFile(file, "w") as z:
        with z.open("arr_0.npy", "w", force_zip64=True) as f:
            write_npy(f, *array)
        if labels:
            with z.open("arr_1.npy", "w") as f:
                np.save(f, np.resize(labels, len(paths)))  # cycled


def save_grid(path, images, columns=None):
    """Write images uint8 (N, H, W, C) as one picture; latents show their first three channels."""
    if images.dtype != np.uint8:
        low, high = images.min(), images.max()
        images = ((images - low) / max(high - low, 1e-9) * 255).astype(np.uint8)
        images = images[..., :3] if images.shape[-1] >= 3 else images[..., :1]
    replace_file(path, lambda f: image_grid(images, columns).save(f, "PNG"))


# ---------------------------------------------------------------------------------------------


def whole_numbers(text):
    """An argparse type: "0,1,2" -> [0, 1, 2]."""
    return [int(part) for part in text.split(",")]


whole_numbers.__name__ = "whole numbers, such as 0,1,2"  # what argparse calls it


def interval(text):
    """An argparse type: "0.2,5" -> [0.2, 5.0]."""
    low, high = (float(part) for part in text.split(","))
    if not 0 <= low < high:
        raise ValueError
    return [low, high]


interval.__name__ = "two noise levels, low then high, such as 0.2,5"


def pick_device(name, local_rank=0):
    """auto -> cuda, else mps, else cpu, as a torch.device; exits if that asked for is not there."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": 1}
    name = next(d for d in here if here[d]) if name == "auto" else name
    need(here[name], f"--device {name} is not available here: use --device auto")
    return torch.device(name, local_rank) if name == "cuda" else torch.device(name)


def add_flags(parser, batch_size):
    """The flags of drawing samples that fid.py has, too; `sampling_settings` reads most of them."""
    add = parser.add_argument
    add("--steps", type=number(int, 1), help="of the sampler (by the kind of model, 18 or 1)")
    add("--sampler", choices=("heun", "euler", "churn", "consistency"), help="likewise")
    add("--mid_sigma", type=number(float, 0.002, 80), help="second noise level of consistency "
        "models (0.821; if tuned by cm_preset imagenet64 1.526)")
    add("--cfg_scale", type=float, default=1.0, help="guidance scale, 1 for none")
    add("--seed", type=number(int, 0), default=0, help="of the noise (%(default)s)")
    add("--batch_size", type=number(int, 1), default=batch_size, help="images at a time")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the network")


def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--ckpt", default="out/ft.pt", help="checkpoint that train.py wrote")
    add("--num", type=number(int, 1), default=64, help="number of images")
    add("--out", default="out/samples.png",
        help=".png: a grid; .npz: arr_0; .npy: an array; else a folder of PNGs")
    add("--weights", choices=("ema", "raw"), default="ema")
    add("--guide_ckpt", help="guide by this weaker model instead of the null class, such as "
        "out/ft-0000400.pt")
    add("--cfg_interval", type=interval, default="0,inf", help="guide between these noise levels "
        "only, such as 0.2,5")
    add("--labels", type=whole_numbers, help="classes to draw, such as 0,1,2, cycled over the "
        "images (default: those that the model was trained on)")
    add_flags(parser, batch_size=64)
    args = parser.parse_args(argv)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(args.device, int(os.environ.get("LOCAL_RANK", 0)))
    denoiser, checkpoint = load_denoiser(args.ckpt, args.weights, device)
    labels = labels_to_draw(denoiser.config, args.labels)
    guide, weaker = (None, None) if not args.guide_ckpt else load_denoiser(
        args.guide_ckpt, args.weights, device, denoiser.config)
    settings = dict(sampling_settings(args, denoiser, checkpoint, guide), labels=labels,
                    cfg_interval=args.cfg_interval)
    suffix = os.path.splitext(args.out)[1]
    need(suffix in (".npy", ".png") or not is_latent(denoiser.config),
         "this model makes latents: give an --out that ends in .npy, and decode that")
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)

    def batches(indices):
        return generate(denoiser, indices, batch_size=args.batch_size, guide=guide,
                        dtype=getattr(torch, args.dtype), **settings)

    if rank == 0:
        print(f"{args.num} samples of {args.ckpt}, step {checkpoint['step']}, {args.weights} "
              f"weights, {settings['sampler']} {settings['steps']}, on {device}", file=sys.stderr)
    if suffix == ".png":
        if rank == 0:
            made = tqdm(batches(range(args.num)), "sampling", -(-args.num // args.batch_size))
            columns = None
            if 1 < len(labels) <= 20:  # a column is of one class, the picture about square
                columns = len(labels) * max(1, round(args.num**0.5 / len(labels)))
            save_grid(args.out, np.concatenate([images for _, images in made]), columns)
    else:
        describe = dict(settings, num=args.num, batch_size=args.batch_size, weights=args.weights,
                        dtype=args.dtype, step=checkpoint["step"], run=checkpoint.get("run_id"),
                        guide=[weaker["step"], weaker.get("run_id")] if guide else None)
        write_all(args.out, batches, args.num, args.batch_size, describe, rank, world)
    if rank == 0:
        print(f"wrote {args.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
