"""Train a diffusion transformer: first on a few visible patches, then on whole images.

python train.py --mask_ratio=0.9                          # stage 1 -> out/pt.pt
python train.py --init_from=out/pt.pt                     # stage 2 -> out/ft.pt
python train.py --loss=consistency --init_from=out/ft.pt  # 1- or 2-step generator -> out/cm.pt
python train.py --mask_ratio=0.9 --resume                 # continue stage 1 after an interruption
torchrun --nproc_per_node=8 train.py --mask_ratio=0.9     # the same run on 8 GPUs

All stages are one loop. Every draw of step n but dropout's is made for the global batch, by a
generator of (seed, purpose, n): resuming is exact, more processes change rounding and dropout.
"""

import gc
import importlib.util
import json
import math
import os
import shutil
import signal
import sys
import sysconfig
import time
import warnings
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, fields
from datetime import timedelta
from functools import lru_cache, partial

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # idle OpenMP threads give up a busy core quickly
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn  # before there is a group, or its default arguments keep that alive
from torch.nn.parallel import DistributedDataParallel as DDP

import sample
from model import (
    CONSISTENCY_WEIGHTS, MASKS, NETWORK, NOISE, OBJECTIVES, P_MEAN, P_STD, Denoiser, ModelConfig,
    Muon, blocks_of, distill_targets, find_checkpoint, fisher_information, load_checkpoint,
    load_what_fits, make_mask, normalised, objective, patchify, previous, save_checkpoint, sigma_of)
from prepare_data import Images, Parser, check, on_stop_signals, progress_bar, run_script
from sample import RANK, WORLD_SIZE, print0
if os.name == "posix":
    import fcntl  # to lock a file

# ---- Presets: flags of a network and of its stages pt (masked), ft (whole), cm (consistency). A
# stage that is absent is taken from RECIPES, never merged with it. `parse`'s defaults are MaskDM's.
ECT = ("--steps=200_000 --init_weights=ema --label_dropout=0 --dropout=0.2 --dtype=float32 "
       "--optimizer=radam --lr=1e-4 --beta1=0.9 --beta2=0.999 --weight_decay=0 --ema=0.9999 "
       "--p_mean=-1.1 --p_std=2 --cm_stages=8 --sample_every=5000 ")  # arXiv 2406.14548, CIFAR-10
DIT = "--lr=1e-4 --beta1=0.9 --beta2=0.999 --weight_decay=0 --ema=0.9999 "
DEMO = ("--optimizer=muon --lr=2e-3 --beta1=0.9 --lr_schedule=cosine --warmup=100 --grad_clip=1 "
        "--eval_every=1150 --save_every=500 ")
RECIPES = dict(pt="--batch_size=256", ft="--sample_every=5000", cm=ECT)
PRESETS = {
    "demo": dict(  # two CPU cores, five minutes of training
        network="--dim=128 --depth=6 --heads=4 --patch_size=4",
        pt=DEMO + "--batch_size=48 --steps=2300 --mask_type=crop --lr=4e-3 --lr_schedule=constant",
        ft=DEMO + "--batch_size=4 --steps=3400 --sample_every=1700",
        cm=ECT + "--batch_size=32 --steps=1200 --lr=2e-3 --lr_schedule=cosine "
        "--ema=0.995 --cm_stages=4 --eval_every=500 --sample_every=400 --save_every=500"),
    "maskdm-64": dict(network="--dim=512 --depth=13 --heads=8 --patch_size=4"),
    "maskdm-256": dict(
        network="--dim=768 --depth=13 --heads=12 --patch_size=4",
        pt="--batch_size=256 --block_size=4 --grad_clip=1",
        ft="--batch_size=32 --lr=1e-5 --warmup=5000 --grad_clip=1"),
    "maskdit-xl": dict(
        network="--dim=1152 --depth=28 --heads=16 --patch_size=2 --class_cond "
        "--decoder_depth=8 --decoder_dim=512 --decoder_heads=16",
        pt=DIT + "--batch_size=1024 --steps=2_000_000 --mask_type=patch",
        ft=DIT + "--batch_size=512 --steps=100_000 --lr=5e-5 --dtype=float32 --tf32"),
    "tread-b": dict(
        network="--dim=768 --depth=12 --heads=12 --patch_size=2 --class_cond --route=2,9",
        pt=DIT + "--batch_size=256 --steps=400_000 --mask_type=patch", ft=DIT + "--batch_size=256"),
    "dit-s": dict(network="--dim=384 --depth=12 --heads=6 --patch_size=2"),
    "dit-b": dict(network="--dim=768 --depth=12 --heads=12 --patch_size=2"),
    "dit-l": dict(network="--dim=1024 --depth=24 --heads=16 --patch_size=2"),
    "dit-xl": dict(network="--dim=1152 --depth=28 --heads=16 --patch_size=2"),
    "ect-cifar10": dict(network="--dim=384 --depth=12 --heads=6 --patch_size=2"),
    "ect-cifar10-1h": dict(network="--dim=384 --depth=12 --heads=6 --patch_size=2",
                           cm=ECT + "--steps=8000 --cm_stages=1 --cm_q=256 --ema=0.9993"),
    "ect-imagenet64": dict(
        network="--dim=768 --depth=12 --heads=12 --patch_size=4",
        cm=ECT + "--steps=100_000 --dropout=0.4 --optimizer=adamw --lr=1e-3 --lr_schedule=rsqrt "
        "--beta2=.99 --p_mean=-0.8 --p_std=1.6 --cm_stages=4 --cm_q=4 --cm_c=0.06 --cm_weight=edm"),
}

