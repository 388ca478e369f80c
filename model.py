"""The network, its noise model and its losses: a diffusion transformer on visible patches.

An image is cut into N patches, of which training may keep K <= N. The network computes on K tokens
only, so hiding nine tenths of the patches makes a step about ten times cheaper. Functions take
`visible`, the (B, K) indices of the kept patches; `visible=None` means the whole image.
Symbols: B batch, C channels, H = W image side, p patch side, N = (H/p)^2, K visible tokens.
"""

import math
import os
import sys
import zipfile
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

def check(condition, message):
    """A user's mistake is a ValueError with one sentence, which the scripts print."""
    if not condition:
        raise ValueError(message)

def setting(default, help, low=0):
    """A field of ModelConfig that is also a flag of train.py."""
    return field(default=default, metadata=dict(help=help, low=low))

@dataclass
class ModelConfig:
    """The architecture. It is stored in the checkpoint, so that nothing else has to repeat it."""

    patch_size: int = setting(4, "side of a patch in pixels", low=1)
    dim: int = setting(128, "width of a token", low=4)
    depth: int = setting(6, "number of blocks", low=1)
    heads: int = setting(4, "attention heads of a block", low=1)
    decoder_depth: int = setting(0, "blocks on all tokens after those on visible ones (MaskDiT)")
    decoder_dim: int = setting(0, "width of the decoder's blocks; 0 = dim")
    decoder_heads: int = setting(0, "attention heads of the decoder's blocks; 0 = heads")
    route: tuple = setting((), "A,B = only visible tokens enter blocks A to B - 1 (TREAD)")
    # The rest follows from the data and the loss.
    image_size: int = 64  # pixels (or latent cells) per side
    channels: int = 3
    num_classes: int = 0  # 0 = unconditional
    consistency: bool = False  # whether it is sampled in one or two steps
    latent: tuple = ()  # mean and deviation of each channel of the data; () = 8-bit images

    def __post_init__(self):
        self.latent = tuple(map(tuple, self.latent))
        if self.decoder_depth:
            self.decoder_dim = self.decoder_dim or self.dim
            self.decoder_heads = self.decoder_heads or self.heads
        self.grid = self.image_size // self.patch_size  # patches per side
        self.token_dim = self.patch_size**2 * self.channels  # values in one patch
        self.takes_all = bool(self.decoder_depth or self.route)  # all N tokens, some marked hidden
        check(self.image_size % self.patch_size == 0, f"image size {self.image_size} is not "
              f"divisible by patch_size {self.patch_size}: choose another patch_size")
        if self.route:
            valid = len(self.route) == 2 and 0 <= self.route[0] < self.route[1] <= self.depth
            check(valid and not self.decoder_depth, f"route is {self.route}, expected A < B <= "
                  f"depth {self.depth}, and no decoder")

