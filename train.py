"""Train a diffusion transformer in two stages: on a few visible patches, then on whole images.

python train.py --mask_ratio=0.9                          # stage 1 -> out/pt.pt
python train.py --init_from=out/pt.pt                     # stage 2 -> out/ft.pt
python train.py                                           # whole images from scratch, to compare
python train.py --loss=consistency --init_from=out/ft.pt  # for 1 or 2 steps -> out/cm.pt
torchrun --nproc_per_node=8 train.py --mask_ratio=0.9     # the same run on 8 GPUs
torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py ...
python train.py --resume                                  # go on after an interruption
python train.py --data=data/new --init_from=out/ft.pt --replay=data/old   # learn without forgetting
python train.py --eval_only --ckpt=out/ft.pt --data=data/old,data/new     # what it knows of both

Both stages are the loop at the end of this file; stage 2 is stage 1 with everything visible. Every
draw of step n (images, flips, labels, masks, noise levels, noise) comes from generators seeded by
(seed, n), for the global batch. So resuming is exact, and the number of processes or the size of
the micro-batch changes nothing but speed.
"""

import json
import math
import os
import re
import signal
import sys
import time
import typing
from argparse import SUPPRESS, BooleanOptionalAction
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import lru_cache, partial

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import sample
from model import (PRESETS, Denoiser, ModelConfig, add_penalty, bound, consistency_objective,
                   count_visible, denoiser_from_checkpoint, fisher_information, load_checkpoint,
                   objective, patchify, previous_name, sample_visible, save_checkpoint,
                   stored_config)
from prepare_data import Parser, choose_buffer, gather, open_dataset, open_union, prepare

# ---------------------------------------------------------------------------------------------
# Settings: one line each; the command line is made from them. None: chosen by DEFAULTS below.


def setting(default, help, low=None, below=math.inf, choices=None):
    return field(default=default, metadata=dict(help=help, low=low, below=below, choices=choices))


@dataclass
class Config:
    # files
    data: str = setting("data/faces", "prepared set, or several with commas for their union")
    out_dir: str = setting("out", "folder for checkpoints, samples and log.jsonl")
    init_from: str | None = setting(None, "start from the weights of this checkpoint")
    init_weights: str = setting("ema", "which of its weights", choices=("ema", "raw"))
    resume: str | None = setting(None, "go on with the last run; 'auto': if there is one")
    # masking
    mask_ratio: float = setting(0.0, "share of the patches hidden; > 0 is stage 1", low=0, below=1)
    mask_ratio_end: float | None = setting(None, "share at the end, if another", low=0, below=1)
    mask_schedule: str = setting("cosine4", "way from the one to the other; cosineK: cos(pi/2 x)^K",
                                 choices=("linear", "cosine", "cosine2", "cosine4"))
    mask_type: str = setting("block", "what is hidden", choices=("patch", "block", "crop"))
    block_size: int = setting(2, "patches a side of a hidden block", low=1)
    # network
    preset: str | None = setting(None, "network size", choices=tuple(PRESETS))
    dim: int | None = setting(None, "width; overrides the preset")
    depth: int | None = setting(None, "blocks; overrides the preset")
    heads: int | None = setting(None, "attention heads; overrides the preset")
    patch_size: int | None = setting(None, "pixels a side of a patch; overrides the preset")
    decoder_depth: int | None = setting(None, "more blocks that see all patches again (MaskDiT)")
    decoder_dim: int | None = setting(None, "their width; default: dim")
    decoder_heads: int | None = setting(None, "their attention heads; default: heads")
    dense_depth: int | None = setting(None, "first blocks that see all patches, too (SPRINT)")
    mae_weight: float = setting(0.1, "weight of the reconstruction of hidden patches", low=0)
    class_cond: bool = setting(False, "condition on the labels of the data set")
    label_dropout: float = setting(0.1, "share replaced by the null class", low=0, below=1)
    # consistency tuning: ECT, and SCT with reference images
    loss: str = setting("diffusion", "what is learned", choices=("diffusion", "consistency"))
    cm_preset: str = setting("cifar10", "ECT's settings for", choices=("cifar10", "imagenet64"))
    cm_q: float = setting(2.0, "the gap 1 - r/t of a pair of noise levels shrinks so much a stage")
    cm_k: float = setting(8.0, "how much wider the gap is at low noise; 0: alike", low=0)
    cm_b: float = setting(1.0, "how fast that falls with the noise level", low=0)
    cm_gap: float | None = setting(None, "that gap in the last stage", low=2**-20, below=1)
    cm_stage_length: int | None = setting(None, "steps of a stage; default: by cm_gap", low=1)
    cm_smooth: bool = setting(False, "close the pairs in every step rather than by stages")
    cm_c: float = setting(0.0, "constant of the pseudo-Huber distance", low=0)
    cm_weight: str = setting("gap", "1/(t - r), or 1/t^2 + 1/sigma_data^2", choices=("gap", "edm"))
    cm_segments: int = setting(1, "segments of the noise levels, one sampling step each", low=1)
    ref_batch: int = setting(0, "images whose mean directs the target (SCT); 0: one (ECT)", low=0)
    # continual learning: what was learned before --init_from is kept in mind by ...
    replay: str | None = setting(None, "old prepared sets, with commas, in every batch")
    replay_frac: float = setting(0.5, "share of a batch that is old", low=0)
    replay_coef: float = setting(1.0, "weight of the old images' loss", low=0)
    replay_buffer: int | None = setting(None, "images kept of each old set; default: all", low=1)
    distill_from: str | None = setting(None, "checkpoint that draws the old images and judges them")
    distill_coef: float = setting(1.0, "weight of their loss (share: replay_frac)", low=0)
    l2_prev: float = setting(0.0, "pull to the weights of --init_from", low=0)
    ewc: float = setting(0.0, "the same, each weight by its importance (Fisher information)", low=0)
    fisher_batches: int = setting(8, "batches from which the importance is estimated", low=1)
    # report
    eval_only: bool = setting(False, "no training: losses and bits per dimension of --ckpt")
    ckpt: str | None = setting(None, "the checkpoint of --eval_only")
    # optimization
    batch_size: int | None = setting(None, "images a step, over all processes", low=1)
    micro_batch: int | None = setting(None, "images at once; default: all, a cacheful on a CPU")
    steps: int | None = setting(None, "optimizer steps of the whole run", low=0)
    optimizer: str = setting("adamw", "optimizer", choices=("adamw", "radam"))
    lr: float | None = setting(None, "learning rate", low=0)
    lr_schedule: str | None = setting(None, "after the warm-up; rsqrt: falls from step 2000 on",
                                      choices=("constant", "cosine", "rsqrt"))
    warmup: int = setting(100, "steps of linear warm-up", low=0)
    weight_decay: float = setting(0.03, "decay of the weights", low=0)
    beta1: float | None = setting(None, "first beta of the optimizer", low=0, below=1)
    beta2: float = setting(0.99, "second beta of the optimizer", low=0, below=1)
    grad_clip: float = setting(1.0, "largest norm of the gradient, 0 for no limit", low=0)
    ema: float = setting(0.999, "decay of the averaged weights, with a warm-up", low=0, below=1)
    p_mean: float = setting(-1.2, "mean of ln sigma in training (EDM table 1)")
    p_std: float = setting(1.2, "standard deviation of ln sigma", low=0)
    hflip: bool = setting(False, "flip half of the images left-right")
    # machine
    dtype: str = setting("auto", "of matrix products", choices=("auto", "float32", "bfloat16"))
    compile: bool | None = setting(None, "torch.compile; default: on a GPU")
    device: str = setting("auto", "where to run", choices=("auto", "cpu", "cuda", "mps"))
    seed: int = setting(0, "of every random draw", low=0)
    # intervals in steps, 0: never
    log_every: int = setting(10, "a line in log.jsonl", low=0)
    eval_every: int | None = setting(None, "validation loss", low=0)
    sample_every: int | None = setting(None, "a grid of samples in out_dir", low=0)
    save_every: int | None = setting(None, "a checkpoint; there is always one at the end", low=0)
    save_minutes: float = setting(0.0, "a checkpoint, by the clock", low=0)
    keep_every: int = setting(0, "a checkpoint that stays, NAME-STEP.pt", low=0)


