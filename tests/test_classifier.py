"""The classifier learns what tells classes apart, and its scores are what they are called."""

import numpy as np
import pytest
import torch
from conftest import make_dataset, mistake
from scipy.linalg import sqrtm

import classifier
import fid

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


class Corners(torch.nn.Module):
    """The mean grey of the four corners as features; the brightest corner is the class."""

    def forward(self, x):
        return torch.nn.functional.adaptive_avg_pool2d(x.float().mean(1, keepdim=True), 2).flatten(1)

    def classes(self, features):
        return features


def corner_images(n, seed, brightest=None):
    """Images uint8 (n, 8, 8, 1) of noise, one corner of which is brighter; and that corner."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 100, (n, 8, 8, 1))
    corner = rng.integers(0, 4, n) if brightest is None else brightest
    for image, c in zip(images, corner):
        row, column = 4 * (c // 2), 4 * (c % 2)
        image[row : row + 4, column : column + 4] += 100
    return images.astype(np.uint8), corner


def test_scores_are_the_closed_form_and_a_count():
    net = Corners()
    real, _ = corner_images(600, seed=0)
    images, corner = corner_images(400, seed=1)
    asked = np.where(np.arange(400) % 4 == 0, (corner + 1) % 4, corner)  # a quarter asked for another corner
    found = classifier.scores(net, classifier.features_of(net, real), images, asked)
    assert found["right"] == pytest.approx(0.75) and found["num"] == 400
    a, b = (net(classifier.as_input(x)).double().numpy() for x in (real, images))
    covariances = [np.cov(y, rowvar=False) for y in (a, b)]
    root = sqrtm(covariances[0] @ covariances[1]).real
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(sum(covariances) - 2 * root)
    assert found["fd"] == pytest.approx(expected, rel=1e-6)
    same = classifier.scores(net, classifier.features_of(net, real), real, np.zeros(600, int))
    assert same["fd"] < 1e-6


def test_the_nearest_image_is_the_one_of_least_distance():
    training, _ = corner_images(50, seed=0)
    images, _ = corner_images(5, seed=1)
    found = classifier.nearest(images, training)
    for image, near in zip(images, found):
        distances = [np.sum((image.astype(float) - other) ** 2) for other in training]
        assert np.array_equal(near, training[int(np.argmin(distances))])


def test_a_classifier_is_learned_kept_and_read_by_fid(tmp_path, capsys):
    data = make_dataset(tmp_path / "set", n=400, size=8, channels=1, classes=4, n_val=100)
    for split, n, seed in (("train", 400, 0), ("val", 100, 1)):
        images, corner = corner_images(n, seed)
        np.save(data / f"{split}.npy", images)
        np.save(data / f"{split}_labels.npy", corner)
    net = classifier.load(data, epochs=8)
    images, labels = np.load(data / "val.npy"), np.load(data / "val_labels.npy")
    y = classifier.features_of(net, images)
    assert y.var(0).sum().item() == pytest.approx(100, rel=1e-3)
    assert classifier.scores(net, y, images, labels)["right"] > 0.95
    assert classifier.scores(net, y, images, (labels + 1) % 4)["right"] < 0.05
    before = (data / "classifier.pt").stat().st_mtime_ns
    drawn, asked = corner_images(40, seed=2)
    np.savez(tmp_path / "samples.npz", arr_0=drawn, arr_1=asked)
    classifier.main([str(data), str(tmp_path / "samples.npz"), "--nearest", str(tmp_path / "nearest.png")])
    assert (data / "classifier.pt").stat().st_mtime_ns == before and (tmp_path / "nearest.png").exists()
    own = float(capsys.readouterr().out.splitlines()[2].split(" | ")[2])
    fid.main([str(data / "val.npy"), str(tmp_path / "samples.npz"), "--features", str(data / "classifier.pt")])
    assert float(capsys.readouterr().out.split()[-1]) == pytest.approx(own, rel=0.02)


def test_what_has_no_classes_is_told(tmp_path):
    plain = make_dataset(tmp_path / "plain")
    assert "has no classes" in mistake(classifier.main, str(plain))