# ---- Settings. Precedence: command line > with --resume the run's > the preset's recipe for the
# stage > the default in `parse`. A network is inherited from the checkpoint that a run starts from.
NETWORK_SETTINGS = {f.name: f for f in fields(ModelConfig) if f.metadata}  # those that are flags
NOT_STORED = ("out_dir", "resume", "force", "device", "compile")  # of this command, not of the run

SCHEDULES = {  # factor of the learning rate; progress goes from 0 (after warm-up) to 1
    "constant": lambda step, progress: 1.0,
    "cosine": lambda step, progress: 0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2,
    "rsqrt": lambda step, progress: max(1, step / 2000) ** -0.5,
}
ADAMW = partial(torch.optim.AdamW, fused=True)
OPTIMIZERS = {
    "adamw": ADAMW,
    "muon": ADAMW,  # and Muon for the matrices of the blocks: see configure_optimizers
    "radam": partial(torch.optim.RAdam, decoupled_weight_decay=True),
}

def parse(argv):
    """-> settings; the checkpoint to resume or to start from, or None; whether it is resumed.
    Each set_defaults overrides those before; --help prints what the command would use."""
    parser = Parser(__doc__)
    add = parser.add
    add("data", "data/faces", "prepared set, or several separated by commas")
    add("out_dir", "out", "folder for checkpoints, samples and log.jsonl")
    add("init_from", None, "start from the weights of this checkpoint")
    add("init_weights", "raw", "which of its weights", choices=sample.WEIGHTS)
    add("resume", False, "continue the run of this stage in out_dir, if there is one")
    add("force", False, "replace the run of this stage in out_dir, if there is one")
    add("preset", "demo", "network and recipe", choices=PRESETS)
    for f in NETWORK_SETTINGS.values():
        add(f.name, f.default, **f.metadata)
    add("class_cond", False, "condition on the labels of the data set")
    add("label_dropout", 0.1, "probability of replacing a label with the null class", high=1)
    add("hflip", False, "flip half of the images horizontally")
    add("mask_ratio", 0.0, "share of hidden patches; stage 1 hides some", high=1)
    add("mask_type", "block", "what to hide: patches, blocks, or all but one square", choices=MASKS)
    add("block_size", 2, "side of a hidden block in patches", low=1)
    add("loss", "diffusion", "objective", choices=OBJECTIVES)
    add("p_mean", P_MEAN, "mean of ln sigma", low=-math.inf)
    add("p_std", P_STD, "standard deviation of ln sigma")
    add("mae_weight", 0.1, "weight of the reconstruction of hidden patches by a decoder")
    add("cm_stages", 4, "stages; each divides the gap 1 - r/t of a pair by cm_q", low=1)
    add("cm_q", 2.0, "what the gap is divided by", low=1)
    add("cm_c", 0.0, "constant of the pseudo-Huber distance")
    add("cm_weight", "gap", "1/(t - r), or 1/t^2 + 1/sigma_data^2", choices=CONSISTENCY_WEIGHTS)
    add("ref_batch", 0, "images averaged for the target (SCT); 0 or 1 = none (ECT)")
    # Continual learning.
    add("replay", None, "prepared sets of old images to mix into every batch")
    add("replay_frac", 0.5, "share of old images in a batch")
    add("replay_coef", 1.0, "weight of the loss on old images")
    add("distill_from", None, "checkpoint that predicts the targets of old images")
    add("l2", 0.0, "penalty on the distance to the weights of init_from")
    add("ewc", 0.0, "the same, scaled by the Fisher information of each weight")
    add("ewc_data", None, "sets to estimate it on; None = those of init_from")
    # Optimization.
    add("batch_size", 128, "images per step over all processes", low=1)
    add("micro_batch", 0, "images per forward pass; 0 = all, on a CPU what fits its caches")
    add("steps", 200_000, "optimizer steps of the whole run", low=1)
    add("optimizer", "adamw", "muon trains the matrices, AdamW the rest", choices=OPTIMIZERS)
    add("lr", 2e-4, "learning rate")
    add("lr_schedule", "constant", "learning rate after warm-up", choices=SCHEDULES)
    add("warmup", 0, "steps of linear warm-up")
    add("weight_decay", 0.03, "decoupled weight decay")
    add("beta1", 0.99, "first beta of Adam", high=1)
    add("beta2", 0.99, "second beta of Adam", high=1)
    add("grad_clip", 0.0, "largest norm of the gradient; 0 = no limit")
    add("dropout", 0.0, "dropout in the MLPs of the blocks, in training", high=1)
    add("ema", 0.999, "decay of the averaged weights", high=1)
    add("seed", 0, "seed of every random draw")
    add("device", "auto", "where to run", choices=("auto", "cpu", "cuda"))
    add("dtype", "auto", "autocast dtype", choices=("auto", "float32", "bfloat16"))
    add("tf32", False, "multiply in TF32 where --dtype is float32 (CUDA): faster, less exact")
    add("compile", True, "torch.compile the blocks of the network (CUDA)")
    # Reports; 0 = never.
    add("log_every", 10, "steps between lines in log.jsonl")
    add("eval_every", 2000, "steps between validations; there is always one at the end")
    add("sample_every", 0, "steps between grids of samples in out_dir")
    add("save_every", 2000, "steps between checkpoints; there is always one at the end")
    add("keep_every", 0, "steps between checkpoints that are kept, NAME-STEP.pt")
    flags = [flag for flag in argv if flag not in ("-h", "--help")]
    cfg = parser.parse_args(flags)  # tells the stage; its recipe and the preset come below
    checkpoint = find_checkpoint(out_path(cfg, ".pt")) if cfg.resume else None  # of this stage
    resumed = checkpoint is not None
    if cfg.init_from and not resumed:
        checkpoint = load_checkpoint(cfg.init_from)
    # Default preset: the checkpoint's; for a new run maskdm-64 on a GPU, demo on a CPU.
    if checkpoint:
        parser.set_defaults(preset=checkpoint["config"].get("preset", "demo"))
    elif sample.pick_device(cfg.device).type == "cuda":
        parser.set_defaults(preset="maskdm-64")
    preset = RECIPES | PRESETS[parser.parse_args(flags).preset]
    recipe = f"{preset['network']} {preset[stage_of(cfg)]}"
    parser.set_defaults(**vars(parser.parse_args(recipe.split())))
    # Round the recipe's batch up to a multiple of the number of processes.
    local_batch = math.ceil(parser.get_default("batch_size") / WORLD_SIZE)
    parser.set_defaults(batch_size=local_batch * WORLD_SIZE)
    if checkpoint:
        architecture = checkpoint["architecture"]
        parser.set_defaults(class_cond=architecture["num_classes"] > 0)
        parser.set_defaults(**{name: architecture[name] for name in NETWORK_SETTINGS})
    if resumed:
        parser.set_defaults(**checkpoint["config"])
    parser.set_defaults(**vars(parser.parse_args(flags)))  # so that --help prints final values
    return parser.parse_args(argv), checkpoint, resumed

