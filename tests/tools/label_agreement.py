"""How often a classifier sees in a drawn image the class it was drawn for.

python tests/tools/label_agreement.py data/noto out/ft.pt --cfg_scale 1,2,4 --per_class 20

The classifier is a small convolutional network, trained here on the real images of the data set and
tested on its validation images; the last line is its own agreement there, the most to hope for.
The table is also written as JSON, beside the checkpoint: out/ft.agreement.json.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from model import load_checkpoint
from prepare_data import need, open_folder
from reproduce import where_from


def classifier(channels, classes, width=32):
    layers, c = [], channels
    for w in (width, 2 * width, 4 * width):
        layers += [nn.Conv2d(c, w, 3, padding=1), nn.BatchNorm2d(w), nn.ReLU(), nn.Conv2d(w, w, 3, padding=1),
                   nn.BatchNorm2d(w), nn.ReLU(), nn.MaxPool2d(2)]
        c = w
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.3),
                         nn.Linear(c, classes))


def as_input(images):
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def fit(images, labels, classes, epochs):
    torch.manual_seed(0)
    net = classifier(images.shape[3], classes)
    x, y = as_input(images), torch.from_numpy(labels)
    weight = 1 / torch.bincount(y, minlength=classes).clamp_min(1).float().sqrt()  # classes differ in size
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * -(-len(x) // 64))
    for _ in range(epochs):
        for i in torch.randperm(len(x)).split(64):
            batch = torch.where(torch.rand(len(i), 1, 1, 1) < 0.5, x[i].flip(3), x[i])
            shift = torch.randint(-2, 3, (2,)).tolist()
            loss = nn.functional.cross_entropy(net(batch.roll(shift, (2, 3))), y[i], weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


@torch.no_grad()
def agreement(net, images, labels):
    """Share of images seen as their label, over all and as a mean over classes."""
    right = torch.cat([net(part).argmax(1) for part in as_input(images).split(256)]).numpy() == labels
    return float(right.mean()), float(np.mean([right[labels == c].mean() for c in np.unique(labels)]))


def table(results):
    lines = ["| images | agreement | mean over classes |", "|---|---|---|"]
    return "\n".join(lines + [f"| {r['number']} {r['images']} | {r['agreement']:.3f} | {r['mean']:.3f} |"
                              for r in results])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="prepared set with classes")
    parser.add_argument("ckpt", help="checkpoint trained on it with --class_cond")
    parser.add_argument("--cfg_scale", default="1,2,4")
    parser.add_argument("--per_class", type=int, default=20)
    parser.add_argument("--steps", type=int, default=18)
    parser.add_argument("--epochs", type=int, default=15)
    args = parser.parse_args()
    (images, labels, meta), (val_images, val_labels, _) = (
        open_folder(args.data, split) for split in ("train", "val"))
    names, checkpoint = meta["class_names"] or [], load_checkpoint(args.ckpt)
    classes = len(names)
    need(classes, f"{args.data} has no classes: prepare it from a folder with one sub-folder a class")
    need(checkpoint["architecture"]["num_classes"] and checkpoint["class_names"] == names,
         f"{args.ckpt} was not trained with the classes of {args.data}: give one that was (--class_cond)")
    net = fit(images, labels, classes, args.epochs)
    results = []

    def judge(name, images, labels):
        share, mean = agreement(net, images, labels)
        results.append(dict(images=name, number=len(labels), agreement=share, mean=mean, **where_from()))

    for scale in args.cfg_scale.split(","):
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, str(ROOT / "sample.py"), "--ckpt", args.ckpt,
                            "--out", f"{folder}/x.npz", f"--num={classes * args.per_class}",
                            f"--cfg_scale={scale}", f"--steps={args.steps}"],
                           check=True, capture_output=True)
            with np.load(f"{folder}/x.npz") as drawn:
                judge(f"drawn with guidance {scale}", drawn["arr_0"], drawn["arr_1"])
    judge("real ones it has not seen", val_images, val_labels)
    print(table(results))
    command = " ".join(["python tests/tools/label_agreement.py", *sys.argv[1:]])
    report = json.dumps(dict(command=command, results=results), indent=1)
    Path(args.ckpt).with_suffix(".agreement.json").write_text(report)


if __name__ == "__main__":
    main()