# ---- Patches and masks.
def patchify(images, patch_size):
    """(B, H, W, C) -> (B, N, p*p*C), patches in row-major order."""
    p = patch_size
    b, h, w, c = images.shape
    x = images.reshape(b, h // p, p, w // p, p, c)
    x = x.permute(0, 1, 3, 2, 4, 5)  # (B, H/p, W/p, p, p, C)
    return x.reshape(b, (h // p) * (w // p), p * p * c)

def unpatchify(tokens, patch_size):
    """(B, N, p*p*C) -> (B, H, W, C), the inverse of `patchify` for square images."""
    p = patch_size
    b, n, d = tokens.shape
    grid = math.isqrt(n)
    side = grid * p
    x = tokens.reshape(b, grid, grid, p, p, -1)
    x = x.permute(0, 1, 3, 2, 4, 5)  # (B, H/p, p, W/p, p, C)
    return x.reshape(b, side, side, -1)

# A mask (grid, mask_ratio, block_size) -> K and draw. draw(batch, generator, part) draws for the
# whole batch -> the visible patches of its slice `part`: int64 (b, K), ascending.
def block_mask(grid, mask_ratio, block_size):
    """Hide int(ratio*N) // b^2 blocks of b x b patches on their grid (MaskDM sec. 3.2)."""
    b = block_size
    check(b > 0 and grid % b == 0, f"blocks of {b} x {b} do not fill {grid} x {grid} patches: "
          "choose another block_size")
    g = grid // b  # blocks per side
    num_shown = g**2 - int(mask_ratio * grid**2) // b**2

    def draw(batch, generator, part):
        # The largest of g*g uniform numbers are a uniform draw without replacement.
        uniform = torch.rand(batch, g * g, generator=generator)[part]
        blocks = uniform.topk(num_shown, dim=1).indices
        blocks = blocks[:, :, None, None]  # (b, blocks, 1, 1)
        inside = torch.arange(b)
        row = blocks // g * b + inside[:, None]
        col = blocks % g * b + inside
        return (row * grid + col).flatten(1).sort(dim=1).values
    return num_shown * b**2, draw

def patch_mask(grid, mask_ratio, block_size):
    """Hide int(ratio*N) single patches."""
    return block_mask(grid, mask_ratio, 1)

def crop_mask(grid, mask_ratio, block_size):
    """Show one square of side round(sqrt(N - int(ratio*N))), hide the rest (MaskDM sec. 3.2)."""
    num_visible = grid**2 - int(mask_ratio * grid**2)
    side = round(math.sqrt(num_visible))

    def draw(batch, generator, part):
        corner = torch.randint(grid - side + 1, (2, batch, 1, 1), generator=generator)
        corner = corner[:, part]  # (2, b, 1, 1)
        inside = torch.arange(side)
        row = corner[0] + inside[:, None]
        col = corner[1] + inside
        return (row * grid + col).flatten(1)
    return side**2, draw

MASKS = {"patch": patch_mask, "block": block_mask, "crop": crop_mask}

def make_mask(mask_type, grid, mask_ratio, block_size=1):
    """K and `draw` of a mask that hides something."""
    num_visible, draw = MASKS[mask_type](grid, mask_ratio, block_size)
    check(0 < num_visible < grid**2, f"this mask shows {num_visible} of {grid**2} patches: choose "
          "another mask_ratio or block_size")
    return num_visible, draw

def gather_tokens(tokens, visible):
    """The visible ones (B, K, D) of all tokens (B, N, D)."""
    if visible is None:
        return tokens
    index = visible[:, :, None].expand(-1, -1, tokens.shape[2])
    return tokens.gather(1, index)

def scatter_tokens(tokens, visible, others):
    """`others` (B, N, D) with the tokens (B, K, D) in the places `visible` (B, K)."""
    index = visible[:, :, None].expand_as(tokens)
    return others.scatter(1, index, tokens)

# ---- The network (DiT with adaLN-Zero), on whatever tokens it is given.
def sincos_positions(grid, dim):
    """Fixed 2-D sine-cosine positions (grid*grid, dim): first those of the column (DiT)."""
    freq = 10000.0 ** -(np.arange(dim // 4) / (dim // 4))
    place = np.arange(grid)
    angle = place[:, None] * freq  # (grid, dim/4)
    axis = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)  # (grid, dim/2)
    rows = axis.repeat(grid, axis=0)
    cols = np.tile(axis, (grid, 1))
    positions = np.concatenate([cols, rows], axis=1)
    return torch.from_numpy(positions).float()

def attention(q, k, v):
    """Softmax attention, all (B, heads, N, head_dim)."""
    # On a CPU the fused kernel's backward is slower for short sequences (bench.py attention).
    if q.device.type == "cpu" and q.shape[2] <= 512:
        scale = q.shape[3] ** -0.5
        scores = (q * scale) @ k.transpose(2, 3)
        return scores.softmax(dim=3) @ v  # sums in float32 also for bfloat16 scores
    return F.scaled_dot_product_attention(q, k, v)

def modulate(x, shift, scale):
    """LayerNorm without affine, then shift and scale. x (B, K, D), the others (B, 1, D)."""
    x = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    x = x.to(scale.dtype)  # float32 until here under autocast
    return torch.addcmul(shift, x, 1 + scale)

class Block(nn.Module):
    """Transformer block; the condition modulates its norms and residuals (DiT, adaLN-Zero)."""
    dropout = 0.0  # share of the MLP's inner values that training leaves out

    def __init__(self, dim, heads, cond_dim):
        super().__init__()
        check(dim % 4 == 0 and dim % heads == 0,
              f"the width {dim} is not divisible by 4 and by {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)
        self.adaLN = nn.Linear(cond_dim, 6 * dim)

    def matrices(self):
        """The weights that Muon may take: those that map tokens to tokens."""
        return [layer.weight for layer in (self.qkv, self.proj, self.fc1, self.fc2)]

    def forward(self, x, cond):
        b, k, d = x.shape
        modulation = self.adaLN(cond).view(b, 1, 6, d)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unbind(2)  # each (B, 1, D)
        qkv = self.qkv(modulate(x, shift1, scale1))
        qkv = qkv.view(b, k, 3, self.heads, d // self.heads)
        q, key, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, K, head_dim)
        h = attention(q, key, v)
        h = h.transpose(1, 2).reshape(b, k, d)
        x = x + gate1 * self.proj(h)
        h = self.fc1(modulate(x, shift2, scale2))
        h = F.gelu(h)  # the tanh approximation of DiT takes three times as long on a CPU
        h = F.dropout(h, self.dropout, self.training)
        return x + gate2 * self.fc2(h)

def blocks_of(network):
    """All blocks of a network, also those of its decoder."""
    return [module for module in network.modules() if isinstance(module, Block)]

def run_blocks(blocks, x, cond):
    for block in blocks:
        x = block(x, cond)
    return x

class DiT(nn.Module):
    """tokens, c_noise (B,), visible (B, K) or None, labels (B,) (-1 = none) -> output like tokens.
    tokens are the visible ones (B, K, p*p*C); with a decoder or a route all, (B, N, p*p*C). A
    decoder sees the blocks' outputs for the visible ones, and one learned token in every hidden
    place (MaskDiT fig. 2). On a route hidden tokens skip the blocks A to B - 1 (TREAD fig. 2)."""
    def __init__(self, config):
        super().__init__()
        c = config
        self.route = c.route
        self.patch_embed = nn.Linear(c.token_dim, c.dim)
        # Fixed, hence not in the checkpoint: another resolution simply makes others.
        self.register_buffer("positions", sincos_positions(c.grid, c.dim), persistent=False)
        num_freq = min(128, c.dim // 2)  # 128 in DiT; in a narrow network so many hurt
        freq = 10000.0 ** -(np.arange(num_freq) / num_freq)
        self.register_buffer("freq", torch.from_numpy(freq).float(), persistent=False)
        self.time_embed = nn.Sequential(
            nn.Linear(2 * num_freq, c.dim), nn.SiLU(),
            nn.Linear(c.dim, c.dim))
        # The last row is "no class".
        self.label_embed = nn.Embedding(c.num_classes + 1, c.dim) if c.num_classes else None
        self.blocks = nn.ModuleList(
            Block(c.dim, c.heads, c.dim) for _ in range(c.depth))
        self.decoder = None
        width = c.dim  # of the last block
        if c.decoder_depth:
            width = c.decoder_dim
            self.decoder_adaLN = nn.Linear(c.dim, 2 * c.dim)
            self.decoder_embed = nn.Linear(c.dim, width)
            self.mask_token = nn.Parameter(0.02 * torch.randn(width))
            positions = sincos_positions(c.grid, width)
            self.register_buffer("decoder_positions", positions, persistent=False)
            self.decoder = nn.ModuleList(
                Block(width, c.decoder_heads, c.dim) for _ in range(c.decoder_depth))
        self.final_adaLN = nn.Linear(c.dim, 2 * width)
        self.final_linear = nn.Linear(width, c.token_dim)
        self.init_weights()

    def init_weights(self):
        # At first a block is the identity, and outputs are zero (DiT sec. 3.2; MaskDiT).
        zero = [self.final_adaLN, self.final_linear] + [block.adaLN for block in blocks_of(self)]
        if self.decoder:
            zero += [self.decoder_adaLN, self.decoder_embed]
        small = [self.time_embed[0], self.time_embed[2], self.label_embed]
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
            if layer in zero:
                nn.init.zeros_(layer.weight)
            if layer in small:
                nn.init.normal_(layer.weight, std=0.02)

    def condition(self, c_noise, labels):
        """What all blocks are told about the noise level and the class, (B, D)."""
        angle = c_noise[:, None] * self.freq
        waves = torch.cat([angle.cos(), angle.sin()], dim=1)
        cond = self.time_embed(waves)
        if self.label_embed is not None:
            no_class = self.label_embed.num_embeddings - 1
            rows = torch.where(labels < 0, no_class, labels)
            cond = cond + self.label_embed(rows)
        return F.silu(cond)

    def forward(self, tokens, c_noise, visible=None, labels=None):
        cond = self.condition(c_noise, labels)
        if self.decoder:
            tokens = gather_tokens(tokens, visible)
        positions = self.positions
        if visible is not None and not self.route:
            positions = positions[visible]
        x = self.patch_embed(tokens)
        x = x + positions
        blocks = list(self.blocks)
        if self.route and visible is not None:
            start, end = self.route
            x = run_blocks(blocks[:start], x, cond)
            routed = gather_tokens(x, visible)
            routed = run_blocks(blocks[start:end], routed, cond)
            x = scatter_tokens(routed, visible, x)
            blocks = blocks[end:]
        x = run_blocks(blocks, x, cond)
        if self.decoder:
            x = self.decode(x, cond, visible)
        shift, scale = self.final_adaLN(cond)[:, None].chunk(2, dim=2)
        return self.final_linear(modulate(x, shift, scale))

    def decode(self, x, cond, visible):
        """(B, K, dim) -> (B, N, decoder_dim)."""
        shift, scale = self.decoder_adaLN(cond)[:, None].chunk(2, dim=2)
        x = self.decoder_embed(modulate(x, shift, scale))
        if visible is None:
            x = x + 0 * self.mask_token  # DDP expects a gradient for every weight, even a zero
        else:
            mask_tokens = self.mask_token.to(x.dtype)
            mask_tokens = mask_tokens.expand(len(x), len(self.positions), -1)
            x = scatter_tokens(x, visible, mask_tokens)
        x = x + self.decoder_positions
        return run_blocks(self.decoder, x, cond)

# ---- The noise model, EDM: all that knows how noise is added. Another one changes this section.
# Change a name when you change the code behind it: old checkpoints are then refused.
NOISE = "edm"
NETWORK = "dit-2"
SIGMA_DATA = 0.5  # standard deviation of the data; latents are scaled to about this
P_MEAN, P_STD = -1.2, 1.2  # of ln sigma in training (EDM table 1)

def check_noise(noise, feature):
    """Refuse a feature that is derived for another noise model."""
    check(noise == NOISE, f"{feature} is for the noise model {noise}, but this is {NOISE}")

def sigma_of(z, mean=P_MEAN, std=P_STD):
    """Noise levels from standard normal draws or quantiles z (EDM table 1)."""
    return torch.exp(mean + std * z)

def noised(clean, noise, sigma):
    """Noisy tokens x (B, K, d) from clean ones and standard normal noise; sigma (B,)."""
    return clean + sigma.view(-1, 1, 1) * noise

def denoising_loss(denoised, clean, sigma):
    """Weighted denoising error of each image over the patches given, (B,) (EDM eq. 8).
    denoised, clean (B, K, p*p*C), sigma (B,). With everything visible it is the plain EDM loss."""
    weight = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2
    error = (denoised - clean).square().mean((1, 2))
    return weight * error

def sampler_levels(steps, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """Noise levels of a sampler, float64 (steps + 1,), from sigma_max to 0 (EDM eq. 5)."""
    i = torch.arange(steps, dtype=torch.float64)
    i = i / max(steps - 1, 1)
    start = sigma_max ** (1 / rho)
    end = sigma_min ** (1 / rho)
    levels = (start + i * (end - start)) ** rho
    return torch.cat([levels, levels.new_zeros(1)])

def normalised(data, latent):
    """8-bit values to [-1, 1]; latents (..., p*p*C) to mean 0 and deviation SIGMA_DATA by `latent`,
    the mean and deviation of each channel, because noise levels are relative to that."""
    expected = torch.float32 if latent else torch.uint8
    check(data.dtype == expected, f"the data set gives {data.dtype}, expected {expected}: uint8 "
          "for images, float32 for latents with mean and deviation in `meta`")
    if not latent:
        return data.float().div_(127.5).sub_(1)
    mean, deviation = torch.tensor(latent).to(data.device, non_blocking=True)
    data = data.unflatten(-1, (-1, len(mean)))  # (..., p*p, C)
    data = (data - mean) * (SIGMA_DATA / deviation)
    return data.flatten(-2)

class Denoiser(nn.Module):
    """Preconditioning around the network: D(x; sigma), the denoised tokens (EDM eq. 7).
    x noisy tokens, (B, K, p*p*C), or (B, N, p*p*C) if config.takes_all; sigma (B,) > 0; visible
    (B, K) or None; labels (B,), -1 = no class. Returns float32 (or wider) of x's shape."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.net = DiT(config)

    def forward(self, x, sigma, visible=None, labels=None):
        sd = SIGMA_DATA
        s = sigma.view(-1, 1, 1)
        variance = s**2 + sd**2  # of noisy images
        c_skip = sd**2 / variance
        c_out = s * sd / variance.sqrt()
        c_in = 1 / variance.sqrt()
        c_noise = sigma.log() / 4
        dtype = self.net.final_linear.weight.dtype
        x_in = (c_in * x).to(dtype)
        out = self.net(x_in, c_noise.to(dtype), visible, labels)
        return c_skip * x + c_out * out.to(x.dtype)

# ---- Losses: functions of tensors that draw nothing themselves.
def reconstruction_loss(denoised, noisy, visible):
    """Error of each image over its masked patches, (B,) (MaskDiT sec. 3.3); denoised, noisy (B, N,
    p*p*C), visible (B, K), K < N. The target is the noisy patch, normalised by itself."""
    mean = noisy.mean(dim=2, keepdim=True)
    variance = noisy.var(dim=2, keepdim=True)
    target = (noisy - mean) / (variance + 1e-6).sqrt()
    error = (denoised - target).square().mean(dim=2)  # (B, N)
    num_hidden = error.shape[1] - visible.shape[1]
    return error.scatter(1, visible, 0).sum(dim=1) / num_hidden

def consistency_step(t, stage, q=2.0, k=8.0):
    """The lower noise level r of each pair (t, r), 0 <= r < t (ECT eq. 16; k = 0: constant r/t).
    t (B,); the two levels approach each other from stage to stage, 0, 1, 2, ..."""
    gap = q ** -(stage + 1.0) * (1 + k * torch.sigmoid(-t))  # 1 - r/t
    return (t * (1 - gap)).clamp_min(0)

def posterior_mean(x, clean, sigma, references, allowed=None):
    """Mean of the images that may lie behind x, (B, N, d) (STF, arXiv 2302.00670, eq. 6; SCT).
    sum_i a_i y_i over y itself (clean) and R references, a = softmax(-|x - y_i|^2 / (2 sigma^2)).
    x, clean (B, N, d), sigma (B,), references (R, N, d); image j sees those of allowed[j] (R,)."""
    refs = references.flatten(1).double()  # (R, N*d): small differences of large numbers
    own = x.flatten(1).double()
    square = own.square().sum(dim=1, keepdim=True)
    distance = square - 2 * own @ refs.T + refs.square().sum(dim=1)  # (B, R)
    own_distance = (x - clean).square().sum((1, 2))
    distance = torch.cat([own_distance[:, None], distance], dim=1)
    logits = -distance / (2 * sigma[:, None] ** 2)
    if allowed is not None:
        logits[:, 1:].masked_fill_(~allowed, -math.inf)
    weights = logits.softmax(dim=1)  # (B, 1 + R)
    mean = weights[:, :1, None] * clean + (weights[:, 1:] @ refs).view_as(x)
    return mean.to(x.dtype)

CONSISTENCY_WEIGHTS = {  # of a pair (t, r)
    "gap": lambda t, r: 1 / (t - r),
    "edm": lambda t, r: 1 / t**2 + 1 / SIGMA_DATA**2,
}

def consistency_loss(f_t, target, t, r, c=0.0, weight="gap"):
    """Weighted distance of each image, (B,) (ECT sec. 3.3): w * (sqrt(|f_t - target|^2 + c^2) - c).
    f_t, target (B, K, d), t > r (B,); w is one of CONSISTENCY_WEIGHTS."""
    distance = torch.linalg.vector_norm(f_t - target, dim=(1, 2))  # its gradient at 0 is 0
    if c:
        distance = (distance**2 + c**2).sqrt() - c
    return distance * CONSISTENCY_WEIGHTS[weight](t, r)

# ---- Objectives: the losses of each image, by name. Their sum is trained, each of them is logged.
def objective(model, batch, cfg, step):
    """The losses of the images of a batch at a step, {name: (b,)}, weighted so as to be summed.
    batch: clean, noise (b, K, d), K = N if config.takes_all; sigma (b,). Where needed visible (b,
    K), labels (b,), -1 = none, target (like clean), references and their labels, seed (dropout)."""
    return OBJECTIVES[cfg.loss](model, batch, cfg, step)

def evaluate_network(model, x, sigma, batch):
    """The denoised tokens. All evaluations of a batch leave out the same values (dropout)."""
    if "seed" in batch:
        torch.manual_seed(batch["seed"])
    return model(x, sigma, batch.get("visible"), batch.get("labels"))

def diffusion_objective(model, batch, cfg, step):
    """Denoising, masked or whole; a decoder also reconstructs the hidden patches (MaskDiT)."""
    sigma = batch["sigma"]
    visible = batch.get("visible")
    target = batch.get("target", batch["clean"])
    x = noised(batch["clean"], batch["noise"], sigma)
    denoised = evaluate_network(model, x, sigma, batch)
    if visible is None or not cfg.decoder_depth:
        return {"denoising": denoising_loss(denoised, target, sigma)}
    reconstruction = reconstruction_loss(denoised, x, visible)
    denoised = gather_tokens(denoised, visible)
    target = gather_tokens(target, visible)
    return {"denoising": denoising_loss(denoised, target, sigma),
            "reconstruction": cfg.mae_weight * reconstruction}

def consistency_objective(model, batch, cfg, step):
    """The consistency loss: ECT's, or SCT's if the batch has references. The output at sigma = t
    is trained towards that at the lower level r, one step along the estimated ODE from x_t."""
    check_noise("edm", "consistency tuning")
    clean = batch["clean"]
    t = batch["sigma"]
    visible = batch.get("visible")
    labels = batch.get("labels")
    x_t = noised(clean, batch["noise"], t)
    stage_length = math.ceil(cfg.steps / cfg.cm_stages)
    stage = step // stage_length
    r = consistency_step(t, stage, cfg.cm_q)
    endpoint = clean  # of the ODE through x_t, judged by one image (ECT), or below by many (SCT)
    if "references" in batch:
        allowed = None
        if labels is not None:
            own = labels[:, None]
            allowed = (own == batch["reference_labels"]) | (own == -1)
        endpoint = posterior_mean(x_t, clean, t, batch["references"], allowed)
    relative_step = (r - t) / t
    x_r = x_t + relative_step.view(-1, 1, 1) * (x_t - endpoint)
    positive = r > 0
    with torch.no_grad():
        # Where r = 0 the output is not used, and any positive level will do.
        f_r = evaluate_network(model, x_r, torch.where(positive, r, t), batch)
    target = torch.where(positive.view(-1, 1, 1), f_r, x_r)  # at r = 0 the output is x_r itself
    f_t = evaluate_network(model, x_t, t, batch)
    if cfg.decoder_depth:  # only the visible patches count
        f_t = gather_tokens(f_t, visible)
        target = gather_tokens(target, visible)
    loss = consistency_loss(f_t, target, t, r, cfg.cm_c, cfg.cm_weight)
    return {"consistency": loss}

OBJECTIVES = {"diffusion": diffusion_objective, "consistency": consistency_objective}

# ---- Continual learning: how much each weight matters, and what a teacher predicts.
def fisher_information(denoiser, batch, autocast):
    """Diagonal Fisher information of the denoising loss, E (d loss / d weight)^2 (EWC), by name:
    the mean over the whole images of a batch of each one's squared gradient."""
    names, parameters = zip(*denoiser.named_parameters())
    total = [torch.zeros_like(p) for p in parameters]
    num_images = len(batch["clean"])
    for i in range(num_images):
        image = {name: tensor[i : i + 1] for name, tensor in batch.items()}
        with autocast:
            losses = diffusion_objective(denoiser, image, None, 0)  # no settings for whole images
        loss = losses["denoising"].sum()
        gradients = torch.autograd.grad(loss, parameters)
        torch._foreach_addcmul_(total, gradients, gradients)
    return {name: t / num_images for name, t in zip(names, total)}

@torch.no_grad()
def distill_targets(teacher, batch, num_new):
    """Targets (b, K, d): num_new images, then the teacher's answers for old ones (2311.14028)."""
    clean = batch["clean"]
    num_new = min(max(num_new, 0), len(clean))
    if num_new == len(clean):
        return clean
    old = {name: tensor[num_new:] for name, tensor in batch.items()
           if name in ("clean", "noise", "sigma", "visible", "labels")}
    x = noised(old["clean"], old["noise"], old["sigma"])
    predicted = teacher(x, old["sigma"], old.get("visible"), old.get("labels"))
    return torch.cat([clean[:num_new], predicted])

# ---- An optimizer for matrices.
def newton_schulz(x):
    """Singular values of x (n, m), n <= m, towards 1: x <- p(x x') x five times, as product @ x."""
    def polynomial(square):
        factor = torch.addmm(square, square, square, beta=-4.775, alpha=2.0315)
        factor.diagonal().add_(3.4445)
        return factor
    square = x @ x.mT
    norm2 = square.trace().clamp_min(1e-30)  # squared Frobenius norm
    square = square / norm2
    factor = polynomial(square)
    product = factor / norm2.sqrt()
    for _ in range(4):
        square = factor @ square @ factor
        factor = polynomial(square)
        product = factor @ product
    return product @ x

class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal, for matrices; updates as large as AdamW's (arXiv 2502.16982). As
    torch.optim.Muon, but always in float32 and with smaller products, for CPUs."""
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 0.05)
                update = p.grad.lerp(momentum, 0.95)  # Nesterov
                if p.shape[0] > p.shape[1]:
                    update = newton_schulz(update.mT).mT
                else:
                    update = newton_schulz(update)
                rate = 0.2 * group["lr"] * max(p.shape) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-rate)

# ---- Checkpoints: one file of tensors and plain values, replaced as a whole or not at all.
def replace_file(path, write, keep=None):
    """write(file) to `path`.tmp, sync, rename; an old file at `path` is kept as `keep`, if given.
    After a crash one of them is whole."""
    try:
        with open(f"{path}.tmp", "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if keep and os.path.exists(path):
            os.replace(path, keep)
        os.replace(f"{path}.tmp", path)
    except (OSError, RuntimeError) as error:
        if os.path.exists(f"{path}.tmp"):
            os.remove(f"{path}.tmp")
        check(False, f"cannot write {path} ({error}); what was there before is still whole")

def check_writable(path):
    """Fail before the work whose result is to be written, and not after it."""
    check(not os.path.isdir(path), f"{path} is a folder, expected the name of a file")
    with open(f"{path}.tmp", "wb"):
        os.remove(f"{path}.tmp")

def previous(path):
    """NAME.pt -> NAME.prev.pt, the checkpoint before."""
    return path.removesuffix(".pt") + ".prev.pt"

def save_checkpoint(path, checkpoint):
    replace_file(path, lambda file: torch.save(checkpoint, file), keep=previous(path))

RESUMABLE = ("model", "ema", "optimizer", "config", "step")  # what a run needs to continue

def load_checkpoint(path, resume=False):
    """Read a checkpoint of train.py onto the CPU. One that was stripped for sharing needs only
    architecture and weights, unless a run is to be resumed from it."""
    check(os.path.exists(path), f"there is no {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not compare the checksums
        check(not damaged, f"{damaged} has a wrong checksum")
        checkpoint = torch.load(path, "cpu", weights_only=True, mmap=os.name != "nt")  # lazy
        architecture = checkpoint["architecture"]
    except Exception as error:  # noqa: BLE001 (the bytes of the file decide which)
        check(False, f"{path} is not a whole checkpoint of train.py ({error!r:.200})")
    different = sorted(architecture.keys() ^ asdict(ModelConfig()).keys())
    check(not different, f"{path} is of another version of this code: {different} of its "
          "architecture are unknown or missing")
    own = dict(noise=NOISE, network=NETWORK)
    found = {name: checkpoint.get(name) for name in own}
    check(found == own, f"{path} is for {found}, but this code is for {own}")
    missing = set(RESUMABLE) - checkpoint.keys()
    check(not (resume and missing), f"{path} has no {missing}: it can't be resumed, but a new run "
          "can start from it with --init_from")
    weights = checkpoint.get("model") or checkpoint.get("ema")
    check(weights, f"{path} has neither model nor ema")
    rows = weights.get("net.label_embed.weight", [None])  # the last one is "no class"
    class_names = [str(i) for i in range(len(rows) - 1)]
    # What the file has replaces these defaults.
    return dict(model=weights, ema=weights, config={}, step=0, class_names=class_names) | checkpoint

def find_checkpoint(path):
    """The run at `path` to resume, or if that is damaged the one before; None if there is none."""
    candidates = [file for file in (path, previous(path)) if os.path.exists(file)]
    for file in candidates:
        try:
            return load_checkpoint(file, resume=True)
        except ValueError as error:
            if file == candidates[-1]:
                raise
            print(f"{error}; trying the one before", file=sys.stderr)
    return None

def load_what_fits(denoiser, weights):
    """Load weights by name where the shapes agree; returns the names of those that start afresh.
    Known classes keep their rows, and "no class" its last one; rows of new classes start afresh."""
    own = denoiser.state_dict()
    labels = "net.label_embed.weight"
    if labels in own and labels in weights and own[labels].shape[1] == weights[labels].shape[1]:
        known = weights[labels]
        table = own[labels].clone()
        table[: len(known) - 1] = known[:-1]
        table[-1] = known[-1]
        weights = weights | {labels: table}
    fitting = {name: weight for name, weight in weights.items()
               if name in own and weight.shape == own[name].shape}
    denoiser.load_state_dict(own | fitting)
    fresh = own.keys() - fitting.keys()
    return sorted(name.removeprefix("net.") for name in fresh)
