"""The network, its noise model and its losses: a diffusion transformer on visible patches.

An image is cut into N patches; training may keep K <= N of them. What the network does, it does on
K tokens, so hiding nine tenths of the patches makes a step about ten times cheaper. Everything here
takes `visible`, the (B, K) indices of the kept patches; `visible=None` means the whole image.
Symbols: B batch, C channels, H = W image side, p patch side, N = (H/p)^2, K visible tokens.
"""

import math
import os
import zipfile
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from prepare_data import need, open_folder

@dataclass
class ModelConfig:
    """The architecture. It travels in the checkpoint, so that nothing else has to repeat it."""

    image_size: int = 64  # pixels (or latent cells) a side
    channels: int = 3
    patch_size: int = 4
    dim: int = 128  # width of a token
    depth: int = 6  # number of blocks
    heads: int = 4
    num_classes: int = 0  # 0: unconditional
    decoder_depth: int = 0  # blocks on all tokens after the masked ones (MaskDiT)
    decoder_dim: int = 0  # their width; 0: dim
    decoder_heads: int = 0  # 0: heads
    route: tuple = ()  # (A, B): hidden tokens pass by the blocks A to B - 1 (TREAD); (): none do
    consistency: bool = False  # whether it is to be sampled in one or two steps
    latent: tuple = ()  # mean and deviation of each channel of the data; (): 8-bit images

    def __post_init__(self):
        self.latent = tuple(map(tuple, self.latent))
        self.decoder_dim = self.decoder_depth and (self.decoder_dim or self.dim)
        self.decoder_heads = self.decoder_depth and (self.decoder_heads or self.heads)
        size, p, route = self.image_size, self.patch_size, self.route
        self.grid = size // p  # patches a side
        self.token_dim = p**2 * self.channels  # values in one patch
        self.takes_all = bool(self.decoder_depth or route)  # all N tokens, of which it hides some
        need(size % p == 0, f"image size {size} is not divisible by patch_size {p}: use one of "
             f"{[q for q in range(1, size + 1) if size % q == 0]}")
        need(not route or not self.decoder_depth and 0 <= route[0] < route[1] <= self.depth,
             f"route is {route}, expected A < B <= depth {self.depth}, and no decoder")

PRESETS = {  # MaskDM table of settings; DiT table 1
    "demo": dict(dim=128, depth=6, heads=4, patch_size=4),  # two CPU cores, minutes
    "maskdm-64": dict(dim=512, depth=13, heads=8, patch_size=4),
    "maskdm-256": dict(dim=768, depth=13, heads=12, patch_size=4),
    "dit-s": dict(dim=384, depth=12, heads=6, patch_size=2),
    "dit-b": dict(dim=768, depth=12, heads=12, patch_size=2),
    "dit-l": dict(dim=1024, depth=24, heads=16, patch_size=2),
    "dit-xl": dict(dim=1152, depth=28, heads=16, patch_size=2),
}

# ---- Patches and masks.
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
    """Number K of visible patches on a grid x grid image, the same for every image of a batch.
    "patch" hides int(ratio*N) patches, "block" int(ratio*N) // b^2 blocks of b x b on their grid,
    "crop" shows one square of side round(sqrt(N - int(ratio*N))) (MaskDM sec. 3.2)."""
    hidden = int(mask_ratio * grid**2)
    if mask_type == "crop":
        return round(math.sqrt(grid**2 - hidden)) ** 2
    if mask_type == "patch" or not hidden:
        return grid**2 - hidden
    need(mask_type == "block" and block_size > 0 and grid % block_size == 0,
         f"no {mask_type} mask of block_size {block_size} fits {grid} x {grid} patches")
    return grid**2 - hidden // block_size**2 * block_size**2

def sample_visible(batch, grid, mask_ratio, mask_type="patch", block_size=4, generator=None):
    """Which patches stay visible: (batch, K) int64, ascending; None where nothing is hidden."""
    k = count_visible(grid, mask_ratio, mask_type, block_size)
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

