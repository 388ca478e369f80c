"""How far apart are two sets of images?  Frechet distance (FID), KID, precision and recall.

python fid.py data/faces out/samples.npz --metrics fid,kid,pr   # the reference, then what to judge
python fid.py data/faces out/ft.pt --num 5000                   # draws 5,000 samples by itself
python fid.py data/faces --stats faces.npz                      # mu and sigma, to be A another time
python fid.py data/faces out/samples.npz --features random      # offline; not to be called FID
python fid.py data/old,data/new out/ft.pt --metrics bpd         # losses by noise level, bits/dim

A source is a prepared folder (its training images; data/faces/val.npy are those held out), a
folder or archive of images, an .npz of images (arr_0) or of statistics (mu, sigma), or a checkpoint
(.pt). Features and resize are pytorch-fid's; --resize tf1 is that of ADM's and EDM's figures.
"""

import hashlib
import json
import math
import os
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from itertools import chain, groupby, islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import prepare_data
import sample
from model import check_noise, check_writable, denoising_loss, noised, replace_file
from prepare_data import Images, Parser, check, progress_bar, run_script, say

WEIGHTS_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
               "pt_inception-2015-12-05-6726825d.pth")
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

# ---- Inception v3, the 2015-12-05 graph of the FID paper. Names are those of torchvision and of
# the public weight file; the pooling differs from torchvision's. Comments give the image side.
avg_pool = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
max_pool = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
halve = partial(F.max_pool2d, kernel_size=3, stride=2)

class Conv(nn.Module):
    """Convolution, batch norm, ReLU."""
    def __init__(self, c_in, c_out, kernel, stride=1, padding="same"):
        super().__init__()
        if stride == 2:
            padding = 0
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)

class Mixed(nn.Module):
    """Branches side by side: lists of convolutions (channels out, kernel[, stride]), named by _1,
    _2, ... if there are several; two in a list run in parallel, as 2a and 2b. branch_pool pools."""
    def __init__(self, c_in, pool, **branches):
        super().__init__()
        self.pool = pool
        self.branches = {}  # name: its steps, each a list of convolutions that run in parallel
        for name, convs in branches.items():
            c = c_in
            steps = []
            for i, conv in enumerate(convs, 1):
                key = f"{name}_{i}" if len(convs) > 1 else name
                parallel = {key: conv}
                if isinstance(conv, list):
                    parallel = {f"{key}a": conv[0], f"{key}b": conv[1]}
                for part, shape in parallel.items():
                    self.add_module(part, Conv(c, *shape))
                c = shape[0]
                steps.append(list(parallel))
            self.branches[name] = steps

    def forward(self, x):
        outputs = []
        for name, steps in self.branches.items():
            h = self.pool(x) if name == "branch_pool" else x
            for step in steps:
                h = torch.cat([self.get_submodule(key)(h) for key in step], dim=1)
            outputs.append(h)
        return torch.cat(outputs, dim=1)

def inception_a(c_in, pool_features):  # 35
    return Mixed(
        c_in, avg_pool,
        branch1x1=[(64, 1)],
        branch5x5=[(48, 1), (64, 5)],
        branch3x3dbl=[(64, 1), (96, 3), (96, 3)],
        branch_pool=[(pool_features, 1)])

def inception_b(c_in):  # 35 -> 17
    return Mixed(
        c_in, halve,
        branch3x3=[(384, 3, 2)],
        branch3x3dbl=[(64, 1), (96, 3), (96, 3, 2)],
        branch_pool=[])

def inception_c(c_in, c):  # 17
    return Mixed(
        c_in, avg_pool,
        branch1x1=[(192, 1)],
        branch7x7=[(c, 1), (c, (1, 7)), (192, (7, 1))],
        branch7x7dbl=[(c, 1), (c, (7, 1)), (c, (1, 7)), (c, (7, 1)), (192, (1, 7))],
        branch_pool=[(192, 1)])

def inception_d(c_in):  # 17 -> 8
    return Mixed(
        c_in, halve,
        branch3x3=[(192, 1), (320, 3, 2)],
        branch7x7x3=[(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)],
        branch_pool=[])