# What a consistency run takes where no flag says otherwise (ECT, arXiv 2406.14548, appendix; its
# networks have dropout 0.2 besides, this one has none).
CONSISTENCY = {
    "cifar10": dict(p_mean=-1.1, p_std=2.0, cm_q=2.0, cm_c=0.0, cm_weight="gap", optimizer="radam",
                    beta1=0.9, beta2=0.999, weight_decay=0.0, ema=0.9999, warmup=0),
    "imagenet64": dict(p_mean=-0.8, p_std=1.6, cm_q=4.0, cm_c=0.06, cm_weight="edm",
                       optimizer="adamw", beta1=0.9, beta2=0.99, weight_decay=0.0, warmup=0,
                       lr=1e-3, lr_schedule="rsqrt"),  # the lr is for EDM2's normalised weights
}
# Columns: stage 1 (pt), stage 2 (ft) and consistency tuning (cm) on a CPU, then the three on a GPU.
# On two cores both stages on the built-in faces take about ten minutes; on a GPU these are MaskDM's
# network, batch and optimizer at 64 px.
DEFAULTS = {
    "preset": ("demo", "demo", "demo", "maskdm-64", "maskdm-64", "maskdm-64"),
    "batch_size": (48, 4, 32, 256, 128, 128),
    "steps": (2500, 4200, 1200, 100_000, 100_000, 200_000),
    "lr": (4e-3, 2e-3, 2e-3, 2e-4, 2e-4, 1e-4),
    "lr_schedule": ("constant", "cosine", "cosine", "constant", "constant", "constant"),
    "beta1": (0.9, 0.9, 0.9, 0.99, 0.99, 0.9),
    "eval_every": (500, 1400, 400, 2000, 2000, 2000),
    "sample_every": (0, 1400, 400, 0, 5000, 5000),
    "save_every": (500, 1400, 400, 2000, 2000, 2000),
    "cm_gap": (None, None, 1 / 16, None, None, 1 / 256),
}
DECODER = ("decoder_depth", "decoder_dim", "decoder_heads", "dense_depth")
ARCHITECTURE = ("dim", "depth", "heads", "patch_size", *DECODER)  # a checkpoint decides these


def parse_flags(argv):
    """The settings that were given on the command line, and no others."""
    parser = Parser(description=__doc__.splitlines()[0], argument_default=SUPPRESS)
    for f in fields(Config):
        kind = (typing.get_args(f.type) or [f.type])[0]  # str of str | None
        how = dict(type=kind, choices=f.metadata["choices"])
        if kind is bool:
            how = dict(action=BooleanOptionalAction)
        if f.name == "resume":
            how = dict(nargs="?", const="last", choices=("last", "auto"))
        default = "" if f.default is None else f" (default {f.default})"
        parser.add_argument(f"--{f.name}", help=f.metadata["help"] + default, **how)
    return vars(parser.parse_args(argv))


def resolve(given, previous, device):
    """Config from the flags given, then the run taken up (`previous`), then the defaults."""
    kinds = {f.name: f.type for f in fields(Config)}
    for key, value in previous.items():
        if key not in kinds or not isinstance(value, kinds[key]):
            sys.exit(f"the run has the setting {key} = {value!r}, which this train.py does not "
                     "know: resume it with the version that made it")
    cfg = Config(**(previous | given))
    if cfg.loss == "consistency" and cfg.cm_preset != previous.get("cm_preset"):
        cfg = Config(**(previous | CONSISTENCY[cfg.cm_preset] | given))
    column = ["pt", "ft", "cm"].index(run_name(asdict(cfg))) + 3 * (device.type != "cpu")
    for name, values in DEFAULTS.items():
        if getattr(cfg, name) is None:
            setattr(cfg, name, values[column])
    if cfg.compile is None:
        cfg.compile = device.type == "cuda"
    if cfg.loss == "consistency" and (cfg.cm_stage_length is None or "cm_gap" in given):
        halvings = -math.log2(max(1e-6, cfg.cm_gap))
        stages = max(1, round(halvings / math.log2(max(1.1, cfg.cm_q))))
        cfg.cm_stage_length = max(1, math.ceil(cfg.steps / stages))
    decoder = cfg.decoder_depth or "init_from" in given or previous
    old = cfg.replay or cfg.distill_from
    reporting = {"eval_only", "ckpt", "data", "out_dir", "seed", "device", "dtype"}
    consistency = {"ref_batch"} | {name for name in kinds if name.startswith("cm_")}
    idle = {  # when, and which flags then do nothing
        "with --eval_only": cfg.eval_only and set(given) - reporting,
        "without --eval_only": not cfg.eval_only and {"ckpt"},
        "without --loss=consistency": cfg.loss != "consistency" and consistency,
        "with --cm_stage_length": "cm_stage_length" in given and {"cm_gap"},
        "without --decoder_depth": not decoder and {"decoder_dim", "decoder_heads", "mae_weight"},
        "without --mask_ratio_end": cfg.mask_ratio_end is None and {"mask_schedule"},
        "without --replay": not cfg.replay and {"replay_coef", "replay_buffer"},
        "without --distill_from": not cfg.distill_from and {"distill_coef"},
        "without --replay or --distill_from": not old and {"replay_frac"},
        "without --ewc": not cfg.ewc and {"fisher_batches"},
    }
    for when, names in idle.items():
        if useless := given.keys() & (names or ()):
            sys.exit(f"--{min(useless)} does nothing {when}: change one of the two")
    return cfg


