"""How often a classifier sees in a drawn image the class it was drawn for.

python tests/tools/label_agreement.py data/noto out/ft.pt

The classifier is a small convolutional network, trained here on the real images of the data set and
tested on its validation images; the last line is its own agreement there, the most to hope for.
The table is also written as JSON, beside the checkpoint: out/ft.agreement.json.
"""

import json
import math
import tempfile
from pathlib import Path

from common import call, markdown, typed, where_from  # puts the project on the path

import numpy as np
import torch
from torch import nn

from model import load_checkpoint
from prepare_data import Parser, check, open_folder, run_script

def classifier(channels, num_classes):
    layers = []
    c = channels
    for width in (32, 64, 128):
        for c_in in (c, width):
            layers += [nn.Conv2d(c_in, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
        c = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.3), nn.Linear(c, num_classes))

def as_input(images):
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1

def fit(images, labels, num_classes, epochs):
    torch.manual_seed(0)
    net = classifier(images.shape[3], num_classes)
    x, y = as_input(images), torch.from_numpy(labels)
    weight = torch.bincount(y, minlength=num_classes).clamp_min(1) ** -0.5  # classes differ in size
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * math.ceil(len(x) / 64))
    for _ in range(epochs):
        for i in torch.randperm(len(x)).split(64):
            flipped = torch.rand(len(i), 1, 1, 1) < 0.5
            batch = torch.where(flipped, x[i].flip(3), x[i])
            batch = batch.roll(torch.randint(-2, 3, (2,)).tolist(), (2, 3))
            loss = nn.functional.cross_entropy(net(batch), y[i], weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()

@torch.no_grad()
def agreement(net, images, labels):
    """Share of images seen as their label, over all and as a mean over classes."""
    seen = torch.cat([net(part).argmax(1) for part in as_input(images).split(256)])
    right = seen.numpy() == labels
    by_class = [right[labels == c].mean() for c in np.unique(labels)]
    return dict(number=len(labels), agreement=float(right.mean()), mean=float(np.mean(by_class)))

def table(results):
    rows = [[f"{r['number']} {r['images']}", f"{r['agreement']:.3f}", f"{r['mean']:.3f}"] for r in results]
    return markdown(["images", "agreement", "mean over classes"], rows)

def main(argv):
    parser = Parser(__doc__)
    parser.add_argument("data", help="prepared set with classes")
    parser.add_argument("ckpt", help="checkpoint trained on it with --class_cond")
    parser.add("cfg_scale", "1,2,4", "guidance scales")
    parser.add("per_class", 20, "images to draw of each class", low=1)
    parser.add("epochs", 15, "of training the classifier", low=1)
    args = parser.parse_args(argv)
    images, labels, meta = open_folder(args.data)
    names = meta["class_names"]
    check(names, f"{args.data} has no classes: prepare it from a folder with one sub-folder a class")
    checkpoint = load_checkpoint(args.ckpt)
    check(checkpoint["architecture"]["num_classes"] and checkpoint["class_names"] == names,
          f"{args.ckpt} was not trained with the classes of {args.data}: give one that was (--class_cond)")
    net = fit(images, labels, len(names), args.epochs)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for scale in args.cfg_scale.split(","):
            call("sample.py", "--ckpt", args.ckpt, "--num", len(names) * args.per_class, "--cfg_scale", scale,
                 "--out", f"{folder}/x.npz", log=f"{folder}/log")
            drawn = np.load(f"{folder}/x.npz")
            name = f"drawn with guidance {scale}"
            results.append(dict(images=name, **agreement(net, drawn["arr_0"], drawn["arr_1"])))
    val_images, val_labels, _ = open_folder(args.data, "val")
    results.append(dict(images="real ones it has not seen", **agreement(net, val_images, val_labels)))
    results = [r | where_from() for r in results]
    print(table(results))
    report = json.dumps(dict(command=typed(__file__, argv), results=results), indent=1)
    Path(args.ckpt).with_suffix(".agreement.json").write_text(report)

if __name__ == "__main__":
    run_script(main)
