"""Features for fid.py that are learned from a data set, for machines that cannot fetch Inception's weights.

python tests/tools/judge.py data/faces             # -> data/faces/judge.pt; table in judge.json, too
python fid.py data/faces out/ft.pt --num 1000 --features data/faces/judge.pt

A small convolutional network sees pairs of views of training images: one as it is, one damaged. It
learns two things: how each was damaged (blur, noise, patches that do not fit), and which two belong
together. Brightness, contrast and tint of all views differ at random, so they tell it little. Its last
layer, averaged over the places, is the features, in units in which the (first 5,120) training images
have a mean of 0 and a variance of 100 in all: a distance of 1 is one per cent of it. The table
damages validation images more and more, by kinds that it was trained on and by others, and gives
Frechet distance and KID to the first 2,000 training images, by the judge's features and by random ones.
"""

import json
from pathlib import Path
from types import SimpleNamespace

from common import markdown, typed, where_from  # puts the project on the path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import fid
from model import replace_file
from prepare_data import Parser, check, open_folder, run_script

# ---- Kinds of damage: functions of images float (B, 3, H, W), 0 to 255, a strength and a generator.
def blurred(x, deviation, generator):
    at = torch.arange(-8.0, 9.0)
    weights = torch.exp(-0.5 * (at / max(deviation, 1e-3)) ** 2)
    weights = (weights / weights.sum()).expand(3, 1, 1, -1)
    x = F.pad(x, (8, 8, 8, 8), "replicate")
    x = F.conv2d(x, weights, groups=3)
    return F.conv2d(x, weights.transpose(2, 3), groups=3)

def noisy(x, deviation, generator):
    return x + deviation * torch.randn(x.shape, generator=generator)

def moved(x, pixels, generator):
    """Every second patch of 4 x 4 pixels."""
    rows = torch.arange(x.shape[2])[:, None] // 4
    columns = torch.arange(x.shape[3]) // 4
    return torch.where((rows + columns) % 2 == 1, x.roll(round(pixels), dims=3), x)

