"""The network: a diffusion transformer that sees only the visible patches of an image.

An image is cut into N patches; training may keep K <= N of them. Whatever the network does, it does
on K tokens, so hiding nine tenths of the patches makes a step about ten times cheaper; only an
optional decoder looks at all N places again. Everything here takes `visible`, the (B, K) indices of
the kept patches; `visible=None` means the whole image.

Symbols: B batch, C channels, H = W image side, p patch side, N = (H/p)^2, K visible tokens.
Papers: MaskDM arXiv 2306.11363, MaskDiT 2306.09305, DiT 2212.09748, SPRINT 2510.21986,
EDM 2206.00364, ECT 2406.14548, SCT 2410.18958, STF 2302.00670.
"""

import math
import os
import sys
import zipfile
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.distributed as dist
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
    decoder_depth: int = 0  # blocks after the masked ones, on all tokens (MaskDiT)
    decoder_dim: int = 0  # their width; 0 becomes dim if there is a decoder
    decoder_heads: int = 0  # 0 becomes heads
    dense_depth: int = 0  # how many of `depth` blocks come before the masking (SPRINT)
    cm_segments: int = 0  # 0: a diffusion model; m > 0: a consistency model of m segments
    known_classes: tuple = ()  # the classes that it was trained on; () becomes all

    def __post_init__(self):
        self.decoder_dim = self.decoder_depth and (self.decoder_dim or self.dim)
        self.decoder_heads = self.decoder_depth and (self.decoder_heads or self.heads)
        for f in fields(self)[:-1]:  # the numbers
            v, low = getattr(self, f.name), -1 if f.default == 0 else 0
            if type(v) is not f.type or not low < v < 2**20:
                sys.exit(f"{f.name} is {v!r}, expected {f.type.__name__} above {low}, below 2^20")
        known, classes = self.known_classes, range(self.num_classes)
        if type(known) is not tuple or not all(type(k) is int and k in classes for k in known):
            sys.exit(f"known_classes is {known!r}, expected a tuple of class numbers")
        self.known_classes = known or tuple(classes)
        size, p = self.image_size, self.patch_size
        if size % p:
            divisors = [q for q in range(1, size + 1) if size % q == 0]
            fits = sorted(divisors, key=lambda q: abs(q - p))[:2]  # the two nearest
            sys.exit(f"image size {size} is not divisible by patch_size {p}: use a patch_size of "
                     f"{min(fits)} or {max(fits)}, or data of {size // p * p or p} or "
                     f"{size // p * p + p} px")
        for part in ("", "decoder_") if self.decoder_depth else ("",):
            dim, step = getattr(self, part + "dim"), 4 * getattr(self, part + "heads")
            if dim % step:
                sys.exit(f"{part}dim {dim} must be a multiple of 4 x {part}heads ({step}); the "
                         f"nearest that fits is {max(1, round(dim / step)) * step}")
        if self.dense_depth and not (self.decoder_depth and self.dense_depth < self.depth):
            sys.exit(f"dense_depth is {self.dense_depth}, expected less than depth {self.depth} "
                     "and a decoder_depth above 0: give both, such as 2 and 2")

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


def count_visible(grid, mask_ratio, mask_type="patch", block_size=4, may_hide_none=False):
    """Number K of visible patches on a grid x grid image: the same for every image of a batch.

    `mask_type` (MaskDM sec. 3.2): "patch" hides int(ratio*N) single patches, "block" hides
    int(ratio*N) // b^2 blocks of b x b on the block grid, "crop" shows one square of side
    round(sqrt(N - int(ratio*N))). Exits with a sentence where a mask cannot be had, and, unless
    `may_hide_none`, where a ratio above 0 hides none.
    """
    hidden = int(mask_ratio * grid**2)
    if mask_type == "crop":
        hidden = grid**2 - round(math.sqrt(grid**2 - hidden)) ** 2
    if mask_type == "block" and mask_ratio > 0:
        if block_size < 1 or grid % block_size:
            sys.exit(f"block_size {block_size} does not divide the {grid} x {grid} grid of "
                     f"patches: use one of {[b for b in range(1, grid) if grid % b == 0]}")
        hidden = hidden // block_size**2 * block_size**2
    if mask_ratio > 0 and hidden == 0 and not may_hide_none:
        sys.exit(f"mask_ratio {mask_ratio} with mask_type {mask_type} hides none of the {grid**2} "
                 "patches: raise the ratio, use smaller blocks, or ask for 0")
    return grid**2 - hidden