def inception_e(c_in, pool):  # 8
    fork = [(384, (1, 3)), (384, (3, 1))]
    return Mixed(
        c_in, pool,
        branch1x1=[(320, 1)],
        branch3x3=[(384, 1), fork],
        branch3x3dbl=[(448, 1), (384, 3), fork],
        branch_pool=[(192, 1)])

def bilinear(x):
    """uint8 (B, 3, H, W) -> (B, 3, 299, 299) in [-1, 1], as in pytorch-fid."""
    x = F.interpolate(x / 255, (299, 299), mode="bilinear", align_corners=False)
    return 2 * x - 1

def bilinear_tf1(x):
    """As in TensorFlow 1, where row i of the output is row i * H / 299 of the input."""
    batch, _, height, width = x.shape
    theta = torch.eye(2, 3, device=x.device)  # from places in the output to places in the input
    theta[0, 2] = 1 / width - 1 / 299
    theta[1, 2] = 1 / height - 1 / 299
    grid = F.affine_grid(theta.expand(batch, 2, 3), (batch, 3, 299, 299), align_corners=False)
    x = F.grid_sample(x.float(), grid, padding_mode="border", align_corners=False)
    return (x - 128) / 128

RESIZES = {"pytorch-fid": bilinear, "tf1": bilinear_tf1}

class Inception(nn.Sequential):
    def __init__(self, resize="pytorch-fid"):
        self.resize = RESIZES[resize]
        super().__init__(OrderedDict(
            Conv2d_1a_3x3=Conv(3, 32, 3, 2),
            Conv2d_2a_3x3=Conv(32, 32, 3, padding=0),
            Conv2d_2b_3x3=Conv(32, 64, 3),
            pool1=nn.MaxPool2d(3, 2),
            Conv2d_3b_1x1=Conv(64, 80, 1),
            Conv2d_4a_3x3=Conv(80, 192, 3, padding=0),
            pool2=nn.MaxPool2d(3, 2),
            Mixed_5b=inception_a(192, 32),
            Mixed_5c=inception_a(256, 64),
            Mixed_5d=inception_a(288, 64),
            Mixed_6a=inception_b(288),
            Mixed_6b=inception_c(768, 128),
            Mixed_6c=inception_c(768, 160),
            Mixed_6d=inception_c(768, 160),
            Mixed_6e=inception_c(768, 192),
            Mixed_7a=inception_d(768),
            Mixed_7b=inception_e(1280, avg_pool),
            Mixed_7c=inception_e(2048, max_pool)))

    def forward(self, x):
        """uint8 (B, 3, H, W) -> features (B, 2048)."""
        return super().forward(self.resize(x)).mean((2, 3))

def random_weights(net):
    """He-normal convolutions, drawn by numpy, whose streams do not change."""
    rng = np.random.default_rng(0)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            weight = module.weight
            draw = rng.standard_normal(weight.shape, np.float32)
            draw *= np.float32((2 / weight[0].numel()) ** 0.5)
            weight.copy_(torch.from_numpy(draw))

