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

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import fid
import sample
from prepare_data import need, open_folder
from reproduce import where_from

WIDTHS = 32, 64, 96, 128  # channels of the layers; each has half the side of the one before
# Kinds of damage and their strengths in the table. The judge learns the first three, up to the last strength.
LEARNED = {"blur, deviation in pixels": (0.4, 0.8, 1.6),
           "noise, deviation of 255": (4, 8, 16),
           "every second patch moved, pixels": (1, 2, 3)}
UNSEEN = {"pixels made larger, times": (2, 4, 8),
          "warped, pixels": (0.5, 1, 2),
          "another image shines through, share": (0.1, 0.2, 0.4),
          "only so many different images": (256, 64, 16),
          "brighter, of 255": (4, 8, 16)}


def damaged(x, kind, strength, generator):
    """Images float (B, 3, H, W), 0 to 255, made worse in one way."""
    height, width = x.shape[2:]
    if kind.startswith("blur"):
        at = torch.arange(-8.0, 9.0)
        weights = torch.exp(-0.5 * (at / max(strength, 1e-3)) ** 2)
        weights = (weights / weights.sum()).expand(x.shape[1], 1, 1, -1)
        x = F.conv2d(F.pad(x, (8, 8, 8, 8), "replicate"), weights, groups=x.shape[1])
        return F.conv2d(x, weights.transpose(2, 3), groups=x.shape[1])
    if kind.startswith("noise"):
        return x + strength * torch.randn(x.shape, generator=generator)
    if kind.startswith("every second patch"):  # of 4 x 4 pixels
        rows, columns = torch.arange(height)[:, None] // 4, torch.arange(width) // 4
        return torch.where((rows + columns) % 2 == 1, x.roll(round(strength), dims=3), x)
    if kind.startswith("pixels"):
        return F.interpolate(F.avg_pool2d(x, strength), size=(height, width))
    if kind.startswith("warped"):  # by a smooth random field of this deviation
        field = torch.randn(len(x), 2, 6, 6, generator=generator) * strength
        field = F.interpolate(field, (height, width), mode="bicubic", align_corners=False)
        move = field.permute(0, 2, 3, 1) * 2 / torch.tensor([width, height])
        still = F.affine_grid(torch.eye(2, 3).expand(len(x), 2, 3), list(x.shape), align_corners=False)
        return F.grid_sample(x, still + move, padding_mode="border", align_corners=False)
    if kind.startswith("another image"):
        return x.lerp(x.roll(1, dims=0), strength)
    if kind.startswith("only"):
        return x[torch.arange(len(x)) % strength]
    return x + strength  # brighter


def varied(x, generator):
    """Brightness, contrast and tint drawn for each image."""
    def between(low, high, channels=1):
        return low + (high - low) * torch.rand(len(x), channels, 1, 1, generator=generator)
    return (x * between(0.92, 1.08) + between(-10, 10) + between(-4, 4, x.shape[1])).clamp(0, 255)