def stage_of(cfg):
    """pt: masked (stage 1), ft: whole images (stage 2), cm: consistency tuning."""
    if cfg.loss == "consistency":
        return "cm"
    return "pt" if cfg.mask_ratio > 0 else "ft"

def out_path(cfg, ending):
    return os.path.join(cfg.out_dir, stage_of(cfg) + ending)

# ---- The stream. Purposes of seeds: 0 order, 1 draws, 2 noise, 3 fixed, 4 init, 5 refs, 6 dropout.
@lru_cache(8)
def shuffled(n, seed, epoch):
    return torch.randperm(n, generator=sample.seeded(seed, 0, epoch)).numpy()

class Stream:
    """Batches by step number. The first `num_new` images are new, the others old (--replay). In a
    batch the new ones come first; both are walked through in epochs, so any step can be loaded."""
    def __init__(self, images, num_new, cfg, config, device, rank=RANK, world_size=WORLD_SIZE):
        self.images, self.cfg, self.config, self.device = images, cfg, config, device
        self.rank_slice = slice(rank, None, world_size)  # every world_size-th: some new, some old
        num_old = len(images) - num_new
        old_batch = 0
        if cfg.replay:
            old_batch = round(cfg.replay_frac * cfg.batch_size)
            check(num_old and 0 < old_batch <= cfg.batch_size,
                  f"--replay gives {old_batch} of {num_old} old images to a batch")
        new_batch = cfg.batch_size - old_batch
        self.local_new = len(range(rank, new_batch, world_size))
        # (images per batch, images in all, number of the first) of the new and of the old images.
        self.sources = [(new_batch, num_new, 0), (old_batch, num_old, num_new)]
        # The mean of weight * loss over a batch is to be L_new + replay_coef * L_old.
        self.weight = torch.full((cfg.batch_size,), cfg.batch_size / max(new_batch, 1))
        self.weight[new_batch:] = cfg.replay_coef * cfg.batch_size / max(old_batch, 1)
        self.num_visible, self.draw_mask = config.grid**2, None
        if cfg.mask_ratio > 0:
            self.num_visible, self.draw_mask = make_mask(
                cfg.mask_type, config.grid, cfg.mask_ratio, cfg.block_size)
        if cfg.ref_batch > 1:
            check(cfg.mask_ratio == 0, "--ref_batch needs whole images: give --mask_ratio=0")
            # A pool holds the images of one class (without classes: all), either new or old.
            labels = images.labels.tolist() if config.num_classes else [-1] * len(images)
            self.pool_of = [(label, i >= num_new) for i, label in enumerate(labels)]
            self.pools = defaultdict(list)
            for i, pool in enumerate(self.pool_of):
                self.pools[pool].append(i)

    def index(self, step):
        """Image numbers of the global batch, (batch_size,)."""
        numbers = []
        for count, size, offset in self.sources:
            for position in range(step * count, (step + 1) * count):
                epoch, i = divmod(position, size)
                numbers.append(offset + shuffled(size, self.cfg.seed, epoch)[i])
        return np.array(numbers)

    def load(self, step):
        """This process's part of the batch, on the device: what `objective` is told, and the
        weight of each image's loss, (b,). K = N if the network takes all tokens."""
        cfg, rows = self.cfg, self.rank_slice
        n = cfg.batch_size
        g = sample.seeded(cfg.seed, 1, step)
        sigma = sigma_of(torch.randn(n, generator=g), cfg.p_mean, cfg.p_std)
        flip = self.draw_flips(n, g)[rows]
        dropped = torch.rand(n, generator=g) < cfg.label_dropout
        index = self.index(step)[rows]
        batch = dict(sigma=sigma[rows], weight=self.weight[rows])
        to_read = None  # all; with a decoder or --route the network takes hidden patches, too
        if self.draw_mask:
            batch["visible"] = self.draw_mask(n, g, rows)
            if not self.config.takes_all:
                to_read = batch["visible"].numpy()
        if self.config.num_classes:
            labels = torch.from_numpy(self.images.labels[index])
            batch["labels"] = labels.masked_fill(dropped[rows], -1)
        batch = {name: self.move(tensor) for name, tensor in batch.items()}
        batch["clean"] = self.read(index, to_read, flip)
        g = sample.seeded(cfg.seed, 2, step, device=self.device)
        noise = torch.randn(n, *batch["clean"].shape[1:], generator=g, device=self.device)
        batch["noise"] = noise[rows].contiguous()
        if cfg.ref_batch > 1:
            batch.update(self.references(step))
        return batch

    def draw_flips(self, n, generator):
        return (torch.rand(n, generator=generator).numpy() < 0.5) & self.cfg.hflip

    def read(self, index, visible, flip):
        """Patches (b, K, p*p*C) of some images, normalised; all N if visible is None."""
        patches = torch.from_numpy(self.images.read(index, visible, flip))
        return normalised(self.move(patches), self.config.latent)

    def references(self, step):
        """The images that SCT averages, whole and of the batch's classes, and their labels."""
        n = self.cfg.ref_batch - 1  # an image is itself the first of its references
        g = sample.seeded(self.cfg.seed, 5, step)
        uniform = torch.rand(n, generator=g, dtype=torch.float64).tolist()
        # Reference j comes from the pool of image j * batch_size // n of the batch.
        batch_index = self.index(step)[np.arange(n) * self.cfg.batch_size // n]
        pools = [self.pools[self.pool_of[i]] for i in batch_index]
        index = np.array([pool[int(u * len(pool))] for pool, u in zip(pools, uniform)])
        labels = torch.from_numpy(self.images.labels[index])
        images = self.read(index, None, self.draw_flips(n, g))
        return dict(references=images, reference_labels=self.move(labels))

    def move(self, tensor):
        """To the device, without waiting for a GPU."""
        if self.device.type == "cuda":
            tensor = tensor.contiguous().pin_memory()
        return tensor.to(self.device, non_blocking=True)

def fixed_batch(images, config, device, rows=slice(None)):
    """Up to 512 whole images, evenly spaced, with noise, at levels of P_MEAN and P_STD: the same
    in every run, for validation and Fisher information. rows: those that this process takes."""
    n = min(len(images), 512)
    index = np.linspace(0, len(images) - 1, n).astype(int)[rows]
    patches = torch.from_numpy(images.read(index, None, np.zeros(len(index), bool)))
    g = sample.seeded(0, 3)
    quantile = (torch.randperm(n, generator=g) + 0.5) / n
    noise = torch.randn(n, config.image_size, config.image_size, config.channels, generator=g)
    sigma = sigma_of(torch.special.ndtri(quantile[rows]))
    noise = patchify(noise[rows], config.patch_size)
    batch = dict(clean=normalised(patches, config.latent), noise=noise, sigma=sigma)
    if config.num_classes:
        batch["labels"] = torch.from_numpy(images.labels[index])
    return {name: tensor.to(device) for name, tensor in batch.items()}

# ---- Optimizers.
def learning_rate(cfg, step, peak):
    """Linear warm-up to `peak`, then the schedule."""
    progress = min(1.0, max(0, step - cfg.warmup) / max(1, cfg.steps - cfg.warmup))
    warmup = min(1.0, (step + 1) / (cfg.warmup + 1))
    return peak * warmup * SCHEDULES[cfg.lr_schedule](step, progress)

def configure_optimizers(denoiser, cfg):
    """A list of optimizers, each built from (name, parameter) pairs."""
    named = list(denoiser.named_parameters())
    blocks = blocks_of(denoiser) if cfg.optimizer == "muon" else []
    matrices = {p for block in blocks for p in block.matrices()}
    others = [(name, p) for name, p in named if p not in matrices]
    settings = dict(lr=cfg.lr, weight_decay=cfg.weight_decay)
    optimizers = [OPTIMIZERS[cfg.optimizer](others, betas=(cfg.beta1, cfg.beta2), **settings)]
    if matrices:
        named_matrices = [(name, p) for name, p in named if p in matrices]
        muon = Muon(named_matrices, settings)
        if named[0][1].device.type == "cuda":  # the same, but multiplies in bfloat16
            muon = torch.optim.Muon(named_matrices, adjust_lr_fn="match_rms_adamw", **settings)
        optimizers.append(muon)
    return optimizers

def set_learning_rates(optimizers, cfg, step):
    """Every group follows the schedule from the rate that it was configured with."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            peak = group.setdefault("initial_lr", group["lr"])
            group["lr"] = learning_rate(cfg, step, peak)

# ---- Processes: torchrun and DDP. All ranks call these. FSDP2 would replace this section.
def setup(cfg):
    """Join the other processes; returns the device of this one and its autocast."""
    device = sample.pick_device(cfg.device)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = cfg.tf32
        # cuDNN's backward gave NaN for 64 and 192 tokens (pytorch issue 196678); others do not.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if WORLD_SIZE > 1:  # an hour, because saving a large model can take more than ten minutes
        dist.init_process_group(device_id=device if cuda else None, timeout=timedelta(hours=1))
    dtype = sample.pick_dtype(cfg.dtype, device)
    return device, torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

def wrap(cfg, denoiser, ema, device):
    """Set dropout, compile the blocks, and average gradients over processes (DDP). A fork that
    shards the weights does it here, also to `ema`, before the optimizers are built."""
    blocks = blocks_of(denoiser)
    for block in blocks:
        block.dropout = cfg.dropout
    if cfg.compile and device.type == "cuda" and importlib.util.find_spec("triton"):
        header = f"{sysconfig.get_path('include')}/Python.h"
        compiler = shutil.which(os.environ.get("CC", "cc"))
        check(compiler and os.path.exists(header), "no C compiler or no Python.h: --no-compile")
        torch._dynamo.config.optimize_ddp = False  # compiled blocks already overlap communication
        for block in blocks:  # all share one graph; fallback_random: dropout by torch's seed
            block.compile(dynamic=False, options=dict(combo_kernels=True, fallback_random=True))
    if WORLD_SIZE == 1:
        return denoiser
    return DDP(denoiser, gradient_as_bucket_view=True, forward_sync_buffers=False)

def sync_gradients(model, now):
    """Let the next backward pass average the gradients over the processes, or not."""
    model.require_backward_grad_sync = now

def sum_over_processes(tensor):
    if WORLD_SIZE > 1:
        dist.all_reduce(tensor)
    return tensor

def gather_state(denoiser, ema, optimizers):
    """Whole tensors, for a checkpoint."""
    return dict(model=denoiser.state_dict(), ema=ema.state_dict(),
                optimizer=[optimizer.state_dict() for optimizer in optimizers])

def group_layout(states):  # "initial_lr" is there only after the first step
    return [[(group["param_names"], group.keys() - {"initial_lr"})
             for group in state["param_groups"]] for state in states]

def restore_optimizers(optimizers, stored):
    """Give each optimizer a copy of the saved moments; rates and betas remain this command's."""
    states = [optimizer.state_dict() for optimizer in optimizers]
    check(group_layout(states) == group_layout(stored),
          "the run to resume had another optimizer: give --init_from instead")
    for optimizer, current, saved in zip(optimizers, states, stored):
        optimizer.load_state_dict(current | dict(state=deepcopy(saved["state"])))

def leave():
    """Let go of the other processes. Nothing may hold on to the process group by now."""
    if WORLD_SIZE > 1:
        gc.collect()  # DDP refers to itself: its group, alive at exit, may abort the process
        dist.barrier()
        dist.destroy_process_group()

# ---- What a run works with.
def build(cfg, checkpoint, resumed, device):
    """New and old images, and the network and its average with the weights to start from."""
    known = []  # classes that the model knows already keep their numbers
    if checkpoint and cfg.class_cond:
        known = checkpoint["class_names"] or []
    folders = f"{cfg.data},{cfg.replay}" if cfg.replay else cfg.data
    images = Images(folders, "train", cfg.patch_size, known)
    meta = images.meta
    names = meta["class_names"] or []
    check(names or not cfg.class_cond, f"{cfg.data} has no labels: give --no-class_cond")
    num_classes = len(names) if cfg.class_cond else 0
    # A network keeps the scale of latents that it was trained on.
    latent = checkpoint["architecture"]["latent"] if checkpoint else meta["latent"]
    config = ModelConfig(
        **{name: getattr(cfg, name) for name in NETWORK_SETTINGS}, num_classes=num_classes,
        image_size=meta["size"], channels=meta["channels"], latent=latent or (),
        consistency=cfg.loss == "consistency")
    torch.manual_seed(sample.seed_of(cfg.seed, 4))
    denoiser = Denoiser(config).to(device)
    if resumed:
        different = dict(checkpoint["architecture"].items() - asdict(config).items())
        check(not different, f"the run to resume has {different}: give --init_from instead")
        denoiser.load_state_dict(checkpoint["model"])
    elif checkpoint:
        fresh = load_what_fits(denoiser, checkpoint[sample.WEIGHTS[cfg.init_weights]])
        fresh += names[len(known) : num_classes]
        if fresh:
            print0(f"these start from random weights: {fresh}")
    ema = deepcopy(denoiser).eval().requires_grad_(False)
    if resumed:
        ema.load_state_dict(checkpoint["ema"])
    return images, denoiser, ema

def load_teacher(cfg, config, names, device):
    """The network of --distill_from, if its predictions mean the same as this one's."""
    teacher, stored = sample.load_denoiser(cfg.distill_from, "ema", device)
    known = stored["class_names"]
    same = sample.same_task(teacher.config, config) and teacher.config.takes_all == config.takes_all
    same_classes = known == names[: len(known)] and len(known) <= config.num_classes
    check(same and same_classes and cfg.replay and cfg.loss == "diffusion",
          f"--distill_from={cfg.distill_from} needs --replay, --loss=diffusion and equal classes")
    return teacher

def weight_penalties(cfg, config, names, device, autocast):
    """{name: (p0, c)} for a penalty 1/2 c (p - p0)^2, which pulls a weight to p0, its value in
    init_from, or to zero for classes that are new; c = l2 + ewc * Fisher information."""
    check(cfg.init_from, "--l2 and --ewc need --init_from, whose weights they hold on to")
    stored = load_checkpoint(cfg.init_from)
    anchor = Denoiser(config).to(device)
    for p in anchor.parameters():
        p.data.zero_()
    fresh = load_what_fits(anchor, stored[sample.WEIGHTS[cfg.init_weights]])
    check(not fresh, f"--l2 and --ewc: {cfg.init_from} lacks the weights {fresh}")
    fisher = defaultdict(float)
    if cfg.ewc:
        folders = cfg.ewc_data or stored["config"].get("data")
        check(folders, f"{cfg.init_from} does not say on what it was trained: give --ewc_data")
        images = Images(folders, "train", cfg.patch_size, names)
        no_new = not config.num_classes or images.meta["class_names"] == names
        check(no_new, f"{folders} has classes that this model does not know")
        batch = fixed_batch(images, config, device)
        if config.num_classes:
            batch["labels"][::10] = -1  # so that the null class counts, too
        fisher = fisher_information(anchor, batch, autocast)
    return {name: (p.detach(), cfg.l2 + cfg.ewc * fisher[name])
            for name, p in anchor.named_parameters()}

def start_loader(stream, step, device):
    """A thread that loads batches during the steps, and the future of the first batch."""
    threads = torch.get_num_threads()
    loader = ThreadPoolExecutor(1)
    loader.submit(torch.set_num_threads, 1)  # leave the other cores to the training step
    if device.type == "cuda":
        loader.submit(torch.cuda.set_device, device)  # or the new thread takes the first GPU
    pending = loader.submit(stream.load, step)
    pending.result()  # by now the loader has set its 1, and lowered this thread's number with it
    torch.set_num_threads(threads)  # ours again; from here it does not reach the loader
    return loader, pending

# ---- Parts of a step.
def slice_batch(batch, start, size):
    """Images start to start + size of a batch. The references are for all of them."""
    return {name: tensor if "reference" in name else tensor[start : start + size]
            for name, tensor in batch.items()}

def accumulate_gradients(model, teacher, batch, cfg, step, micro_batch, local_new):
    """Forward and backward passes over this process's images; returns {name: mean loss}."""
    local_batch = len(batch["clean"])
    num_passes = local_batch // micro_batch
    means = defaultdict(float)
    for start in range(0, local_batch, micro_batch):
        chunk = slice_batch(batch, start, micro_batch)
        chunk["seed"] = sample.seed_of(cfg.seed, 6, step, start, RANK)
        sync_gradients(model, start + micro_batch == local_batch)  # only the last time
        try:
            if teacher:
                chunk["target"] = distill_targets(teacher, chunk, local_new - start)  # may be < 0
            losses = objective(model, chunk, cfg, step)
            total = (chunk["weight"] * sum(losses.values())).mean()
            (total / num_passes).backward()
        except torch.OutOfMemoryError:
            check(False, f"out of memory: give a --micro_batch below {micro_batch}")
        for name, loss in losses.items():
            means[name] += (chunk["weight"] * loss.detach()).mean() / num_passes
    return means

@torch.no_grad()
def update_ema(ema, denoiser, cfg, step):
    """Average the weights. Early decay is smaller, except where ECT or MaskDiT tune a model."""
    decay = cfg.ema
    tuning = cfg.loss == "consistency" or cfg.decoder_depth > 0  # a decoder: MaskDiT
    if not (cfg.init_from and tuning):
        decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(denoiser.parameters()), 1 - decay)

