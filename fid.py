"""How far apart are two sets of images?  Frechet distance (FID), KID, precision and recall.

python fid.py data/faces out/samples.npz                        # the reference, then what to judge
python fid.py data/faces out/ft.pt --num 5000                   # draws 5,000 samples by itself
python fid.py data/faces out/samples --metrics fid,kid,pr --json
python fid.py data/faces --stats faces.npz                      # mu and sigma, another time's A
python fid.py data/faces out/samples.npz --features random      # offline; not to be called FID
torchrun --nproc_per_node=8 fid.py data/faces out/samples.npz   # the same figures, sooner

A source is a prepared folder, a folder or .zip/.tar of images, an .npz of images (arr_0) or of
statistics (mu, sigma), or a checkpoint (.pt). Features and resize are those of pytorch-fid.
"""

import hashlib
import json
import os
import re
import sys
from argparse import BooleanOptionalAction
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from functools import partial, reduce
from itertools import groupby, islice

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import prepare_data
import sample
from prepare_data import need, number

WEIGHTS_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
               "pt_inception-2015-12-05-6726825d.pth")
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
RESIZE = "299x299 bilinear, antialias=False, align_corners=False"
LABELS = {"fid": "FID", "random_fd": "random-feature FD", "fd": "FD in TorchScript features"}

# ---------------------------------------------------------------------------------------------
# Inception v3, the 2015-12-05 graph of the FID paper. Keys are those of the public weight file
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


def random_weights(net, seed=0):
    """He-normal convolutions, batch norm at identity; by numpy, as torch's streams may change."""
    rng, digest = np.random.Generator(np.random.PCG64(seed)), hashlib.sha256()
    for m in net.modules():
        if isinstance(m, nn.Conv2d):
            draw = rng.standard_normal(m.weight.shape, np.float32)
            draw *= np.float32((2 / m.weight[0].numel()) ** 0.5)
            m.weight.copy_(torch.from_numpy(draw))
            digest.update(draw)
    return digest.hexdigest()