def run_name(settings):
    """pt: ends masked (stage 1); ft: ends with whole images (stage 2); cm: consistency tuning."""
    end = settings.get("mask_ratio_end")
    end = settings.get("mask_ratio", 0) if end is None else end
    return "cm" if settings.get("loss") == "consistency" else "pt" if end > 0 else "ft"


def last_gap(cfg):
    """1 - r/t of the last pairs of noise levels (t, r) at high noise; 1 without such pairs."""
    if cfg.loss != "consistency":
        return 1.0
    return cfg.cm_q ** -math.ceil(cfg.steps / cfg.cm_stage_length)


def check(cfg):
    """Exit with a sentence on a value that no run can have."""
    for f in fields(cfg):
        value, low, below = getattr(cfg, f.name), f.metadata["low"], f.metadata["below"]
        if None not in (value, low) and not low <= value < below:
            top = f" and below {below}" if below < math.inf else ""
            sys.exit(f"--{f.name} is {value}, expected at least {low}{top}")
    if not cfg.init_from and (cfg.loss == "consistency" or cfg.l2_prev > 0 or cfg.ewc > 0):
        sys.exit("--loss=consistency, --l2_prev and --ewc go on from a trained model: give its "
                 "--init_from=out/ft.pt")
    if cfg.loss == "consistency" and not (cfg.cm_q > 1 and last_gap(cfg) >= 2**-20):
        sys.exit(f"--cm_q is {cfg.cm_q}, expected above 1, and no more than 2^20 over all stages "
                 "(what float32 tells apart): give a longer --cm_stage_length")
    if cfg.distill_from and cfg.loss == "consistency":
        sys.exit("--distill_from is for --loss=diffusion: a consistency model has its own teacher")
    ways = bool(cfg.replay and cfg.replay_coef) + bool(cfg.distill_from and cfg.distill_coef)
    old = ways * round(cfg.replay_frac * cfg.batch_size)
    if ways and not (0 < old < cfg.batch_size or cfg.replay_frac == 1 and old == cfg.batch_size):
        sys.exit(f"--replay_frac is {cfg.replay_frac}, so {old} of {cfg.batch_size} images of a "
                 "batch are old: expected at least one image, and new ones (only 1 may leave no "
                 "new images, and not with both --replay and --distill_from)")


# ---------------------------------------------------------------------------------------------
# The stream of data: step n -> its batch. All randomness of training is drawn here.


def mask_ratios(cfg):
    """The share of patches to hide in each part of the run: one value, or six if it changes.

    The shape cosine4 is MaskDiT's, 0.5 cos(pi/2 x)^4 over the share x of the run. In six stairs,
    because a compiled network is compiled anew for each number of visible patches.
    """
    if cfg.mask_ratio_end is None:
        return [cfg.mask_ratio]
    power = 0 if cfg.mask_schedule == "linear" else int(cfg.mask_schedule[6:] or 1)
    shape = [math.cos(math.pi / 2 * i / 5) ** power if power else 1 - i / 5 for i in range(6)]
    return [cfg.mask_ratio_end + (cfg.mask_ratio - cfg.mask_ratio_end) * share for share in shape]


@lru_cache(8)
def shuffled(n, seed, epoch):
    """The order of n images in an epoch."""
    g = torch.Generator().manual_seed(sample.seed_of(seed, 0, epoch))
    return torch.randperm(n, generator=g).numpy()