class Judge(nn.Module):
    """uint8 (B, 3, H, W) -> (B, WIDTHS[-1])."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential()
        for a, b in zip((3, *WIDTHS), WIDTHS):
            self.layers.extend([nn.Conv2d(a, b, 3 if a > 3 else 5, 2, 1 if a > 3 else 2), nn.BatchNorm2d(b), nn.ReLU()])
        self.register_buffer("centre", torch.zeros(WIDTHS[-1]))
        self.register_buffer("unit", torch.tensor(1.0))

    def forward(self, x):
        return (self.layers(x / 127.5 - 1).mean((2, 3)) - self.centre) / self.unit


def fit(images, steps, batch=64, seed=0):
    """A Judge of images uint8 (N, H, W, C) after so many pairs of batches."""
    torch.manual_seed(seed)
    g, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    net, how, which = Judge(), nn.Linear(WIDTHS[-1], len(LEARNED)), nn.Linear(WIDTHS[-1], 64)
    weights = [p for part in (net, how, which) for p in part.parameters()]
    optimizer = torch.optim.AdamW(weights, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in tqdm(range(steps), "judge", unit="step"):
        clean = as_input(images[np.sort(rng.choice(len(images), batch, replace=len(images) < batch))])
        strength, parts = torch.zeros(2, batch, len(LEARNED)), list(clean.split(batch // 8))
        for i, part in enumerate(parts):
            kind, share = rng.integers(len(LEARNED)), rng.random()
            name, strengths = list(LEARNED.items())[kind]
            parts[i] = damaged(part, name, share * strengths[-1], g)
            strength[1, i * (batch // 8) : (i + 1) * (batch // 8), kind] = share
        y = net(torch.cat([varied(clean, g), varied(torch.cat(parts), g)]))
        a, b = F.normalize(which(y), dim=1).chunk(2)
        pairs = F.cross_entropy(a @ b.T / 0.2, torch.arange(len(a)))
        loss = pairs + 10 * (how(y) - strength.flatten(0, 1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    net.eval().requires_grad_(False)
    y = torch.cat([net(as_input(images[i : i + 256])) for i in range(0, min(len(images), 5120), 256)])
    net.centre.copy_(y.mean(0)), net.unit.copy_(y.var(0).sum().sqrt() / 10)
    return net


def as_input(images):
    """uint8 (N, H, W, C) -> float (N, 3, H, W), 0 to 255."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float().expand(-1, 3, -1, -1)


def compare(data, judge, number):
    """Distances of damaged validation images to the first 2000 training images, by judge and random features."""
    settings = SimpleNamespace(features="random", weights=None, device="cpu", dtype="float32")
    nets, rows = dict(judge=judge, random=fid.load_features(settings)), []
    real, images = (as_input(open_folder(data, split)[0][:n]) for split, n in (("train", 2000), ("val", number)))

    def features(net, x):
        with torch.inference_mode():
            return torch.cat([net(part.to(torch.uint8)).float() for part in tqdm(x.split(50))]).double()

    def statistics(y):
        return y.mean(0).numpy(), np.cov(y.T.numpy())

    reference = {name: features(net, real) for name, net in nets.items()}
    for kind, strength in [("none", 0)] + [(k, s) for k, v in (LEARNED | UNSEEN).items() for s in v]:
        x = damaged(images, kind, strength, torch.Generator().manual_seed(0)) if strength else images
        row = dict(kind=kind, strength=strength, number=len(images))
        for name, net in nets.items():
            y = features(net, x.round().clamp(0, 255))
            row[name] = fid.frechet_distance(*statistics(reference[name]), *statistics(y))
            row[name + "_kid"] = fid.kid(reference[name], y, size=len(y) // 2)["kid"]
        rows.append(row | where_from())
    return rows


def table(rows):
    lines = ["| damage | judge, FD | random features, FD | judge, KID | random features, KID |", "|---" * 5 + "|"]
    for kind in dict.fromkeys(r["kind"] for r in rows):
        mine = [r for r in rows if r["kind"] == kind]
        strengths = kind if kind == "none" else f"{kind}: {', '.join(str(r['strength']) for r in mine)}"
        cells = [", ".join(f"{r[key]:.3g}" for r in mine) for key in ("judge", "random", "judge_kid", "random_kid")]
        lines.append(f"| {strengths} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="prepared set of images")
    parser.add_argument("--out", help="TorchScript file for fid.py --features; default: DATA/judge.pt")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--num", type=int, default=300, help="validation images in the table")
    parser.add_argument("--table", action=argparse.BooleanOptionalAction, default=True, help="compare (20 minutes)")
    args = parser.parse_args(argv)
    out = Path(args.out or Path(args.data, "judge.pt"))
    images = open_folder(args.data)[0]
    need(images.dtype == np.uint8, f"{args.data} holds latents, expected images: prepare it from images")
    net = torch.jit.trace(fit(images, args.steps), torch.zeros(2, 3, *images.shape[1:3]))
    sample.replace_file(out, lambda f: torch.jit.save(net, f))
    if args.table:
        rows = compare(args.data, net, args.num)
        command = f"python tests/tools/judge.py data/{Path(args.data).name} --steps {args.steps}"
        out.with_suffix(".json").write_text(json.dumps(dict(command=command, results=rows), indent=1))
        print(table(rows))


if __name__ == "__main__":
    main()