@torch.no_grad()
def evaluate(ema, validation, cfg, eval_batch):
    """Mean loss of the EMA over all processes; for consistency, at the gap of the last stage."""
    total = validation["sigma"].new_zeros(2, dtype=torch.float64)  # the loss; the number of images
    for start in range(0, len(validation["clean"]), eval_batch):
        chunk = slice_batch(validation, start, eval_batch)
        losses = sum(objective(ema, chunk, cfg, cfg.steps - 1).values())
        total += torch.stack([losses, torch.ones_like(losses)]).sum(dim=1)
    loss, num_images = sum_over_processes(total).tolist()
    return loss / num_images

@contextmanager
def open_log(cfg):
    """-> log(step, **record), which adds a line to log.jsonl. A second log (wandb, ...) belongs
    here. Meanwhile no other run can write to out_dir; a killed run leaves no lock behind."""
    path = os.path.join(cfg.out_dir, "log.jsonl")
    with open(path if RANK == 0 else os.devnull, "ab", buffering=0) as file:
        try:
            if RANK == 0 and os.name == "posix":
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            check(False, f"another run is writing to {cfg.out_dir}: give another --out_dir")
        except OSError:
            pass  # a file system without locks
        def log(step, **record):
            line = json.dumps(dict(run=stage_of(cfg), step=step, **record))
            try:
                file.write(f"{line}\n".encode())
            except OSError as error:  # a full disk should not end the run before its checkpoint
                warnings.warn(f"lines of {path} are lost: {error}")
        yield log