def warped(x, deviation, generator):
    """By a smooth random field."""
    size = x.shape[2:]
    field = deviation * torch.randn(len(x), 2, 6, 6, generator=generator)
    field = F.interpolate(field, size, mode="bicubic", align_corners=False)
    move = field.permute(0, 2, 3, 1) * 2 / torch.tensor([size[1], size[0]])
    still = F.affine_grid(torch.eye(2, 3).expand(len(x), 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x, still + move, padding_mode="border", align_corners=False)

# {kind: (function, strengths in the table)}. The judge learns the first, up to the last strength.
LEARNED = {
    "blur, deviation in pixels": (blurred, (0.4, 0.8, 1.6)),
    "noise, deviation of 255": (noisy, (4, 8, 16)),
    "every second patch moved, pixels": (moved, (1, 2, 3)),
}
UNSEEN = {
    "pixels made larger, times": (lambda x, n, g: F.interpolate(F.avg_pool2d(x, n), size=x.shape[2:]), (2, 4, 8)),
    "warped, pixels": (warped, (0.5, 1, 2)),
    "another image shines through, share": (lambda x, share, g: x.lerp(x.roll(1, dims=0), share), (0.1, 0.2, 0.4)),
    "only so many different images": (lambda x, n, g: x[torch.arange(len(x)) % n], (256, 64, 16)),
    "brighter, of 255": (lambda x, by, g: x + by, (4, 8, 16)),
}

def varied(x, generator):
    """Brightness, contrast and tint drawn for each image."""
    def between(low, high, channels=1):
        return low + (high - low) * torch.rand(len(x), channels, 1, 1, generator=generator)
    return (x * between(0.92, 1.08) + between(-10, 10) + between(-4, 4, 3)).clamp(0, 255)

# ---- The network and its training.
FEATURES = 128

class Judge(nn.Module):
    """uint8 (B, 3, H, W) -> (B, FEATURES)."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential()
        for c_in, c_out, kernel in ((3, 32, 5), (32, 64, 3), (64, 96, 3), (96, FEATURES, 3)):
            conv = nn.Conv2d(c_in, c_out, kernel, stride=2, padding=kernel // 2)
            self.layers.extend([conv, nn.BatchNorm2d(c_out), nn.ReLU()])
        self.register_buffer("centre", torch.zeros(FEATURES))
        self.register_buffer("unit", torch.tensor(1.0))

    def forward(self, x):
        return (self.layers(x / 127.5 - 1).mean((2, 3)) - self.centre) / self.unit

def as_input(images):
    """uint8 (N, H, W, C) -> float (N, 3, H, W), 0 to 255."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float().expand(-1, 3, -1, -1)

def fit(images, steps, batch=64, seed=0):
    """A Judge of images uint8 (N, H, W, C) after so many pairs of batches."""
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    rng = np.random.default_rng(seed)
    net = Judge()
    damage = nn.Linear(FEATURES, len(LEARNED))
    identity = nn.Linear(FEATURES, 64)
    weights = nn.ModuleList([net, damage, identity]).parameters()
    optimizer = torch.optim.AdamW(weights, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in tqdm(range(steps), "judge", unit="step"):
        index = rng.choice(len(images), batch, replace=len(images) < batch)
        clean = as_input(images[np.sort(index)])
        parts = []
        shares = torch.zeros(batch, len(LEARNED))  # of the last strength, by kind
        for part, own_shares in zip(clean.split(batch // 8), shares.split(batch // 8)):
            kind = rng.integers(len(LEARNED))
            share = rng.random()
            function, strengths = list(LEARNED.values())[kind]
            parts.append(function(part, share * strengths[-1], g))
            own_shares[:, kind] = share
        y = net(torch.cat([varied(clean, g), varied(torch.cat(parts), g)]))
        a, b = F.normalize(identity(y), dim=1).chunk(2)
        pairs = F.cross_entropy(a @ b.T / 0.2, torch.arange(batch))
        expected = torch.cat([torch.zeros_like(shares), shares])
        loss = pairs + 10 * F.mse_loss(damage(y), expected)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    net.eval().requires_grad_(False)
    y = torch.cat([net(as_input(images[i : i + 256])) for i in range(0, min(len(images), 5120), 256)])
    net.centre.copy_(y.mean(0))
    net.unit.copy_(y.var(0).sum().sqrt() / 10)
    return net

# ---- The table.
def features(net, x):
    with torch.inference_mode():
        return torch.cat([net(part.to(torch.uint8)).double() for part in tqdm(x.round().clamp(0, 255).split(50))])

def compare(data, judge, number):
    """Distances of damaged validation images to the first 2000 training images, by judge and random features."""
    settings = SimpleNamespace(features="random", weights=None, device="cpu", dtype="float32")
    nets = dict(judge=judge, random=fid.load_features(settings)[0])
    real = as_input(open_folder(data)[0][:2000])
    images = as_input(open_folder(data, "val")[0][:number])
    reference = {name: features(net, real) for name, net in nets.items()}
    damaged = [("none", 0, images)]
    for kind, (function, strengths) in (LEARNED | UNSEEN).items():
        damaged += [(kind, s, function(images, s, torch.Generator().manual_seed(0))) for s in strengths]
    rows = []
    for kind, strength, x in damaged:
        row = dict(kind=kind, strength=strength, number=len(images))
        for name, net in nets.items():
            a, b = reference[name], features(net, x)
            statistics = [s for y in (a, b) for s in (y.mean(0).numpy(), np.cov(y.T.numpy()))]
            row[name] = fid.frechet_distance(*statistics)
            row[f"{name}_kid"] = fid.kid(a, b, size=len(b) // 2)["kid"]
        rows.append(row | where_from())
    return rows

def table(rows):
    lines = []
    for kind in dict.fromkeys(r["kind"] for r in rows):
        own = [r for r in rows if r["kind"] == kind]
        strengths = ", ".join(str(r["strength"]) for r in own)
        name = kind if kind == "none" else f"{kind}: {strengths}"
        columns = [", ".join(f"{r[key]:.3g}" for r in own) for key in ("judge", "random", "judge_kid", "random_kid")]
        lines.append([name, *columns])
    return markdown(["damage", "judge, FD", "random features, FD", "judge, KID", "random features, KID"], lines)

def main(argv):
    parser = Parser(__doc__)
    parser.add_argument("data", help="prepared set of images")
    parser.add("out", None, "TorchScript file for fid.py --features; None = DATA/judge.pt")
    parser.add("steps", 1500, "training steps", low=1)
    parser.add("num", 300, "validation images in the table", low=2)
    parser.add("table", True, "compare the features with random ones (20 minutes)")
    args = parser.parse_args(argv)
    out = Path(args.out or f"{args.data}/judge.pt")
    images = open_folder(args.data)[0]
    check(images.dtype == np.uint8, f"{args.data} holds latents, expected images: prepare it from images")
    net = torch.jit.trace(fit(images, args.steps), torch.zeros(2, 3, *images.shape[1:3]))
    replace_file(out, lambda file: torch.jit.save(net, file))
    if args.table:
        rows = compare(args.data, net, args.num)
        about = dict(command=typed(__file__, argv), results=rows)
        out.with_suffix(".json").write_text(json.dumps(about, indent=1))
        print(table(rows))

if __name__ == "__main__":
    run_script(main)
