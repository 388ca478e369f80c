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
from model import (PRESETS, Denoiser, ModelConfig, add_penalty, bound,
                   consistency_objective, count_hidden, count_visible, denoiser_from_checkpoint,
                   fisher_information, load_checkpoint, objective, patchify, previous_name,
                   sample_visible, save_checkpoint, stored_config)
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
    micro_batch: int | None = setting(None, "images a process takes at once; default: its "
                                    "share, on a CPU as many as keep its caches warm")
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
# Stage 1, stage 2, consistency tuning, by machine. On a CPU both stages on the built-in faces take
# about ten minutes on two cores; on a GPU these are MaskDM's network, batch and optimizer at 64 px.
DEFAULTS = {
    ("cpu", 1): dict(preset="demo", batch_size=48, steps=2500, lr=4e-3, beta1=0.9,
                     lr_schedule="constant", eval_every=500, sample_every=0, save_every=500),
    ("cpu", 2): dict(preset="demo", batch_size=4, steps=4200, lr=2e-3, beta1=0.9,
                     lr_schedule="cosine", eval_every=1400, sample_every=1400, save_every=1400),
    ("cpu", 3): dict(preset="demo", batch_size=32, steps=1200, lr=2e-3, beta1=0.9, cm_gap=1 / 16,
                     lr_schedule="cosine", eval_every=400, sample_every=400, save_every=400),
    ("gpu", 1): dict(preset="maskdm-64", batch_size=256, steps=100_000, lr=2e-4, beta1=0.99,
                     lr_schedule="constant", eval_every=2000, sample_every=0, save_every=2000),
    ("gpu", 2): dict(preset="maskdm-64", batch_size=128, steps=100_000, lr=2e-4, beta1=0.99,
                     lr_schedule="constant", eval_every=2000, sample_every=5000, save_every=2000),
    ("gpu", 3): dict(preset="maskdm-64", batch_size=128, steps=200_000, lr=1e-4, beta1=0.9,
                     lr_schedule="constant", eval_every=2000, sample_every=5000, save_every=2000,
                     cm_gap=1 / 256),
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
    stage = {"pt": 1, "ft": 2, "cm": 3}[run_name(asdict(cfg))]
    for name, value in DEFAULTS["cpu" if device.type == "cpu" else "gpu", stage].items():
        if getattr(cfg, name) is None:
            setattr(cfg, name, value)
    if cfg.compile is None:
        cfg.compile = device.type == "cuda"
    if cfg.loss == "consistency" and (cfg.cm_stage_length is None or "cm_gap" in given):
        halvings = -math.log2(max(1e-6, cfg.cm_gap))
        stages = max(1, round(halvings / math.log2(max(1.1, cfg.cm_q))))
        cfg.cm_stage_length = max(1, math.ceil(cfg.steps / stages))
    reporting = {"eval_only", "ckpt", "data", "out_dir", "seed", "device", "dtype"}
    cm = {f.name for f in fields(Config) if f.name.startswith("cm_")}
    decoder = cfg.decoder_depth or "init_from" in given or previous
    idle = [  # when, whether that is so, which flags then do nothing
        ("with --eval_only", cfg.eval_only, set(given) - reporting),
        ("without --eval_only", not cfg.eval_only, {"ckpt"}),
        ("without --loss=consistency", cfg.loss != "consistency", cm | {"ref_batch"}),
        ("with --cm_stage_length", "cm_stage_length" in given, {"cm_gap"}),
        ("without --decoder_depth", not decoder, {"decoder_dim", "decoder_heads", "mae_weight"}),
        ("without --mask_ratio_end", cfg.mask_ratio_end is None, {"mask_schedule"}),
        ("without --replay", not cfg.replay, {"replay_coef", "replay_buffer"}),
        ("without --distill_from", not cfg.distill_from, {"distill_coef"}),
        ("without --replay or --distill_from", not (cfg.replay or cfg.distill_from),
         {"replay_frac"}),
        ("without --ewc", not cfg.ewc, {"fisher_batches"}),
    ]
    for when, so, names in idle:
        if so and names & set(given):
            sys.exit(f"--{min(names & set(given))} does nothing {when}: change one of the two")
    return cfg


def run_name(settings):
    """pt: ends masked (stage 1); ft: ends with whole images (stage 2); cm: consistency tuning."""
    end = settings.get("mask_ratio_end")
    end = settings.get("mask_ratio", 0) if end is None else end
    return "cm" if settings.get("loss") == "consistency" else "pt" if end > 0 else "ft"


def check(cfg):
    """Exit with a sentence on a value that no run can have."""
    for f in fields(cfg):
        value, low, below = getattr(cfg, f.name), f.metadata["low"], f.metadata["below"]
        if None not in (value, low) and not low <= value < below:
            top = f" and below {below}" if below < math.inf else ""
            sys.exit(f"--{f.name} is {value}, expected at least {low}{top}")
    if cfg.loss == "consistency":
        stages = math.ceil(cfg.steps / cfg.cm_stage_length)
        if not cfg.cm_q > 1 or stages * math.log2(cfg.cm_q) > 20:
            sys.exit(f"--cm_q is {cfg.cm_q} in {stages} stages, expected more than 1, and in all "
                     "less than 2^20 (float32 tells no closer noise levels apart): give a longer "
                     "--cm_stage_length")
    old_share = round(cfg.replay_frac * cfg.batch_size)
    wanted = (cfg.replay and cfg.replay_coef > 0) or (cfg.distill_from and cfg.distill_coef > 0)
    if cfg.replay_frac > 1 or (wanted and old_share == 0):
        sys.exit(f"--replay_frac is {cfg.replay_frac}, expected at most 1 and at least one image "
                 f"of the {cfg.batch_size} of a batch")
    if cfg.distill_from and cfg.loss == "consistency":
        sys.exit("--distill_from is for --loss=diffusion: a consistency model has its own teacher")


# ---------------------------------------------------------------------------------------------
# The stream of data: step n -> its batch. All randomness of training is drawn here.


def mask_ratios(cfg, grid):
    """The share of patches hidden in each part of the run: one value, or six with mask_ratio_end.

    The shape cosine4 is MaskDiT's, 0.5 cos(pi/2 x)^4 over the share x of the run. In six stairs,
    because a compiled network is compiled anew for each number of visible patches.
    """
    if cfg.mask_ratio_end is None:
        return [cfg.mask_ratio]
    power = 0 if cfg.mask_schedule == "linear" else int(cfg.mask_schedule[6:] or 1)
    shape = [math.cos(math.pi / 2 * i / 5) ** power if power else 1 - i / 5 for i in range(6)]
    ratios = [cfg.mask_ratio_end + (cfg.mask_ratio - cfg.mask_ratio_end) * share for share in shape]
    return [r if count_hidden(grid, r, cfg.mask_type, cfg.block_size) else 0.0 for r in ratios]


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
        self.labels, self.cfg, self.config = labels, cfg, config
        self.new = np.arange(sum(map(len, self.sets))) if new is None else np.asarray(new)
        self.old = np.asarray(old, np.int64)
        share = round(cfg.replay_frac * cfg.batch_size)
        self.n_replayed = share if len(old) and cfg.replay_coef > 0 else 0
        self.n_distilled = share if cfg.distill_from and cfg.distill_coef > 0 else 0
        self.n_new = cfg.batch_size - self.n_replayed - self.n_distilled
        self.parts = [  # where from, how many, weight
            (self.new, self.n_new, 1.0), (self.old, self.n_replayed, cfg.replay_coef),
            (self.new, self.n_distilled, cfg.distill_coef)]
        self.distilled = torch.arange(cfg.batch_size) >= cfg.batch_size - self.n_distilled
        self.taught = torch.tensor(teacher.config.known_classes if teacher else [])  # to be drawn
        self.device = device
        self.ratios = mask_ratios(cfg, config.grid)
        # Every world-th image, so that each process has its part of each kind.
        self.share = slice(rank, None, world)

    def numbers(self, pool, start, n):
        """The images at positions start, ..., start + n - 1 of the endless walk through a pool."""
        places = (divmod(start + q, len(pool)) for q in range(n))
        return np.array([pool[shuffled(len(pool), self.cfg.seed, epoch)[i]] for epoch, i in places],
                        np.int64)

    def index(self, step):
        """The numbers of the images of a global batch."""
        return np.concatenate([self.numbers(pool, step * n, n) for pool, n, _ in self.parts])

    def weights(self):
        """What each image of a global batch counts, for L_new + coef L_old; None: all alike."""
        if self.n_new == self.cfg.batch_size:
            return None
        return torch.cat([torch.full((n,), coef * self.cfg.batch_size / max(n, 1))
                          for _, n, coef in self.parts])

    def load(self, step):
        """This process's part, b images, of the batch of a step.

        index (b,) numpy; on the device: clean (b, K, p*p*C) in [-1, 1] (all N patches if there is a
        decoder), noise like it, sigma (b,), visible (b, K) or None for the whole image, labels (b,)
        or None.
        """
        cfg, config = self.cfg, self.config
        g = torch.Generator().manual_seed(sample.seed_of(cfg.seed, 1, step))
        ln_sigma = cfg.p_mean + cfg.p_std * torch.randn(cfg.batch_size, generator=g)
        sigma = ln_sigma[self.share].exp()
        flip = torch.rand(cfg.batch_size, generator=g)[self.share].numpy() < 0.5 * cfg.hflip
        dropped = torch.rand(cfg.batch_size, generator=g)[self.share] < cfg.label_dropout
        ratio = self.ratios[min(len(self.ratios) * step // max(1, cfg.steps), len(self.ratios) - 1)]
        visible = sample_visible(cfg.batch_size, config.grid, ratio, cfg.mask_type, cfg.block_size,
                                 generator=g)
        index = self.index(step)[self.share]
        visible = None if visible is None else visible[self.share]
        # A decoder is asked about the hidden patches, too.
        clean, labels = self.read(index, flip, None if config.decoder_depth else visible)
        if labels is not None and len(self.taught):
            drawn = torch.randint(len(self.taught), (cfg.batch_size,), generator=g)
            drawn = self.taught[drawn][self.share]
            labels = torch.where(self.distilled[self.share], drawn, labels)
        if labels is not None:
            labels = torch.where(dropped, config.num_classes, labels)

        sigma, visible, labels = (self.move(t) for t in (sigma, visible, labels))
        g = torch.Generator(self.device).manual_seed(sample.seed_of(cfg.seed, 2, step))
        noise = torch.randn(cfg.batch_size, *clean.shape[1:], generator=g, device=self.device)
        batch = dict(index=index, clean=clean, noise=noise[self.share], sigma=sigma,
                     visible=visible, labels=labels, **self.references(step))
        if (weight := self.weights()) is not None:
            batch["weight"] = self.move(weight[self.share])
        if self.n_distilled:
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
        n_old = round(n * self.n_replayed / cfg.batch_size)
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
        if t is None or self.device.type == "cpu":
            return t
        t = t.pin_memory() if self.device.type == "cuda" else t
        return t.to(self.device, non_blocking=self.device.type == "cuda")


@torch.no_grad()
def with_teacher(teacher, clean, noise, sigma, visible, labels, start, distilled, **others):
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
                target=target, **others)


def validation_set(images, labels, config, levels=(-1.2, 1.2), limit=512):
    """Whole images, noise levels and noise that are the same in every run on a data set.

    The levels are the quantiles of ln sigma ~ N(mean, std^2): EDM's, whatever the run trains with.
    images: arrays, of which each gives its first limit / len(images).
    """
    images = images if isinstance(images, list) else [images]
    starts = np.cumsum([0] + [len(x) for x in images])
    index = np.concatenate([start + np.arange(min(len(x), limit // len(images)))
                            for start, x in zip(starts, images)])
    pixels = np.concatenate([x[: limit // len(images)] for x in images])
    n, clean = len(index), patchify(torch.from_numpy(pixels), config.patch_size)
    g = torch.Generator().manual_seed(sample.seed_of(0, 3))
    quantile = (torch.randperm(n, generator=g) + 0.5) / n
    sigma = torch.exp(levels[0] + levels[1] * math.sqrt(2) * torch.erfinv(2 * quantile - 1))
    noise = patchify(torch.randn(pixels.shape, generator=g), config.patch_size)
    labels = torch.from_numpy(labels[index].astype(np.int64)) if config.num_classes else None
    return dict(clean=clean, noise=noise, sigma=sigma, labels=labels)


# ---------------------------------------------------------------------------------------------
# Report: what a model knows of some data sets (--eval_only).


@torch.no_grad()
def report(cfg, device, autocast, limit=512):
    """Print what --ckpt knows of the validation images of each set; also into CKPT.eval.json."""
    path = cfg.ckpt or os.path.join(cfg.out_dir, "ft.pt")
    denoiser, checkpoint = sample.load_denoiser(path, device=device)
    config, edges, result = denoiser.config, np.linspace(math.log(0.002), math.log(80.0), 11), {}
    print("| set | ln sigma | " + " | ".join(f"{v:.2f}" for v in (edges[:-1] + edges[1:]) / 2)
          + " | bits per dimension |\n" + "|---" * 13 + "|")
    for name in cfg.data.split(","):
        images, labels, meta = open_dataset(name, "val")
        if images.shape[1:] != (config.image_size, config.image_size, config.channels):
            sys.exit(f"{name} has images of shape {images.shape[1:]}, but the model makes "
                     f"{config.image_size} x {config.image_size} with {config.channels} channels")
        if images.dtype != np.uint8:
            sys.exit(f"{name} holds {images.dtype} latents: bits per dimension need 8-bit images")
        if config.num_classes and meta["class_names"] != checkpoint.get("class_names"):
            sys.exit(f"{name} has not the {config.num_classes} classes of the model, but "
                     f"{len(meta['class_names'] or [])} others: name sets with its classes")
        g, bits, losses = torch.Generator().manual_seed(sample.seed_of(cfg.seed, 7)), [], []
        for start in range(0, min(limit, len(images)), 32):
            at = slice(start, min(start + 32, limit))
            values = patchify(torch.from_numpy(np.array(images[at])), config.patch_size).to(device)
            known = torch.from_numpy(labels[at]).to(device) if config.num_classes else None
            with autocast:
                b, e = bound(partial(denoiser, labels=known), values, g, config.sigma_data)
            bits, losses = bits + [b.cpu()], losses + [e.cpu()]
        bits, losses = torch.cat(bits).double(), torch.cat(losses).double().mean(dim=0).tolist()
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


def task_fisher(cfg, denoiser, batches, device, autocast, rank, world):
    """The Fisher information of a model on the data that cfg names, without what it replays."""
    sets, labels, _ = open_union(cfg.data.split(","))
    cfg = replace(cfg, distill_from=None, loss="diffusion", batch_size=max(cfg.batch_size, world))
    stream = Stream(sets, labels, cfg, denoiser.config, device, rank, world)
    batches = (stream.load(cfg.steps + n) for n in range(batches))
    return fisher_information(denoiser.to(device), denoiser.config, batches, autocast)


def add_importance(kept, start, cfg, fisher_of):
    """`kept` and the importance for the task of --init_from, which was learned without EWC."""
    known = {f.name for f in fields(Config)}
    old = Config(**{k: v for k, v in start["config"].items() if k in known})
    names = old.data.split(",")
    here = all(os.path.exists(os.path.join(d, "meta.json")) for d in names)
    if not here or open_union(names)[2]["hash"] != start.get("data_hash"):
        sys.exit(f"--ewc needs the data that {cfg.init_from} was trained on, and {old.data} is not "
                 "there or has changed: put it back, or leave --ewc out")
    own = fisher_of(old, denoiser_from_checkpoint(start, cfg.init_weights), cfg.fisher_batches)
    return {n: f + kept[n].to(f.device) if n in kept else f for n, f in own.items()}


def held_back(cfg, start, resumed, data_hash, denoiser, fisher_of):
    """What the weights are pulled to and how strongly: anchor, importance (by name), strength.

    The anchor is the weights of --init_from; a second stage on the same data goes on with that of
    the first. Parameters that begin afresh are free. Without l2_prev and ewc there is no strength,
    but the importance of earlier tasks is kept for later ones. All are None without a start.
    fisher_of(config of a run, denoiser, batches) is `task_fisher` on this machine.
    """
    def fitted(stored):
        return {n: stored[n].to(p.device) if n in stored and stored[n].shape == p.shape
                else torch.zeros_like(p) for n, p in denoiser.named_parameters()}

    pulled = cfg.l2_prev > 0 or cfg.ewc > 0
    if not start:
        if pulled:
            sys.exit("--l2_prev and --ewc pull to the weights of --init_from: give that")
        return None, None, None
    complete = "anchor" in start and (not cfg.ewc or "importance" in start)
    if resumed and pulled and not complete:
        sys.exit("--l2_prev and --ewc cannot begin in the middle of a run: start one from its "
                 "checkpoint with --init_from")
    if resumed or (complete and start.get("data_hash") == data_hash):
        anchor, kept = start.get("anchor"), start.get("importance", {})
    else:
        anchor = start["ema" if cfg.init_weights == "ema" else "model"]
        kept = start.get("fisher") or start.get("importance") or {}
        if cfg.ewc and "fisher" not in start:
            kept = add_importance(kept, start, cfg, fisher_of)
    if not pulled:
        return None, {n: v.cpu() for n, v in kept.items()}, None
    importance = fitted(kept)
    known = fitted({n: torch.ones_like(v) for n, v in anchor.items()})
    strength = [known[n] * (cfg.l2_prev + cfg.ewc * importance[n]) for n in importance]
    return fitted(anchor), importance if kept else None, strength


def taken_up(given):
    """(path, checkpoint, the file it was read from) of the run that --resume means, or None x 3."""
    how, out_dir = given.get("resume"), given.get("out_dir", Config.out_dir)
    names = [run_name(given) + ".pt"]
    if how == "last" and not {"mask_ratio", "mask_ratio_end", "init_from", "loss"} & set(given):
        names = ["pt.pt", "ft.pt", "cm.pt"]  # nothing says which: the newest
    paths = [os.path.join(out_dir, n) for n in names]
    run_of = {f: p for p in paths for f in (p, previous_name(p)) if os.path.exists(f)}
    if how is None or (how == "auto" and not run_of):
        return None, None, None
    if not run_of:
        sys.exit(f"--resume found no {' or '.join(names)} in {out_dir}: start without it, or name "
                 "the run's --out_dir")
    path = run_of[max(run_of, key=os.path.getmtime)]
    for file in (path, previous_name(path)):
        try:
            return path, load_checkpoint(file), file
        except SystemExit as e:
            print(f"{e.code}; falling back to {previous_name(path)}" if file == path else e.code,
                  file=sys.stderr)
    sys.exit(f"neither {path} nor {previous_name(path)} can be read: start afresh without --resume")


def model_config(cfg, given, meta, seen, start, resumed, say):
    """The network's configuration: from the checkpoint it starts from, else preset and flags.

    seen: labels of the images to train on, which join the classes that the checkpoint knows.
    """
    sizes = dict.fromkeys(DECODER, 0) | PRESETS[cfg.preset]
    sizes.update({k: getattr(cfg, k) for k in ARCHITECTURE if getattr(cfg, k) is not None})
    if start:
        theirs = asdict(stored_config(start))
        wanted = {k: given[k] for k in ARCHITECTURE if k in given}
        asked = PRESETS.get(given.get("preset"), {}) | wanted | {"channels": meta["channels"]}
        for k in asked:
            if asked[k] != theirs[k] and (resumed or k not in DECODER):
                sys.exit(f"{k} is {asked[k]}, but {'the run' if resumed else cfg.init_from} has "
                         f"{theirs[k]}: leave the flag out, or start from another checkpoint")
            if asked[k] != theirs[k]:
                say(f"{k} is {asked[k]}, in {cfg.init_from} it was {theirs[k]}")
        sizes = {k: theirs[k] for k in ARCHITECTURE} | wanted
    classes = len(meta["class_names"] or []) if cfg.class_cond else 0
    if cfg.class_cond and not classes:
        sys.exit(f"--class_cond needs labels, and {cfg.data} has none: prepare it from a folder "
                 "with one sub-folder a class, or leave the flag out")
    if resumed and classes != theirs["num_classes"]:
        sys.exit(f"{cfg.data} has {classes} classes, but the run has {theirs['num_classes']}: "
                 "resume on the data it began with, or start a new run with --init_from")
    known = np.unique(seen).tolist() if classes else []
    if classes and start and start.get("class_names") == meta["class_names"]:
        before = theirs["known_classes"] or range(theirs["num_classes"])
        known = sorted({*known, *before})
    segments = cfg.cm_segments if cfg.loss == "consistency" else 0
    config = ModelConfig(image_size=meta["size"], channels=meta["channels"], num_classes=classes,
                         sigma_data=meta["sigma_data"], cm_segments=segments,
                         known_classes=tuple(known), **sizes)
    for k in ARCHITECTURE:
        setattr(cfg, k, getattr(config, k))
    return config


def load_initial(denoiser, weights, path, say):
    """Load another run's weights; label embedding and decoder may differ, and then start afresh."""
    mine = denoiser.state_dict()
    fits = {n for n in mine if n in weights and mine[n].shape == weights[n].shape}
    differ = {n.split(".")[1] for n in {*mine, *weights} - fits}
    if "labels" in differ:
        say(f"the classes are not those of {path}: the label embedding starts afresh")
    if differ - {"labels"}:
        say(f"the decoder is not that of {path}: left out, or begun afresh: "
            + ", ".join(sorted(differ - {"labels"})))
    denoiser.load_state_dict(mine | {n: weights[n] for n in fits})


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
    local = int(os.environ.get("LOCAL_RANK", 0))

    def say(text):
        if rank == 0:
            tqdm.write(text, file=sys.stderr)

    # -- where the run starts -------------------------------------------------------------------
    path, checkpoint, source = taken_up(given)
    previous = {k: v for k, v in (checkpoint or {}).get("config", {}).items() if k != "resume"}
    device = sample.pick_device((previous | given).get("device", "auto"), local)
    start = checkpoint
    if given.get("loss") == "consistency" and not checkpoint and "init_from" not in given:
        sys.exit("--loss=consistency tunes a trained model: give its --init_from=out/ft.pt")
    if not checkpoint and "init_from" in given:
        start = load_checkpoint(given["init_from"])
    cfg = resolve(given, previous, device)
    check(cfg)
    stages = math.ceil(cfg.steps / cfg.cm_stage_length) if cfg.loss == "consistency" else 0
    gap = cfg.cm_q**-stages  # 1 - r/t at the end
    if device.type == "cuda":
        torch.cuda.set_device(device)
        precise = gap < 1 / 16  # see pick_dtype
        torch.set_float32_matmul_precision("highest" if precise else "high")
    if world > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=20))
    if rank == 0 and cfg.data == Config.data and not os.path.exists(cfg.data) and not cfg.eval_only:
        say(f"{cfg.data} is missing: making the built-in faces")
        prepare(None, cfg.data)
    if world > 1:
        dist.barrier()

    dtype = pick_dtype(cfg.dtype, device, gap)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    if cfg.eval_only:
        if world > 1:
            dist.destroy_process_group()
        if rank == 0:
            report(cfg, device, autocast)
        return

    # -- data and network -----------------------------------------------------------------------
    names, replayed = cfg.data.split(","), cfg.replay.split(",") if cfg.replay else []
    images, labels, meta = open_union(names + replayed)
    meta = meta | {"hash": open_union(names)[2]["hash"]}
    val_images, val_labels, _ = open_union(names, "val")
    starts = np.cumsum([0] + [len(x) for x in images])
    new, remembered = np.arange(starts[len(names)]), []  # numbers of images to learn, to replay
    for name, begin, end in zip(replayed, starts[len(names) :], starts[len(names) + 1 :]):
        remembered.extend(begin + choose_buffer(end - begin, open_dataset(name)[1],
                                                cfg.replay_buffer, sample.seed_of(cfg.seed, 6)))
    if start and not checkpoint and "class_cond" not in given and meta["class_names"]:
        cfg.class_cond = start["architecture"]["num_classes"] > 0  # stays what it was
    seen = [] if labels is None else labels[np.concatenate([new, remembered]).astype(np.int64)]
    config = model_config(cfg, given, meta, seen, start, checkpoint is not None, say)
    for ratio in {cfg.mask_ratio, cfg.mask_ratio_end or 0}:  # refuses what hides nothing
        count_visible(config.grid, ratio, cfg.mask_type, cfg.block_size)
    counts = [count_visible(config.grid, ratio, cfg.mask_type, cfg.block_size)
              for ratio in mask_ratios(cfg, config.grid)]
    k = max(counts)
    share = cfg.batch_size // world
    micro = pick_micro_batch(cfg.micro_batch, share, k * config.dim, device)
    if micro < 1 or cfg.batch_size % (world * micro):
        sys.exit(f"batch_size {cfg.batch_size} is not divisible by {world} processes x micro_batch "
                 f"{cfg.micro_batch or 1}: change one of the three")
    torch.manual_seed(sample.seed_of(cfg.seed, 4))
    denoiser = Denoiser(config)
    if checkpoint:
        denoiser.load_state_dict(checkpoint["model"])
    elif start:
        load_initial(denoiser, start[cfg.init_weights if cfg.init_weights == "ema" else "model"],
                     cfg.init_from, say)
    denoiser.to(device)
    ema = Denoiser(config).to(device).eval().requires_grad_(False)
    ema.load_state_dict(denoiser.state_dict())
    teacher = None
    if cfg.distill_from and cfg.distill_coef > 0:
        also = ("decoder_depth", "dense_depth")
        teacher, _ = sample.load_denoiser(cfg.distill_from, "ema", device, config, also)
    stream = Stream(images, labels, cfg, config, device, rank, world, new, remembered, teacher)
    if stream.n_new < 0 or (stream.n_new == 0 and cfg.replay_frac < 1):
        sys.exit(f"--replay_frac {cfg.replay_frac} leaves no new images: give less, such as 0.25")
    fisher_of = partial(task_fisher, device=device, autocast=autocast, rank=rank, world=world)
    anchor, importance, strength = held_back(cfg, start, checkpoint is not None, meta["hash"],
                                             denoiser, fisher_of)
    kind = dict(adamw=partial(torch.optim.AdamW, fused=True),
                radam=partial(torch.optim.RAdam, decoupled_weight_decay=True))[cfg.optimizer]
    optimizer = kind(denoiser.parameters(), lr=cfg.lr, betas=(cfg.beta1, cfg.beta2),
                     weight_decay=cfg.weight_decay)
    step = 0
    run_id = f"{sample.seed_of(cfg.seed, time.time_ns()):016x}"
    name = run_name(asdict(cfg))
    path = path or os.path.join(cfg.out_dir, name + ".pt")
    if checkpoint:
        ema.load_state_dict(checkpoint["ema"])
        try:
            optimizer.load_state_dict(checkpoint["optimizer"])
            for group in optimizer.param_groups:  # they came with the state; flags may have changed
                group.update(betas=(cfg.beta1, cfg.beta2), weight_decay=cfg.weight_decay)
        except Exception as e:  # the file may hold anything under this name
            sys.exit(f"{source} has no usable state of the optimizer ({type(e).__name__}): start "
                     f"another run with --init_from={source}")
        step, run_id = checkpoint["step"], checkpoint.get("run_id", run_id)
        for key in sorted(set(given) - {"resume"}):
            if previous.get(key) != given[key]:
                say(f"changed: {key} was {previous.get(key)}, is {given[key]}")
        if checkpoint.get("data_hash") != meta["hash"]:
            say(f"changed: the images of {cfg.data} are not those that this run began with")
        if rank == 0 and source != path and os.path.exists(path):
            os.replace(path, path + ".broken")  # or it would become the *.prev.pt of the next save
        cfg.out_dir = os.path.dirname(path) or "."  # the folder may have been moved
        say(f"resumed from step {step}")
    if world > 1:
        dist.barrier()  # all have read what they start from
    if not checkpoint and rank == 0:
        os.makedirs(cfg.out_dir, exist_ok=True)
        for file in (path, previous_name(path)):  # neither may pass for a checkpoint of this run
            if os.path.exists(file):
                old, used = os.path.splitext(file)[0] + ".old.pt", cfg.distill_from or ""
                if os.path.exists(old) and os.path.realpath(used) == os.path.realpath(old):
                    sys.exit(f"--distill_from {used} would be replaced by {file}: rename it, or "
                             "give another --out_dir")
                if os.path.realpath(used) == os.path.realpath(file):
                    cfg.distill_from = old  # where a resumed run finds it
                os.replace(file, old)
                say(f"{file} of an earlier run is now {old}")
    if world > 1:
        steps = torch.tensor([step, -step], device=device)
        dist.all_reduce(steps, dist.ReduceOp.MAX)
        highest, lowest = int(steps[0]), -int(steps[1])
        if lowest != highest:
            sys.exit(f"the processes start from steps {lowest} to {highest}: {cfg.out_dir} must be "
                     "on storage that all nodes share")
    if cfg.compile:
        torch._dynamo.config.recompile_limit = 16  # six mask ratios, with gradient and without
        denoiser.compile(dynamic=False)
    model = denoiser
    if world > 1:
        gpu = [device] if device.type == "cuda" else None
        model = DistributedDataParallel(denoiser, device_ids=gpu, gradient_as_bucket_view=True,
                                        broadcast_buffers=False)
    levels = (cfg.p_mean, cfg.p_std) if cfg.loss == "consistency" else (-1.2, 1.2)
    validation = validation_set(val_images, val_labels, config, levels)

    say("\n".join(f"{key:>14} = {v}" for key, v in asdict(cfg).items() if v is not None))
    size = sum(p.numel() for p in denoiser.parameters()) / 1e6
    say(f"{size:.2f} M parameters on {world} x {device} in {str(dtype)[6:]}; {len(stream.new)} "
        f"images; {', '.join(map(str, counts))} of {config.grid**2} patches visible (mask ratio "
        f"{1 - counts[0] / config.grid**2:.4g}); writing {path}")
    if cfg.loss == "consistency":
        say(f"{stages} stages, to a gap 1 - r/t of {gap:.3g} at high noise levels")
    for what, (pool, n, coef) in zip(("replayed", "distilled"), stream.parts[1:]):
        if n:
            say(f"{n} of {cfg.batch_size} images of a batch are {what}, with coefficient {coef}"
                + (f", from {len(pool)}" if what == "replayed" else ""))
    if cfg.batch_size > len(stream.new):
        say(f"a batch of {cfg.batch_size} holds some of these {len(stream.new)} images repeatedly")

    # -- saving, logging, stopping ----------------------------------------------------------------
    continual = {k: v for k, v in (("anchor", anchor), ("importance", importance)) if v}

    def save(to=path):
        """Whether the checkpoint is on disk. A full disk does not stop the run before its end."""
        if rank > 0:
            return True
        try:
            save_checkpoint(to, dict(
                model=denoiser.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict(),
                architecture=asdict(config), config=asdict(cfg), step=step, run_id=run_id,
                data_hash=meta["hash"], class_names=meta["class_names"], **continual))
            return True
        except (OSError, RuntimeError) as e:
            say(f"step {step}: {to} could not be written ({e}); the checkpoint before it is kept")
            return False

    def log(**record):
        if rank == 0:
            try:
                with open(os.path.join(cfg.out_dir, "log.jsonl"), "a") as f:
                    f.write(json.dumps(dict(run=name, step=step, **record)) + "\n")
            except OSError as e:
                say(f"step {step}: log.jsonl could not be written ({e})")

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

    edges = sample.segment_edges(cfg.cm_segments).to(device, torch.float32)

    def loss_of(model, step, **batch):
        if cfg.loss == "consistency":
            return consistency_objective(model, config, cfg, step, edges, **batch)
        return objective(model, config, mae_weight=cfg.mae_weight, **batch)

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
    log(event="start", config=asdict(cfg), replayed=stream.n_replayed / cfg.batch_size,
        distilled=stream.n_distilled / cfg.batch_size)
    bar = tqdm(total=cfg.steps, initial=step, desc=name, disable=rank > 0, unit="step")
    started = saved = time.time()
    first, seen, bad, waited = step, 0, 0, 0.0
    threads = torch.get_num_threads()
    loader = ThreadPoolExecutor(1, initializer=start_loader, initargs=(device,))
    pending = loader.submit(stream.load, step) if step < cfg.steps else None
    stop = 0
    while step < cfg.steps and not stop:
        asked = time.time()
        batch = pending.result()
        waited += time.time() - asked
        if step == first:
            torch.set_num_threads(threads)  # the loader's call changed MKL's number for all threads
        pending = loader.submit(stream.load, step + 1)
        index = batch.pop("index")
        shared = {key: batch.pop(key) for key in ("references", "reference_labels") if key in batch}
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg, step)
        loss = torch.zeros((), device=device)
        starts = range(0, share, micro)
        with autocast:  # around all parts: the weights are cast once a step
            for i in starts:
                part = {key: None if t is None else t[i : i + micro] for key, t in batch.items()}
                model.require_backward_grad_sync = i == starts[-1]  # DDP: after the last part alone
                weight = part.pop("weight", None)
                part = with_teacher(teacher, **part) if teacher else part
                part_loss = loss_of(model, step, **part, **shared)
                part_loss = (part_loss if weight is None else weight * part_loss).mean()
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
            if strength:  # what is clipped is the loss alone, or little would be learned
                penalty = add_penalty(list(denoiser.parameters()), [*anchor.values()], strength)
            optimizer.step()
            update_ema(ema, denoiser, cfg.ema, step)
            bad = 0
        else:
            bad += 1
            low, high = batch["sigma"].min().item(), batch["sigma"].max().item()
            log(event="skipped", loss=str(loss), grad_norm=str(norm), sigma=[low, high],
                index=index.tolist())
            say(f"step {step} skipped: loss {loss}, gradient norm {norm}, sigma {low:.3g} to "
                f"{high:.3g}")
        optimizer.zero_grad(set_to_none=True)
        step, seen = step + 1, seen + cfg.batch_size
        bar.update()
        if bad >= 10:
            say(f"stopped: {bad} steps in a row were not finite; the last checkpoint is as it was")
            break
        stop = asked_to_stop()
        if cfg.log_every and step % cfg.log_every == 0 and not bad:
            rate = seen / (time.time() - started)
            bar.set_postfix_str(f"loss {loss:.4f}, {rate:.0f} images/s")
            log(loss=loss, grad_norm=norm, lr=learning_rate(cfg, step - 1), images_per_s=rate,
                seconds=time.time() - started, seconds_waited_for_data=waited,
                **({"penalty": penalty.item()} if strength else {}))
        aside = time.time()  # the clock of training stands until the next step
        if cfg.eval_every and step % cfg.eval_every == 0 and step < cfg.steps and not stop:
            evaluate()
        if cfg.sample_every and step % cfg.sample_every == 0 and rank == 0:
            grid = [x for _, x in sample.generate(ema, range(16), seed=cfg.seed)]
            try:
                picture = os.path.join(cfg.out_dir, f"{name}_{step:07d}.png")
                sample.save_grid(picture, np.concatenate(grid))
            except OSError as e:
                say(f"step {step}: the samples could not be written ({e})")
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
    if stop:
        if world > 1:
            dist.barrier()  # torchrun ends all processes when the first one leaves
            dist.destroy_process_group()
        say(f"stopped by {signal.Signals(stop).name} after step {step}"
            + (f": {path} is saved, go on with --resume" if written else ""))
        sys.exit(128 + stop)
    if step > first or not checkpoint:  # a finished run taken up again has nothing to add
        evaluate()
        if not save():
            sys.exit(f"{path} could not be written: free some space and run again with --resume")
    if cfg.ewc and (step > first or "fisher" not in (checkpoint or {})):
        own = fisher_of(cfg, ema.requires_grad_(True), cfg.fisher_batches)
        continual["fisher"] = {n: f + importance[n] for n, f in own.items()}  # for the next task
        save()
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
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