def sha256(path):
    """Hash of a file, or of the relative names and the contents of all files in a folder."""
    digest = hashlib.sha256()
    if os.path.isdir(path):
        for f in sorted(os.path.join(d, f) for d, _, names in os.walk(path) for f in names):
            digest.update(os.fsencode(f"{os.path.relpath(f, path)}\0{sha256(f)}\0"))
        return digest.hexdigest()
    with open(path, "rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def load_features(args):
    """The network uint8 (B, 3, H, W) -> (B, D); its `identity` is "KEY HASH", KEY one of LABELS."""
    path = args.weights or f"{torch.hub.get_dir()}/checkpoints/{os.path.basename(WEIGHTS_URL)}"
    try:
        if args.features not in ("inception", "random"):
            path = args.features
            net = torch.jit.load(path, map_location=args.device).eval()
            net.identity = f"fd {sha256(path)}"
            return net
        net = Inception().eval().requires_grad_(False)
        if args.features == "random":
            net.identity = f"random_fd {random_weights(net)}"
        else:
            if not args.weights and not os.path.exists(path):
                os.makedirs(os.path.dirname(path), exist_ok=True)
                torch.hub.download_url_to_file(WEIGHTS_URL, path, WEIGHTS_SHA256)  # all or nothing
            net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
            net.identity = f"fid {sha256(path)}"
    except Exception as e:  # noqa: BLE001 (the network, the disk, the file's bytes: all can fail)
        reason = " ".join(f"{type(e).__name__}: {e}".split())[:200]
        sys.exit(f"no feature weights from {path} ({reason}): get {WEIGHTS_URL}, put it there or "
                 "name it with --weights; --features random, or a TorchScript file, works offline")
    for m in net.modules():
        if hasattr(m, "bn"):  # as part of the convolution: the same function in half the time
            m.conv, m.bn = nn.utils.fuse_conv_bn_eval(m.conv, m.bn), nn.Identity()
    return net.to(args.device, getattr(torch, args.dtype), memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------------
# Sources. Each one is a stream of uint8 images (H, W, C), or known by its statistics.


@dataclass
class Source:
    path: str
    about: dict  # what belongs to the protocol
    images: object = None  # (rank, world) -> images rank, rank + world, ...
    mu: np.ndarray = None  # float64 (D,); from here on known when it is measured
    sigma: np.ndarray = None  # float64 (D, D), unbiased
    n: int = 0  # number of images; 0 where another tool's file doesn't say
    net: str = ""  # identity of the feature network, "" where unknown
    image_size: str = ""
    features: torch.Tensor = None  # (n, D), only where a metric needs them


def load_stats(path):
    """The statistics in an .npz, None if it holds images; any exception if it is damaged."""
    with np.load(path, allow_pickle=False) as f:
        if "arr_0" in f:
            return None
        mu, sigma = np.float64(f["mu"]), np.float64(f["sigma"])
        kinds = {"n": int, "net": str, "image_size": str}  # not in other tools' files
        more = {k: kind(f[k].item()) for k, kind in kinds.items() if k in f}
        features = torch.from_numpy(np.float32(f["features"])) if "features" in f else None
    n, net, given = more.get("n", 0), more.get("net", ""), features is not None
    total = mu.sum() + sigma.sum() + (features.sum().item() if given else 0)
    if (mu.ndim != 1 or sigma.shape != 2 * mu.shape or given and features.shape != (n, len(mu))
            or not np.isfinite(total) or n < 0
            or not re.fullmatch(f"(({'|'.join(LABELS)}) [0-9a-f]+)?", net)):
        shape = tuple(features.shape) if given else None
        raise ValueError(f"mu {mu.shape}, sigma {sigma.shape}, features {shape} of {n} images by "
                         f"{net!r}, expected finite (D,), (D, D) and none or (n, D)")
    return {"mu": mu, "sigma": sigma, "features": features, **more}


def save_stats(path, source):
    """An .npz that pytorch-fid and EDM read too (mu, sigma), written whole or not at all."""
    keys = ("mu", "sigma", "n", "net", "image_size", "features")
    saved = {k: getattr(source, k) for k in keys if getattr(source, k) is not None}
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    sample.replace_file(path, lambda f: np.savez(f, **saved), os.getpid())


def open_source(path, args):
    """Find out what `path` is. Nothing is measured yet."""
    need(os.path.exists(path),
         f"no source at {path}: give a folder, .zip, .tar or .npz, or a checkpoint")
    if path.endswith((".pt", ".pth")):
        return checkpoint_source(path, args)
    if path.endswith(".npz"):
        try:
            stats = load_stats(path)
        except Exception as e:  # noqa: BLE001 (the file's bytes decide which error)
            sys.exit(f"{path} can't be read ({e}): expected arr_0 (images), or mu and sigma")
        if stats:
            return Source(path, {"kind": "statistics", "hash": sha256(path)}, **stats)
    if not os.path.exists(os.path.join(path, "meta.json")):
        about = {"kind": "images", "hash": sha256(path)}
        return Source(path, about, partial(read_images, path, args.num))
    data, _, meta = prepare_data.open_dataset(path, args.split)
    about = {"kind": "prepared", "split": args.split, "data_hash": meta["hash"],
             "hash": sha256(os.path.join(path, f"{args.split}.npy"))}
    return Source(path, about, lambda rank, world: data[rank : args.num : world])


def read_images(path, num, rank, world):
    rejects = []
    reader = prepare_data.iter_images(path, rejects=rejects)
    for _, image, _ in islice(reader, rank, num, world):
        yield image
    for name, reason in rejects:  # a figure without it would be of another set
        need(reason == prepare_data.CLUTTER,
             f"{path}: {str(name)!r} is no readable image ({reason}): mend or remove it")


def checkpoint_source(path, args):
    """Samples of a checkpoint, drawn when they are needed; image i depends on (seed, i) alone."""
    denoiser, checkpoint = sample.load_denoiser(path, args.ckpt_weights, args.device)
    settings = sample.sampling_settings(args, denoiser, checkpoint)
    about = {"kind": "checkpoint", "hash": sha256(path), "step": checkpoint["step"],
             "weights": args.ckpt_weights, **settings}
    return Source(path, about, lambda rank, world: (
        image for _, images in sample.generate(denoiser, range(rank, args.num or 10_000, world),
                                               batch_size=args.batch_size, **settings)
        for image in images))


# ---------------------------------------------------------------------------------------------
# One pass over the images. For the Frechet distance alone, memory doesn't grow with their number.


def merge(a, b):
    """(n, mean, squares about the mean) of a union, with no cancellation (Chan et al. 1979)."""
    if not a or not b:
        return a or b
    n, delta = a[0] + b[0], b[1] - a[1]
    squares = a[2].add_(b[2]).addr_(delta, delta, alpha=a[0] * b[0] / n)  # in place: 32 MB each
    return n, a[1] + delta * (b[0] / n), squares


def measure(source, net, args):
    """Fill in a source's statistics. Rank r measures images r, r + world, ...; all know the sum."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    images = tqdm(source.images(rank, world), source.path, unit="image", disable=rank > 0)
    total, kept, sizes = None, [], set()
    for shape, alike in groupby(images, key=np.shape):
        while batch := list(islice(alike, args.batch_size)):  # the last one may be smaller
            need(batch[0].dtype == np.uint8,
                 f"{source.path} holds latents, but FID needs images: decode them first")
            x = torch.from_numpy(np.stack(batch)).to(args.device).expand(-1, -1, -1, 3)
            with torch.inference_mode():
                y = net(x.permute(0, 3, 1, 2)).float().cpu()
            need(y.dim() == 2 and len(y) == len(x) and y.isfinite().all(),
                 f"{source.path}: features {tuple(y.shape)} of {len(x)} images, expected (B, D) "
                 "without NaN: look at the images and the weights")
            mean = y.double().mean(0)
            centred = y.double() - mean
            total = merge(total, (len(y), mean, centred.T @ centred))
            kept += [y] if args.keep else []
            sizes.add(f"{shape[1]}x{shape[0]}")
    parts = [(total, kept, sizes)] * world
    if world > 1:
        dist.all_gather_object(parts, parts[rank])
    totals, kept, sizes = zip(*parts)
    n, mu, squares = reduce(merge, totals) or (0, None, None)
    need(n >= 2 + 2 * args.keep,
         f"{source.path} holds {n} image{'s' * (n != 1)}: FID needs 2 or more, pr 4")
    source.n, source.mu, source.sigma = n, mu.numpy(), (squares / (n - 1)).numpy()
    source.net, source.image_size = net.identity, ", ".join(sorted(set().union(*sizes)))
    source.features = torch.empty(n, len(mu)) if args.keep else None
    for r in range(world if args.keep else 0):
        source.features[r::world] = torch.cat(kept[r])


def measure_once(source, net, args):
    """measure(), or what an earlier run has cached under a hash of all that decides the result,
    code included, so it can't be out of date. Samples and single features aren't cached."""
    if args.keep or source.about["kind"] == "checkpoint" or not args.cache:
        return measure(source, net, args)
    code = sha256(__file__) + sha256(prepare_data.__file__)
    recipe = json.dumps([source.about, args.num, net.identity, args.dtype, code]).encode()
    path = f"{torch.hub.get_dir()}/fid_statistics/{hashlib.sha256(recipe).hexdigest()}.npz"
    found = [None]
    with suppress(Exception):  # not there, or damaged
        found = [load_stats(path)]
    if dist.is_initialized():
        dist.broadcast_object_list(found)  # rank 0 decides for all: measuring takes all of them
    if found[0]:
        return vars(source).update(found[0])
    measure(source, net, args)
    with suppress(OSError):  # a read-only place has no cache
        save_stats(path, source)


# ---------------------------------------------------------------------------------------------
# Distances.


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
    """Kernel distance (Binkowski et al. 2018): mean over random subsets, and its standard error."""
    rng, size = np.random.default_rng(seed), min(size, len(x), len(y))
    values = [mmd(*(f[rng.choice(len(f), size, replace=False)].double() for f in (x, y)))
              for _ in range(subsets)]
    return {"kid": np.mean(values), "kid_se": np.std(values, ddof=1) / subsets**0.5}


def precision_recall(real, fake, k=3):
    """The share of each set that lies in the other's k-NN balls (Kynkaanniemi et al. 2019)."""
    def distances(x, y):
        return (torch.cdist(part.double(), y.double()) for part in x.split(500))

    def covered(x, y):
        radii = torch.cat([d.kthvalue(k + 1).values for d in distances(y, y)])  # 1st: itself
        return torch.cat([(d <= radii).any(1) for d in distances(x, y)]).double().mean().item()

    return {"precision": covered(fake, real), "recall": covered(real, fake)}


def parse(argv):
    parser = prepare_data.Parser(description=__doc__)
    add = parser.add_argument
    add("a", metavar="A", help="the reference")
    add("b", metavar="B", nargs="?", help="what is judged; not needed with --stats")
    add("--features", default="inception", help="inception, random, or a TorchScript file")
    add("--weights", help="Inception weights (default: torch hub cache, else a download)")
    add("--metrics", default="fid", help="of fid,kid,pr (default: fid)")
    add("--num", type=number(int, 2), help="first so many images of each source (a checkpoint "
        "draws 10,000)")
    add("--split", choices=("train", "val"), default="train", help="of a prepared folder")
    add("--json", action="store_true", help="one JSON object as the last line of stdout")
    add("--stats", help="save mu and sigma of A in this .npz, for kid and pr also its features")
    add("--cache", action=BooleanOptionalAction, default=True, help="of statistics, by content")
    add("--ckpt_weights", choices=("ema", "raw"), default="ema", help="of a checkpoint")
    sample.add_flags(parser, batch_size=32)
    args = parser.parse_args(argv)
    args.metrics = args.metrics.split(",")
    args.keep = args.metrics != ["fid"]
    args.device = sample.pick_device(args.device, int(os.environ.get("LOCAL_RANK", 0)))
    need(set(args.metrics) <= {"fid", "kid", "pr"}, "--metrics takes fid,kid,pr or some of it")
    need(args.b or args.stats, f"one source, {args.a}: name a second, or give --stats")
    need((args.stats or ".npz").endswith(".npz"), f"--stats is {args.stats}, expected NAME.npz")
    need(not args.weights or args.features == "inception", "--weights is for --features inception")
    return args


def main(argv=None):
    args = parse(argv)
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)
        torch.backends.cudnn.allow_tf32 = False  # float32 means float32
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")  # only results travel
    sources = [open_source(path, args) for path in (args.a, args.b) if path]
    todo = [s for s in sources if s.mu is None]
    need(not args.keep or all(s.mu is None or s.features is not None for s in sources),
         "kid and pr need images, or statistics made with them: use --metrics fid")
    net = load_features(args) if todo else None
    for source in todo:
        try:
            measure_once(source, net, args)
        except RuntimeError as e:  # too little memory, or a TorchScript file for other images
            sys.exit(f"no features of {source.path}: {str(e)[-200:]!r}; try a smaller --batch_size")
    found = [(s.path, len(s.mu), s.net) for s in sources]
    need(len({s.net for s in sources} - {""}) <= 1 and len({len(s.mu) for s in sources}) == 1,
         f"the features differ, {found}: measure both with the same --features")
    if dist.is_initialized():
        rank = dist.get_rank()
        dist.barrier()
        dist.destroy_process_group()  # or its threads may abort the process at its end
        if rank > 0:
            return
    key, digest = (max(s.net for s in sources) or "fid unknown").split()
    about = {"features": LABELS[key], "weights_sha256": digest, "dims": len(sources[0].mu),
             "resize": "none" if key == "fd" else RESIZE, "dtype": args.dtype, "warnings": []}
    if key == "fid" and digest != WEIGHTS_SHA256:
        about["warnings"] += ["the Inception weights aren't known to be the public ones"]
    for name, s in zip("ab", sources):
        about[name] = {"path": s.path, "n": s.n, "image_size": s.image_size, **s.about}
        if 0 < s.n < max(2048, len(s.mu)):
            about["warnings"] += [f"{s.path} has only {s.n} images: this biases all figures"]
    print(*(f"{name}: {value}" for name, value in about.items()), sep="\n", file=sys.stderr)
    a, result = sources[0], {}
    for b in sources[1:]:
        if "fid" in args.metrics:
            result[key] = frechet_distance(a.mu, a.sigma, b.mu, b.sigma)
        result |= kid(a.features, b.features, seed=args.seed) if "kid" in args.metrics else {}
        result |= precision_recall(a.features, b.features) if "pr" in args.metrics else {}
    if args.stats:
        save_stats(args.stats, a)
    lines = [f"{LABELS.get(name, name)} {value:.6g}" for name, value in result.items()]
    print(json.dumps(result | about) if args.json else "\n".join(lines))


if __name__ == "__main__":
    main()