class Images:
    """The images of prepared folders (commas between), numbered through. Another class needs these
    arguments, len, read, labels (int64 (N,), -1: none), meta (size, channels, class_names or None,
    latent: None or means and deviations). Classes are united by name, `class_names` first."""

    def __init__(self, folders, split="train", patch_size=1, class_names=()):
        opened = [open_folder(folder, split) for folder in folders.split(",")]
        self.arrays, labels, metas = zip(*opened)  # arrays: memmaps (N, H, W, C)
        kinds = {(meta["size"], meta["channels"], meta["dtype"]) for meta in metas}
        need(len(kinds) == 1, f"{folders} hold {kinds}, which can't be mixed: prepare them alike")
        names = [*dict.fromkeys([*class_names, *sum((m["class_names"] or [] for m in metas), [])])]
        numbers = [[*map(names.index, meta["class_names"] or ()), -1] for meta in metas]
        self.labels = np.concatenate([np.array(n)[own] for n, own in zip(numbers, labels)])
        self.meta = metas[0] | dict(class_names=names or None)
        self.patch_size = patch_size

    def __len__(self):
        return sum(map(len, self.arrays))

    def read(self, index, visible, flip):
        """The visible patches (b, K, p*p*C) of the images `index` (b,), and no other byte of them.
        visible (b, K) patch numbers, None for all; flip (b,) bool: which images to mirror (then the
        patch numbers are those of the mirrored image)."""
        p, c, g = self.patch_size, self.meta["channels"], self.meta["size"] // self.patch_size
        visible = np.tile(np.arange(g * g), (len(index), 1)) if visible is None else visible
        row, col = visible // g, visible % g
        col = np.where(flip[:, None], g - 1 - col, col)
        out, start = np.empty((*visible.shape, p, p, c), self.meta["dtype"]), 0
        for array in self.arrays:
            patches = array.reshape(-1, g, p, g, p, c)  # a view: nothing is read yet
            own = (start <= index) & (index < start + len(array))
            out[own] = patches[index[own, None] - start, row[own], :, col[own]]
            start += len(array)
        out[flip] = out[flip][:, :, :, ::-1]
        return out.reshape(*visible.shape, p * p * c)