class Stream:
    """Batches by step number.

    images: an array or several, numbered through; new, old: the numbers of those to learn (None:
    all) and of those to replay. Each of the two comes in epochs of fresh order, so that any step
    can be loaded at once. A batch holds new images, replayed ones, and places for distilled ones.
    """

    def __init__(self, images, labels, cfg, config, device=torch.device("cpu"), rank=0, world=1,
                 new=None, old=(), teacher=None):
        self.sets = images if isinstance(images, list) else [images]
        self.labels, self.cfg, self.config, self.device = labels, cfg, config, device
        self.new = np.arange(sum(map(len, self.sets))) if new is None else np.asarray(new)
        self.old = np.asarray(old, np.int64)
        share = round(cfg.replay_frac * cfg.batch_size)
        n_replayed = share if len(old) and cfg.replay_coef > 0 else 0
        n_distilled = share if cfg.distill_from and cfg.distill_coef > 0 else 0
        n_new = cfg.batch_size - n_replayed - n_distilled
        self.parts = [  # where from, how many, weight
            (self.new, n_new, 1.0), (self.old, n_replayed, cfg.replay_coef),
            (self.new, n_distilled, cfg.distill_coef)]
        weight = [torch.full((n,), coef * cfg.batch_size / max(n, 1)) for _, n, coef in self.parts]
        # Every world-th image, so that each process has its part of each kind.
        self.share = slice(rank, None, world)
        # What each of them counts, for L_new + coef L_old.
        self.weight = self.move(torch.cat(weight)[self.share])
        self.distilled = torch.arange(cfg.batch_size) >= cfg.batch_size - n_distilled
        self.taught = torch.tensor(teacher.config.known_classes if teacher else [])  # to be drawn
        self.ratios = mask_ratios(cfg)

    def index(self, step):
        """The numbers of the images of a global batch: a walk through each pool, epoch by epoch."""
        drawn = []
        for pool, n, _ in self.parts:
            for q in range(step * n, step * n + n):
                epoch, i = divmod(q, len(pool))
                drawn.append(pool[shuffled(len(pool), self.cfg.seed, epoch)[i]])
        return np.array(drawn, np.int64)

    def load(self, step):
        """This process's part, b images, of the batch of a step.

        index (b,) numpy; on the device: clean (b, K, p*p*C) in [-1, 1] (all N patches if there is a
        decoder), noise like it, sigma (b,), visible (b, K) or None for the whole image, labels (b,)
        or None.
        """
        cfg, config, n = self.cfg, self.config, self.cfg.batch_size
        g = torch.Generator().manual_seed(sample.seed_of(cfg.seed, 1, step))
        ln_sigma = cfg.p_mean + cfg.p_std * torch.randn(n, generator=g)
        sigma = ln_sigma[self.share].exp()
        flip = torch.rand(n, generator=g)[self.share].numpy() < 0.5 * cfg.hflip
        dropped = torch.rand(n, generator=g)[self.share] < cfg.label_dropout
        ratio = self.ratios[min(len(self.ratios) * step // max(1, cfg.steps), len(self.ratios) - 1)]
        visible = sample_visible(n, config.grid, ratio, cfg.mask_type, cfg.block_size, g)
        index = self.index(step)[self.share]
        visible = None if visible is None else visible[self.share]
        # A decoder is asked about the hidden patches, too.
        clean, labels = self.read(index, flip, None if config.decoder_depth else visible)
        if labels is not None:
            if len(self.taught):
                drawn = torch.randint(len(self.taught), (n,), generator=g)
                drawn = self.taught[drawn][self.share]
                labels = torch.where(self.distilled[self.share], drawn, labels)
            labels = torch.where(dropped, config.num_classes, labels)

        sigma, visible, labels = (self.move(t) for t in (sigma, visible, labels))
        g = torch.Generator(self.device).manual_seed(sample.seed_of(cfg.seed, 2, step))
        noise = torch.randn(n, *clean.shape[1:], generator=g, device=self.device)
        batch = dict(index=index, clean=clean, noise=noise[self.share], sigma=sigma,
                     visible=visible, labels=labels, **self.references(step))
        if self.distilled.any():
            start = torch.randn(noise.shape, generator=g, device=self.device)
            batch.update(start=start[self.share], distilled=self.distilled[self.share])
        return batch

    def read(self, index, flip, visible=None):
        """Some images: their visible patches (None: all) on the device, as floats; their labels."""
        n = self.config.grid**2
        shown = np.tile(np.arange(n), (len(index), 1)) if visible is None else visible.numpy()
        patches = gather(self.sets, index, shown, self.config.patch_size, flip)
        labels = torch.from_numpy(self.labels[index]) if self.config.num_classes else None
        return self.as_float(self.move(torch.from_numpy(patches))), labels

    def references(self, step):
        """The whole images that a batch shares to average over (SCT), and their labels."""
        cfg = self.cfg
        if cfg.loss != "consistency" or cfg.ref_batch < 2:  # each image alone is ECT
            return {}
        g = torch.Generator().manual_seed(sample.seed_of(cfg.seed, 5, step))
        n = cfg.ref_batch - 1
        n_old = round(n * self.parts[1][1] / cfg.batch_size)
        index = np.concatenate([pool[torch.randint(len(pool), (k,), generator=g).numpy()]
                                for pool, k in ((self.new, n - n_old), (self.old, n_old)) if k])
        flip = torch.rand(len(index), generator=g).numpy() < 0.5 * cfg.hflip
        images, labels = self.read(index, flip)
        return dict(references=images, reference_labels=self.move(labels))

    @staticmethod
    def as_float(t):
        """8-bit values to [-1, 1]; latents as they are."""
        return t.float().div_(127.5).sub_(1) if t.dtype == torch.uint8 else t

    def move(self, t):
        """To the device, without waiting for a GPU."""
        if t is None:
            return None
        cuda = self.device.type == "cuda"
        return (t.pin_memory() if cuda else t).to(self.device, non_blocking=cuda)


@torch.no_grad()
def with_teacher(teacher, clean, noise, sigma, visible, labels, start, distilled):
    """The batch with images drawn by the teacher where `distilled` is set (arXiv 2311.14028).

    Drawn in two Euler steps from `start`, on the visible patches alone (a decoder, which answers
    for hidden ones otherwise, draws all); their target is the teacher's answer, not the image. With
    classes, `labels` says what to draw: classes that the teacher knows (Stream).
    """
    rows = distilled.nonzero()[:, 0].to(clean.device)
    target = clean
    if len(rows):
        shown, classes = (None if t is None else t[rows] for t in (visible, labels))
        drawn_from = None if teacher.config.decoder_depth else shown

        def denoise(x, s):
            return teacher(x, torch.full((len(x),), s, device=x.device), drawn_from, classes)

        drawn = sample.sample_loop(denoise, start[rows], sample.segment_edges(2), "euler")
        clean = clean.index_copy(0, rows, drawn)
        noisy = drawn + sigma[rows].view(-1, 1, 1) * noise[rows]
        target = clean.index_copy(0, rows, teacher(noisy, sigma[rows], shown, classes))
    return dict(clean=clean, noise=noise, sigma=sigma, visible=visible, labels=labels,
                target=target)


def validation_set(images, labels, config, levels=(-1.2, 1.2), limit=512):
    """Whole images, noise levels and noise that are the same in every run on a data set.

    The levels are the quantiles of ln sigma ~ N(mean, std^2): EDM's, whatever the run trains with.
    images: arrays, of which each gives its first limit / len(images).
    """
    images = images if isinstance(images, list) else [images]
    each = limit // len(images)
    pixels = np.concatenate([x[:each] for x in images])
    n, clean = len(pixels), patchify(torch.from_numpy(pixels), config.patch_size)
    g = torch.Generator().manual_seed(sample.seed_of(0, 3))
    quantile = (torch.randperm(n, generator=g) + 0.5) / n
    sigma = torch.exp(levels[0] + levels[1] * math.sqrt(2) * torch.erfinv(2 * quantile - 1))
    noise = patchify(torch.randn(pixels.shape, generator=g), config.patch_size)
    classes = None
    if config.num_classes:
        own = np.split(labels, np.cumsum([len(x) for x in images])[:-1])
        classes = torch.from_numpy(np.concatenate([part[:each] for part in own]))
    return dict(clean=clean, noise=noise, sigma=sigma, labels=classes)


# ---------------------------------------------------------------------------------------------
# Report: what a model knows of some data sets (--eval_only).


@torch.no_grad()
def report(cfg, device, autocast, limit=512):
    """Print what --ckpt knows of the validation images of each set; also into CKPT.eval.json."""
    path = cfg.ckpt or os.path.join(cfg.out_dir, "ft.pt")
    denoiser, checkpoint = sample.load_denoiser(path, device=device)
    config, edges, result = denoiser.config, np.linspace(math.log(0.002), math.log(80.0), 11), {}
    shape = (config.image_size, config.image_size, config.channels)
    print("| set | ln sigma | " + " | ".join(f"{v:.2f}" for v in (edges[:-1] + edges[1:]) / 2)
          + " | bits per dimension |\n" + "|---" * 13 + "|")
    for name in cfg.data.split(","):
        images, labels, meta = open_dataset(name, "val")
        if images.dtype != np.uint8 or images.shape[1:] != shape:
            sys.exit(f"{name} holds {images.dtype} images of shape {images.shape[1:]}, but bits "
                     f"per dimension need 8-bit ones of the model's {shape}")
        if config.num_classes and meta["class_names"] != checkpoint.get("class_names"):
            sys.exit(f"{name} has not the {config.num_classes} classes of the model, but "
                     f"{len(meta['class_names'] or [])} others: name sets with its classes")
        g, found = torch.Generator().manual_seed(sample.seed_of(cfg.seed, 7)), []
        for start in range(0, min(limit, len(images)), 32):
            at = slice(start, min(start + 32, limit))
            values = patchify(torch.from_numpy(np.array(images[at])), config.patch_size).to(device)
            known = torch.from_numpy(labels[at]).to(device) if config.num_classes else None
            with autocast:
                found.append(bound(partial(denoiser, labels=known), values, g, config.sigma_data))
        bits, losses = (torch.cat(parts).cpu().double() for parts in zip(*found))
        losses = losses.mean(dim=0).tolist()
        error = bits.std().item() / math.sqrt(len(bits)) if len(bits) > 1 else None
        result[name] = dict(images=len(bits), loss_by_level=losses, ln_sigma=edges.tolist(),
                            bits_per_dim=bits.mean().item(), standard_error=error)
        print(f"| {name} | loss | " + " | ".join(f"{v:.4g}" for v in losses)
              + f" | {bits.mean():.4f} ± {error or math.nan:.4f} |", flush=True)
    text = json.dumps(result)
    print(text)
    try:
        sample.replace_file(os.path.splitext(path)[0] + ".eval.json",
                            lambda f: f.write(text.encode()))
    except OSError as e:
        print(f"the report could not be written ({e})", file=sys.stderr)


# ---------------------------------------------------------------------------------------------
# Set-up: where to start from.


def fitting(stored, tensors):
    """Those of `stored` that have the name and the shape of one of `tensors`, on its device."""
    return {n: stored[n].to(t.device) for n, t in tensors.items()
            if n in stored and stored[n].shape == t.shape}


def task_fisher(cfg, denoiser, data_hash, earlier, device, autocast, rank, world):
    """Importance of the weights, by name: `earlier`, and for the data of a run (without replay)."""
    sets, labels, meta = open_union(cfg.data.split(","))
    if meta["hash"] != data_hash:
        sys.exit(f"--ewc needs the data that the model was trained on, and {cfg.data} has changed: "
                 "put it back, or leave --ewc out")
    cfg = replace(cfg, distill_from=None, loss="diffusion", batch_size=max(cfg.batch_size, world))
    stream = Stream(sets, labels, cfg, denoiser.config, device, rank, world)
    batches = (stream.load(cfg.steps + n) for n in range(cfg.fisher_batches))
    own = fisher_information(denoiser.to(device), denoiser.config, batches, autocast)
    return own | {n: own[n] + f for n, f in fitting(earlier, own).items()}


def held_back(cfg, start, resumed, weights, data_hash, denoiser, fisher_of):
    """What the weights are pulled to, what each of them counts, and how strongly it is pulled.

    Anchor, importance and strength, by name. The anchor is the `weights` of --init_from; a second
    stage on the same data goes on with that of the first. Parameters that begin afresh are free.
    Without l2_prev and ewc there is no anchor, but the importance is kept for later tasks.
    fisher_of(config of a run, denoiser, data_hash, earlier) is `task_fisher` on this machine.
    """
    pulled = cfg.l2_prev > 0 or cfg.ewc > 0
    anchor, importance = start.get("anchor"), start.get("importance", {})
    begins = not anchor or (cfg.ewc > 0 and not importance)
    if resumed and pulled and begins:
        sys.exit("--l2_prev and --ewc cannot begin in the middle of a run: start one from its "
                 "checkpoint with --init_from")
    if begins or not (resumed or start.get("data_hash") == data_hash):
        anchor, importance = weights, start.get("fisher", importance)
        if cfg.ewc > 0 and "fisher" not in start:  # its task was learned without EWC
            known = {f.name for f in fields(Config)}
            run = Config(**{k: v for k, v in start["config"].items() if k in known})
            importance = fisher_of(replace(run, fisher_batches=cfg.fisher_batches),
                                   denoiser_from_checkpoint(start, cfg.init_weights),
                                   start.get("data_hash"), importance)
    parameters = dict(denoiser.named_parameters())
    anchor = fitting(anchor, parameters) if pulled else {}
    importance = fitting(importance, parameters)
    strength = {n: cfg.l2_prev + cfg.ewc * importance.get(n, torch.zeros_like(a))
                for n, a in anchor.items()}
    return anchor, importance, strength


def taken_up(given):
    """(path, checkpoint, file it was read from) of the run that --resume means; {} for none."""
    how, out_dir = given.get("resume"), given.get("out_dir", Config.out_dir)
    names = [run_name(given) + ".pt"]
    if how == "last" and not {"mask_ratio", "mask_ratio_end", "init_from", "loss"} & set(given):
        names = ["pt.pt", "ft.pt", "cm.pt"]  # nothing says which: the newest
    paths = [os.path.join(out_dir, n) for n in names]
    run_of = {f: p for p in paths for f in (p, previous_name(p)) if os.path.exists(f)}
    if how is None or (how == "auto" and not run_of):
        return None, {}, None
    if not run_of:
        sys.exit(f"--resume found no {' or '.join(names)} in {out_dir}: start without it, or name "
                 "the run's --out_dir")
    path = run_of[max(run_of, key=os.path.getmtime)]
    try:
        return path, load_checkpoint(path), path
    except SystemExit as e:
        before = previous_name(path)
        if not os.path.exists(before):
            raise
        print(f"{e.code}; falling back to {before}", file=sys.stderr)
        return path, load_checkpoint(before), before


def model_config(cfg, given, meta, labels, start, resumed):
    """The network's configuration: from the checkpoint it starts from, else preset and flags.

    labels: of the images to train on, which join the classes that the checkpoint knows.
    """
    if start and not resumed and "class_cond" not in given and meta["class_names"]:
        cfg.class_cond = start["architecture"]["num_classes"] > 0  # stays what it was
    classes = len(meta["class_names"] or []) if cfg.class_cond else 0
    if cfg.class_cond and not classes:
        sys.exit(f"--class_cond needs labels, and {cfg.data} has none: prepare it from a folder "
                 "with one sub-folder a class, or leave the flag out")
    known = set(np.unique(labels).tolist()) if classes else set()
    asked = PRESETS.get(given.get("preset"), {}) | {k: given[k] for k in ARCHITECTURE if k in given}
    sizes = dict.fromkeys(DECODER, 0) | PRESETS[cfg.preset]
    if start:
        sizes = asdict(stored_config(start))
        for k, value in dict(asked, channels=meta["channels"]).items():
            if value != sizes[k] and (resumed or k not in DECODER):
                sys.exit(f"{k} is {value}, but {'the run' if resumed else cfg.init_from} has "
                         f"{sizes[k]}: leave the flag out, or start from another checkpoint")
        if resumed and classes != sizes["num_classes"]:
            sys.exit(f"{cfg.data} has {classes} classes, but the run has {sizes['num_classes']}: "
                     "resume on the data it began with, or start a new run with --init_from")
        if classes and start.get("class_names") == meta["class_names"]:
            known.update(sizes["known_classes"])
    config = ModelConfig(**(sizes | asked | dict(
        image_size=meta["size"], channels=meta["channels"], sigma_data=meta["sigma_data"],
        num_classes=classes, known_classes=tuple(sorted(known)),
        cm_segments=cfg.cm_segments if cfg.loss == "consistency" else 0)))
    for k in ARCHITECTURE:
        setattr(cfg, k, getattr(config, k))
    return config


def pick_dtype(name, device, gap=1.0):
    """auto: bfloat16 where the processor multiplies in it, else float32.

    But float32 for a consistency loss of pairs that get closer than 1/16: it is the difference of
    two answers that are nearly equal, and bfloat16's rounding is then larger than that.
    """
    if name != "auto":
        return getattr(torch, name)
    if gap < 1 / 16:
        return torch.float32
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        probe = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        fast = device.type == "cpu" and probe()
    return torch.bfloat16 if fast else torch.float32


def pick_micro_batch(wanted, share, size, device):
    """How many of a process's `share` of images to take at once; `size`: values of one's tokens.

    On a CPU the largest divisor of the share with at most 2^20 values: larger tensors fall out of
    the caches and come from the system anew each time (`tests/bench.py micro`).
    """
    if wanted or device.type != "cpu":
        return min(wanted or share, share)
    fits = [m for m in range(1, share + 1) if share % m == 0 and m * size <= 2**20]
    return max(fits, default=min(1, share))


def learning_rate(cfg, step):
    """Linear warm-up, then constant, a cosine down to 1 %, or lr sqrt(2000/step) from 2000 on."""
    warm = min(1.0, (step + 1) / (cfg.warmup + 1))
    if cfg.lr_schedule == "constant":
        return cfg.lr * warm
    if cfg.lr_schedule == "rsqrt":
        return cfg.lr * warm * max(1, step / 2000) ** -0.5
    progress = min(1.0, max(0.0, (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)))
    return cfg.lr * warm * (0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)


def start_loader(device):
    """Set up the thread that makes the next batch while this one is computed."""
    # With threads of its own there would be more than there are cores, and then OpenMP sends all
    # its threads to sleep between two operations: masked steps took up to twice as long.
    torch.set_num_threads(1)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # a new thread begins with the first GPU


@torch.no_grad()
def update_ema(ema, model, decay, step):
    """ema <- d ema + (1 - d) weights, with d small in the first steps."""
    d = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - d)


# ---------------------------------------------------------------------------------------------


def main(argv=None):
    given = parse_flags(argv)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

    def say(text):
        if rank == 0:
            tqdm.write(text, file=sys.stderr)

    # -- where the run starts -------------------------------------------------------------------
    path, checkpoint, source = taken_up(given)
    previous = checkpoint.get("config", {})
    device = sample.pick_device((previous | given).get("device", "auto"),
                                int(os.environ.get("LOCAL_RANK", 0)))
    start = checkpoint or (load_checkpoint(given["init_from"]) if "init_from" in given else {})
    cfg = resolve(given, previous, device)
    check(cfg)
    gap = last_gap(cfg)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("highest" if gap < 1 / 16 else "high")  # see pick_dtype
    dtype = pick_dtype(cfg.dtype, device, gap)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    if cfg.eval_only:
        if rank == 0:
            report(cfg, device, autocast)
        return
    if world > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=20))
    if rank == 0 and cfg.data == Config.data and not os.path.exists(cfg.data):
        say(f"{cfg.data} is missing: making the built-in faces")
        prepare(None, cfg.data)
    if world > 1:
        dist.barrier()

    # -- data and network -----------------------------------------------------------------------
    names, replayed = cfg.data.split(","), cfg.replay.split(",") if cfg.replay else []
    images, labels, meta = open_union(names + replayed)
    val_images, val_labels, val_meta = open_union(names, "val")
    data_hash = val_meta["hash"]  # of what is learned, without what is replayed
    starts = np.cumsum([0] + [len(x) for x in images])
    new, remembered = np.arange(starts[len(names)]), []  # numbers of images to learn, to replay
    for name, begin, end in zip(replayed, starts[len(names) :], starts[len(names) + 1 :]):
        remembered.extend(begin + choose_buffer(end - begin, open_dataset(name)[1],
                                                cfg.replay_buffer, sample.seed_of(cfg.seed, 6)))
    seen = [] if labels is None else labels[np.concatenate([new, remembered]).astype(np.int64)]
    config = model_config(cfg, given, meta, seen, start, resumed=bool(checkpoint))
    mask = cfg.mask_type, cfg.block_size
    for ratio in (cfg.mask_ratio, cfg.mask_ratio_end or 0):  # refuses what hides nothing
        count_visible(config.grid, ratio, *mask)
    counts = [count_visible(config.grid, r, *mask, may_hide_none=True) for r in mask_ratios(cfg)]
    k, share = max(counts), cfg.batch_size // world
    micro = pick_micro_batch(cfg.micro_batch, share, k * config.dim, device)
    if micro < 1 or cfg.batch_size % (world * micro):
        sys.exit(f"batch_size {cfg.batch_size} is not divisible by {world} processes x micro_batch "
                 f"{cfg.micro_batch or 1}: change one of the three")
    torch.manual_seed(sample.seed_of(cfg.seed, 4))
    denoiser = Denoiser(config)
    weights = start.get("model" if checkpoint or cfg.init_weights == "raw" else "ema", {})
    mine = denoiser.state_dict()
    fits = fitting(weights, mine)
    differ = sorted({n.split(".")[1] for n in {*mine, *weights} - {*fits}})
    if start and differ:
        say(f"not as in {cfg.init_from}: {', '.join(differ)} (a label embedding starts afresh, a "
            "decoder begins afresh or is left out)")
    denoiser.load_state_dict(mine | fits)
    denoiser.to(device)
    ema = Denoiser(config).to(device).eval().requires_grad_(False)
    ema.load_state_dict(checkpoint["ema"] if checkpoint else denoiser.state_dict())
    teacher = None
    if cfg.distill_from and cfg.distill_coef > 0:
        also = ("decoder_depth", "dense_depth")
        teacher, _ = sample.load_denoiser(cfg.distill_from, "ema", device, config, also)
    stream = Stream(images, labels, cfg, config, device, rank, world, new, remembered, teacher)
    fisher_of = partial(task_fisher, device=device, autocast=autocast, rank=rank, world=world)
    anchor, importance, strength = held_back(cfg, start, bool(checkpoint), weights, data_hash,
                                             denoiser, fisher_of)
    kind = dict(adamw=partial(torch.optim.AdamW, fused=True),
                radam=partial(torch.optim.RAdam, decoupled_weight_decay=True))[cfg.optimizer]
    optimizer = kind(denoiser.parameters(), lr=cfg.lr, betas=(cfg.beta1, cfg.beta2),
                     weight_decay=cfg.weight_decay)
    step, run_id = 0, f"{sample.seed_of(cfg.seed, time.time_ns()):016x}"
    name = run_name(asdict(cfg))
    path = path or os.path.join(cfg.out_dir, name + ".pt")
    if checkpoint:
        step, run_id = checkpoint["step"], checkpoint.get("run_id", run_id)
        try:
            optimizer.load_state_dict(checkpoint["optimizer"])
            for group in optimizer.param_groups:  # they came with the state; flags may have changed
                group.update(betas=(cfg.beta1, cfg.beta2), weight_decay=cfg.weight_decay)
        except Exception as e:  # the file may hold anything under this name
            sys.exit(f"{source} has no usable state of the optimizer ({type(e).__name__}): start "
                     f"another run with --init_from={source}")
        for key in sorted(set(given) - {"resume"}):
            if previous.get(key) != given[key]:
                say(f"changed: {key} was {previous.get(key)}, is {given[key]}")
        if checkpoint.get("data_hash") != data_hash:
            say(f"changed: the images of {cfg.data} are not those that this run began with")
        cfg.out_dir = os.path.dirname(path) or "."  # the folder may have been moved
        say(f"resumed from step {step}")
    if world > 1:
        steps = [None] * world
        dist.all_gather_object(steps, step)  # after this all have read what they start from
        if min(steps) < max(steps):
            sys.exit(f"the processes start from steps {min(steps)} to {max(steps)}: {cfg.out_dir} "
                     "must be on storage that all nodes share")
    if rank == 0:
        os.makedirs(cfg.out_dir, exist_ok=True)
        # A damaged file must not become the *.prev.pt of the next save, nor may what an earlier run
        # left pass for a checkpoint of this one.
        moves = {path: path + ".broken"} if checkpoint and source != path else {}
        if not checkpoint:
            moves = {f: os.path.splitext(f)[0] + ".old.pt" for f in (path, previous_name(path))}
        for file in filter(os.path.exists, moves):
            old, used = moves[file], os.path.realpath(cfg.distill_from or "")
            if used == os.path.realpath(old):
                sys.exit(f"--distill_from {cfg.distill_from} would be replaced by {file}: rename "
                         "it, or give another --out_dir")
            if used == os.path.realpath(file):
                cfg.distill_from = old  # where a resumed run finds it
            os.replace(file, old)
            say(f"{file} is now {old}")
    if cfg.compile:
        torch._dynamo.config.recompile_limit = 16  # six mask ratios, with gradient and without
        denoiser.compile(dynamic=False)
    model = denoiser
    if world > 1:
        model = DistributedDataParallel(denoiser, gradient_as_bucket_view=True,
                                        broadcast_buffers=False)
    levels = (cfg.p_mean, cfg.p_std) if cfg.loss == "consistency" else (-1.2, 1.2)
    validation = validation_set(val_images, val_labels, config, levels)
    edges = sample.segment_edges(cfg.cm_segments).to(device, torch.float32)

    say("\n".join(f"{key:>14} = {v}" for key, v in asdict(cfg).items() if v is not None))
    size = sum(p.numel() for p in denoiser.parameters()) / 1e6
    say(f"{size:.2f} M parameters on {world} x {device} in {str(dtype)[6:]}; {len(new)} images; "
        f"{', '.join(map(str, counts))} of {config.grid**2} patches visible; writing {path}"
        + (f"; pairs close to 1 - r/t = {gap:.3g}" if cfg.loss == "consistency" else ""))

    # -- saving, logging, stopping ----------------------------------------------------------------
    continual = {k: v for k, v in (("anchor", anchor), ("importance", importance)) if v}

    def write(what, how, *args):
        """Whether how(*args) wrote it. A full disk does not stop the run before its end."""
        try:
            how(*args)
            return True
        except (OSError, RuntimeError) as e:
            say(f"step {step}: {what} could not be written ({e})")
            return False

    def save(to=path):
        """Whether the checkpoint is on disk; if not, the one before it is kept."""
        return rank > 0 or write(to, save_checkpoint, to, dict(
            model=denoiser.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict(),
            architecture=asdict(config), config=asdict(cfg), step=step, run_id=run_id,
            data_hash=data_hash, class_names=meta["class_names"], **continual))

    def log(**record):
        def append():
            with open(os.path.join(cfg.out_dir, "log.jsonl"), "a") as f:
                f.write(json.dumps(dict(run=name, step=step, **record)) + "\n")

        if rank == 0:
            write("log.jsonl", append)

    def loss_of(model, step, **batch):
        if cfg.loss == "consistency":
            return consistency_objective(model, config, cfg, step, edges, **batch)
        return objective(model, config, mae_weight=cfg.mae_weight, **batch)

    @torch.no_grad()
    def evaluate():
        """Log the mean loss of the EMA weights on the validation set; the processes share it."""
        batch = max(1, min(64, micro * k // config.grid**2))  # no more tokens than in training
        n, total = len(validation["clean"]), torch.zeros((), dtype=torch.float64)
        for start in range(rank * batch, n, world * batch):
            part = {key: None if t is None else t[start : start + batch].to(device)
                    for key, t in validation.items()}
            part["clean"] = Stream.as_float(part["clean"])
            with autocast:  # a consistency loss: that of the last stage, to ECT's target
                total += loss_of(ema, cfg.steps - 1, visible=None, **part).sum().cpu().double()
        if world > 1:
            total = total.to(device)
            dist.all_reduce(total)
        log(val_loss=total.item() / n)
        say(f"step {step}: validation loss {total.item() / n:.4f}")

    caught = []  # (signal, when)

    def on_signal(number, _):
        # A second wish to stop is granted at once. What comes within three seconds is no second
        # one: torchrun passes on the signals that a scheduler sends to every process.
        if caught and time.time() - caught[0][1] > 3:
            os._exit(128 + number)
        caught.append((number, time.time()))

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)

    def asked_to_stop():
        """The signal that any process got, or 0: all leave the loop after the same step."""
        number = caught[0][0] if caught else 0
        if world > 1:
            number = torch.tensor(number, device=device)
            dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)

    # -- the loop ---------------------------------------------------------------------------------
    log(event="start", config=asdict(cfg), replayed=stream.parts[1][1] / cfg.batch_size,
        distilled=stream.parts[2][1] / cfg.batch_size)
    bar = tqdm(total=cfg.steps, initial=step, desc=name, disable=rank > 0, unit="step")
    held = [p for n, p in denoiser.named_parameters() if n in strength]
    started = saved = time.time()
    first, bad, waited, stop = step, 0, 0.0, 0
    threads = torch.get_num_threads()
    loader = ThreadPoolExecutor(1, initializer=start_loader, initargs=(device,))
    pending = loader.submit(stream.load, step) if step < cfg.steps else None
    while step < cfg.steps and not stop:
        asked = time.time()
        batch = pending.result()
        waited += time.time() - asked
        if step == first:
            torch.set_num_threads(threads)  # the loader's call changed MKL's number for all threads
        pending = loader.submit(stream.load, step + 1)
        index = batch.pop("index")
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg, step)
        loss = torch.zeros((), device=device)
        starts = range(0, share, micro)
        with autocast:  # around all parts: the weights are cast once a step
            for i in starts:
                part = {key: t if t is None or "reference" in key else t[i : i + micro]
                        for key, t in batch.items()}  # the references are for all parts
                model.require_backward_grad_sync = i == starts[-1]  # DDP: after the last part alone
                part = with_teacher(teacher, **part) if teacher else part
                part_loss = (stream.weight[i : i + micro] * loss_of(model, step, **part)).mean()
                (part_loss / len(starts)).backward()
                loss += part_loss.detach() / len(starts)
        if world > 1:
            dist.all_reduce(loss)
            loss /= world
        total_norm = torch.nn.utils.get_total_norm(p.grad for p in denoiser.parameters())
        loss, norm = torch.stack([loss, total_norm]).tolist()  # the step's one wait for the GPU
        if math.isfinite(loss) and math.isfinite(norm):
            if 0 < cfg.grad_clip < norm:
                torch.nn.utils.clip_grads_with_norm_(
                    denoiser.parameters(), cfg.grad_clip, total_norm)
            if held:  # what is clipped is the loss alone, or little would be learned
                penalty = add_penalty(held, [*anchor.values()], [*strength.values()])
            optimizer.step()
            update_ema(ema, denoiser, cfg.ema, step)
            bad = 0
        else:
            bad += 1
            low, high = batch["sigma"].min().item(), batch["sigma"].max().item()
            log(event="skipped", loss=str(loss), grad_norm=str(norm), sigma=[low, high],
                index=index.tolist())
            say(f"step {step} skipped: loss {loss}, norm {norm}, sigma {low:.3g} to {high:.3g}")
        optimizer.zero_grad(set_to_none=True)
        step += 1
        bar.update()
        if bad >= 10:
            say(f"stopped: {bad} steps in a row were not finite; the last checkpoint is as it was")
            break
        stop = asked_to_stop()
        if cfg.log_every and step % cfg.log_every == 0 and not bad:
            seconds = time.time() - started
            rate = (step - first) * cfg.batch_size / seconds
            bar.set_postfix_str(f"loss {loss:.4f}, {rate:.0f} images/s")
            log(loss=loss, grad_norm=norm, lr=learning_rate(cfg, step - 1), images_per_s=rate,
                seconds=seconds, seconds_waited_for_data=waited,
                **({"penalty": penalty.item()} if held else {}))
        aside = time.time()  # the clock of training stands until the next step
        if cfg.eval_every and step % cfg.eval_every == 0 and step < cfg.steps and not stop:
            evaluate()
        if cfg.sample_every and step % cfg.sample_every == 0 and rank == 0:
            grid = np.concatenate([x for _, x in sample.generate(ema, range(16), seed=cfg.seed)])
            picture = os.path.join(cfg.out_dir, f"{name}_{step:07d}.png")
            write(picture, sample.save_grid, picture, grid)
        clock = cfg.save_minutes and time.time() - saved > 60 * cfg.save_minutes
        if stop or clock or (cfg.save_every and step % cfg.save_every == 0 and step < cfg.steps):
            written = save()
            saved = time.time()
        if cfg.keep_every and step % cfg.keep_every == 0:
            save(f"{os.path.splitext(path)[0]}-{step:07d}.pt")
        started += time.time() - aside
    bar.close()
    loader.shutdown(cancel_futures=True)
    if bad >= 10:
        sys.exit(3)
    if not stop and (step > first or not checkpoint):  # else a finished run has nothing to add
        evaluate()
        if not save():
            sys.exit(f"{path} could not be written: free some space and run again with --resume")
    if not stop and cfg.ewc and (step > first or "fisher" not in checkpoint):
        continual["fisher"] = fisher_of(cfg, ema.requires_grad_(True), data_hash, importance)
        save()  # for the next task
    if world > 1:
        dist.barrier()  # torchrun ends all processes when the first one leaves
        dist.destroy_process_group()
    if stop:
        say(f"stopped by {signal.Signals(stop).name} after step {step}"
            + (f": {path} is saved, go on with --resume" if written else ""))
        sys.exit(128 + stop)
    say(f"wrote {path} after {step} steps")


if __name__ == "__main__":
    try:
        main()
    except torch.OutOfMemoryError:
        sys.exit("out of GPU memory: give a smaller --micro_batch (the batch stays what it is)")
    except RuntimeError as e:
        lost = re.search("gloo|nccl|connection|timed? ?out", str(e), re.IGNORECASE)
        if not (dist.is_initialized() and lost):
            raise
        sys.exit(f"process {dist.get_rank()} lost touch with another ({str(e).splitlines()[0]}): "
                 "the report of torchrun names the one that failed first; go on with --resume")