def due(step, every):  # 0 = never
    return every and step % every == 0

# ---- The run.
MAX_BAD_STEPS = 10  # in a row
def train(cfg, checkpoint, resumed, log):
    path = out_path(cfg, ".pt")
    device, autocast = setup(cfg)
    images, denoiser, ema = build(cfg, checkpoint, resumed, device)
    names = images.meta["class_names"] or []
    config = denoiser.config
    model = wrap(cfg, denoiser, ema, device)
    optimizers = configure_optimizers(denoiser, cfg)
    step = 0
    if resumed:
        restore_optimizers(optimizers, checkpoint["optimizer"])
        step = checkpoint["step"]
    teacher = load_teacher(cfg, config, names, device) if cfg.distill_from else None
    penalties = weight_penalties(cfg, config, names, device, autocast) if cfg.l2 or cfg.ewc else {}
    stream = Stream(images, len(Images(cfg.data)), cfg, config, device)  # images: new, then old
    num_tokens = config.grid**2 if config.takes_all else stream.num_visible
    local_batch = max(1, cfg.batch_size // WORLD_SIZE)
    micro_batch = cfg.micro_batch or sample.images_per_pass(local_batch, num_tokens, config, device)
    check(cfg.batch_size % (WORLD_SIZE * micro_batch) == 0, f"batch_size {cfg.batch_size} is not "
          f"a multiple of {WORLD_SIZE} processes x micro_batch {micro_batch}")
    eval_batch = sample.images_per_pass(64, config.grid**2, config, device)
    held_out = Images(cfg.data, "val", cfg.patch_size, names)
    validation = fixed_batch(held_out, config, device, stream.rank_slice)

    def save(path):
        settings = {name: v for name, v in vars(cfg).items() if name not in NOT_STORED}
        about = dict(step=step, config=settings, architecture=asdict(config),
                     class_names=names or None, noise=NOISE, network=NETWORK)
        state = gather_state(denoiser, ema, optimizers)
        if RANK == 0:
            save_checkpoint(path, state | about)
    parameters = list(denoiser.parameters())
    received = []  # signals to stop, after the step that is running
    on_stop_signals(lambda number, frame: received.append(number))
    log(step, event="start", config=vars(cfg))
    print0(f"{path} starts at step {step}: {sum(p.numel() for p in parameters) / 1e6:.2f} M weights"
           f" on {WORLD_SIZE} x {device}, {stream.num_visible} of {config.grid**2} patches visible")
    bar = progress_bar(total=cfg.steps, initial=step, desc=stage_of(cfg), disable=RANK > 0)
    loader, pending = start_loader(stream, step, device)
    seconds = first_seconds = 0.0  # of steps, without reports; of the first step
    first_step, bad_steps, stopping = step, 0, False
    while step < cfg.steps and not stopping and bad_steps < MAX_BAD_STEPS:
        began = time.time()
        batch = pending.result()
        pending = loader.submit(stream.load, step + 1)
        set_learning_rates(optimizers, cfg, step)
        with autocast:  # around all passes, so that the weights are cast once
            losses = accumulate_gradients(
                model, teacher, batch, cfg, step, micro_batch, stream.local_new)
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        if cfg.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(parameters, cfg.grad_clip, norm)
        # What all processes must agree on, in one sum: the losses, and whether any is to stop.
        num_signals = torch.full_like(norm, len(received))
        totals = sum_over_processes(torch.stack([*losses.values(), num_signals]))
        # The norm is the same everywhere. This copy is the only wait for a GPU.
        *sums, num_signals, grad_norm = torch.cat([totals, norm[None]]).tolist()
        stopping = num_signals > 0
        mean_losses = {name: value / WORLD_SIZE for name, value in zip(losses, sums)}
        loss = sum(mean_losses.values())
        if math.isfinite(loss + grad_norm):
            for name, (anchor, strength) in penalties.items():
                p = denoiser.get_parameter(name)
                p.grad.add_((p.detach() - anchor) * strength)  # not clipped, to keep its strength
            for optimizer in optimizers:
                optimizer.step()
            update_ema(ema, denoiser, cfg, step)
            bad_steps = 0
        else:
            bad_steps += 1
            log(step, event="skipped", loss=str(loss), grad_norm=str(grad_norm),
                index=stream.index(step).tolist())
            print0(f"step {step} skipped: loss {loss}, gradient norm {grad_norm}")
        denoiser.zero_grad()
        step += 1
        bar.update()
        seconds += time.time() - began
        if step == first_step + 1:
            first_seconds = seconds  # it may have compiled
        if due(step, cfg.log_every) and bad_steps == 0:
            rate = (step - first_step - 1) * cfg.batch_size / max(seconds - first_seconds, 1e-9)
            bar.set_postfix_str(f"loss {loss:.4f}, {rate:.0f} images/s", refresh=False)
            log(step, loss=loss, **mean_losses, grad_norm=grad_norm,
                lr=optimizers[0].param_groups[0]["lr"], images_per_s=rate, seconds=seconds)
        evaluating = step == cfg.steps or due(step, cfg.eval_every)
        if evaluating and len(held_out):
            with autocast:
                val_loss = evaluate(ema, validation, cfg, eval_batch)
            log(step, val_loss=val_loss)
            print0(f"step {step}: validation loss {val_loss:.4f}")
        if due(step, cfg.sample_every) and not config.latent:
            batches = list(sample.generate(ema, range(16), seed=cfg.seed))  # all ranks, for FSDP2
            if RANK == 0:
                sample.save_grid(out_path(cfg, f"_{step:07d}.png"), np.concatenate(batches))
        ending = stopping or step == cfg.steps  # saves even if just skipped: no weight changed
        if ending and bad_steps < MAX_BAD_STEPS:
            save(path)
        elif bad_steps == 0 and due(step, cfg.save_every):
            save(path)
        if bad_steps == 0 and due(step, cfg.keep_every):
            save(out_path(cfg, f"-{step:07d}.pt"))
    bar.close()
    loader.shutdown()
    del model  # DDP holds on to the process group
    leave()
    if bad_steps == MAX_BAD_STEPS:
        print0("ten steps in a row were not finite: start a new run with --init_from, a lower --lr")
        sys.exit(3)
    if step < cfg.steps:
        print0(f"stopped after step {step}: continue with --resume")
        sys.exit(128 + (received or [signal.SIGTERM])[0])  # or another process received it
    print0(f"{path} is at step {step}")

def main(argv):
    check("RANK" in os.environ or os.environ.get("SLURM_NTASKS", "1") == "1", "srun would start "
          "independent copies: use srun torchrun --nproc_per_node=GPUS train.py, one task a node")
    cfg, checkpoint, resumed = parse(argv)
    path = out_path(cfg, ".pt")
    own = os.path.realpath(out_path(cfg, ""))  # so begin the names of this run's files
    for file in filter(None, (cfg.init_from, cfg.distill_from)):
        check(not os.path.realpath(file).startswith(own), f"{file} may be lost: change --out_dir")
    for file in (path, previous(path)):
        check(resumed or cfg.force or not os.path.exists(file), f"{file} is of an earlier run: "
              "continue it with --resume, give another --out_dir, or replace it with --force")
    os.makedirs(cfg.out_dir, exist_ok=True)
    with open_log(cfg) as log:
        train(cfg, checkpoint, resumed, log)

if __name__ == "__main__":
    run_script(main)
