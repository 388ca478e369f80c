"""Train a diffusion transformer in two stages: on a few visible patches, then on whole images.

python train.py --mask_ratio=0.9                          # stage 1 -> out/pt.pt
python train.py --init_from=out/pt.pt                     # stage 2 -> out/ft.pt
python train.py --loss=consistency --init_from=out/ft.pt  # for 1 or 2 steps -> out/cm.pt
torchrun --nproc_per_node=8 train.py --mask_ratio=0.9     # on 8 GPUs, with settings for them
python train.py --resume                                  # go on after an interruption

Stage 2 is the same loop with everything visible. Every draw of step n, for the global batch, is
seeded by (seed, use, n): resuming is exact, and more processes change speed and rounding alone.
"""

import json
import math
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import asdict
from functools import lru_cache, partial
from importlib.util import find_spec

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # threads that wait soon leave a busy core

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import sample
from model import (NOISE, P_MEAN, P_STD, PRESETS, Denoiser, Images, ModelConfig, Muon,
                   consistency_objective, count_visible, diffusion_objective, fisher_information,
                   load_checkpoint, load_what_fits, need_noise, normalised, patchify,
                   replace_file, sample_visible, sigma_of, teach)
from prepare_data import Parser, need

# ---- Settings: typed, else the resumed run's, else CONSISTENCY, DEFAULTS, those in parse().
GPU = dict(preset="maskdm-64", optimizer="adamw", beta1=0.99, lr=2e-4, lr_schedule="constant",
           warmup=0, grad_clip=0.0, steps=100_000, eval_every=2000, save_every=2000)  # MaskDM's
DEFAULTS = {  # (stage, whether on a GPU); on two cores ten minutes for both stages
    ("pt", False): dict(batch_size=48, steps=2300, lr=4e-3, lr_schedule="constant"),
    ("ft", False): dict(eval_every=1700, sample_every=1700, save_every=1700),
    ("cm", False): dict(batch_size=32, steps=1200, sample_every=400),
    ("pt", True): GPU | dict(batch_size=256),
    ("ft", True): GPU | dict(batch_size=128, sample_every=5000),
    ("cm", True): GPU | dict(batch_size=128, steps=200000, lr=1e-4, cm_stages=8, sample_every=5000),
}
TUNING = dict(init_weights="ema", optimizer="adamw", beta1=0.9, weight_decay=0.0, warmup=0,
              grad_clip=0.0, ema=0.9999, label_dropout=0.0, dtype="float32")
CONSISTENCY = {  # ECT, arXiv 2406.14548, appendix; its networks have dropout, this one has none
    "cifar10": TUNING | dict(p_mean=-1.1, p_std=2.0, optimizer="radam", beta2=0.999),
    "imagenet64": TUNING | dict(p_mean=-0.8, p_std=1.6, cm_q=4.0, cm_c=0.06, cm_weight="edm",
                                lr=1e-3, lr_schedule="rsqrt", cm_stages=4, steps=100_000),
}
ARCHITECTURE = ("dim", "depth", "heads", "patch_size", "decoder_depth", "decoder_dim",
                "decoder_heads", "route")