def sample_visible(batch, grid, mask_ratio, mask_type="patch", block_size=4, generator=None):
    """Draw which patches stay visible: (batch, K) int64 indices in ascending order, or None.

    None stands for the whole image, where nothing is hidden. Every image keeps `count_visible`.
    """
    k = count_visible(grid, mask_ratio, mask_type, block_size, may_hide_none=True)
    if k == grid**2:
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
    """Fixed 2-D sine-cosine positions (grid*grid, dim): half the channels for the row."""
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

    def __init__(self, dim, heads, cond_dim):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)
        self.modulation = nn.Linear(cond_dim, 6 * dim)

    def forward(self, x, cond):
        b, k, d = x.shape
        mod = self.modulation(cond).view(b, 1, 6, d).unbind(2)  # 6 x (B, 1, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = mod
        qkv = self.qkv(modulate(x, shift1, scale1)).view(b, k, 3, self.heads, d // self.heads)
        q, key, v = qkv.permute(2, 0, 3, 1, 4)  # 3 x (B, heads, K, head_dim)
        x = x + gate1 * self.proj(attention(q, key, v).transpose(1, 2).reshape(b, k, d))
        h = self.fc1(modulate(x, shift2, scale2))
        return x + gate2 * self.fc2(F.gelu(h))  # DiT's tanh form takes 3 times as long on a CPU


def take(tokens, visible):
    """The visible ones (B, K, D) of all tokens (B, N, D); visible (B, K), or None for all."""
    if visible is None:
        return tokens
    return tokens.gather(1, visible[:, :, None].expand(-1, -1, tokens.shape[2]))


class DiT(nn.Module):
    """tokens, c_noise (B,), visible (B, K) or None, labels (B,) or None -> tokens of that shape.

    tokens (B, K, p*p*C) are the visible ones; with a decoder (B, N, p*p*C), all of them. The blocks
    then still see the visible ones alone, and the decoder's blocks the answer for these and one
    learned token in every other place (MaskDiT fig. 2). With dense_depth > 0 the first blocks see
    all tokens, and what they make of them goes to the decoder, too (SPRINT, arXiv 2510.21986).
    """

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
        self.dense_depth = c.dense_depth
        self.blocks = nn.ModuleList(Block(c.dim, c.heads, c.dim) for _ in range(c.depth))
        self.decoder = None
        if c.decoder_depth:
            self.decoder_embed = nn.Linear(c.dim, c.decoder_dim)
            self.mask_token = nn.Parameter(0.02 * torch.randn(c.decoder_dim))
            positions = sincos_positions(c.grid, c.decoder_dim)
            self.register_buffer("decoder_positions", positions, persistent=False)
            if c.dense_depth:
                self.fuse = nn.Linear(c.decoder_dim + c.dim, c.decoder_dim)
            self.decoder = nn.ModuleList(
                Block(c.decoder_dim, c.decoder_heads, c.dim) for _ in range(c.decoder_depth))
        width = c.decoder_dim or c.dim
        self.modulation = nn.Linear(c.dim, 2 * width)
        self.head = nn.Linear(width, c.token_dim)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        if self.labels is not None:
            nn.init.normal_(self.labels.weight, std=0.02)
        # Every block starts as the identity and the output as zero (DiT sec. 3.2).
        blocks = [*self.blocks, *(self.decoder or ())]
        for m in [self.modulation, self.head] + [block.modulation for block in blocks]:
            nn.init.zeros_(m.weight)

    def forward(self, tokens, c_noise, visible=None, labels=None):
        angle = c_noise[:, None] * self.freq
        cond = self.time(torch.cat([angle.sin(), angle.cos()], dim=1))  # (B, D)
        if self.labels is not None:
            cond = cond + self.labels(labels)
        cond = F.silu(cond)
        if self.dense_depth:
            x = self.embed(tokens) + self.positions  # (B, N, D)
            for block in self.blocks[: self.dense_depth]:
                x = block(x, cond)
            dense, x = x, take(x, visible)
        else:
            positions = self.positions if visible is None else self.positions[visible]
            x = self.embed(take(tokens, visible) if self.decoder else tokens) + positions
        for block in self.blocks[self.dense_depth :]:  # (B, K, D)
            x = block(x, cond)
        if self.decoder:
            x = self.decoder_embed(x)
            if visible is None:
                x = x + 0 * self.mask_token  # a gradient of zero, so that no process lacks one
            else:  # back to their places among N; the mask token in all others
                whole = self.mask_token.to(x.dtype).expand(len(x), len(self.positions), -1)
                x = whole.scatter(1, visible[:, :, None].expand_as(x), x)
            if self.dense_depth:
                x = self.fuse(torch.cat([x, dense], dim=2))
            x = x + self.decoder_positions
            for block in self.decoder:
                x = block(x, cond)
        shift, scale = self.modulation(cond)[:, None].chunk(2, dim=2)
        return self.head(modulate(x, shift, scale))


class Denoiser(nn.Module):
    """EDM preconditioning around the network: D(x; sigma), the denoised tokens (EDM eq. 7).

    x noisy tokens, (B, K, p*p*C) or, with a decoder, (B, N, p*p*C); sigma (B,) > 0; visible (B, K)
    or None; labels (B,) int64, num_classes being the null class, needed if the model has classes.
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


def reconstruction_loss(denoised, noisy, visible):
    """Error of each image over its masked patches, (B,) (MaskDiT sec. 3.3).

    denoised, noisy (B, N, p*p*C), visible (B, K), K < N. The target is the noisy patch, normalised
    by its own mean and variance; the noise level does not weigh it.
    """
    mean, variance = noisy.mean(dim=2, keepdim=True), noisy.var(dim=2, keepdim=True)
    target = (noisy - mean) / (variance + 1e-6).sqrt()
    error = (denoised - target).square().mean(dim=2)  # (B, N)
    return error.scatter(1, visible, 0).sum(dim=1) / (error.shape[1] - visible.shape[1])


def consistency_step(t, stage, q=2.0, k=8.0, b=1.0):
    """The lower noise level r of each pair (t, r), 0 <= r < t (ECT eq. 16; k = 0: the constant).

    r = t (1 - q^-(stage + 1) (1 + k sigmoid(-b t))), at least 0. t (B,); the pairs close as the
    stage, 0, 1, 2, ... or any number between, goes up.
    """
    return (t * (1 - q ** -(stage + 1.0) * (1 + k * torch.sigmoid(-b * t)))).clamp_min(0)


def consistency_function(denoised, x, t, s):
    """f(x, t) = (1 - s/t) D + (s/t) x, which is x at t = s: consistent down to the level s.

    denoised, x (B, K, p*p*C), t and s (B,). With s = 0 it is D itself.
    """
    share = (s / t).view(-1, 1, 1)
    return denoised + share * (x - denoised)


def posterior_mean(x, clean, sigma, references, allowed=None, visible=None):
    """The mean of the images that may lie behind x, (B, K, d) (STF, arXiv 2302.00670, eq. 6; SCT).

    sum_i a_i y_i over y itself (clean) and R references, a = softmax(-|x - y_i|^2 / (2 sigma^2)).
    x, clean (B, K, d) and sigma (B,); references (R, N, d), of which image j sees the patches
    visible[j] (None: all), and, with allowed (B, R) bool, only the references allowed[j].
    In float32 and by matrix products: no (B, R, N*d) tensor exists.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # distances are differences of large numbers
    try:
        with torch.autocast(x.device.type, enabled=False):
            b, d = len(x), x.shape[2]
            refs = references.flatten(1)  # (R, N*d)
            if visible is None:
                product, square = x.flatten(1) @ refs.T, refs.square().sum(dim=1)
            else:  # hidden patches count zero in both
                place = visible[:, :, None].expand(-1, -1, d)
                blank = x.new_zeros(b, *references.shape[1:])
                product = blank.scatter(1, place, x).flatten(1) @ refs.T
                shown = blank.scatter(1, place, torch.ones_like(x)).flatten(1)
                square = shown @ refs.square().T
            distance = x.square().sum(dim=(1, 2))[:, None] - 2 * product + square  # (B, R)
            own = (x - clean).square().sum(dim=(1, 2))[:, None]
            logits = -torch.cat([own, distance], dim=1) / (2 * sigma[:, None] ** 2)
            if allowed is not None:
                logits[:, 1:].masked_fill_(~allowed, -math.inf)
            weights = logits.softmax(dim=1)  # (B, 1 + R)
            mean = (weights[:, 1:] @ refs).view(b, *references.shape[1:])
    finally:
        torch.set_float32_matmul_precision(precision)
    return weights[:, :1, None] * clean + take(mean, visible)


def consistency_loss(f_t, target, t, r, c=0.0, weight="gap", sigma_data=0.5):
    """Weighted distance of each image, (B,) (ECT sec. 3.3): w * (sqrt(|f_t - target|^2 + c^2) - c).

    f_t, target (B, K, d), t > r (B,). w = 1/(t - r) for "gap", 1/t^2 + 1/sigma_data^2 for "edm".
    """
    norm = torch.linalg.vector_norm(f_t - target, dim=(1, 2))  # its gradient at 0 is 0
    distance = (norm**2 + c**2).sqrt() - c if c else norm
    return distance * (1 / (t - r) if weight == "gap" else 1 / t**2 + 1 / sigma_data**2)


# ---------------------------------------------------------------------------------------------
# Objectives: a network and a batch -> the loss of each image.


def objective(model, config, clean, noise, sigma, visible, labels, mae_weight=0.0, target=None):
    """The loss of each image of a batch, (b,): masked or whole, the same line.

    A decoder also answers for hidden patches. After MaskDiT's encoder they are reconstructed; where
    the first blocks have seen them (dense_depth > 0) they are denoised like the others. `target`:
    what the answer should be, if not `clean`.
    """
    target = clean if target is None else target
    noisy = clean + sigma.view(-1, 1, 1) * noise
    denoised = model(noisy, sigma, visible, labels)
    seen = visible if config.decoder_depth and not config.dense_depth else None
    loss = denoising_loss(take(denoised, seen), take(target, seen), sigma, config.sigma_data)
    return loss if seen is None else loss + mae_weight * reconstruction_loss(denoised, noisy, seen)


def consistency_objective(model, config, cfg, step, edges, clean, noise, sigma, visible, labels,
                          references=None, reference_labels=None):
    """The consistency loss of each image, (b,): ECT's, or SCT's if there are references.

    The answer at sigma = t is drawn to the answer of the same network, without gradient, at the
    lower level r, where x is one step along the estimated ODE from x_t. edges (m + 1,): the
    segments' noise levels, from 80 to 0 (sample.segment_edges); cfg: the settings cm_* of train.py.
    """
    t, noisy = sigma, clean + sigma.view(-1, 1, 1) * noise
    lower = torch.where(edges[1:] < t[:, None], edges[1:], 0).amax(dim=1)  # of t's segment
    stage = step / cfg.cm_stage_length
    stage = stage if cfg.cm_smooth else math.floor(stage)
    r = torch.maximum(consistency_step(t, stage, cfg.cm_q, cfg.cm_k, cfg.cm_b), lower)
    goal = clean  # where the ODE leads, judged by this image alone
    if references is not None:
        allowed = None
        if labels is not None:
            null = labels[:, None] == config.num_classes
            allowed = (labels[:, None] == reference_labels) | null
        seen = None if config.decoder_depth else visible
        goal = posterior_mean(noisy, clean, t, references, allowed, seen)
    x_r = noisy + ((r - t) / t).view(-1, 1, 1) * (noisy - goal)
    with torch.no_grad():
        level = torch.where(r > lower, r, t)  # where r = lower the answer is x_r itself
        below = consistency_function(model(x_r, level, visible, labels), x_r, level, lower)
        target = torch.where((r > lower).view(-1, 1, 1), below, x_r)
    above = consistency_function(model(noisy, t, visible, labels), noisy, t, lower)
    if config.decoder_depth and not config.dense_depth:
        above, target = take(above, visible), take(target, visible)
    return consistency_loss(above, target, t, r, cfg.cm_c, cfg.cm_weight, config.sigma_data)


# ---------------------------------------------------------------------------------------------
# What was learned before: importance of the weights, and how well images are known.


def fisher_information(denoiser, config, batches, autocast):
    """Diagonal Fisher information of the denoising loss: E (d loss / d weight)^2 (EWC), by name.

    The mean over the images of all batches of the squared gradient of each image alone.
    """
    total = {n: torch.zeros_like(p) for n, p in denoiser.named_parameters()}
    count = 0
    for batch in batches:
        for i in range(len(batch["clean"])):
            one = {k: None if batch[k] is None else batch[k][i : i + 1]
                   for k in ("clean", "noise", "sigma", "visible", "labels")}
            with autocast:
                loss = objective(denoiser, config, **one).sum()
            gradients = torch.autograd.grad(loss, list(denoiser.parameters()))
            for t, g in zip(total.values(), gradients):
                t.addcmul_(g, g)
        count += len(batch["clean"])
    if dist.is_initialized():  # each process had its part of the batches
        count = torch.tensor(float(count), device=next(iter(total.values())).device)
        for t in (count, *total.values()):
            dist.all_reduce(t)
    return {n: t / count for n, t in total.items()}


@torch.no_grad()
def add_penalty(parameters, anchor, strength):
    """Add the gradient of 1/2 sum strength (theta - anchor)^2; returns its value.

    parameters, anchor: lists of tensors; strength: a number (L2) or a list of tensors (EWC).
    """
    pull = torch._foreach_sub([p.detach() for p in parameters], anchor)
    force = torch._foreach_mul(pull, strength)
    torch._foreach_add_([p.grad for p in parameters], force)
    return sum((f * d).sum() for f, d in zip(force, pull)) / 2


def decoder_nats(z, values, sigma=0.002):
    """-ln p(v | z) of 8-bit values: p = softmax over the levels v_k of -(z - v_k)^2 / (2 sigma^2).

    z any shape, in [-1, 1] and noisy; values uint8 of that shape.
    """
    levels = torch.arange(256, device=z.device, dtype=z.dtype) / 127.5 - 1
    logits = -((z.reshape(-1, 1) - levels) ** 2) / (2 * sigma**2)
    return -logits.log_softmax(dim=1).gather(1, values.reshape(-1, 1).long()).view(z.shape)


def bound(denoise, values, generator, sigma_data=0.5, bins=10):
    """Variational bound on -log2 p in bits per dimension (b,), and losses by level (b, bins).

    values uint8 (b, K, d); denoise(x, sigma (b,)) -> D. With lambda = -2 ln sigma: 1/2 of the
    integral of E|x - D|^2 e^lambda, by one noise level of each image in each bin of ln sigma, + the
    prior |x|^2 / (2 sigma_max^2) + the decoder at sigma_min. The losses: `denoising_loss`.
    """
    low, high = math.log(0.002), math.log(80.0)  # the noise levels of the sampler
    x = values.float() / 127.5 - 1
    b, size = len(x), x[0].numel()

    def randn():
        return torch.randn(x.shape, generator=generator).to(x.device)

    losses, nats = [], 0.0
    for i in range(bins):
        # One random place in the bin, and the images evenly over it: less chance, no bias.
        u = (torch.randperm(b, generator=generator) + torch.rand(1, generator=generator)) / b
        sigma = torch.exp(low + (high - low) * (i + u) / bins).to(x.device)
        denoised = denoise(x + sigma.view(-1, 1, 1) * randn(), sigma)
        losses.append(denoising_loss(denoised, x, sigma, sigma_data))
        error = (denoised - x).square().sum(dim=(1, 2))
        nats = nats + (high - low) / bins * error / sigma**2  # d lambda = 2 d ln sigma
    nats = nats + x.square().sum(dim=(1, 2)) / (2 * math.exp(2 * high))
    z = x + math.exp(low) * randn()
    decoded = torch.stack([decoder_nats(z[i], values[i]).sum() for i in range(b)])
    return (nats + decoded) / (math.log(2) * size), torch.stack(losses, dim=1)


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
            if damaged := z.testzip():
                raise ValueError(f"wrong sum of {damaged}")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        needed = ("model", "ema", "architecture", "config", "step")
        if missing := [k for k in needed if k not in checkpoint]:
            raise ValueError(f"it has no {', '.join(missing)}")
        with torch.device("meta"):  # takes no memory, whatever size is claimed
            right = Denoiser(stored_config(checkpoint)).state_dict()
        shapes = {k: v.shape for k, v in right.items()}
        step, config = checkpoint["step"], checkpoint["config"]
        sound = isinstance(config, dict) and type(step) is int and step >= 0
        for weights in (checkpoint["model"], checkpoint["ema"]):
            sound &= {k: v.shape for k, v in weights.items()} == shapes
            sound &= all(v.is_floating_point() and v.isfinite().all() for v in weights.values())
        if not sound:
            raise ValueError("odd weights, step or config")
    except (Exception, SystemExit) as e:  # the file's bytes decide which
        why = " ".join(f"{e}".split()).split(". ")[0][:200] or type(e).__name__
        sys.exit(f"{path} is not a checkpoint of train.py, but damaged or of another kind ({why}): "
                 "give a .pt file that train.py wrote")
    return checkpoint


def stored_config(checkpoint):
    """The ModelConfig of a checkpoint."""
    known = {f.name for f in fields(ModelConfig)}
    return ModelConfig(**{k: v for k, v in checkpoint["architecture"].items() if k in known})


def denoiser_from_checkpoint(checkpoint, weights="ema"):
    """Build the denoiser that a checkpoint describes, with its EMA or its raw weights."""
    denoiser = Denoiser(stored_config(checkpoint))
    denoiser.load_state_dict(checkpoint["ema" if weights == "ema" else "model"])
    return denoiser

