"""Judge samples of a data set with classes by a small classifier that learns them from its training images.

python tests/tools/classifier.py data/fashion                    # trains -> data/fashion/classifier.pt
python tests/tools/classifier.py data/fashion out/samples.npz    # judges; --nearest out/nearest.png looks for copies
python fid.py data/fashion/val.npy out/samples.npz --features data/fashion/classifier.pt --metrics fid,pr

Reported are the Frechet distance and KID to the held-out images in the features of the classifier
("classifier FD"), and the share of samples that it takes for the class that was asked for. Features are in
units in which the held-out images have a variance of 100 in all: a distance of 1 is one per cent of it.
The line of training images is the floor: as many of them, judged in the same way.
"""

import math
from pathlib import Path

from common import markdown, picture  # puts the project on the path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import fid
from model import replace_file
from prepare_data import Parser, check, open_folder, progress_bar, run_script

FEATURES = 128

class Classifier(nn.Module):
    """uint8 (B, C, H, W) -> features (B, FEATURES); `classes` turns these into logits.

    Grey images may come as three equal channels, as fid.py gives them.
    """

    def __init__(self, channels, num_classes):
        super().__init__()
        self.layers = nn.Sequential()
        for c_in, c_out, stride in ((channels, 32, 1), (32, 64, 2), (64, FEATURES, 2), (FEATURES, FEATURES, 1)):
            conv = nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1)
            self.layers.extend([conv, nn.BatchNorm2d(c_out), nn.ReLU()])
        self.channels = channels
        self.head = nn.Linear(FEATURES, num_classes)
        self.register_buffer("unit", torch.tensor(1.0))

    def forward(self, x):
        return self.layers(x[:, : self.channels].float() / 127.5 - 1).mean((2, 3)) / self.unit

    @torch.jit.export
    def classes(self, features):
        return self.head(features * self.unit)

def as_input(images):
    """uint8 (N, H, W, C) -> (N, C, H, W)."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2)

def fit(images, labels, num_classes, epochs, seed=0):
    """A Classifier of images uint8 (N, H, W, C) with labels (N,)."""
    torch.manual_seed(seed)
    net = Classifier(images.shape[3], num_classes)
    x, y = as_input(images), torch.from_numpy(labels)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    total = epochs * math.ceil(len(x) / 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=total)
    batches = [i for _ in range(epochs) for i in torch.randperm(len(x)).split(64)]
    for i in progress_bar(batches, "classifier"):
        shift = torch.randint(-2, 3, (2,)).tolist()
        loss = F.cross_entropy(net.classes(net(x[i].roll(shift, (2, 3)))), y[i])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval().requires_grad_(False)

def features_of(net, images):
    """Images uint8 (N, H, W, C) -> features (N, FEATURES)."""
    with torch.inference_mode():
        return torch.cat([net(part) for part in as_input(images).split(250)]).double()

def load(data, seed=0, epochs=4):
    """The classifier of a prepared set, made and kept in its folder where there is none."""
    path = Path(data, "classifier.pt" if seed == 0 else f"classifier-{seed}.pt")
    if not path.exists():
        images, labels, meta = open_folder(data)
        check(meta["class_names"], f"{data} has no classes: prepare it from a folder with one sub-folder a class")
        net = fit(images, labels, len(meta["class_names"]), epochs, seed)
        net.unit.copy_(features_of(net, open_folder(data, "val")[0]).var(0).sum().sqrt() / 10)
        replace_file(path, lambda file: torch.jit.save(torch.jit.script(net), file))
    return torch.jit.load(path).eval()

def scores(net, reference, images, labels):
    """Distances of images to the features `reference`, and the share whose class is that of `labels`."""
    y = features_of(net, images)
    statistics = [s for z in (reference, y) for s in (z.mean(0).numpy(), np.cov(z.T.numpy()))]
    size = min(1000, len(y), len(reference))
    found = net.classes(y.float()).argmax(1).numpy()
    return dict(num=len(y), fd=fid.frechet_distance(*statistics), kid=fid.kid(reference, y, size=size)["kid"],
                right=float(np.mean(found == labels)))

def nearest(images, training):
    """The training image at the least distance in pixels, for each of the images."""
    known = torch.from_numpy(np.array(training)).flatten(1).float()
    return training[[(known - torch.from_numpy(x).flatten()).square().sum(1).argmin().item() for x in images]]

def main(argv):
    parser = Parser(__doc__)
    parser.add_argument("data", help="prepared set with classes")
    parser.add_argument("samples", nargs="*", help=".npz of sample.py, from a model with --class_cond")
    parser.add("seed", 0, "of the classifier")
    parser.add("nearest", None, "PNG: ten samples of each .npz, above the nearest training images")
    args = parser.parse_args(argv)
    net = load(args.data, args.seed)
    reference = features_of(net, open_folder(args.data, "val")[0])
    images, labels, _ = open_folder(args.data)
    results, lines = [], []
    for path in args.samples:
        drawn = np.load(path)
        check("arr_1" in drawn, f"{path} has no classes: draw it with a model that was trained with --class_cond")
        results.append(dict(images=path, **scores(net, reference, drawn["arr_0"], drawn["arr_1"])))
        first = drawn["arr_0"][:10]
        lines += [(Path(path).stem, first), ("nearest in training", nearest(first, images))]
    some = np.sort(np.random.default_rng(0).permutation(len(images))[:results[0]["num"] if results else 2000])
    results.append(dict(images="training images", **scores(net, reference, images[some], labels[some])))
    results.append(dict(images="held-out images", **scores(net, reference, *open_folder(args.data, "val")[:2])))
    rows = [[r["images"], str(r["num"]), f"{r['fd']:.3g}", f"{r['kid']:.3g}", f"{100 * r['right']:.1f} %"] for r in results]
    print(markdown(["images", "number", "classifier FD", "KID", "of the right class"], rows))
    if args.nearest:
        picture(args.nearest, lines)

if __name__ == "__main__":
    run_script(main)