def load_public_weights(net, path):
    """Load the weights of the FID paper's network, downloaded once -> the path of their file."""
    path = path or f"{torch.hub.get_dir()}/checkpoints/{os.path.basename(WEIGHTS_URL)}"
    try:
        if not os.path.exists(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            torch.hub.download_url_to_file(WEIGHTS_URL, path, WEIGHTS_SHA256)  # all or nothing
        weights = torch.load(path, "cpu", weights_only=True)
        del weights["fc.weight"], weights["fc.bias"]  # of the classifier
        net.load_state_dict(weights)
    except Exception as error:  # noqa: BLE001 (the network, the disk, the file's bytes)
        check(False, f"no Inception weights at {path} ({error!r:.200}): get {WEIGHTS_URL} and put "
              "it there or name it with --weights; --features random works offline")
    return path

def file_hash(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()

def load_features(args):
    """The network uint8 (B, 3, H, W) -> (B, D), and its identity "KEY HASH+RESIZE", where KEY is
    "fid", or "random_fd" for random weights; "fd HASH" for a TorchScript file."""
    if args.features not in ("inception", "random"):
        net = torch.jit.load(args.features, map_location=args.device).eval()
        return net, f"fd {file_hash(args.features)}"
    net = Inception(args.resize).eval().requires_grad_(False)
    if args.features == "random":
        random_weights(net)
        identity = "random_fd default_rng(0)"
    else:
        identity = f"fid {file_hash(load_public_weights(net, args.weights))}"
    identity += f"+{args.resize}"
    for module in net.modules():
        if isinstance(module, Conv):  # the same function in half the time
            module.conv = nn.utils.fuse_conv_bn_eval(module.conv, module.bn)
            module.bn = nn.Identity()
    return net.to(args.device, memory_format=torch.channels_last), identity

# ---- Sources: images, or what is known of them.
@dataclass
class Source:
    path: str
    about: dict  # for the protocol
    num: int  # of images
    images: object = None  # numbers -> an iterator of images uint8 (H, W, C)
    mu: object = None  # statistics, from a file or when measured
    sigma: object = None
    net: str = ""  # identity of the features, "KEY HASH" of load_features
    features: object = None  # (num, D), kept for KID and precision

def open_source(path, args, temp_dir):
    check(os.path.exists(path), f"there is no {path}: give a folder, an archive, .npz or .pt file")
    if path.endswith(".pt"):
        return checkpoint_source(path, args)
    if path.endswith(".npz"):
        arrays = np.load(path)
        if "mu" in arrays and "sigma" in arrays:
            return statistics_source(path, arrays)
    return image_source(path, args, temp_dir)

def checkpoint_source(path, args):
    denoiser, checkpoint = sample.load_denoiser(path, device=args.device)
    settings = sample.sampling_settings(args, denoiser, checkpoint)
    draw = sample.drawer(args, denoiser, checkpoint, settings)
    about = dict(step=checkpoint["step"], dtype=args.dtype, guide=args.guide_ckpt, **settings)
    images = lambda numbers: chain.from_iterable(draw(numbers))
    return Source(path, about, args.num or 10_000, images)

def statistics_source(path, arrays):
    """mu and sigma; ADM's reference batches also hold some images, for KID and precision."""
    mu = np.float64(arrays["mu"])
    sigma = np.float64(arrays["sigma"])
    check(mu.ndim == 1 and sigma.shape == 2 * mu.shape and np.isfinite([mu, *sigma]).all(),
          f"{path}: mu {mu.shape} and sigma {sigma.shape} are no statistics, or not finite")
    net = str(arrays.get("net", "fid unknown"))
    num = int(arrays.get("n", 0))
    images = None
    if "arr_0" in arrays:
        pixels = arrays["arr_0"]
        num = len(pixels)
        images = lambda numbers: (pixels[i] for i in numbers)
    return Source(path, dict(kind="statistics"), num, images, mu, sigma, net)

def image_source(path, args, temp_dir):
    if os.path.exists(f"{path}/train.npy"):
        pixels, _, _ = prepare_data.open_folder(path)
        found = prepare_data.Source(range(len(pixels)), pixels.__getitem__)
    else:
        found = prepare_data.open_source(path, temp_dir)
    total = len(found.names)
    num = min(total, args.num or total)

    def images(numbers):
        decoder = prepare_data.Decoder()
        evenly = [i * total // num for i in numbers]
        for _, image in decoder.iter_images(found, evenly):
            yield image
        rejected = decoder.rejected
        check(not rejected, f"{path}: cannot read {rejected[:9]}: repair or remove it")
    return Source(path, dict(kind="images"), num, images)

# ---- One pass over the images. For the Frechet distance alone, memory does not grow with them.
def measure(source, net, identity, args):
    """Fill in a source's statistics."""
    moments = 0  # sum of (y, 1) (y, 1)^T over the features y: products, sums and their number
    kept = []
    stream = progress_bar(source.images(range(source.num)), source.path, source.num)
    for _, same_size in groupby(stream, key=np.shape):
        while images := list(islice(same_size, args.batch_size)):
            y = extract(net, images, source.path, args.device)
            if args.keep:
                kept.append(y)
            y = F.pad(y.double(), (0, 1), value=1.0)
            moments += y.T @ y
    num = moments[-1, -1]  # the last row and column come from the 1
    check(num > 1, f"{source.path} holds only one image")
    if source.mu is None:
        mean = moments[-1, :-1] / num
        covariance = moments[:-1, :-1] / num - torch.outer(mean, mean)
        source.mu = mean.numpy()
        source.sigma = (covariance * num / (num - 1)).numpy()
        source.net = identity
    source.num = int(num)
    if args.keep:
        source.features = torch.cat(kept)

@torch.inference_mode()
def extract(net, images, path, device):
    """Features (B, D) of images uint8 (H, W, C) of one size, on the CPU."""
    x = torch.from_numpy(np.stack(images)).to(device)
    check(x.dtype == torch.uint8, f"{path} holds latents: decode them first")
    x = x.expand(-1, -1, -1, 3).permute(0, 3, 1, 2)  # grey as colour; (B, 3, H, W)
    y = net(x).cpu()
    check(y.dim() == 2 and y.isfinite().all(), f"{path}: the features of {len(x)} images are "
          f"{tuple(y.shape)} or not finite: look at the images and the weights")
    return y

# ---- Distances.
def matrix_factor(sigma):
    """A with A A^T = sigma, without the directions of no variance."""
    values, vectors = torch.linalg.eigh(torch.from_numpy(sigma))
    eps = torch.finfo(values.dtype).eps
    kept = values > len(values) * eps * values[-1]
    return vectors[:, kept] * values[kept].sqrt()

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^1/2 (Dowson & Landau 1982), at least 0. With
    S = A A^T the last trace is the sum of the singular values of A1^T A2, also for singular S."""
    product = matrix_factor(sigma1).T @ matrix_factor(sigma2)
    cross = torch.linalg.svdvals(product).sum().item()
    means = np.sum((mu1 - mu2) ** 2)
    traces = np.trace(sigma1) + np.trace(sigma2)
    return max(0.0, float(means + traces - 2 * cross))

def mmd(x, y):
    """Unbiased squared maximum mean discrepancy with kernel (x.y / D + 1)^3."""
    z = torch.cat([x, y])
    kernel = (z @ z.T / z.shape[1] + 1) ** 3
    n = len(x)
    discrepancy = -2 * kernel[:n, n:].mean()
    for k in kernel[:n, :n], kernel[n:, n:]:
        discrepancy += (k.sum() - k.trace()) / (len(k) * (len(k) - 1))
    return discrepancy.item()

def kid(x, y, subsets=100, size=1000, seed=0):
    """Kernel distance (Binkowski et al. 2018): mean and deviation over subsets (torch-fidelity)."""
    rng = np.random.default_rng(seed)

    def subset(features):
        return features[rng.choice(len(features), size, replace=False)].double()
    values = [mmd(subset(x), subset(y)) for _ in range(subsets)]
    return {"kid": np.mean(values), "kid_std": np.std(values)}

def distances(x, y):
    """Rows of the distances between x (N, D) and y (M, D), 500 at a time."""
    for part in x.split(500):
        yield torch.cdist(part.double(), y.double())

def share_covered(x, y, k):
    """Share of x that lies within the k-th neighbour of some y."""
    radii = torch.cat([d.kthvalue(k + 1).values for d in distances(y, y)])  # the 1st is y itself
    covered = torch.cat([(d <= radii).any(dim=1) for d in distances(x, y)])
    return covered.double().mean().item()

def precision_recall(real, fake, k=3):
    """Precision and recall in the space of features (Kynkaanniemi et al. 2019)."""
    return {"precision": share_covered(fake, real, k), "recall": share_covered(real, fake, k)}

# ---- Bits per dimension.
SIGMA_MIN = 0.0013  # the decoder costs 0.01 bit; at the sampler's 0.002 it would cost 0.19
SIGMA_MAX = 80.0
BINS = 10  # of ln sigma, by which losses are reported

def decoder_nats(z, values, sigma=SIGMA_MIN):
    """-ln p(v | z) of 8-bit values: p = softmax over the levels v_k of -(z - v_k)^2 / (2 sigma^2).
    z any shape, in [-1, 1] and noisy; values uint8 of that shape."""
    levels = torch.arange(256).to(z) / 127.5 - 1
    logits = -((z.reshape(-1, 1) - levels) ** 2) / (2 * sigma**2)
    level = values.reshape(-1, 1).long()
    log_p = logits.log_softmax(dim=1).gather(1, level)
    return -log_p.view(z.shape)

def variational_bound(denoise, values, generator):
    """Variational bound on -log2 p in bits per dimension (b,), and losses by level (b, BINS).
    values uint8 (b, K, d); denoise(x, sigma (b,)) -> D. 1/2 of the integral of E|x - D|^2 e^lambda
    over lambda = -2 ln sigma, one level of each image a bin, + prior + decoder at SIGMA_MIN."""
    x = values.float() / 127.5 - 1
    b = len(x)
    width = math.log(SIGMA_MAX / SIGMA_MIN) / BINS  # of a bin

    def randn():
        return torch.randn(x.shape, generator=generator).to(x.device)
    losses = []
    nats = x.square().sum((1, 2)) / (2 * SIGMA_MAX**2)
    for i in range(BINS):
        # One random place in the bin, and the images evenly over it: less chance, no bias.
        place = torch.randperm(b, generator=generator) + torch.rand(1, generator=generator)
        sigma = SIGMA_MIN * torch.exp(width * (i + place / b))
        sigma = sigma.to(x.device)
        denoised = denoise(noised(x, randn(), sigma), sigma)
        losses.append(denoising_loss(denoised, x, sigma))
        error = (denoised - x).square().sum((1, 2))
        nats += width * error / sigma**2  # d lambda = 2 d ln sigma
    z = x + SIGMA_MIN * randn()
    nats += torch.stack([decoder_nats(z[i], values[i]).sum() for i in range(b)])
    return nats / (math.log(2) * x[0].numel()), torch.stack(losses, dim=1)

def bits_per_dim(folder, denoiser, class_names, args):
    """Losses by noise level and bits per dimension of a model on a set's validation images."""
    config = denoiser.config
    images = Images(folder, "val", config.patch_size, class_names)
    form = (images.meta["size"], images.meta["channels"], images.meta["dtype"])
    expected = (config.image_size, config.channels, "uint8")
    known = not class_names or images.meta["class_names"] == class_names
    check(form == expected and known, f"{folder} holds {form}, but the model needs {expected} and "
          f"no classes but {class_names}")
    check(len(images), f"{folder} has no held-out images: prepare it with --val_frac")
    generator = sample.seeded(args.seed, 7)
    num = min(len(images), args.num or 512)
    results = []
    for start in range(0, num, 32):
        index = np.arange(start, min(start + 32, num))
        values = torch.from_numpy(images.read(index, None, np.zeros(len(index), bool)))
        labels = torch.from_numpy(images.labels[index]).to(args.device)
        denoise = partial(denoiser, labels=labels)
        results.append(variational_bound(denoise, values.to(args.device), generator))
    bits, losses = [torch.cat(parts).double() for parts in zip(*results)]
    return dict(
        images=num,
        loss_by_level=losses.mean(dim=0).tolist(),
        ln_sigma=np.linspace(math.log(SIGMA_MIN), math.log(SIGMA_MAX), BINS + 1).tolist(),
        bits_per_dim=bits.mean().item(),
        standard_error=bits.std().item() / math.sqrt(num))

def report_bits_per_dim(args):
    """A line for each set, then all results as JSON."""
    check_noise("edm", "--metrics bpd")
    denoiser, checkpoint = sample.load_denoiser(args.b, device=args.device)
    class_names = checkpoint["class_names"]
    results = {}
    for folder in args.a.split(","):
        results[folder] = result = bits_per_dim(folder, denoiser, class_names, args)
        bits, error = result["bits_per_dim"], result["standard_error"]
        print(f"{folder}: {bits:.4f} ± {error:.4f} bits per dimension", flush=True)
    print(json.dumps(results))

# ---- The command line.
def protocol(sources, args):
    """(KEY of the features, how the figures came about and what makes them doubtful)."""
    keys, digests = zip(*[source.net.split() for source in sources])
    widths = {len(source.mu) for source in sources}
    nets = {source.net for source in sources} - {"fid unknown"}
    check(len(set(keys)) == len(widths) == 1 and len(nets) <= 1, f"the features differ: {keys} "
          f"{digests}, {widths} values; use the same --features and --resize")
    warnings = [f"{source.path} has only {source.num} images: this biases all figures"
                for source in sources if 0 < source.num < max(2048, *widths)]
    weights = {net.split("+")[0] for net in nets}
    if weights != {f"fid {WEIGHTS_SHA256}"} and keys[0] == "fid":
        warnings.append("not all Inception weights are known to be the public ones")
    if "unknown" in digests:
        warnings.append(f"statistics of an unknown resize beside --resize {args.resize}: those of "
                        "ADM, EDM, EDM2, MaskDiT, TREAD and ECT were made with tf1")
    about = dict(
        features=keys[0],
        weights=digests,
        warnings=warnings)
    for name, source in zip("ab", sources):
        about[name] = dict(path=source.path, n=source.num, **source.about)
    return keys[0], about

def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("a", metavar="A", help="the reference")
    parser.add_argument("b", metavar="B", nargs="?", help="what is judged; not needed with --stats")
    add = parser.add
    add("features", "inception", "inception, random, or a TorchScript file")
    add("resize", "pytorch-fid", "resize before Inception; tf1 = as in ADM", choices=RESIZES)
    add("weights", None, "file of Inception's weights; None = torch hub's cache, else a download")
    add("metrics", "fid", "some of fid,kid,pr, or bpd")
    add("kid_size", 1000, "images in each of KID's 100 subsets", low=2)
    add("num", None, "images of each source, evenly spaced; None = all, of a checkpoint 10,000",
        int, low=2)
    add("json", False, "print one JSON object as the last line")
    add("stats", None, "save mu and sigma of A in this .npz")
    sample.add_flags(parser, batch_size=32)
    args = parser.parse_args(argv)
    metrics = set(args.metrics.split(","))
    check(metrics <= {"fid", "kid", "pr"} or metrics == {"bpd"},
          f"--metrics {args.metrics}: expected some of fid,kid,pr, or only bpd")
    check(args.b or args.stats, f"{args.a} is only one source: name a second, or give --stats")
    if args.stats:
        check_writable(args.stats)
    args.keep = bool({"kid", "pr"} & metrics)
    args.device = sample.pick_device(args.device)
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)
        torch.backends.cudnn.allow_tf32 = False  # float32 means float32
    if metrics == {"bpd"}:
        report_bits_per_dim(args)
        return
    with TemporaryDirectory() as temp_dir:
        sources = [open_source(path, args, temp_dir) for path in (args.a, args.b) if path]
        check(not args.keep or all(source.images for source in sources),
              "kid and pr need images, not statistics: use --metrics fid")
        smallest = min(source.num for source in sources)
        check("kid" not in metrics or args.kid_size <= smallest, f"KID draws {args.kid_size} "
              f"images, and there are {smallest}: give a smaller --kid_size")
        unknown = [source for source in sources if source.mu is None or args.keep]
        if unknown:
            net, identity = load_features(args)
        for source in unknown:
            measure(source, net, identity, args)
    key, about = protocol(sources, args)
    say(json.dumps(about, indent=1))
    a, b = sources[0], sources[-1]
    results = {}
    if "fid" in metrics and args.b:
        results[key] = frechet_distance(a.mu, a.sigma, b.mu, b.sigma)
    if "kid" in metrics:
        results |= kid(a.features, b.features, size=args.kid_size, seed=args.seed)
    if "pr" in metrics:
        results |= precision_recall(a.features, b.features)
    if args.json:
        print(json.dumps(results | about))
    else:
        for name, value in results.items():
            print(f"{name} {value:.6g}")
    if args.stats:
        statistics = dict(mu=a.mu, sigma=a.sigma, n=a.num, net=a.net)
        replace_file(args.stats, lambda file: np.savez(file, **statistics))

if __name__ == "__main__":
    run_script(main)
