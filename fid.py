"""How far apart are two sets of images?  Frechet distance (FID), KID, precision and recall.

python fid.py data/faces out/samples.npz --metrics fid,kid,pr   # the reference, then what to judge
python fid.py data/faces out/ft.pt --num 5000                   # draws 5,000 samples by itself
python fid.py data/faces --stats faces.npz                      # mu and sigma, another time's A
python fid.py data/faces out/samples.npz --features random      # offline; not to be called FID
python fid.py data/old,data/new out/ft.pt --metrics bpd         # losses by noise level, bits/dim

A source is a prepared folder, a folder or .zip/.tar of images, an .npz of images (arr_0) or of
statistics (mu, sigma), or a checkpoint (.pt). Features and resize are those of pytorch-fid.
"""

import hashlib
import json
import math
import os
import re
import sys
from collections import OrderedDict
from contextlib import ExitStack
from functools import partial, reduce
from itertools import groupby, islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import prepare_data
import sample
from model import Images, denoising_loss, need_noise, noised
from prepare_data import need

WEIGHTS_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
               "pt_inception-2015-12-05-6726825d.pth")
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
SIGMA_MIN = 0.0013  # of bits/dim: the decoder costs 0.01 bit; at the sampler's 0.002 0.19
LABELS = {"fid": "FID", "random_fd": "random-feature FD", "fd": "FD in TorchScript features"}

# ---- Inception v3, the 2015-12-05 graph of the FID paper. Keys are those of the public weight file
# (torchvision's names); the pooling is not torchvision's.
avg_pool = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
max_pool = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
halve = partial(F.max_pool2d, kernel_size=3, stride=2)

# Branches of a block: a name and convolutions CHANNELS@KERNEL, "/2" for stride 2, "+" for two side
# by side. Branch "_pool" starts with the pool; a block that halves the image ends with it.
BLOCK_35 = "1x1 64@1, 5x5 48@1 64@5, 3x3dbl 64@1 96@3 96@3, _pool {0}@1"  # 35 x 35 pixels
BLOCK_17 = ("1x1 192@1, 7x7 {0}@1 {0}@1x7 192@7x1, "
            "7x7dbl {0}@1 {0}@7x1 {0}@1x7 {0}@7x1 192@1x7, _pool 192@1")
BLOCK_8 = "1x1 320@1, 3x3 384@1 384@1x3+384@3x1, 3x3dbl 448@1 384@3 384@1x3+384@3x1, _pool 192@1"
BLOCKS = {  # key: (channels in, pool, branches)
    **{f"Mixed_5{k}": (c, avg_pool, BLOCK_35.format(p))
       for k, c, p in zip("bcd", (192, 256, 288), (32, 64, 64))},
    "Mixed_6a": (288, halve, "3x3 384@3/2, 3x3dbl 64@1 96@3 96@3/2"),
    **{f"Mixed_6{k}": (768, avg_pool, BLOCK_17.format(c))
       for k, c in zip("bcde", (128, 160, 160, 192))},
    "Mixed_7a": (768, halve, "3x3 192@1 320@3/2, 7x7x3 192@1 192@1x7 192@7x1 192@3/2"),
    "Mixed_7b": (1280, avg_pool, BLOCK_8),
    "Mixed_7c": (2048, max_pool, BLOCK_8),
}

