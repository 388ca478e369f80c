"""The network: a diffusion transformer that sees only the visible patches of an image.

An image is cut into N patches; training may keep K <= N of them. Whatever the network does, it does
on K tokens, so hiding nine tenths of the patches makes a step about ten times cheaper. Everything
here takes `visible`, the (B, K) indices of the kept patches; `visible=None` means the whole image.

Symbols: B batch, C channels, H = W image side, p patch side, N = (H/p)^2, K visible tokens.
Papers: MaskDM arXiv 2306.11363, DiT arXiv 2212.09748, EDM arXiv 2206.00364.
"""

import math
import os
import sys
import zipfile
from dataclasses import asdict, dataclass, fields

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

# ---------------------------------------------------------------------------------------------
# Configuration. The architecture travels in the checkpoint; nothing else has to repeat it.


@dataclass
class ModelConfig:
    image_size: int = 64  # pixels (or latent cells) a side
    channels: int = 3
    patch_size: int = 4
    dim: int = 128  # width of a token
    depth: int = 6  # number of blocks
    heads: int = 4
    num_classes: int = 0  # 0: unconditional; otherwise index num_classes is the null class
    sigma_data: float = 0.5  # standard deviation of the data (EDM table 1)

    def __post_init__(self):
        for f in fields(self):
            v, low = getattr(self, f.name), -1 if f.name == "num_classes" else 0
            if type(v) is not f.type or not low < v < 2**20:
                sys.exit(f"{f.name} is {v!r}, expected {f.type.__name__} above {low}, below 2^20")
        size, p = self.image_size, self.patch_size
        if size % p:
            fits = sorted(range(1, size + 1), key=lambda q: (size % q > 0, abs(q - p)))[:2]
            sys.exit(
                f"image size {size} is not divisible by patch_size {p}: use a patch_size of "
                f"{min(fits)} or {max(fits)}, or prepare the data at {max(size // p, 1) * p} or "
                f"{(size // p + 1) * p} px"
            )
        if self.dim % (4 * self.heads):
            sys.exit(
                f"dim {self.dim} must be a multiple of 4 x heads ({4 * self.heads}); the nearest "
                f"that fits is {max(1, round(self.dim / (4 * self.heads))) * 4 * self.heads}"
            )

    @property
    def grid(self):
        """Patches a side."""
        return self.image_size // self.patch_size

    @property
    def token_dim(self):
        """Values in one patch, p*p*C."""
        return self.patch_size**2 * self.channels


PRESETS = {  # MaskDM table of settings; DiT table 1
    "demo": dict(dim=128, depth=6, heads=4, patch_size=4),  # two CPU cores, minutes
    "maskdm-64": dict(dim=512, depth=13, heads=8, patch_size=4),
    "maskdm-256": dict(dim=768, depth=12, heads=12, patch_size=4),
    "dit-s": dict(dim=384, depth=12, heads=6, patch_size=2),
    "dit-b": dict(dim=768, depth=12, heads=12, patch_size=2),
    "dit-l": dict(dim=1024, depth=24, heads=16, patch_size=2),
    "dit-xl": dict(dim=1152, depth=28, heads=16, patch_size=2),
}

# ---------------------------------------------------------------------------------------------
# Patches and masks.