def parse(argv):
    """-> settings; the path of the checkpoint to resume, or None; what to start from, or {}."""
    about = " In brackets: defaults; DEFAULTS in train.py changes some by stage and device."
    parser = Parser(description=__doc__.splitlines()[0] + about, allow_abbrev=False)
    add = parser.add
    add("data", "data/faces", "prepared set, or several with commas for their union")
    add("out_dir", "out", "folder for checkpoints, samples and log.jsonl")
    add("init_from", None, "start from the weights of this checkpoint")
    add("init_weights", "raw", "which of its weights", choices=("ema", "raw"))
    add("resume", None, "go on with a run", nargs="?", const="last", choices=("last", "auto"))
    add("mask_ratio", 0.0, "share of the patches hidden; > 0 is stage 1")
    add("mask_type", "block", "what is hidden: patch, block; crop: all but one square")
    add("block_size", 2, "patches a side of a hidden block")
    add("preset", "demo", "size of a new network", choices=tuple(PRESETS))
    for name in ARCHITECTURE[:-1]:
        add(name, getattr(ModelConfig, name), "as in ModelConfig; overrides the preset")
    add("route", (), "A,B: the blocks A to B - 1 see visible patches only (TREAD)",
        type=lambda text: tuple(map(int, text.split(","))) if text else ())
    add("mae_weight", 0.1, "weight of the reconstruction of hidden patches")
    add("class_cond", False, "condition on the labels of the data set")
    add("label_dropout", 0.1, "share replaced by the null class")
    add("loss", "diffusion", "what is learned", choices=("diffusion", "consistency"))
    add("cm_preset", "cifar10", "ECT's settings for", choices=tuple(CONSISTENCY))
    add("cm_stages", 4, "stages; at high noise the last pairs have 1 - r/t = cm_q^-stages")
    add("cm_q", 2.0, "1 - r/t shrinks by this factor a stage")
    add("cm_c", 0.0, "constant of the pseudo-Huber distance")
    add("cm_weight", "gap", "1/(t - r), or 1/t^2 + 1/sigma_data^2", choices=("gap", "edm"))
    add("ref_batch", 0, "images averaged for the target (SCT); 0: none (ECT)")
    add("replay", None, "old prepared sets, comma-separated, in every batch")
    add("replay_frac", 0.5, "share of a batch that is old")
    add("replay_coef", 1.0, "weight of the old images' loss")
    add("distill_from", None, "checkpoint whose answers are the targets of the old images")
    add("anchor", None, "checkpoint to whose weights l2 and ewc pull; default: init_from")
    add("l2", 0.0, "strength of the pull, the same for all weights")
    add("ewc", 0.0, "strength by the importance of each weight (Fisher information)")
    add("ewc_data", None, "sets to estimate the importance on; default: those of the anchor's run")
    add("batch_size", 4, "images per step, in all processes")
    add("micro_batch", 0, "images per pass; 0: all, on a CPU by its caches")
    add("steps", 3400, "optimizer steps of the whole run")
    add("optimizer", "muon", "muon has AdamW beside it", choices=("adamw", "muon", "radam"))
    add("lr", 2e-3, "learning rate")
    add("lr_schedule", "cosine", "after warm-up", choices=("constant", "cosine", "rsqrt"))
    add("warmup", 100, "steps of linear warm-up")
    add("weight_decay", 0.03, "decay of the weights")
    add("beta1", 0.9, "first beta of the optimizer")
    add("beta2", 0.99, "second beta of the optimizer")
    add("grad_clip", 1.0, "largest norm of the gradient, 0 for no limit")
    add("ema", 0.999, "decay of the averaged weights")
    add("p_mean", P_MEAN, "mean of ln sigma in training")
    add("p_std", P_STD, "standard deviation of ln sigma")
    add("hflip", False, "flip half of the images left-right")
    add("dtype", "auto", "of matrix products", choices=("auto", "float32", "bfloat16"))
    add("compile", False, "torch.compile; on a GPU with Triton by default")
    add("device", "auto", "where to run", choices=("auto", "cpu", "cuda", "mps"))
    add("seed", 0, "of every random draw")
    add("log_every", 10, "steps between two lines in log.jsonl; 0: never, so below too")
    add("eval_every", 500, "steps between validations")
    add("sample_every", 0, "steps between grids of samples in out_dir")
    add("save_every", 500, "steps between checkpoints; there is always one at the end")
    add("keep_every", 0, "steps between checkpoints that stay, NAME-STEP.pt")

    cfg = parser.parse_args(argv)
    kind = sample.pick_device(cfg.device).type
    source, start = find_run(cfg) if cfg.resume else (None, {})
    start = start or (load_checkpoint(cfg.init_from) if cfg.init_from else {})
    parser.set_defaults(**DEFAULTS[run_name(cfg), kind != "cpu"])
    if cfg.loss == "consistency":
        need_noise("edm", "--loss=consistency")
        short = dict(ema=0.995) if kind == "cpu" else {}  # 0.9999 would stay behind
        parser.set_defaults(**CONSISTENCY[cfg.cm_preset] | short)
    sizes = start.get("architecture") or PRESETS[parser.parse_args(argv).preset]
    parser.set_defaults(**{k: sizes[k] for k in ARCHITECTURE if k in sizes},
                        class_cond=sizes.get("num_classes", 0) > 0,
                        compile=kind == "cuda" and find_spec("triton") is not None)
    world = int(os.environ.get("WORLD_SIZE", 1))  # a default is what all processes can share
    parser.set_defaults(batch_size=-(-parser.get_default("batch_size") // world) * world)
    if source:
        parser.set_defaults(**start["config"] | dict(out_dir=os.path.dirname(source)))
    cfg = parser.parse_args(argv)
    need(not source or os.path.basename(source).startswith(run_name(cfg)) and cfg.optimizer ==
         start["config"].get("optimizer", "adamw"), f"{source} is of another stage or optimizer "
         "than these settings: start that with --init_from")
    for name in ("mask_ratio", "label_dropout", "ema"):
        need(0 <= getattr(cfg, name) < 1, f"--{name}: expected at least 0 and below 1")
    return cfg, source, start

def run_name(cfg):
    """pt: masked (stage 1); ft: whole images (stage 2); cm: consistency tuning."""
    return "cm" if cfg.loss == "consistency" else "pt" if cfg.mask_ratio > 0 else "ft"

def find_run(cfg):
    """The newest whole checkpoint, of the run that the command describes or, if of none, of any."""
    name = run_name(cfg)
    names = [name] if cfg.resume == "auto" or cfg.init_from or name != "ft" else ["pt", "ft", "cm"]
    paths = [os.path.join(cfg.out_dir, name + end) for name in names for end in (".pt", ".prev.pt")]
    paths = sorted(filter(os.path.exists, paths), key=os.path.getmtime, reverse=True)
    for path in paths:
        try:
            return path, load_checkpoint(path)
        except SystemExit as e:
            print(f"{e.code}; trying the one before", file=sys.stderr)
    need(cfg.resume == "auto" and not paths, f"--resume found no whole checkpoint of {names} in "
         f"{cfg.out_dir}: start without it, or name the run's --out_dir")
    return None, {}

# ---- The stream of data: step n -> its batch. All randomness of training is drawn here.
@lru_cache(8)
def shuffled(n, seed, epoch):
    """The order of n images in an epoch."""
    return torch.randperm(n, generator=sample.seeded(seed, 0, epoch)).numpy()

class Stream:
    """Batches by step number, of images like model.Images. Those after the first `new` are
    old: a share of each batch. New and old ones come in epochs of fresh order each, so that any
    step can be loaded directly; in a batch the new ones come first."""

    def __init__(self, images, new, cfg, config, device, rank=0, world=1):
        self.images, self.cfg, self.config, self.device = images, cfg, config, device
        old = len(images) - new if cfg.replay_coef else 0
        n_old = round(cfg.replay_frac * cfg.batch_size) if old else 0
        need(0 < n_old <= cfg.batch_size or not old, f"--replay_frac leaves {n_old} of "
             f"{cfg.batch_size} images for the old ones: choose another")
        n_new = cfg.batch_size - n_old
        self.parts = [(n_new, new, 0), (n_old, old, new)][: 2 if n_old else 1]
        self.mine = slice(rank, None, world)  # every world-th image: some of each kind
        self.n_new = len(range(rank, n_new, world))  # in this process
        # Weight of each image in the mean over the batch, for L_new + replay_coef L_old.
        weight = torch.full((cfg.batch_size,), cfg.batch_size / max(n_new, 1))
        weight[n_new:] = cfg.replay_coef * cfg.batch_size / max(n_old, 1)
        self.weight = self.move(weight[self.mine])
        # Class and age of each image in one number, for `references`.
        self.kind = 2 * images.labels * (config.num_classes > 0) + (np.arange(len(images)) >= new)
        self.order = self.kind.argsort()
        self.mask = config.grid, cfg.mask_ratio, cfg.mask_type, cfg.block_size
        self.visible, n = count_visible(*self.mask), config.grid**2
        need(0 < self.visible < n or cfg.mask_ratio == 0, f"the mask shows {self.visible} of {n} "
             "patches: choose another ratio or block_size")

    def index(self, step):
        """The numbers of the images of a global batch: a walk through each part by epochs."""
        drawn = []
        for n, size, first in self.parts:
            places = np.divmod(np.arange(step * n, step * n + n), size)
            drawn += [first + shuffled(size, self.cfg.seed, e)[i] for e, i in zip(*places)]
        return np.array(drawn, np.int64)

    def load(self, step):
        """This process's part, b images, of the batch of a step.
        index (b,) numpy; on the device: clean (b, K, p*p*C), deviation 0.5 (K = N if the network
        takes all), noise like it, sigma (b,), visible (b, K) or None for the whole image,
        labels (b,), -1 for no class, or None."""
        cfg, config, n, mine = self.cfg, self.config, self.cfg.batch_size, self.mine
        g = sample.seeded(cfg.seed, 1, step)
        sigma = sigma_of(torch.randn(n, generator=g), cfg.p_mean, cfg.p_std)
        flip = torch.rand(n, generator=g).numpy() < 0.5 * cfg.hflip
        dropped = torch.rand(n, generator=g) < cfg.label_dropout
        visible = sample_visible(n, *self.mask, g)
        visible, index = None if visible is None else visible[mine], self.index(step)[mine]
        clean, labels = self.read(index, flip[mine], None if config.takes_all else visible)
        labels[dropped[mine]] = -1
        g = sample.seeded(cfg.seed, 2, step, device=self.device)
        noise = torch.randn(n, *clean.shape[1:], generator=g, device=self.device)[mine].contiguous()
        labels = self.move(labels) if config.num_classes else None
        visible = None if visible is None else self.move(visible)
        return dict(index=index, clean=clean, noise=noise, sigma=self.move(sigma[mine]),
                    visible=visible, labels=labels, **self.references(step))

    def read(self, index, flip, visible=None):
        """The visible patches (None: all) of some images, and their labels."""
        patches = self.images.read(index, None if visible is None else visible.numpy(), flip)
        labels = torch.from_numpy(self.images.labels[index])
        return normalised(self.move(torch.from_numpy(patches)), self.config.latent), labels

    def references(self, step):
        """The whole images over which a batch averages (SCT), and their labels. They are drawn from
        the classes in the batch, or most images would have none of their own."""
        cfg, n = self.cfg, self.cfg.ref_batch - 1
        if cfg.loss != "consistency" or n < 1:  # each image alone is ECT
            return {}
        g = sample.seeded(cfg.seed, 5, step)
        kind = self.kind[self.index(step)[np.arange(n) * cfg.batch_size // n]]
        first, end = (np.searchsorted(self.kind, kind, side, self.order)
                      for side in ("left", "right"))
        place = torch.rand(n, generator=g, dtype=torch.float64).numpy()
        flip = torch.rand(n, generator=g).numpy() < 0.5 * cfg.hflip
        images, labels = self.read(self.order[first + (place * (end - first)).astype(int)], flip)
        return dict(references=images, reference_labels=self.move(labels))

    def move(self, t):
        """To the device, without waiting for a GPU."""
        cuda = self.device.type == "cuda"
        return (t.pin_memory() if cuda else t).to(self.device, non_blocking=cuda)

def validation_set(sets, config, p_mean, p_std, limit=512):
    """Whole images, noise levels (quantiles of ln sigma) and noise, the same in every run on a set.
    sets: like model.Images, of which each gives its first limit / len(sets)."""
    some = [np.arange(min(len(x), limit // len(sets))) for x in sets]
    clean = np.concatenate([x.read(i, None, np.zeros(len(i), bool)) for x, i in zip(sets, some)])
    labels = torch.from_numpy(np.concatenate([x.labels[i] for x, i in zip(sets, some)]))
    n, g = len(clean), sample.seeded(0, 3)
    quantile = (torch.randperm(n, generator=g) + 0.5) / n
    sigma = sigma_of(math.sqrt(2) * torch.erfinv(2 * quantile - 1), p_mean, p_std)
    shape = n, config.image_size, config.image_size, config.channels
    noise = patchify(torch.randn(shape, generator=g), config.patch_size)
    return dict(clean=normalised(torch.from_numpy(clean), config.latent), noise=noise, sigma=sigma,
                labels=labels if config.num_classes else None)

# ---- Parts of a step.
def learning_rate(cfg, step, lr):
    """Linear warm-up, then constant, a cosine down to 1 %, or lr sqrt(2000/step) from 2000 on."""
    progress = min(1.0, max(0.0, (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)))
    shape = dict(constant=1.0, cosine=0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2,
                 rsqrt=max(1, step / 2000) ** -0.5)[cfg.lr_schedule]
    return lr * min(1.0, (step + 1) / (cfg.warmup + 1)) * shape

def configure_optimizers(denoiser, cfg):
    """A list of optimizers; the rate of each group is scheduled from its initial_lr."""
    kind = torch.optim.RAdam if cfg.optimizer == "radam" else torch.optim.AdamW
    how = dict(decoupled_weight_decay=True) if cfg.optimizer == "radam" else dict(fused=True)
    both, rest = dict(lr=cfg.lr, weight_decay=cfg.weight_decay), dict(denoiser.named_parameters())
    matrices = [rest.pop(name) for name in [*rest] if cfg.optimizer == "muon" and name.endswith(
        ("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight"))]  # of the blocks
    muon = [Muon([dict(params=matrices, initial_lr=cfg.lr)], both)] if matrices else []
    return muon + [kind([dict(params=[*rest.values()], initial_lr=cfg.lr)],
                        betas=(cfg.beta1, cfg.beta2), **both, **how)]

def pull_of(cfg, denoiser, device, autocast):
    """[(weight, where it is pulled to, how strongly)]: to the anchor's weights, by l2 + ewc * their
    Fisher information on whole images of ewc_data; the same when the run starts or resumes."""
    anchor, stored = sample.load_denoiser(cfg.anchor or cfg.init_from, cfg.init_weights, device)
    strength = [cfg.l2] * len(list(anchor.parameters()))
    if cfg.ewc:
        images = Images(cfg.ewc_data or stored["config"]["data"], "train", anchor.config.patch_size,
                        stored["class_names"] or ())
        whole = deepcopy(cfg)
        vars(whole).update(mask_ratio=0.0, loss="diffusion", batch_size=512)
        batch = Stream(images, len(images), whole, anchor.config, device).load(0)
        fisher = fisher_information(anchor.requires_grad_(True), anchor.config, batch, autocast)
        strength = [cfg.l2 + cfg.ewc * f for f in fisher]
    theirs = {n: (p.detach(), c) for (n, p), c in zip(anchor.named_parameters(), strength)}
    return [(p, *theirs[n]) for n, p in denoiser.named_parameters()
            if n in theirs and theirs[n][0].shape == p.shape]

def build(cfg, source, start, device, rank, world, say):
    """What a run works with, where it starts; the classes that its model knows are the first."""
    known = (start.get("class_names") or []) if cfg.class_cond else []
    sets = ",".join(filter(None, (cfg.data, cfg.replay)))
    images, new = Images(sets, "train", cfg.patch_size, known), len(Images(cfg.data))
    names, meta = images.meta["class_names"] or [], images.meta
    need(names or not cfg.class_cond, f"{cfg.data} has no labels: give --no-class_cond")
    latent = start["architecture"].get("latent") if start else meta["latent"]
    need(bool(latent) == bool(meta["latent"]), f"either {cfg.data} or the model is latent")
    config = ModelConfig(**{k: getattr(cfg, k) for k in ARCHITECTURE}, image_size=meta["size"],
                         channels=meta["channels"], latent=latent or (),
                         num_classes=len(names) if cfg.class_cond else 0,
                         consistency=cfg.loss == "consistency")
    torch.manual_seed(sample.seed_of(cfg.seed, 4))
    denoiser = Denoiser(config)
    if source:
        denoiser.load_state_dict(start["model"])
    elif start:
        fresh = load_what_fits(denoiser, start["model" if cfg.init_weights == "raw" else "ema"])
        fresh = ", ".join(fresh + names[len(known) : config.num_classes])
        say(f"begins afresh: {fresh or 'nothing'}")
    ema = deepcopy(denoiser).to(device).eval().requires_grad_(False)
    optimizers, step = configure_optimizers(denoiser.to(device), cfg), start.get("step", 0)
    if source:
        ema.load_state_dict(start["ema"])
        for optimizer, stored in zip(optimizers, start["optimizer"]):  # the settings are today's
            optimizer.load_state_dict(optimizer.state_dict() | {"state": deepcopy(stored["state"])})
        say(f"resumed from step {step}")
    here = "cpu" if device.type == "mps" else device  # two threads crash (pytorch issue 197805)
    stream = Stream(images, new, cfg, config, torch.device(here), rank, world)
    return stream, denoiser, ema, optimizers, step if source else 0, names

# ---- The run.
def main(argv=None):
    cfg, source, start = parse(argv)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = sample.pick_device(cfg.device, int(os.environ.get("LOCAL_RANK", 0)))
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    dtype = sample.pick_dtype(cfg.dtype, device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    say = partial(tqdm.write, file=sys.stderr) if rank == 0 else lambda text: None
    stream, denoiser, ema, optimizers, step, names = build(
        cfg, source, start, device, rank, world, say)
    config, weights, average = denoiser.config, [*denoiser.parameters()], [*ema.parameters()]
    loss_weight, start = stream.weight.to(device), None  # whose tensors are not needed any more
    pull = pull_of(cfg, denoiser, device, autocast) if cfg.l2 or cfg.ewc else []
    teacher = None
    if cfg.distill_from:
        teacher, theirs = sample.load_denoiser(cfg.distill_from, "ema", device)
        classes = (theirs.get("class_names") or []) if cfg.class_cond else []
        kinds = {(c.grid, c.token_dim, c.latent, c.consistency, c.takes_all and cfg.mask_ratio)
                 for c in (config, teacher.config)}
        need(cfg.replay and cfg.loss == "diffusion" and classes == names[: len(classes)] and
             len(kinds) == 1, f"{cfg.distill_from} needs --replay, diffusion and a model like this")
    share, tokens = cfg.batch_size // world, config.grid**2 if config.takes_all else stream.visible
    fits = [m for m in range(1, share + 1) if share % m == 0 and m * tokens * config.dim <= 2**20]
    micro = cfg.micro_batch or (max(fits, default=1) if device.type == "cpu" else share)
    need(share and cfg.batch_size % (world * micro) == 0, f"batch_size {cfg.batch_size} is not "
         f"divisible by {world} processes x micro_batch {micro}: change one of the three")

    tuned = cfg.init_from and (cfg.loss == "consistency" or cfg.decoder_depth)  # ECT, MaskDiT
    name = run_name(cfg)
    path, before = (os.path.join(cfg.out_dir, name + end) for end in (".pt", ".prev.pt"))
    moved = {os.path.realpath(f[:-3] + end) for f in (path, before) for end in (".pt", ".old.pt")}
    for used in filter(None, (cfg.init_from, cfg.anchor, cfg.distill_from)):
        need(os.path.realpath(used) not in moved, f"{used} would be replaced by this run: give "
             "another --out_dir")
    os.makedirs(cfg.out_dir, exist_ok=True)
    for file in (path,) if source else (path, before):
        if rank == 0 and os.path.exists(file) and file != source:  # of another run, or damaged
            os.replace(file, file[:-3] + ".old.pt")
            say(f"{file} is now {file[:-3]}.old.pt")

    def save(path):
        settings = {k: v for k, v in vars(cfg).items() if k not in ("resume", "device", "compile")}
        if rank == 0:
            checkpoint = dict(
                model=denoiser.state_dict(), ema=ema.state_dict(), architecture=asdict(config),
                optimizer=[optimizer.state_dict() for optimizer in optimizers], step=step,
                config=settings, class_names=names or None, noise=NOISE)
            replace_file(path, partial(torch.save, checkpoint), keep=f"{path[:-3]}.prev.pt")

    def log(**record):
        if rank == 0:
            with open(os.path.join(cfg.out_dir, "log.jsonl"), "a") as f:
                f.write(json.dumps(dict(run=name, step=step, **record)) + "\n")

    if cfg.compile:
        for network in filter(None, (denoiser, teacher)):
            network.compile(dynamic=False)
    model = denoiser
    if world > 1:
        model = DistributedDataParallel(model, gradient_as_bucket_view=True,
                                        forward_sync_buffers=False)
    sets = [Images(x, "val", cfg.patch_size, names) for x in cfg.data.split(",")]
    levels = (cfg.p_mean, cfg.p_std) if cfg.loss == "consistency" else (P_MEAN, P_STD)
    validation = validation_set(sets, config, *levels)

    def loss_of(model, step, **batch):
        if cfg.loss == "consistency":
            return consistency_objective(model, config, cfg, step, **batch)
        return diffusion_objective(model, config, mae_weight=cfg.mae_weight, **batch)

    @torch.no_grad()
    def evaluate():  # the EMA weights
        total, n = 0.0, len(validation["clean"])
        size = max(1, min(64, micro * tokens // config.grid**2))  # as in training
        for i in range(0, n, size):
            part = {k: t if t is None else t[i : i + size].to(device)
                    for k, t in validation.items()}
            with autocast:
                total += loss_of(ema, cfg.steps - 1, visible=None, **part).sum().item()
        log(val_loss=total / n)
        say(f"step {step}: validation loss {total / n:.4f}")

    caught = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: caught.append(number))
    log(event="start", config=vars(cfg))
    say("\n".join(f"{key:>14} = {v}" for key, v in vars(cfg).items() if v is not None))
    say(f"{sum(p.numel() for p in weights) / 1e6:.2f} M weights on {world} x {device} in {dtype}, "
        f"{stream.visible} of {config.grid**2} patches visible")

    bar = tqdm(total=cfg.steps, initial=step, desc=name, disable=rank > 0, unit="step")
    bad, stop, first, began, threads = 0, False, step, time.time(), torch.get_num_threads()
    loader = ThreadPoolExecutor(1)
    loader.submit(torch.set_num_threads, 1)  # more threads than cores make OpenMP sleep
    if cuda:
        loader.submit(torch.cuda.set_device, device)  # a new thread begins with the first GPU
    pending = loader.submit(stream.load, step)
    pending.result()  # only then, as the loader's first work sets the number for all threads
    torch.set_num_threads(threads)
    while step < cfg.steps and not stop and bad < 10:
        batch = pending.result()
        pending = loader.submit(stream.load, step + 1)
        batch = {k: t if t is None else t.to(device) for k, t in batch.items() if k != "index"}
        for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
            group["lr"] = learning_rate(cfg, step, group["initial_lr"])
        loss = torch.zeros((), device=device)
        with autocast:  # around all parts: the weights are cast once a step
            for i in range(0, share, micro):
                part = {k: t if t is None or "reference" in k else t[i : i + micro]
                        for k, t in batch.items()}  # the references are for all parts
                if teacher:
                    part["target"] = teach(teacher, min(max(stream.n_new - i, 0), micro), **part)
                model.require_backward_grad_sync = i + micro == share  # DDP: after the last part
                part_loss = (loss_weight[i : i + micro] * loss_of(model, step, **part)).mean()
                (part_loss / (share // micro)).backward()
                loss += part_loss.detach() / (share // micro)
        norm = torch.nn.utils.clip_grad_norm_(weights, cfg.grad_clip or math.inf)
        # What all must agree on, in one sum: the loss, and whether anybody was asked to stop.
        shared = torch.stack([loss / world, torch.full_like(loss, len(caught) > 0)])
        if world > 1:
            dist.all_reduce(shared)
        loss, stop, norm = torch.cat([shared, norm[None]]).tolist()  # the one wait for the GPU
        if math.isfinite(loss) and math.isfinite(norm):
            for p, anchor, strength in pull:  # after the clipping, or little would be learned
                p.grad.add_((p.detach() - anchor) * strength)
            for optimizer in optimizers:
                optimizer.step()
            decay = cfg.ema if tuned else min(cfg.ema, (1 + step) / (10 + step))  # a warm-up
            torch._foreach_lerp_(average, [p.detach() for p in weights], 1 - decay)
            bad = 0
        else:
            bad += 1
            index = stream.index(step).tolist()
            log(event="skipped", loss=str(loss), grad_norm=str(norm), index=index)
            say(f"step {step} skipped: loss {loss}, norm {norm}")
        denoiser.zero_grad()
        step += 1
        bar.update()
        if cfg.log_every and step % cfg.log_every == 0 and not bad:
            seconds = time.time() - began
            rate = (step - first) * cfg.batch_size / seconds
            bar.set_postfix_str(f"loss {loss:.4f}, {rate:.0f} images/s")
            log(loss=loss, grad_norm=norm, lr=group["lr"], images_per_s=rate, seconds=seconds)
        aside, last = time.time(), step == cfg.steps  # not training time from here on
        if rank == 0 and (last or cfg.eval_every and step % cfg.eval_every == 0):
            evaluate()
        if cfg.sample_every and step % cfg.sample_every == 0 and rank == 0:
            grid = np.concatenate([x for _, x in sample.generate(ema, range(16), seed=cfg.seed)])
            sample.save_grid(os.path.join(cfg.out_dir, f"{name}_{step:07d}.png"), grid)
        if bad < 10 and (stop or last) or not bad and cfg.save_every and step % cfg.save_every == 0:
            save(path)
        if not bad and cfg.keep_every and step % cfg.keep_every == 0:
            save(f"{path[:-3]}-{step:07d}.pt")
        began += time.time() - aside
    bar.close()
    loader.shutdown(cancel_futures=True)
    if world > 1:
        del model  # it holds on to the process group, which must be the last to go
        dist.barrier()
        dist.destroy_process_group()
    if bad == 10:
        say(f"stopped: ten steps in a row up to {step} were not finite. Resuming repeats them: "
            "use --init_from, another --out_dir, and a lower --lr or --grad_clip")
        sys.exit(3)
    if stop:
        say(f"stopped after step {step}: {path} is saved, go on with --resume")
        sys.exit(128 + (caught or [signal.SIGTERM])[0])
    say(f"{path} is at step {step}")

if __name__ == "__main__":
    main()