def conv(c_in, spec, pad=True):
    c_out, h, w, half = re.fullmatch(r"(\d+)@(\d)x?(\d?)(/2)?", spec).groups()
    kernel = (int(h), int(w or h))
    padding = [k // 2 for k in kernel] if pad and not half else 0
    layer = nn.Conv2d(c_in, int(c_out), kernel, 2 if half else 1, padding, bias=False)
    bn = nn.BatchNorm2d(int(c_out), eps=0.001)
    return nn.Sequential(OrderedDict(conv=layer, bn=bn, relu=nn.ReLU(inplace=True)))

class Mixed(nn.Module):
    def __init__(self, c_in, pool, spec):
        super().__init__()
        self.pool, self.inputs = pool, {}  # key of a convolution: key of what it is applied to
        for branch, *steps in (text.split() for text in spec.split(",")):
            c, before = c_in, "pool" if branch == "_pool" else "x"
            for i, step in enumerate(steps, 1):
                key = f"branch{branch}_{i}" if len(steps) > 1 else f"branch{branch}"
                for part, ab in zip(step.split("+"), "ab" if "+" in step else [""]):
                    self.add_module(key + ab, conv(c, part))
                    self.inputs[key + ab] = before
                c, before = int(step.split("@")[0]), key

    def forward(self, x):
        out = {"x": x, "pool": self.pool(x)}
        for key, before in self.inputs.items():
            out[key] = getattr(self, key)(out[before])
        ends = [key for key in (*self.inputs, "pool") if key not in self.inputs.values()]
        return torch.cat([out[key] for key in ends], dim=1)

class Inception(nn.Module):
    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = conv(3, "32@3/2")
        self.Conv2d_2a_3x3 = conv(32, "32@3", pad=False)
        self.Conv2d_2b_3x3 = conv(32, "64@3")
        self.Conv2d_3b_1x1 = conv(64, "80@1")
        self.Conv2d_4a_3x3 = conv(80, "192@3", pad=False)
        for key, block in BLOCKS.items():
            self.add_module(key, Mixed(*block))
        self.fc = nn.Linear(2048, 1008)  # in the weight file, not in the FID

    def forward(self, x):  # uint8 (B, 3, H, W) -> (B, 2048)
        x = F.interpolate(x / 255, (299, 299), mode="bilinear", align_corners=False)
        x = (2 * x - 1).to(self.fc.weight.dtype)
        for key, layer in list(self.named_children())[:-1]:
            x = layer(halve(x) if key in ("Conv2d_3b_1x1", "Mixed_5b") else x)
        return x.mean((2, 3))

def random_weights(net):
    """He-normal convolutions, by numpy, as torch's streams may change; returns their hash."""
    rng, digest = np.random.Generator(np.random.PCG64(0)), hashlib.sha256()
    for m in net.modules():
        if isinstance(m, nn.Conv2d):
            draw = rng.standard_normal(m.weight.shape, np.float32)
            draw *= np.float32((2 / m.weight[0].numel()) ** 0.5)
            m.weight.copy_(torch.from_numpy(draw))
            digest.update(draw)
    return digest.hexdigest()

def load_features(args):
    """The network uint8 (B, 3, H, W) -> (B, D); its `identity` is "KEY HASH", KEY one of LABELS."""
    path = args.weights or f"{torch.hub.get_dir()}/checkpoints/{os.path.basename(WEIGHTS_URL)}"
    if args.features not in ("inception", "random"):
        net = torch.jit.load(args.features, map_location=args.device).eval()
        net.identity = f"fd {hashlib.sha256(Path(args.features).read_bytes()).hexdigest()}"
        return net
    net = Inception().eval().requires_grad_(False)
    if args.features == "random":
        net.identity = f"random_fd {random_weights(net)}"
    else:
        try:
            if not args.weights and not os.path.exists(path):
                os.makedirs(os.path.dirname(path), exist_ok=True)
                torch.hub.download_url_to_file(WEIGHTS_URL, path, WEIGHTS_SHA256)  # all or nothing
            net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        except Exception as e:  # noqa: BLE001 (the network, the disk, the file's bytes can fail)
            sys.exit(f"no weights at {path} ({e!r:.200}): get {WEIGHTS_URL}, put it there or name "
                     "it with --weights; --features random works offline")
        net.identity = f"fid {hashlib.sha256(Path(path).read_bytes()).hexdigest()}"
    for m in net.modules():
        if hasattr(m, "bn"):  # as part of the convolution: the same function in half the time
            m.conv, m.bn = nn.utils.fuse_conv_bn_eval(m.conv, m.bn), nn.Identity()
    return net.to(args.device, getattr(torch, args.dtype), memory_format=torch.channels_last)

# ---- Sources: a stream of uint8 images (H, W, C), or known by its statistics.
def open_source(path, args, stack):
    """A source: path, about (for the protocol), n, images(numbers) -> images, if it has any; and,
    known when it is measured or from a file of statistics, mu, sigma, features, net and sizes."""
    s = SimpleNamespace(path=path, mu=None, images=None, features=None, net="", sizes="")
    need(os.path.exists(path), f"no source at {path}: give a folder, an archive, .npz or .pt file")
    if path.endswith(".pt"):
        denoiser, checkpoint = sample.load_denoiser(path, args.ckpt_weights, args.device)
        how = sample.sampling_settings(args, denoiser, checkpoint)
        s.about = dict(kind="checkpoint", step=checkpoint["step"], weights=args.ckpt_weights, **how)
        s.n, how = args.num or 10_000, how | dict(batch_size=args.batch_size)
        s.images = lambda numbers: (image for _, images in sample.generate(denoiser, numbers, **how)
                                    for image in images)
    elif path.endswith(".npz") and "mu" in (stored := np.load(path)):
        s.mu, s.sigma = np.float64(stored["mu"]), np.float64(stored["sigma"])
        need(s.sigma.shape == 2 * s.mu.shape, f"{path}: mu {s.mu.shape}, sigma {s.sigma.shape}")
        s.about, s.n = dict(kind="statistics"), int(stored.get("n", 0))
        s.net = str(stored.get("net", "fid unknown" if args.features == "random" else ""))
        if (x := stored.get("arr_0")) is not None:  # ADM's reference batches have some images, too
            s.n, s.images = len(x), partial(map, x.__getitem__)
            s.about = dict(kind="statistics for FID, images for KID, precision and recall")
    else:
        if os.path.exists(os.path.join(path, "meta.json")):
            data, _, meta = prepare_data.open_folder(path, args.split)
            s.about = dict(kind="prepared", split=args.split, data_hash=meta["hash"])
            found = prepare_data.Source(range(len(data)), data.__getitem__)
        else:
            found, s.about = prepare_data.open_source(path, stack), dict(kind="images")
        s.n, bad = min(len(found.names), args.num or len(found.names)), []
        order = [i * len(found.names) // s.n for i in range(s.n)]  # evenly spaced
        if s.about["kind"] == "images":  # an unreadable file is told before the pass
            sum(1 for _ in prepare_data.iter_images(found, order[args.rank :: args.world], bad))
            need(not bad, f"{path}: cannot read {bad[:9]}: mend or remove it")
        s.images = lambda numbers: (image for _, image in prepare_data.iter_images(
            found, [order[i] for i in numbers], bad))
    return s

# ---- One pass over the images. For the Frechet distance alone, memory doesn't grow with them.
def merge(a, b):
    """(n, mean, squares about the mean) of a union, with no cancellation (Chan et al. 1979)."""
    if not a or not b:
        return a or b
    n, delta = a[0] + b[0], b[1] - a[1]
    squares = a[2].add_(b[2]).addr_(delta, delta, alpha=a[0] * b[0] / n)  # in place: 32 MB each
    return n, a[1] + delta * (b[0] / n), squares

def measure(s, net, args):
    """Fill in a source's statistics. Rank r measures images r, r + world, ...; all know the sum."""
    rank, world = args.rank, args.world
    numbers, total, kept, sizes = range(rank, s.n, world), None, [], set()
    images = tqdm(s.images(numbers), s.path, len(numbers), unit="image", disable=rank > 0)
    for shape, alike in groupby(images, key=np.shape):
        while batch := list(islice(alike, args.batch_size)):  # the last one may be smaller
            need(batch[0].dtype == np.uint8, f"{s.path} holds latents: decode them first")
            x = torch.from_numpy(np.stack(batch)).to(args.device).expand(-1, -1, -1, 3)
            with torch.inference_mode():
                y = net(x.permute(0, 3, 1, 2)).float().cpu()
            need(y.dim() == 2 and y.isfinite().all(), f"{s.path}: the features of {len(x)} images "
                 f"are {tuple(y.shape)} or not finite: look at the images and the weights")
            mean = y.double().mean(0)
            centred = y.double() - mean
            total = merge(total, (len(y), mean, centred.T @ centred))
            kept += [y] if args.keep else []
            sizes.add(f"{shape[1]}x{shape[0]}")
    parts = [(total, kept, sizes)] * world
    if world > 1:
        dist.all_gather_object(parts, parts[rank])
    total = reduce(merge, (part[0] for part in parts))
    need(total and total[0] >= 2 + 2 * args.keep, f"{s.path}: FID needs 2 images or more, pr 4")
    if s.mu is None:
        s.mu, s.sigma = total[1].numpy(), (total[2] / (total[0] - 1)).numpy()
    s.n, s.net, sizes = total[0], s.net or net.identity, set().union(*(p[2] for p in parts))
    s.sizes = ", ".join(sorted(sizes))
    s.features = torch.empty(s.n, len(s.mu)) if args.keep else None
    for r in range(world if args.keep else 0):
        s.features[r::world] = torch.cat(parts[r][1])

# ---- Distances.
def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^1/2 (Dowson & Landau 1982). With S = A A^T the
    last trace is the sum of the singular values of A1^T A2: never imaginary, right for singular S,
    and with all its digits, half of which the eigenvalues of the product would lose."""
    def factor(sigma):
        l, u = torch.linalg.eigh(torch.from_numpy(sigma))
        kept = l > len(l) * torch.finfo(l.dtype).eps * l[-1]
        return u[:, kept] * l[kept].sqrt()

    cross = torch.linalg.svdvals(factor(sigma1).T @ factor(sigma2)).sum().item()
    return float(np.sum((mu1 - mu2) ** 2) + np.trace(sigma1) + np.trace(sigma2) - 2 * cross)

def mmd(x, y):
    """Unbiased squared maximum mean discrepancy with kernel (x.y / D + 1)^3."""
    xx, yy, xy = ((a @ b.T / a.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    off_diagonal = [(k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (xx, yy)]
    return (sum(off_diagonal) - 2 * xy.mean()).item()

def kid(x, y, subsets=100, size=1000, seed=0):
    """Kernel distance (Binkowski et al. 2018): mean and deviation over subsets (torch-fidelity)."""
    rng = np.random.default_rng(seed)
    values = [mmd(*(f[rng.choice(len(f), size, replace=False)].double() for f in (x, y)))
              for _ in range(subsets)]
    return {"kid": np.mean(values), "kid_std": np.std(values)}

def precision_recall(real, fake, k=3):
    """The share of each set that lies in the other's k-NN balls (Kynkaanniemi et al. 2019)."""
    def distances(x, y):
        return (torch.cdist(part.double(), y.double()) for part in x.split(500))
    def covered(x, y):
        radii = torch.cat([d.kthvalue(k + 1).values for d in distances(y, y)])  # 1st: itself
        return torch.cat([(d <= radii).any(1) for d in distances(x, y)]).double().mean().item()
    return {"precision": covered(fake, real), "recall": covered(real, fake)}

def decoder_nats(z, values, sigma=SIGMA_MIN):
    """-ln p(v | z) of 8-bit values: p = softmax over the levels v_k of -(z - v_k)^2 / (2 sigma^2).
    z any shape, in [-1, 1] and noisy; values uint8 of that shape."""
    levels = torch.arange(256, device=z.device, dtype=z.dtype) / 127.5 - 1
    logits = -((z.reshape(-1, 1) - levels) ** 2) / (2 * sigma**2)
    return -logits.log_softmax(dim=1).gather(1, values.reshape(-1, 1).long()).view(z.shape)

def bound(denoise, values, generator, bins=10):
    """Variational bound on -log2 p in bits per dimension (b,), and losses by level (b, bins).
    values uint8 (b, K, d); denoise(x, sigma (b,)) -> D. 1/2 of the integral of E|x - D|^2 e^lambda
    over lambda = -2 ln sigma, one level of each image a bin, + prior + decoder at sigma_min."""
    low, high = math.log(SIGMA_MIN), math.log(80.0)
    x = values.float() / 127.5 - 1
    b, size = len(x), x[0].numel()

    def randn():
        return torch.randn(x.shape, generator=generator).to(x.device)
    losses, nats = [], 0.0
    for i in range(bins):
        # One random place in the bin, and the images evenly over it: less chance, no bias.
        u = (torch.randperm(b, generator=generator) + torch.rand(1, generator=generator)) / b
        sigma = torch.exp(low + (high - low) * (i + u) / bins).to(x.device)
        denoised = denoise(noised(x, randn(), sigma), sigma)
        losses.append(denoising_loss(denoised, x, sigma))
        error = (denoised - x).square().sum(dim=(1, 2))
        nats = nats + (high - low) / bins * error / sigma**2  # d lambda = 2 d ln sigma
    nats = nats + x.square().sum(dim=(1, 2)) / (2 * math.exp(2 * high))
    z = x + math.exp(low) * randn()
    decoded = torch.stack([decoder_nats(z[i], values[i]).sum() for i in range(b)])
    return (nats + decoded) / (math.log(2) * size), torch.stack(losses, dim=1)

def bits_per_dim(sets, path, args):
    """{set: losses by noise level, bits per dimension and their standard error} of a checkpoint, on
    the first validation images of prepared sets; prints a line for each."""
    need_noise("edm", "--metrics bpd")
    denoiser, checkpoint = sample.load_denoiser(path, args.ckpt_weights, args.device)
    c, result, limit = denoiser.config, {}, args.num or 512
    names = checkpoint["class_names"] if c.num_classes else []
    edges = np.linspace(math.log(SIGMA_MIN), math.log(80.0), 11)
    for name in sets.split(","):
        images = Images(name, "val", c.patch_size, names)
        theirs = [images.meta[k] for k in ("size", "channels", "dtype")]
        need(theirs == [c.image_size, c.channels, "uint8"] and names in
             ([], images.meta["class_names"]), f"{name} does not fit the model: expected 8-bit "
             f"images of side {c.image_size} and no classes but {names}")
        g, found = sample.seeded(args.seed, 7), []
        for start in range(0, min(limit, len(images)), 32):
            index = np.arange(start, min(start + 32, limit, len(images)))
            values = torch.from_numpy(images.read(index, None, np.zeros(len(index), bool)))
            labels = torch.from_numpy(images.labels[index]).to(args.device) if names else None
            found.append(bound(partial(denoiser, labels=labels), values.to(args.device), g))
        bits, losses = (torch.cat(parts).cpu().double() for parts in zip(*found))
        error = bits.std().item() / math.sqrt(len(bits))
        result[name] = dict(images=len(bits), loss_by_level=losses.mean(dim=0).tolist(),
                            ln_sigma=edges.tolist(), bits_per_dim=bits.mean().item(),
                            standard_error=error)
        print(f"{name}: {bits.mean():.4f} ± {error:.4f} bits per dimension", flush=True)
    return result

# ---- The command.
def main(argv=None):
    parser = prepare_data.Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("a", metavar="A", help="the reference")
    parser.add_argument("b", metavar="B", nargs="?", help="what is judged; not needed with --stats")
    add = parser.add
    add("features", "inception", "inception, random, or a TorchScript file")
    add("weights", None, "of Inception; default: torch hub's cache, else a download")
    add("metrics", "fid", "of fid,kid,pr, or bpd")
    add("kid_size", 1000, "images in each of KID's 100 subsets")
    add("num", None, "so many of each source, evenly spaced; of a checkpoint 10,000", type=int)
    add("split", "train", "of a prepared folder", choices=("train", "val"))
    add("json", False, "one JSON object as the last line of stdout")
    add("ckpt_weights", "ema", "of a checkpoint", choices=("ema", "raw"))
    add("stats", None, "save mu and sigma of A in this .npz")
    sample.add_flags(parser, batch_size=32)
    args = parser.parse_args(argv)
    args.metrics = args.metrics.split(",")
    args.keep = bool({"kid", "pr"} & {*args.metrics})
    args.device = sample.pick_device(args.device, int(os.environ.get("LOCAL_RANK", 0)))
    need({*args.metrics} <= {"fid", "kid", "pr"} or args.metrics == ["bpd"],
         f"--metrics {args.metrics}: expected some of fid,kid,pr, or bpd alone")
    need(args.b or args.stats, f"one source, {args.a}: name a second, or give --stats")
    args.rank = rank = int(os.environ.get("RANK", 0))
    args.world = world = int(os.environ.get("WORLD_SIZE", 1))
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)
        torch.backends.cudnn.allow_tf32 = False  # float32 means float32
    if args.metrics == ["bpd"]:
        return print(json.dumps(bits_per_dim(args.a, args.b, args))) if rank == 0 else None
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")  # only results travel
    with ExitStack() as stack:
        sources = [open_source(path, args, stack) for path in (args.a, args.b) if path]
        need(not args.keep or all(s.images for s in sources),
             "kid and pr need images, not statistics: use --metrics fid")
        need("kid" not in args.metrics or 1 < args.kid_size <= min(s.n for s in sources),
             f"KID draws {args.kid_size} images of {[s.n for s in sources]}: see --kid_size")
        unknown = [s for s in sources if s.mu is None or args.keep]
        net = load_features(args) if unknown else None
        for s in unknown:
            measure(s, net, args)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()  # or its threads may abort the process at its end
    if rank > 0:
        return
    need(len({s.net for s in sources} - {""}) <= 1 and len({len(s.mu) for s in sources}) == 1,
         f"features differ, {[s.net or len(s.mu) for s in sources]}: use the same --features")
    key, digest = (max(s.net for s in sources) or "fid unknown").split()
    about = dict(features=LABELS[key], weights_sha256=digest, dtype=args.dtype, warnings=[
        f"{s.path} has only {s.n} images: this biases all figures" for s in sources
        if 0 < s.n < max(2048, len(s.mu))], resize="none" if key == "fd" else
        "299x299 bilinear, antialias=False, align_corners=False")
    if key == "fid" and digest != WEIGHTS_SHA256:
        about["warnings"] += ["the Inception weights are not known to be the public ones"]
    sizes = {s.sizes for s in sources if s.sizes}
    about["warnings"] += [f"images of different sizes are compared: {sizes}"] * (len(sizes) > 1)
    for name, s in zip("ab", sources):
        about[name] = dict(path=s.path, n=s.n, image_size=s.sizes, **s.about)
    print(*(f"{name}: {value}" for name, value in about.items()), sep="\n", file=sys.stderr)
    a, result = sources[0], {}
    for b in sources[1:]:
        if "fid" in args.metrics:
            result[key] = frechet_distance(a.mu, a.sigma, b.mu, b.sigma)
        if "kid" in args.metrics:
            result |= kid(a.features, b.features, size=args.kid_size, seed=args.seed)
        result |= precision_recall(a.features, b.features) if "pr" in args.metrics else {}
    if args.stats:
        stored = dict(mu=a.mu, sigma=a.sigma, n=a.n, net=a.net)
        sample.replace_file(args.stats, lambda f: np.savez(f, **stored))
    lines = [f"{LABELS.get(name, name)} {value:.6g}" for name, value in result.items()]
    print(json.dumps(result | about) if args.json else "\n".join(lines))

if __name__ == "__main__":
    main()