def patchify(images, patch_size):
    """(B, H, W, C) -> (B, N, p*p*C), patches in row-major order."""
    b, h, w, c = images.shape
    p = patch_size
    x = images.reshape(b, h // p, p, w // p, p, c).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(b, (h // p) * (w // p), p * p * c)


def unpatchify(tokens, patch_size):
    """(B, N, p*p*C) -> (B, H, W, C), the inverse of `patchify` for square images."""
    b, n, d = tokens.shape
    p, g = patch_size, math.isqrt(n)
    x = tokens.reshape(b, g, g, p, p, d // p**2).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(b, g * p, g * p, d // p**2)


def count_visible(grid, mask_ratio, mask_type="patch", block_size=4):
    """Number K of visible patches on a grid x grid image: the same for every image of a run.

    `mask_type` (MaskDM sec. 3.2): "patch" hides int(ratio*N) single patches, "block" hides
    int(ratio*N) // b^2 blocks of b x b on the block grid, "crop" shows one square of side
    round(sqrt(N - int(ratio*N))). Exits with a sentence where a mask cannot be had.
    """
    n = grid * grid
    if not 0 <= mask_ratio < 1:
        sys.exit(f"mask_ratio is {mask_ratio}, expected a share in [0, 1), for example 0.9")
    hidden = int(mask_ratio * n)
    if mask_ratio == 0:
        return n
    if mask_type == "block":
        if block_size < 1 or grid % block_size:
            sys.exit(
                f"block_size {block_size} does not divide the {grid} x {grid} grid of patches: use "
                f"one of {[b for b in range(1, grid) if grid % b == 0]}"
            )
        hidden = hidden // block_size**2 * block_size**2
    elif mask_type == "crop":
        hidden = n - round(math.sqrt(n - hidden)) ** 2
    elif mask_type != "patch":
        sys.exit(f"mask_type is {mask_type!r}, expected patch, block or crop")
    if hidden == 0:
        sys.exit(
            f"mask_ratio {mask_ratio} with mask_type {mask_type} hides none of the {n} patches: "
            "raise the ratio, use smaller blocks, or ask for 0"
        )
    return n - hidden


def sample_visible(batch, grid, mask_ratio, mask_type="patch", block_size=4, generator=None):
    """Draw which patches stay visible: (batch, K) int64 indices in ascending order, or None.

    None stands for the whole image (ratio 0). Every image keeps exactly `count_visible` patches.
    """
    k = count_visible(grid, mask_ratio, mask_type, block_size)
    if mask_ratio == 0:
        return None
    if mask_type == "crop":
        side = math.isqrt(k)
        corner = torch.randint(grid - side + 1, (2, batch, 1, 1), generator=generator)
        row = corner[0] + torch.arange(side).view(1, side, 1)
        col = corner[1] + torch.arange(side).view(1, 1, side)
        return (row * grid + col).reshape(batch, k)
    b = block_size if mask_type == "block" else 1
    g = grid // b  # a patch mask is a block mask of 1 x 1 blocks
    # The k largest of g*g uniform numbers are a uniform draw without replacement.
    blocks = torch.rand(batch, g * g, generator=generator).topk(k // b**2, dim=1).indices
    inside = torch.arange(b)
    row = (blocks // g * b).view(batch, -1, 1, 1) + inside.view(b, 1)
    col = (blocks % g * b).view(batch, -1, 1, 1) + inside
    return (row * grid + col).reshape(batch, k).sort(dim=1).values


# ---------------------------------------------------------------------------------------------
# The network (DiT with adaLN-Zero), on whatever tokens it is given.


def sincos_positions(grid, dim):
    """Fixed 2-D sine-cosine positions (grid*grid, dim): half the channels for row, half for column."""
    freq = 10000.0 ** -(np.arange(dim // 4) / (dim // 4))
    angle = np.arange(grid)[:, None] * freq  # (grid, dim/4)
    axis = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)  # (grid, dim/2)
    rows, cols = axis.repeat(grid, axis=0), np.tile(axis, (grid, 1))
    return torch.from_numpy(np.concatenate([rows, cols], axis=1)).float()


def attention(q, k, v):
    """Softmax attention, all (B, heads, N, head_dim).

    Fused, except for short sequences on a CPU, where the backward of the fused kernel takes longer
    than two batched products (`tests/bench.py attention`).
    """
    if q.device.type == "cpu" and q.shape[2] <= 512:
        scores = (q * q.shape[3] ** -0.5) @ k.transpose(2, 3)
        return scores.softmax(dim=3) @ v  # the kernel sums in float32 for bfloat16 scores, too
    return F.scaled_dot_product_attention(q, k, v)


def modulate(x, shift, scale):
    """LayerNorm without affine, then shift and scale. x (B, K, D), the others (B, 1, D)."""
    x = F.layer_norm(x, x.shape[-1:], eps=1e-6).to(scale.dtype)  # float32 until here under autocast
    return torch.addcmul(shift, x, 1 + scale)


class Block(nn.Module):
    """Transformer block; the noise level modulates its norms and residuals (DiT, adaLN-Zero)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)
        self.modulation = nn.Linear(dim, 6 * dim)

    def forward(self, x, cond):
        b, k, d = x.shape
        mod = self.modulation(cond).view(b, 1, 6, d).unbind(2)  # 6 x (B, 1, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = mod
        qkv = self.qkv(modulate(x, shift1, scale1)).view(b, k, 3, self.heads, d // self.heads)
        q, key, v = qkv.permute(2, 0, 3, 1, 4)  # 3 x (B, heads, K, head_dim)
        x = x + gate1 * self.proj(attention(q, key, v).transpose(1, 2).reshape(b, k, d))
        h = self.fc1(modulate(x, shift2, scale2))
        return x + gate2 * self.fc2(F.gelu(h))  # DiT's tanh form takes 3 times as long on a CPU


class DiT(nn.Module):
    """tokens (B, K, p*p*C), c_noise (B,), visible (B, K) or None, labels (B,) or None -> tokens."""

    def __init__(self, config):
        super().__init__()
        c = config
        self.embed = nn.Linear(c.token_dim, c.dim)
        # Fixed, hence not in the checkpoint: another resolution simply makes others.
        self.register_buffer("positions", sincos_positions(c.grid, c.dim), persistent=False)
        # c_noise = ln(sigma)/4 lies in about [-1.6, 1.1]: wavelengths from 60 down to 0.4.
        freq = torch.from_numpy(np.geomspace(0.1, 16.0, c.dim // 2)).float()
        self.register_buffer("freq", freq, persistent=False)
        self.time = nn.Sequential(nn.Linear(c.dim, c.dim), nn.SiLU(), nn.Linear(c.dim, c.dim))
        self.labels = nn.Embedding(c.num_classes + 1, c.dim) if c.num_classes else None
        self.blocks = nn.ModuleList(Block(c.dim, c.heads) for _ in range(c.depth))
        self.modulation = nn.Linear(c.dim, 2 * c.dim)
        self.head = nn.Linear(c.dim, c.token_dim)
        self.init_weights()

    def init_weights(self):
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        if self.labels is not None:
            nn.init.normal_(self.labels.weight, std=0.02)
        # Every block starts as the identity and the output as zero (DiT sec. 3.2).
        for m in [self.modulation, self.head] + [block.modulation for block in self.blocks]:
            nn.init.zeros_(m.weight)

    def forward(self, tokens, c_noise, visible=None, labels=None):
        positions = self.positions if visible is None else self.positions[visible]
        x = self.embed(tokens) + positions  # (B, K, D)
        angle = c_noise[:, None] * self.freq
        cond = self.time(torch.cat([angle.sin(), angle.cos()], dim=1))  # (B, D)
        if self.labels is not None:
            cond = cond + self.labels(labels)
        cond = F.silu(cond)
        for block in self.blocks:
            x = block(x, cond)
        shift, scale = self.modulation(cond)[:, None].chunk(2, dim=2)
        return self.head(modulate(x, shift, scale))


class Denoiser(nn.Module):
    """EDM preconditioning around the network: D(x; sigma), the denoised tokens (EDM eq. 7).

    x (B, K, p*p*C) noisy tokens, sigma (B,) > 0, visible (B, K) or None, labels (B,) int64 with
    `num_classes` as the null class; required if the model has classes, ignored otherwise.
    Returns float32 (or wider) of x's shape.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.net = DiT(config)

    def forward(self, x, sigma, visible=None, labels=None):
        sd = self.config.sigma_data
        s = sigma.view(-1, 1, 1)
        c_skip = sd**2 / (s**2 + sd**2)
        c_out = s * sd / (s**2 + sd**2).sqrt()
        c_in = 1 / (s**2 + sd**2).sqrt()
        out = self.net((c_in * x).to(self.net.head.weight.dtype), sigma.log() / 4, visible, labels)
        return c_skip * x + c_out * out.to(x.dtype)


# ---------------------------------------------------------------------------------------------
# Losses: functions of tensors that draw nothing themselves.


def denoising_loss(denoised, clean, sigma, sigma_data):
    """Weighted denoising error of each image over its visible patches, (B,) (EDM eq. 8).

    denoised, clean (B, K, p*p*C), sigma (B,). With everything visible it is the plain EDM loss.
    """
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    return weight * (denoised - clean).square().mean(dim=(1, 2))


# ---------------------------------------------------------------------------------------------
# Checkpoints: one file of tensors and plain values, replaced as a whole or not at all.


def save_checkpoint(path, checkpoint):
    """Write a checkpoint beside `path`, sync it, rename it; the one it replaces becomes *.prev.pt.

    Whenever the machine stops, `path` or its *.prev.pt is whole. Raises OSError or RuntimeError if
    the disk is full; the files there are then untouched.
    """
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        if os.path.exists(path):
            os.replace(path, previous_name(path))
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def previous_name(path):
    """out/pt.pt -> out/pt.prev.pt"""
    return os.path.splitext(path)[0] + ".prev.pt"


def load_checkpoint(path):
    """Read a checkpoint of train.py, on the CPU; exits with a sentence if `path` is not one."""
    if not os.path.isfile(path):
        sys.exit(f"no checkpoint at {path}: give the path of a .pt file that train.py wrote")
    try:
        with zipfile.ZipFile(path) as z:  # torch.load itself does not compare the sums
            damaged = z.testzip()
        if damaged:
            raise ValueError(f"wrong sum of {damaged}")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # truncated, foreign or unsafe: the file's bytes decide which error
        sys.exit(
            f"{path} cannot be read as a checkpoint ({type(e).__name__}): it is damaged or of "
            "another kind; give a .pt file that train.py wrote"
        )
    needed = ("model", "ema", "architecture", "config", "step")
    missing = [k for k in needed if not isinstance(checkpoint, dict) or k not in checkpoint]
    if missing:
        sys.exit(f"{path} is not a checkpoint of train.py: it has no {', '.join(missing)}")
    try:
        sound, reason = is_sound(checkpoint), "weights, step or config"
    except (Exception, SystemExit) as e:  # the file may hold anything under these names
        sound, reason = False, " ".join(f"{e}".split())[:200]
    if not sound:
        sys.exit(f"{path} is not what train.py writes ({reason}): give another checkpoint")
    return checkpoint


def is_sound(checkpoint):
    """Whether both sets of weights are finite and have the names and shapes of the architecture."""
    with torch.device("meta"):  # takes no memory, whatever size is claimed
        right = {k: v.shape for k, v in Denoiser(stored_config(checkpoint)).state_dict().items()}
    step, config = checkpoint["step"], checkpoint["config"]
    return isinstance(config, dict) and type(step) is int and step >= 0 and all(
        {k: v.shape for k, v in weights.items()} == right
        and all(v.is_floating_point() and v.isfinite().all() for v in weights.values())
        for weights in (checkpoint["model"], checkpoint["ema"]))


def stored_config(checkpoint):
    """The ModelConfig of a checkpoint."""
    known = {f.name for f in fields(ModelConfig)}
    return ModelConfig(**{k: v for k, v in checkpoint["architecture"].items() if k in known})


def denoiser_from_checkpoint(checkpoint, weights="ema"):
    """Build the denoiser that a checkpoint describes, with its EMA or its raw weights."""
    denoiser = Denoiser(stored_config(checkpoint))
    denoiser.load_state_dict(checkpoint["ema" if weights == "ema" else "model"])
    return denoiser


def architecture(config):
    """The plain dictionary of a ModelConfig that a checkpoint stores."""
    return asdict(config)