# ---- The network (DiT with adaLN-Zero), on whatever tokens it is given.
def sincos_positions(grid, dim):
    """Fixed 2-D sine-cosine positions (grid*grid, dim): half the channels for the row."""
    freq = 10000.0 ** -(np.arange(dim // 4) / (dim // 4))
    angle = np.arange(grid)[:, None] * freq  # (grid, dim/4)
    axis = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)  # (grid, dim/2)
    rows, cols = axis.repeat(grid, axis=0), np.tile(axis, (grid, 1))
    return torch.from_numpy(np.concatenate([rows, cols], axis=1)).float()

def attention(q, k, v):
    """Softmax attention, all (B, heads, N, head_dim): fused, but not for short sequences on a CPU,
    where the fused kernel's backward is slower (`tests/tools/bench.py attention`)."""
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

def through(blocks, x, cond):
    """x (B, K, D) after all of the blocks."""
    for block in blocks:
        x = block(x, cond)
    return x

def take(tokens, visible):
    """The visible ones (B, K, D) of all tokens (B, N, D); visible (B, K), or None for all."""
    if visible is None:
        return tokens
    return tokens.gather(1, visible[:, :, None].expand(-1, -1, tokens.shape[2]))

def put(tokens, visible, others):
    """`others` (B, N, D) with the tokens (B, K, D) in their places visible (B, K)."""
    return others.scatter(1, visible[:, :, None].expand_as(tokens), tokens)

class DiT(nn.Module):
    """tokens, c_noise (B,), visible (B, K) or None, labels (B,), -1 for none -> tokens like them.
    tokens (B, K, p*p*C) are the visible ones. With a decoder or a route they are all (B, N, p*p*C):
    the blocks still see the visible ones alone, and the decoder these and one learned token in
    every other place (MaskDiT fig. 2); or only the blocks of the route do (TREAD fig. 2), and the
    hidden tokens come back as they were before."""

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
        # One row more: that of "no class", which has the number -1 outside the network.
        self.labels = nn.Embedding(c.num_classes + 1, c.dim) if c.num_classes else None
        self.route = c.route
        self.blocks = nn.ModuleList(Block(c.dim, c.heads, c.dim) for _ in range(c.depth))
        self.decoder, width = None, c.decoder_dim or c.dim
        if c.decoder_depth:
            self.decoder_modulation = nn.Linear(c.dim, 2 * c.dim)
            self.decoder_embed = nn.Linear(c.dim, c.decoder_dim)
            self.mask_token = nn.Parameter(0.02 * torch.randn(c.decoder_dim))
            self.register_buffer("decoder_positions", sincos_positions(c.grid, width), False)
            self.decoder = nn.ModuleList(
                Block(c.decoder_dim, c.decoder_heads, c.dim) for _ in range(c.decoder_depth))
        self.modulation = nn.Linear(c.dim, 2 * width)
        self.head = nn.Linear(width, c.token_dim)
        for name, m in self.named_modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
            # Every block starts as the identity, the output and the decoder's input as zero (DiT
            # sec. 3.2, MaskDiT).
            if name.endswith(("modulation", "head", "decoder_embed")):
                nn.init.zeros_(m.weight)
            if name in ("time.0", "time.2", "labels"):
                nn.init.normal_(m.weight, std=0.02)

    def forward(self, tokens, c_noise, visible=None, labels=None):
        angle = c_noise[:, None] * self.freq
        cond = self.time(torch.cat([angle.sin(), angle.cos()], dim=1))  # (B, D)
        if self.labels is not None:
            last = self.labels.num_embeddings - 1
            cond = cond + self.labels(torch.where(labels < 0, last, labels))
        cond = F.silu(cond)
        if self.decoder:
            tokens = take(tokens, visible)
        here = self.positions if visible is None or self.route else self.positions[visible]
        x, blocks = self.embed(tokens) + here, [*self.blocks]
        a, b = self.route if self.route and visible is not None else (0, 0)
        if a < b:
            x = through(blocks[:a], x, cond)
            x = put(through(blocks[a:b], take(x, visible), cond), visible, x)
        x = through(blocks[b:], x, cond)
        if self.decoder:
            shift, scale = self.decoder_modulation(cond)[:, None].chunk(2, dim=2)
            x = self.decoder_embed(modulate(x, shift, scale))
            if visible is None:
                x = x + 0 * self.mask_token  # a gradient of zero, so that no process lacks one
            else:
                others = self.mask_token.to(x.dtype).expand(len(x), len(self.positions), -1)
                x = put(x, visible, others)
            x = through(self.decoder, x + self.decoder_positions, cond)
        shift, scale = self.modulation(cond)[:, None].chunk(2, dim=2)
        return self.head(modulate(x, shift, scale))

# ---- The noise model, EDM: all that knows how noise is added. Another one changes this section.
NOISE = "edm"  # checkpoints say with which they were trained
SIGMA_DATA = 0.5  # standard deviation of the data; latents are normalised to it
P_MEAN, P_STD = -1.2, 1.2  # of ln sigma in training (EDM table 1)

def need_noise(kind, feature):
    """Exit if a feature that is derived for one kind of noise model meets another."""
    need(kind == NOISE, f"{feature} is for the noise model {kind}, but this is {NOISE}")

def sigma_of(z, mean=P_MEAN, std=P_STD):
    """Noise levels from standard normal draws or quantiles z (EDM table 1)."""
    return torch.exp(mean + std * z)

def noised(clean, noise, sigma):
    """Noisy tokens x (B, K, d) from clean ones and standard normal noise; sigma (B,)."""
    return clean + sigma.view(-1, 1, 1) * noise

def denoising_loss(denoised, clean, sigma):
    """Weighted denoising error of each image over its visible patches, (B,) (EDM eq. 8).
    denoised, clean (B, K, p*p*C), sigma (B,). With everything visible it is the plain EDM loss."""
    weight = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2
    return weight * (denoised - clean).square().mean(dim=(1, 2))

def sampler_levels(steps, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """Noise levels of a sampler, float64 (steps + 1,), from sigma_max to 0 (EDM eq. 5)."""
    i = torch.arange(steps, dtype=torch.float64) / max(steps - 1, 1)
    top, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return torch.cat([(top + i * (low - top)) ** rho, torch.zeros(1, dtype=torch.float64)])

def normalised(data, latent):
    """8-bit values to [-1, 1]; latents (..., p*p*C) to mean 0 and deviation SIGMA_DATA in each
    channel, by their mean and deviation `latent`: noise levels are measured against that."""
    if not latent:
        return data.float().div_(127.5).sub_(1)
    mean, deviation = torch.tensor(latent).to(data.device, non_blocking=True)
    data = (data.unflatten(-1, (-1, len(mean))) - mean) * (SIGMA_DATA / deviation)
    return data.flatten(-2)

class Denoiser(nn.Module):
    """Preconditioning around the network: D(x; sigma), the denoised tokens (EDM eq. 7).
    x noisy tokens, (B, K, p*p*C), or (B, N, p*p*C) if config.takes_all; sigma (B,) > 0; visible
    (B, K) or None; labels (B,), -1 for no class. Returns float32 (or wider) of x's shape."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.net = DiT(config)

    def forward(self, x, sigma, visible=None, labels=None):
        sd, s = SIGMA_DATA, sigma.view(-1, 1, 1)
        c_skip = sd**2 / (s**2 + sd**2)
        c_out = s * sd / (s**2 + sd**2).sqrt()
        c_in = 1 / (s**2 + sd**2).sqrt()
        dtype = self.net.head.weight.dtype
        out = self.net((c_in * x).to(dtype), (sigma.log() / 4).to(dtype), visible, labels)
        return c_skip * x + c_out * out.to(x.dtype)

# ---- Losses: functions of tensors that draw nothing themselves.
def reconstruction_loss(denoised, noisy, visible):
    """Error of each image over its masked patches, (B,) (MaskDiT sec. 3.3).
    denoised, noisy (B, N, p*p*C), visible (B, K), K < N. The target is the noisy patch, normalised
    by its own mean and variance; the noise level does not weigh it."""
    mean, variance = noisy.mean(dim=2, keepdim=True), noisy.var(dim=2, keepdim=True)
    target = (noisy - mean) / (variance + 1e-6).sqrt()
    error = (denoised - target).square().mean(dim=2)  # (B, N)
    return error.scatter(1, visible, 0).sum(dim=1) / (error.shape[1] - visible.shape[1])

def consistency_step(t, stage, q=2.0, k=8.0, b=1.0):
    """The lower noise level r of each pair (t, r), 0 <= r < t (ECT eq. 16; k = 0: the constant).
    t (B,); the pairs close as the stage, 0, 1, 2, ... or any number between, goes up."""
    return (t * (1 - q ** -(stage + 1.0) * (1 + k * torch.sigmoid(-b * t)))).clamp_min(0)

def posterior_mean(x, clean, sigma, references, allowed=None, visible=None):
    """The mean of the images that may lie behind x, (B, K, d) (STF, arXiv 2302.00670, eq. 6; SCT).
    sum_i a_i y_i over y itself (clean) and R references, a = softmax(-|x - y_i|^2 / (2 sigma^2)).
    x, clean (B, K, d) and sigma (B,); references (R, N, d), of which image j sees the patches
    visible[j] (None: all), and, with allowed (B, R) bool, only the references allowed[j]."""
    with torch.autocast(x.device.type, enabled=False):  # small differences of large numbers
        refs = references.flatten(1)  # (R, N*d)
        if visible is None:
            product, square = x.flatten(1) @ refs.T, refs.square().sum(dim=1)
        else:  # hidden patches count zero in both
            blank = x.new_zeros(len(x), *references.shape[1:])
            product = put(x, visible, blank).flatten(1) @ refs.T
            square = put(torch.ones_like(x), visible, blank).flatten(1) @ refs.square().T
        distance = x.square().sum(dim=(1, 2))[:, None] - 2 * product + square  # (B, R)
        own = (x - clean).square().sum(dim=(1, 2))[:, None]
        logits = -torch.cat([own, distance], dim=1) / (2 * sigma[:, None] ** 2)
        if allowed is not None:
            logits[:, 1:].masked_fill_(~allowed, -math.inf)
        weights = logits.softmax(dim=1)  # (B, 1 + R)
        mean = (weights[:, 1:] @ refs).view(len(x), *references.shape[1:])
    return weights[:, :1, None] * clean + take(mean, visible)

def consistency_loss(f_t, target, t, r, c=0.0, weight="gap"):
    """Weighted distance of each image, (B,) (ECT sec. 3.3): w * (sqrt(|f_t - target|^2 + c^2) - c).
    f_t, target (B, K, d), t > r (B,). w = 1/(t - r) for "gap", 1/t^2 + 1/sigma_data^2 for "edm"."""
    norm = torch.linalg.vector_norm(f_t - target, dim=(1, 2))  # its gradient at 0 is 0
    distance = (norm**2 + c**2).sqrt() - c if c else norm
    return distance * (1 / (t - r) if weight == "gap" else 1 / t**2 + 1 / SIGMA_DATA**2)

# ---- Objectives: a network and a batch -> the loss of each image.
def diffusion_objective(model, config, clean, noise, sigma, visible, labels, mae_weight=0.0,
                        target=None):
    """The loss of each image, (b,), masked or whole; with a decoder the hidden patches are
    reconstructed, too (MaskDiT). `target`: what the answer should be, if not `clean`."""
    target = clean if target is None else target
    x = noised(clean, noise, sigma)
    denoised = model(x, sigma, visible, labels)
    if not config.decoder_depth or visible is None:
        return denoising_loss(denoised, target, sigma)
    seen = denoising_loss(take(denoised, visible), take(target, visible), sigma)
    return seen + mae_weight * reconstruction_loss(denoised, x, visible)

def consistency_objective(model, config, cfg, step, clean, noise, sigma, visible, labels,
                          references=None, reference_labels=None):
    """The consistency loss of each image, (b,): ECT's, or SCT's with references. The answer at
    sigma = t is drawn to that at the lower level r, one step along the estimated ODE from x_t."""
    t, x_t = sigma, noised(clean, noise, sigma)
    stage = step // max(1, math.ceil(cfg.steps / cfg.cm_stages))
    r = consistency_step(t, stage, cfg.cm_q)
    goal = clean  # where the ODE leads, judged by this image alone
    seen = visible if config.decoder_depth else None  # of the answer the visible patches count
    if references is not None:
        allowed = None if labels is None else (
            (labels[:, None] == reference_labels) | (labels[:, None] == -1))
        shown = None if config.takes_all else visible
        goal = posterior_mean(x_t, clean, t, references, allowed, shown)
    x_r = x_t + ((r - t) / t).view(-1, 1, 1) * (x_t - goal)
    with torch.no_grad():  # where r = 0 the answer is x_r itself
        answer = model(x_r, torch.where(r > 0, r, t), visible, labels)
        target = torch.where((r > 0).view(-1, 1, 1), answer, x_r)
    f_t = model(x_t, t, visible, labels)
    return consistency_loss(take(f_t, seen), take(target, seen), t, r, cfg.cm_c, cfg.cm_weight)

class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal, for matrices; updates as large as AdamW's (arXiv 2502.16982).
    torch.optim.Muon, but all at once and iterated on n x n products, n the smaller side."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for n in {min(p.shape) for p in group["params"]}:
                weights = [p for p in group["params"] if min(p.shape) == n]
                gradients, lr = [p.grad for p in weights], group["lr"]
                v = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in weights]
                torch._foreach_lerp_(v, gradients, 0.05)
                x = torch._foreach_lerp(gradients, v, 0.95)  # Nesterov's
                x = [m.mT if m.shape[0] > n else m for m in x]
                square = torch.stack([m @ m.mT for m in x])
                norm = square.diagonal(dim1=1, dim2=2).sum(1).clamp_min(1e-30).view(-1, 1, 1)
                square, root = square / norm, torch.eye(n, device=norm.device) / norm.sqrt()
                for _ in range(5):  # singular values of root @ x towards 1 (Newton-Schulz)
                    factor = torch.baddbmm(square, square, square, beta=-4.775, alpha=2.0315)
                    factor.diagonal(dim1=1, dim2=2).add_(3.4445)
                    square, root = factor @ square @ factor, factor @ root
                torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
                for p, m, r in zip(weights, x, root):
                    update = (r @ m).mT if p.shape[0] > n else r @ m
                    p.add_(update, alpha=-0.2 * lr * max(p.shape) ** 0.5)

# ---- Continual learning: what each weight is worth, and what a teacher answers.
def fisher_information(denoiser, config, batch, autocast):
    """Diagonal Fisher information of the denoising loss, E (d loss / d weight)^2 (EWC): a list.
    The mean over the images of a batch of each one's squared gradient."""
    parameters = list(denoiser.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    for i in range(len(batch["clean"])):
        one = {k: None if batch[k] is None else batch[k][i : i + 1]
               for k in ("clean", "noise", "sigma", "visible", "labels")}
        with autocast:
            loss = diffusion_objective(denoiser, config, **one).sum()
        gradients = torch.autograd.grad(loss, parameters)
        torch._foreach_addcmul_(total, gradients, gradients)
    return [t / len(batch["clean"]) for t in total]

@torch.no_grad()
def teach(teacher, n_new, clean, noise, sigma, visible, labels):
    """The targets: the first n_new images, then what the teacher answers (arXiv 2311.14028)."""
    if n_new == len(clean):
        return clean
    x = noised(clean[n_new:], noise[n_new:], sigma[n_new:])
    shown, classes = (None if t is None else t[n_new:] for t in (visible, labels))
    return torch.cat([clean[:n_new], teacher(x, sigma[n_new:], shown, classes)])

# ---- Checkpoints: one file of tensors and plain values, replaced as a whole or not at all.
def replace_file(path, write, keep=None):
    """write(file) beside `path`, sync, rename; what it replaces gets the name `keep`, if any. When
    the machine stops, one of them is whole. Exits with a sentence if the disk is full."""
    try:
        with open(f"{path}.tmp", "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
    except (OSError, RuntimeError) as e:
        if os.path.exists(f"{path}.tmp"):
            os.remove(f"{path}.tmp")
        need(False, f"{path} could not be written ({e}); what was there is whole: make room, go on")
    if keep and os.path.exists(path):
        os.replace(path, keep)
    os.replace(f"{path}.tmp", path)

def load_checkpoint(path):
    """Read a checkpoint of train.py, on the CPU; exits with a sentence if `path` is not one."""
    try:
        with zipfile.ZipFile(path) as z:  # torch.load itself does not compare the sums
            if damaged := z.testzip():
                raise ValueError(f"wrong sum of {damaged}")
        checkpoint = torch.load(path, "cpu", weights_only=True, mmap=os.name != "nt")  # lazy
        ModelConfig(**checkpoint["architecture"])
    except Exception as e:  # the file's bytes decide which
        need(False, f"{path} is no whole checkpoint of train.py ({e!r:.200})")
    need_noise(checkpoint.get("noise", "edm"), path)
    return checkpoint

def load_what_fits(denoiser, weights):
    """Load weights by name where the shapes agree; returns the names of those that begin afresh.
    Of the label embedding the rows of `weights` come first, and its last row stays the last."""
    mine, labels = denoiser.state_dict(), "net.labels.weight"
    if labels in weights and labels in mine and weights[labels].shape[1] == mine[labels].shape[1]:
        table, old = mine[labels].clone(), weights[labels]
        table[: len(old) - 1], table[-1] = old[:-1], old[-1]
        weights = weights | {labels: table}
    fits = {k: v for k, v in weights.items() if k in mine and v.shape == mine[k].shape}
    denoiser.load_state_dict(mine | fits)
    return sorted(k.removeprefix("net.") for k in mine.keys() - fits.keys())
