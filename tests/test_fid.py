"""fid.py: the network, the arithmetic of the distances and of bits per dimension, and the protocol."""

import hashlib
import json
import math
import os
import shutil
import zipfile
from dataclasses import asdict
from decimal import Decimal, getcontext
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
import torch
import torch.nn.functional as F
from conftest import make_dataset, mistake
from PIL import Image

import fid
import model
import sample
from model import save_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


class Pooled(torch.nn.Module):
    """A feature network for tests: 2 x 2 average colours, 12 features of any image."""

    def __init__(self, factor: float = 1.0):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        x = torch.nn.functional.adaptive_avg_pool2d(x.float(), [2, 2])
        return x.flatten(1) * self.factor


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("net") / "pooled.pt")
    torch.jit.save(torch.jit.script(Pooled()), path)
    return path


@pytest.fixture(autouse=True)
def hub(tmp_path, monkeypatch):
    """An empty torch hub cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    return tmp_path / "hub"


def images(n=24, size=16, seed=0, channels=3):
    coarse = np.random.default_rng(seed).integers(0, 256, (n, size // 4, size // 4, channels))
    return coarse.repeat(4, 1).repeat(4, 2).astype(np.uint8)


def npz(path, array):
    np.savez(path, arr_0=array)
    return str(path)


def folder(path, array):
    path.mkdir()
    for i, image in enumerate(array):
        Image.fromarray(image.squeeze()).save(path / f"{i:04d}.png")
    return str(path)


def features(array):
    """What Pooled makes of images, in numpy."""
    n, h, w, c = array.shape
    cells = array.reshape(n, 2, h // 2, 2, w // 2, c).astype(np.float64).mean((2, 4))
    return cells.transpose(0, 3, 1, 2).reshape(n, -1)


@pytest.fixture
def measure(capsys):
    """main() with --json: the parsed last line of stdout, which is the only one."""

    def call(*args):
        fid.main([*map(str, args), "--json", "--device=cpu"])
        (line,) = capsys.readouterr().out.splitlines()
        return json.loads(line)

    return call


# ---------------------------------------------------------------------------------------------
# The network.


@pytest.fixture(scope="module")
def inception():
    network = fid.Inception().eval().requires_grad_(False)
    fid.random_weights(network)
    return network


def public_file(network, path):
    """Weights in a file of the public layout, which has the classifier, too."""
    torch.save(network.state_dict() | {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}, path)
    return str(path)


def load_features(features, weights=None, resize="pytorch-fid"):
    return fid.load_features(SimpleNamespace(features=features, weights=weights, resize=resize, device="cpu"))


def test_inception_has_the_keys_and_the_number_of_values_of_the_public_file(inception):
    state = inception.state_dict()
    learnt = [v.numel() for k, v in state.items() if "running" not in k and "tracked" not in k]
    assert sum(learnt) + 2048 * 1008 + 1008 == 23_850_960  # with the classifier
    assert sum(v.numel() for k, v in state.items() if "running" in k) == 34_432
    assert len(state) == 564  # 94 convolutions, each with 5 entries of batch norm
    parts = ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.num_batches_tracked")
    shapes = {
        "Conv2d_1a_3x3": (32, 3, 3, 3),
        "Mixed_5b.branch5x5_2": (64, 48, 5, 5),
        "Mixed_5d.branch_pool": (64, 288, 1, 1),
        "Mixed_6a.branch3x3": (384, 288, 3, 3),
        "Mixed_6a.branch3x3dbl_3": (96, 96, 3, 3),
        "Mixed_6b.branch7x7dbl_2": (128, 128, 7, 1),
        "Mixed_6e.branch7x7_2": (192, 192, 1, 7),
        "Mixed_7a.branch7x7x3_4": (192, 192, 3, 3),
        "Mixed_7b.branch3x3_2a": (384, 384, 1, 3),
        "Mixed_7c.branch3x3dbl_3b": (384, 384, 3, 1),
        "Mixed_7c.branch3x3dbl_1": (448, 2048, 1, 1),
        "Mixed_7c.branch_pool": (192, 2048, 1, 1),
    }
    for key, shape in shapes.items():
        assert state[f"{key}.conv.weight"].shape == shape, key
        assert all(f"{key}.{part}" in state for part in parts)


def test_inception_layers_have_the_shapes_of_the_paper():
    with torch.device("meta"):
        network, seen = fid.Inception(), {}
    for key, layer in network.named_children():
        layer.register_forward_hook(lambda m, x, y, key=key: seen.update({key: tuple(y.shape[1:])}))
    y = network(torch.zeros(2, 3, 64, 64, dtype=torch.uint8, device="meta"))
    assert y.shape == (2, 2048)
    assert list(seen.values()) == [
        (32, 149, 149), (32, 147, 147), (64, 147, 147), (64, 73, 73), (80, 73, 73), (192, 71, 71), (192, 35, 35),
        (256, 35, 35), (288, 35, 35), (288, 35, 35),
        (768, 17, 17), (768, 17, 17), (768, 17, 17), (768, 17, 17), (768, 17, 17),
        (1280, 8, 8), (2048, 8, 8), (2048, 8, 8)]  # fmt: skip
    mixed = [f"Mixed_{stage}{k}" for stage, ks in ((5, "bcd"), (6, "abcde"), (7, "abc")) for k in ks]
    assert list(seen)[-11:] == mixed


def reference(state, x):
    """The network of pytorch-fid on x (B, 3, 299, 299) in [-1, 1], written out from its weights alone."""

    def conv(key, x, stride=1, same=True):
        weight = state[f"{key}.conv.weight"]
        padding = [k // 2 for k in weight.shape[2:]] if same and stride == 1 else 0
        x = F.conv2d(x, weight, None, stride, padding)
        norm = [state[f"{key}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return F.relu(F.batch_norm(x, *norm, eps=0.001))

    def chain(x, branch, n, stride=1):  # branch_1, ..., branch_n
        for i in range(1, n):
            x = conv(f"{branch}_{i}", x)
        return conv(f"{branch}_{n}", x, stride)

    def mean(x):
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)

    def block(pool, *branches):
        return torch.cat([*branches, pool], dim=1)

    x = conv("Conv2d_1a_3x3", x, 2)
    x = conv("Conv2d_2b_3x3", conv("Conv2d_2a_3x3", x, same=False))
    x = F.max_pool2d(x, 3, 2)
    x = conv("Conv2d_4a_3x3", conv("Conv2d_3b_1x1", x), same=False)
    x = F.max_pool2d(x, 3, 2)
    for m in "Mixed_5b", "Mixed_5c", "Mixed_5d":
        x = block(conv(f"{m}.branch_pool", mean(x)), conv(f"{m}.branch1x1", x), chain(x, f"{m}.branch5x5", 2),
                  chain(x, f"{m}.branch3x3dbl", 3))
    x = block(F.max_pool2d(x, 3, 2), conv("Mixed_6a.branch3x3", x, 2), chain(x, "Mixed_6a.branch3x3dbl", 3, 2))
    for m in "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e":
        x = block(conv(f"{m}.branch_pool", mean(x)), conv(f"{m}.branch1x1", x), chain(x, f"{m}.branch7x7", 3),
                  chain(x, f"{m}.branch7x7dbl", 5))
    x = block(F.max_pool2d(x, 3, 2), chain(x, "Mixed_7a.branch3x3", 2, 2), chain(x, "Mixed_7a.branch7x7x3", 4, 2))
    for m, pooled in ("Mixed_7b", mean), ("Mixed_7c", lambda x: F.max_pool2d(x, 3, 1, 1)):
        a, b = conv(f"{m}.branch3x3_1", x), chain(x, f"{m}.branch3x3dbl", 2)
        x = block(conv(f"{m}.branch_pool", pooled(x)), conv(f"{m}.branch1x1", x),
                  conv(f"{m}.branch3x3_2a", a), conv(f"{m}.branch3x3_2b", a),
                  conv(f"{m}.branch3x3dbl_3a", b), conv(f"{m}.branch3x3dbl_3b", b))
    return x.mean((2, 3))


def test_inception_is_the_network_of_pytorch_fid(inception):
    generator = torch.Generator().manual_seed(0)
    state = {key: value.clone() for key, value in inception.state_dict().items()}
    for key, value in state.items():
        if ".bn." in key and value.is_floating_point():  # no two layers are alike
            value += torch.rand(value.shape, generator=generator) * 0.3
    network = fid.Inception().eval().requires_grad_(False)
    network.load_state_dict(state)
    for size in 32, 299, 340:
        x = np.random.default_rng(size).integers(0, 256, (3, size, size), np.uint8)
        place = (np.arange(299) + 0.5) * size / 299 - 0.5  # in the image, of each pixel that the network sees
        grid = np.meshgrid(place, place, indexing="ij")
        resized = [scipy.ndimage.map_coordinates(c / 127.5 - 1, grid, order=1, mode="nearest") for c in x]
        expected = reference(state, torch.from_numpy(np.float32([resized])))
        found = network(torch.from_numpy(x[None]))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
        assert expected.std() > 1e-3


def test_random_weights_are_he_normal_from_pcg64_and_keep_the_scale(inception):
    draw = np.random.Generator(np.random.PCG64(0)).standard_normal((32, 3, 3, 3), np.float32)
    first = inception.Conv2d_1a_3x3.conv.weight.numpy()
    np.testing.assert_allclose(first, draw * (2 / 27) ** 0.5, rtol=1e-6)
    for m in inception.modules():
        if isinstance(m, torch.nn.Conv2d) and m.weight.numel() > 1e5:
            assert m.weight.var().item() * m.weight[0].numel() == pytest.approx(2, rel=0.03)


def test_folded_network_equals_the_plain_one_alone_and_in_a_batch(inception):
    x = torch.from_numpy(images(2, 32)).permute(0, 3, 1, 2)
    plain = inception(x)
    with torch.no_grad():
        folded, identity = load_features("random")
        both, alone = folded(x), folded(x[:1])
    torch.testing.assert_close(both, plain, rtol=1e-4, atol=1e-5 * plain.abs().max().item())
    torch.testing.assert_close(alone, both[:1], rtol=1e-4, atol=1e-5 * plain.abs().max().item())
    assert identity.startswith("random_fd ")
    assert 0.01 < plain.std() < 100 and plain.std(0).mean() > 1e-3


def test_any_file_with_the_right_keys_is_loaded_and_its_hash_told(inception, tmp_path):
    path = public_file(inception, tmp_path / "weights.pth")
    net, identity = load_features("inception", path)
    assert identity == f"fid {hashlib.sha256((tmp_path / 'weights.pth').read_bytes()).hexdigest()}+pytorch-fid"
    x = torch.from_numpy(images(1, 32)).permute(0, 3, 1, 2)
    torch.testing.assert_close(net(x), inception(x), rtol=1e-4, atol=1e-4)
    state = torch.load(path, weights_only=True)
    state["extra.weight"] = state.pop("Mixed_7c.branch_pool.bn.weight")
    torch.save(state, path)
    assert "Mixed_7c.branch_pool.bn.weight" in mistake(lambda args: load_features(*args), "inception", path)


def test_a_download_with_another_hash_leaves_nothing(inception, tmp_path, hub, monkeypatch):
    release = tmp_path / "release.pth"
    public_file(inception, release)
    monkeypatch.setattr(fid, "WEIGHTS_URL", release.as_uri())
    assert "hash" in mistake(lambda args: load_features(*args), "inception")
    assert list((hub / "hub" / "checkpoints").iterdir()) == []
    monkeypatch.setattr(fid, "WEIGHTS_SHA256", hashlib.sha256(release.read_bytes()).hexdigest())
    load_features("inception")
    assert (hub / "hub" / "checkpoints" / "release.pth").read_bytes() == release.read_bytes()
    release.unlink()  # from now on the cache serves
    load_features("inception")


def test_without_network_and_file_one_sentence_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(fid, "WEIGHTS_URL", (tmp_path / "absent.pth").as_uri())
    a = npz(tmp_path / "a.npz", images())
    sentence = mistake(fid.main, a, a)
    assert "--features random" in sentence and "--weights" in sentence and "absent.pth" in sentence


# ---------------------------------------------------------------------------------------------
# Distances.


def hadamard(d):
    """Orthogonal, with entries +-2^-k: rotating dyadic numbers by it rounds nothing."""
    return scipy.linalg.hadamard(d) / d**0.5


def test_frechet_distance_of_commuting_gaussians_is_the_closed_form():
    q, k = hadamard(64), np.arange(64)
    for l1, l2 in (
        (1 + k % 5, 2.0 ** (k % 3)),
        (2.0 ** -(k % 36), 2.0 ** -(2 * k % 38)),  # condition 2^38: ill-conditioned, still exact
        (np.where(k < 20, 1 + k, 0), np.where(k % 2, 4.0, 0)),  # singular, partly overlapping
        (np.where(k < 32, 1.0, 0), np.where(k < 32, 0, 3.0)),  # orthogonal supports
    ):
        s1, s2 = q @ np.diag(np.float64(l1)) @ q.T, q @ np.diag(np.float64(l2)) @ q.T
        mu1, mu2 = np.full(64, 0.5), np.full(64, 0.25)
        exact = 64 / 16 + np.sum(l1) + np.sum(l2) - 2 * np.sum(np.sqrt(np.float64(l1) * l2))
        assert fid.frechet_distance(mu1, s1, mu2, s2) == pytest.approx(exact, rel=1e-9)
        assert fid.frechet_distance(mu2, s2, mu1, s1) == pytest.approx(exact, rel=1e-9)


def test_frechet_distance_of_ill_conditioned_covariances_agrees_with_fifty_digits():
    getcontext().prec = 50
    q, rng = hadamard(16), np.random.default_rng(0)
    blocks, cross = ([], []), Decimal(0)
    for i in range(8):  # 2 x 2 blocks that do not commute; tr sqrt(M) = sqrt(tr M + 2 sqrt(det M))
        a, b = (np.tril(rng.integers(1, 64, (2, 2))) / 64.0 * 2.0 ** -(j * i) for j in (1, 2))
        a, b = a @ a.T, b.T @ b
        blocks[0].append(a), blocks[1].append(b)
        (a1, a2, a3, a4), (b1, b2, b3, b4) = ([Decimal(v) for v in m.flat] for m in (a, b))
        trace = a1 * b1 + a2 * b3 + a3 * b2 + a4 * b4
        cross += (trace + 2 * ((a1 * a4 - a2 * a3) * (b1 * b4 - b2 * b3)).sqrt()).sqrt()
    s1, s2 = (scipy.linalg.block_diag(*m) for m in blocks)
    exact = Decimal(s1.trace()) + Decimal(s2.trace()) - 2 * cross
    found = fid.frechet_distance(np.zeros(16), q @ s1 @ q.T, np.zeros(16), q @ s2 @ q.T)
    assert np.linalg.cond(s1) > 1e5 and np.linalg.cond(s2) > 1e8
    assert found == pytest.approx(float(exact), rel=1e-9)


def test_frechet_distance_with_fewer_samples_than_dimensions_is_a_nuclear_norm():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((20, 96)), rng.standard_normal((31, 96)) * 2 + 1
    cx, cy = x - x.mean(0), y - y.mean(0)
    cross = np.linalg.norm(cx @ cy.T, "nuc") / (19 * 30) ** 0.5  # no covariance is formed
    exact = (
        ((x.mean(0) - y.mean(0)) ** 2).sum() + (cx**2).sum() / 19 + (cy**2).sum() / 30 - 2 * cross
    )
    found = fid.frechet_distance(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T))
    assert found == pytest.approx(exact, rel=1e-9)


def test_frechet_distance_agrees_with_the_matrix_square_root_of_scipy():
    rng = np.random.default_rng(1)
    x, y = (
        rng.standard_normal((400, 40)),
        rng.standard_normal((400, 40)) @ rng.standard_normal((40, 40)),
    )
    s1, s2 = np.cov(x.T), np.cov(y.T)
    root = scipy.linalg.sqrtm(s1 @ s2).real
    exact = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s1 + s2 - 2 * root)
    assert fid.frechet_distance(x.mean(0), s1, y.mean(0), s2) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("n", [2, 30, 400])
def test_frechet_distance_of_a_gaussian_to_itself_is_zero(n):
    x = np.random.default_rng(2).standard_normal((n, 64)) @ np.diag(2.0 ** -np.arange(64))
    s = np.cov(x.T)
    assert abs(fid.frechet_distance(x[0], s, x[0], s)) < 1e-9 * np.trace(s)


def test_frechet_distance_of_points_is_the_distance_of_means():
    zero = np.zeros((3, 3))
    assert fid.frechet_distance(np.ones(3), zero, np.zeros(3), zero) == 3


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e4])
def test_moments_are_accurate_where_sums_in_single_precision_are_not(tmp_path, offset):
    """Features of deviation 1 around a large mean, in several batches, against two-pass moments."""
    x = np.random.default_rng(0).normal(size=(5000, 6)) @ np.diag([1, 0.5, 1, 2, 1, 1]) + offset
    x = torch.from_numpy(x).float()  # what a network gives
    source = fid.Source("x", {}, len(x), lambda numbers: (np.full((1, 1, 3), i // 20, np.uint8) for i in numbers))
    rows = iter(x.split(64))
    fid.measure(source, lambda batch: next(rows), "fd x", SimpleNamespace(batch_size=64, device="cpu", keep=True))
    exact = np.cov(x.double().numpy().T)
    np.testing.assert_allclose(source.mu, x.double().numpy().mean(0), rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(source.sigma, exact, rtol=1e-6, atol=1e-6)
    assert torch.equal(source.features, x) and source.num == 5000
    distance = fid.frechet_distance(source.mu, source.sigma, source.mu + 0.5, exact)
    assert distance == pytest.approx(6 * 0.5**2, rel=1e-5)
    single = (x.T @ x / 5000 - torch.outer(x.mean(0), x.mean(0))).numpy()
    assert offset == 0 or np.abs(single - exact).max() > 1e-3


def test_kid_is_the_double_loop_over_pairs():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((9, 5)), rng.standard_normal((7, 5)) + 0.5

    def loop(x, y):
        def kernel(a, b):
            return (sum(u * v for u, v in zip(a, b)) / len(a) + 1) ** 3

        m, n = len(x), len(y)
        xx = sum(kernel(x[i], x[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
        yy = sum(kernel(y[i], y[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
        return xx + yy - 2 * sum(kernel(a, b) for a in x for b in y) / (m * n)

    tx, ty = torch.from_numpy(x), torch.from_numpy(y)
    assert fid.mmd(tx, ty) == pytest.approx(loop(x, y), rel=1e-12)
    assert fid.kid(ty, tx[:7], size=7)["kid"] == pytest.approx(loop(y, x[:7]), rel=1e-12)  # subsets of all
    found, draw = fid.kid(tx, ty, subsets=4, size=3, seed=5), np.random.default_rng(5)
    loops = [loop(x[draw.choice(9, 3, replace=False)], y[draw.choice(7, 3, replace=False)])
             for _ in range(4)]  # fmt: skip
    assert found["kid"] == pytest.approx(np.mean(loops), rel=1e-12)
    assert found["kid_std"] == pytest.approx(np.std(loops), rel=1e-9)  # over the subsets, as torch-fidelity


def test_precision_and_recall_are_those_of_a_brute_force_search():
    rng = np.random.default_rng(0)
    real, fake = rng.standard_normal((40, 3)), rng.standard_normal((25, 3)) * 0.6 + 0.7

    def share(of, within, k=3):
        hits = 0
        for a in of:
            for i, b in enumerate(within):
                others = sorted(np.linalg.norm(b - c) for j, c in enumerate(within) if j != i)
                if np.linalg.norm(a - b) <= others[k - 1]:
                    hits += 1
                    break
        return hits / len(of)

    found = fid.precision_recall(torch.from_numpy(real), torch.from_numpy(fake))
    assert found == {"precision": share(fake, real), "recall": share(real, fake)}
    assert 0.2 < found["recall"] < found["precision"]


# ---------------------------------------------------------------------------------------------
# The command.


def test_figures_do_not_depend_on_batch_size_or_order(measure, net, tmp_path):
    x, y = images(23, seed=1), images(19, seed=2)
    a, b = npz(tmp_path / "a.npz", x), npz(tmp_path / "b.npz", y)
    fx, fy = features(x), features(y)
    scale = np.trace(np.cov(fx.T)) + np.trace(np.cov(fy.T))
    exact = fid.frechet_distance(fx.mean(0), np.cov(fx.T), fy.mean(0), np.cov(fy.T))
    settings = ["--features", net, "--metrics=fid,kid,pr", "--kid_size=10"]
    found = [measure(a, b, *settings, f"--batch_size={size}") for size in (1, 7, 64)]
    found.append(measure(npz(tmp_path / "r.npz", x[::-1]), npz(tmp_path / "s.npz", y[::-1]), *settings))
    for result in found:
        assert (result["a"]["n"], result["b"]["n"]) == (23, 19)  # the last partial batch counts
        assert abs(result["fd"] - exact) < 1e-5 * scale
        assert (result["precision"], result["recall"]) == (found[0]["precision"], found[0]["recall"])
    for result in found[:3]:
        assert result["kid"] == pytest.approx(found[0]["kid"], rel=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_the_same_images_in_another_order_are_at_no_distance_and_never_at_a_negative_one(measure, net, tmp_path, seed):
    x = images(30 if seed else 5, seed=seed)  # 5: fewer than there are features
    order = np.random.default_rng(seed).permutation(len(x))
    a, b = npz(tmp_path / "a.npz", x), npz(tmp_path / "b.npz", x[order])
    scale = np.trace(np.cov(features(x).T))
    for pair in (a, b), (b, a), (a, a):
        assert 0 <= measure(*pair, "--features", net, "--batch_size=7")["fd"] < 1e-9 * scale


def test_a_reference_batch_counts_by_its_statistics_for_fid_and_by_its_images_for_the_rest(measure, net, tmp_path):
    x, y = images(40, seed=1), images(30, seed=2)
    rng = np.random.default_rng(0)
    mu, a = rng.standard_normal(features(x).shape[1]), rng.standard_normal((features(x).shape[1],) * 2)
    sigma = a @ a.T
    identity = f"fd {fid.file_hash(net)}"
    np.savez(tmp_path / "adm.npz", arr_0=x, mu=mu, sigma=sigma, arr_1=np.zeros(40, int), net=identity)
    other = npz(tmp_path / "b.npz", y)
    settings = ["--features", net, "--metrics=fid,kid,pr", "--kid_size=20"]
    found = measure(tmp_path / "adm.npz", other, *settings)
    fy = features(y)
    root = scipy.linalg.sqrtm(sigma @ np.cov(fy.T)).real
    exact = np.sum((mu - fy.mean(0)) ** 2) + np.trace(sigma + np.cov(fy.T)) - 2 * np.trace(root)
    assert found["fd"] == pytest.approx(exact, rel=1e-4)
    plain = measure(npz(tmp_path / "a.npz", x), other, *settings)
    for name in ("kid", "precision", "recall"):
        assert found[name] == pytest.approx(plain[name], rel=1e-6)
    assert found["fd"] != pytest.approx(plain["fd"], rel=0.1)
    assert found["a"]["kind"] == "statistics" and found["a"]["n"] == 40
    assert measure(tmp_path / "adm.npz", other, "--features", net)["fd"] == found["fd"]


def test_fewer_images_of_a_source_are_evenly_spaced(measure, net, tmp_path):
    x = images(12)
    sources = [folder(tmp_path / "tree", x), npz(tmp_path / "x.npz", x)]
    for source in sources:
        result = measure(npz(tmp_path / "some.npz", x[::4]), source, "--features", net, "--num=3")
        assert abs(result["fd"]) < 1e-6 and result["b"]["n"] == 3


def test_an_unreadable_file_is_told_by_name_and_nothing_is_written(net, tmp_path):
    source = folder(tmp_path / "tree", images(9))
    (tmp_path / "tree/0008.png").write_bytes(b"no image")
    stats = tmp_path / "stats.npz"
    assert "0008.png" in mistake(fid.main, source, "--stats", stats, "--features", net, "--device=cpu")
    assert not stats.exists()


def test_every_kind_of_source_gives_the_same_features(measure, net, tmp_path):
    data = make_dataset(tmp_path / "set", n=12)
    x = np.load(data / "train.npy")
    as_folder = folder(tmp_path / "images", x)
    as_zip = shutil.make_archive(str(tmp_path / "zipped"), "zip", as_folder)
    for source in (as_folder, as_zip, npz(tmp_path / "x.npz", x)):
        result = measure(data, source, "--features", net)
        assert abs(result["fd"]) < 1e-6 and result["b"]["n"] == 12
    assert measure(data, as_folder, "--features", net, "--num=5")["b"]["n"] == 5


@pytest.mark.parametrize("meta", ["{}", "[]", '{"size": 8, "class_names": ["x"]}', "{"])
def test_a_meta_json_of_another_kind_does_not_make_a_folder_prepared(measure, net, tmp_path, meta):
    x = images(9)
    source = folder(tmp_path / "images", x)
    (tmp_path / "images/meta.json").write_text(meta)
    result = measure(npz(tmp_path / "x.npz", x), source, "--features", net)
    assert result["fd"] < 1e-6 and result["b"]["n"] == 9


def test_grey_of_more_than_8_bits_is_decoded_as_prepare_data_does(measure, net, tmp_path):
    x = images(9, channels=1)
    deep = folder(tmp_path / "deep", x.astype(np.uint16) * 257)
    result = measure(npz(tmp_path / "x.npz", x), deep, "--features", net)
    assert result["fd"] < 1e-6 and result["b"]["n"] == 9
    for i, (low, high) in enumerate([(0, 4095), (17, 900), (5, 32767)]):
        values = np.linspace(low, high, 9 * 64).astype(np.uint16).reshape(9, 8, 8)
        shallow = folder(tmp_path / str(i), values)
        sentence = mistake(fid.main, deep, shallow, "--features", net, "--device=cpu")
        assert f" {low} " in sentence and f" {high}" in sentence and "prepare_data.py" in sentence


def test_greyscale_is_rgb_with_equal_channels(measure, net, tmp_path):
    grey = images(10, channels=1)
    a = folder(tmp_path / "grey", grey)
    result = measure(a, npz(tmp_path / "rgb.npz", grey.repeat(3, axis=3)), "--features", net)
    assert abs(result["fd"]) < 1e-6
    prepared = make_dataset(tmp_path / "set", n=10, channels=1)
    x = np.load(prepared / "train.npy").repeat(3, axis=3)
    assert abs(measure(prepared, npz(tmp_path / "x.npz", x), "--features", net)["fd"]) < 1e-6


def test_images_of_several_sizes_are_all_measured(measure, net, tmp_path):
    a = folder(tmp_path / "mixed", [*images(5), *images(4, 32), *images(3)])
    result = measure(a, a, "--features", net, "--batch_size=2")
    assert result["a"]["n"] == 12 and result["fd"] < 1e-6


def test_random_features_are_never_called_fid(measure, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(fid, "frechet_distance", lambda *gaussians: 1.5)  # spares 2048 dimensions
    a, b = npz(tmp_path / "a.npz", images(2)), npz(tmp_path / "b.npz", images(2, seed=1))
    fid.main([a, b, "--features=random", "--device=cpu", f"--stats={tmp_path}/stats.npz"])
    out, err = capsys.readouterr()
    assert out == "random_fd 1.5\n"
    assert "random_fd" in err and "FID" not in out
    stats = tmp_path / "stats.npz"  # they know of which network they are
    result = measure(stats, stats)
    assert "fid" not in result and result["random_fd"] == 1.5
    assert result["features"] == "random_fd" and len(set(result["weights"])) == 1
    assert result["weights"][0].endswith("+pytorch-fid")
    assert len(result["warnings"]) == 2  # both have fewer than 2,048 images


def test_saved_statistics_have_the_common_layout_and_replace_the_images(measure, net, tmp_path):
    x, b = images(), npz(tmp_path / "b.npz", images(seed=1))
    a, stats = npz(tmp_path / "a.npz", x), tmp_path / "stats.npz"
    assert "fd" not in measure(a, "--stats", stats, "--features", net)
    with np.load(stats, allow_pickle=False) as f:
        assert f["mu"].dtype == f["sigma"].dtype == np.float64
        np.testing.assert_allclose(f["mu"], features(x).mean(0), rtol=1e-6)
        np.testing.assert_allclose(f["sigma"], np.cov(features(x).T), rtol=1e-5, atol=1e-3)
        mu, sigma = f["mu"], f["sigma"]
    expected = measure(a, b, "--features", net)["fd"]
    assert measure(stats, b, "--features", net)["fd"] == pytest.approx(expected, rel=1e-9)
    np.savez(tmp_path / "foreign.npz", mu=mu, sigma=sigma)  # they are taken for those of the FID
    assert "differ" in mistake(fid.main, tmp_path / "foreign.npz", b, "--features", net, "--device=cpu")
    assert [p.name for p in tmp_path.glob("*tmp*")] == []


def test_two_files_of_statistics_need_no_network(measure, tmp_path):
    np.savez(tmp_path / "a.npz", mu=np.zeros(3), sigma=np.eye(3))
    np.savez(tmp_path / "b.npz", mu=np.ones(3), sigma=4 * np.eye(3))
    result = measure(tmp_path / "a.npz", tmp_path / "b.npz")
    assert result["fid"] == pytest.approx(6, rel=1e-12)
    assert len(result["warnings"]) == 2  # nobody knows of which weights they are, and of which resize


@pytest.mark.parametrize("arrays", [
    dict(mu=np.zeros(3)), dict(sigma=np.eye(3)),
    dict(mu=np.zeros(3), sigma=np.full((3, 3), np.nan)), dict(mu=np.full(3, np.nan), sigma=np.eye(3)),
    dict(mu=np.array([0, np.inf, 0]), sigma=np.eye(3)), dict(mu=np.zeros(3), sigma=np.diag([1, np.inf, 1])),
    dict(mu=np.zeros(3), sigma=np.eye(4)), dict(mu=np.zeros(3), sigma=np.ones(3)),
    dict(mu=np.zeros(3), sigma=np.eye(3)[:2]), dict(mu=np.zeros((1, 3)), sigma=np.eye(3)),
    dict(mu=np.zeros((1, 3)), sigma=np.ones((1, 3, 1, 3))), dict(mu=np.float64(0), sigma=np.float64(1)),
], ids=lambda arrays: " ".join(f"{k} {v.shape} {v.flat[-1]}" for k, v in arrays.items()))
def test_statistics_that_are_none_get_a_sentence(tmp_path, arrays):
    np.savez(tmp_path / "good.npz", mu=np.zeros(3), sigma=np.eye(3))
    np.savez(tmp_path / "bad.npz", **arrays)
    for pair in ("good", "bad"), ("bad", "good"):
        sentence = mistake(fid.main, *(tmp_path / f"{name}.npz" for name in pair), "--device=cpu")
        assert "bad.npz" in sentence and "good.npz" not in sentence


def untrained(path, classes=(), **changes):
    """A checkpoint of a network that answers zero, so that D(x; sigma) = x / (1 + 4 sigma^2)."""
    torch.manual_seed(0)
    config = model.ModelConfig(**dict(image_size=16, dim=32, depth=1, heads=2,
                                      num_classes=len(classes)) | changes)
    state = model.Denoiser(config).state_dict()
    save_checkpoint(str(path), dict(
        model=state, ema=state, architecture=asdict(config), noise=model.NOISE, network=model.NETWORK,
        config={}, step=7, class_names=[*classes] or None))
    return str(path)


def test_a_checkpoint_is_measured_by_its_samples(measure, net, tmp_path):
    path, a = untrained(tmp_path / "ft.pt"), npz(tmp_path / "a.npz", images())
    settings = ["--num=10", "--steps=2", "--sampler=euler", "--seed=3", "--batch_size=4"]
    result = measure(a, path, "--features", net, *settings)
    denoiser, _ = sample.load_denoiser(path)
    drawn = sample.generate(denoiser, range(10), seed=3, sampler="euler", steps=2)
    drawn = npz(tmp_path / "drawn.npz", np.concatenate(list(drawn)))
    expected = measure(a, drawn, "--features", net, "--num=10")
    assert result["fd"] == pytest.approx(expected["fd"], rel=1e-3)
    about = {"n": 10, "step": 7, "seed": 3}
    about |= {"sampler": "euler", "steps": 2, "cfg_scale": 1.0}
    assert about.items() <= result["b"].items()


def test_a_checkpoint_is_sampled_in_the_dtype_asked_for_and_judged_in_float32(measure, net, tmp_path, monkeypatch):
    path, a = untrained(tmp_path / "ft.pt"), npz(tmp_path / "a.npz", images())
    generate, extract, dtypes = sample.generate, fid.extract, []
    monkeypatch.setattr(sample, "generate", lambda *args, dtype, **how: dtypes.append(dtype) or generate(
        *args, dtype=dtype, **how))
    monkeypatch.setattr(fid, "load_features", lambda args: (torch.jit.load(net), "fd x"))
    monkeypatch.setattr(fid, "extract", lambda *args: dtypes.append(extract(*args).dtype) or extract(*args))
    for dtype in ("float32", "bfloat16"):
        result = measure(a, path, "--num=4", "--steps=2", f"--dtype={dtype}")
        assert result["b"]["dtype"] == dtype
    assert dtypes == [torch.float32, torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.float32]


# ---------------------------------------------------------------------------------------------
# The resize of TensorFlow 1.


@pytest.mark.parametrize("height, width", [(32, 32), (64, 48), (1, 7), (299, 299), (320, 500)])
def test_tf1_resizes_as_the_loop_that_defines_it(height, width):
    """Row i of 299 is row i * H / 299, between its neighbours; nothing lies behind the last one."""
    x = np.random.default_rng(0).integers(0, 256, (2, 3, height, width), dtype=np.uint8)
    expected = x.astype(np.float64)
    for axis, size in (2, height), (3, width):
        places = np.arange(299) * size / 299
        low = np.floor(places).astype(int)
        high = np.minimum(low + 1, size - 1)
        share = np.expand_dims(places - low, (0, 1, 5 - axis))
        expected = (1 - share) * expected.take(low, axis) + share * expected.take(high, axis)
    found = fid.bilinear_tf1(torch.from_numpy(x))
    assert np.abs(128 * found.numpy() + 128 - expected).max() < 0.02  # grey levels


@pytest.mark.parametrize("size, pixels", [(32, 0.45), (64, 0.39), (256, 0.07)])
def test_tf1_lies_half_a_pixel_of_the_source_minus_one_of_the_output_aside(size, pixels):
    ramp = torch.arange(size, dtype=torch.uint8).expand(1, 3, size, size)
    grey = lambda way: (way(ramp)[0, 0, 9, 40:200] + 1) * 127.5
    shift = (grey(fid.bilinear_tf1) * 128 / 127.5 - grey(fid.bilinear)).mean().item()
    assert shift == pytest.approx(0.5 - 0.5 * size / 299, abs=0.01) == pytest.approx(pixels, abs=0.01)


def test_both_resizes_are_told_apart(measure, tmp_path, capsys):
    a, b = (npz(tmp_path / f"{name}.npz", images(40, seed=i)) for i, name in enumerate("ab"))
    found = {}
    for resize in "pytorch-fid", "tf1":
        common = ["--features=random", f"--resize={resize}", "--device=cpu"]
        fid.main([a, f"--stats={tmp_path}/{resize}.npz", *common])
        capsys.readouterr()
        found[resize] = measure(f"{tmp_path}/{resize}.npz", b, *common)
        assert all(weights.endswith(f"+{resize}") for weights in found[resize]["weights"])
    again = measure(f"{tmp_path}/tf1.npz", f"{tmp_path}/tf1.npz")  # whatever the flags are
    assert all(weights.endswith("+tf1") for weights in again["weights"])
    assert abs(found["tf1"]["random_fd"] / found["pytorch-fid"]["random_fd"] - 1) > 1e-3
    assert "the features differ" in mistake(fid.main, f"{tmp_path}/tf1.npz", b, "--features=random", "--device=cpu")


def test_statistics_from_elsewhere_are_doubted(measure, tmp_path, inception, hub):
    weights = public_file(inception, tmp_path / "w.pth")
    np.savez(tmp_path / "adm.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    result = measure(tmp_path / "adm.npz", npz(tmp_path / "b.npz", images(4)), f"--weights={weights}")
    assert any("unknown resize" in text and "tf1" in text for text in result["warnings"])


# ---------------------------------------------------------------------------------------------
# Losses by noise level and bits per dimension.


def test_the_bound_on_quantised_gaussian_data_is_its_entropy():
    levels = torch.arange(256) / 127.5 - 1
    p = torch.softmax(-((levels.double() - 0.1) ** 2) / (2 * 0.03**2), dim=0)
    entropy = -(p * p.clamp_min(1e-300).log2()).sum().item()
    g = torch.Generator().manual_seed(0)
    near = p > 1e-7  # the other levels never occur
    values = torch.multinomial(p, 2**20, replacement=True, generator=g).view(-1, 4, 8).to(torch.uint8)

    def denoise(x, sigma):  # E[v | x], summed over the levels
        distance = (x[..., None] - levels[near]) ** 2 / (2 * sigma.view(-1, 1, 1, 1) ** 2)
        return (p[near].log().float() - distance).softmax(dim=-1) @ levels[near]

    found = [fid.variational_bound(denoise, part, g) for part in values.split(1024)]
    bits, losses = (torch.cat(t) for t in zip(*found))
    standard_error = bits.std().item() / math.sqrt(len(bits))
    assert losses.shape == (2**15, 10) and standard_error < 0.006
    assert abs(bits.mean().item() - entropy) < 0.01, (bits.mean(), entropy, standard_error)


def test_the_decoder_sums_to_one_over_the_levels():
    for z in (-1.0, 0.123, 0.5, 1.002):
        one = torch.tensor([z], dtype=torch.float64)
        nats = torch.stack([fid.decoder_nats(one, torch.tensor([v])) for v in range(256)])
        assert abs(torch.exp(-nats).sum().item() - 1) < 1e-12


def test_the_report_on_an_untrained_network_is_the_closed_form(tmp_path, capsys):
    sets = [make_dataset(tmp_path / f"{i}", n_val=40, seed=i) for i in (0, 1)]
    ckpt = untrained(tmp_path / "ft.pt")
    fid.main([f"{sets[0]},{sets[1]}", ckpt, "--metrics=bpd", "--device=cpu"])
    out = capsys.readouterr().out.strip().splitlines()
    result = json.loads(out[-1])
    assert list(result) == [*map(str, sets)] and len(out) == 3  # a line a set, then the JSON
    for folder, row in result.items():
        m = np.mean((np.load(f"{folder}/val.npy") / 127.5 - 1) ** 2)
        assert len(row["loss_by_level"]) == 10 and row["images"] == 40 and row["standard_error"] > 0
        edges = np.array(row["ln_sigma"])
        np.testing.assert_allclose(edges, np.linspace(math.log(0.0013), math.log(80), 11))
        # With D = x / (1 + 4 s^2), E (D - y)^2 = (s^4 m + s^2/16) / (s^2 + 1/4)^2 for mean square m.
        v = np.exp(2 * (edges[:-1, None] + np.diff(edges)[:, None] * (np.arange(1000) + 0.5) / 1000))
        error = (v**2 * m + v / 16) / (v + 0.25) ** 2
        np.testing.assert_allclose(row["loss_by_level"], ((v + 0.25) / (v / 4) * error).mean(1), rtol=0.03)
        x, weight = np.polynomial.hermite_e.hermegauss(60)  # the noise before the decoder
        other = 2 / 255 * np.arange(-9, 10)[:, None]  # so far off are the neighbouring levels
        nats = np.log(np.exp((-(other**2) / 0.0013 + 2 * other * x) / 0.0026).sum(0)) @ weight
        assert nats / weight.sum() / math.log(2) < 0.02  # bits, whatever the model; at 0.002 they are 0.19
        nats = np.diff(edges) @ (error / v).mean(1) + m / (2 * 80**2) + nats / weight.sum()
        assert row["bits_per_dim"] == pytest.approx(nats / math.log(2), rel=0.01)


def test_bits_per_dimension_of_a_model_of_classes_are_those_of_each_class(tmp_path, capsys):
    data = make_dataset(tmp_path / "set", classes=2, n_val=6)
    ckpt = untrained(tmp_path / "ft.pt", classes=["class 0", "class 1"])
    state = torch.load(ckpt, weights_only=True)
    for weights in state["model"], state["ema"]:  # the class moves the answer, at all noise levels
        torch.nn.init.normal_(weights["net.label_embed.weight"], generator=torch.Generator().manual_seed(0))
        torch.nn.init.normal_(weights["net.final_adaLN.weight"], generator=torch.Generator().manual_seed(1))
        torch.nn.init.normal_(weights["net.final_linear.weight"], std=0.1, generator=torch.Generator().manual_seed(2))
    save_checkpoint(ckpt, state)
    found = []
    for labels in [0, 1, 0, 1, 0, 1], [1] * 6, [0] * 6:
        np.save(data / "val_labels.npy", np.array(labels))
        fid.main([str(data), ckpt, "--metrics=bpd", "--device=cpu"])
        found.append(json.loads(capsys.readouterr().out.splitlines()[-1])[str(data)]["bits_per_dim"])
    mixed, ones, zeros = found
    # The noise is the same in all three: the mixed set takes images 1, 3, 5 of one and 0, 2, 4 of the other.
    assert abs(ones - zeros) > 0.1 and min(ones, zeros) < mixed < max(ones, zeros)


@pytest.mark.parametrize("how", [{"size": 8}, {"channels": 1}, {"dtype": np.float32}, {"classes": 1}, {"classes": 3}])
def test_bits_per_dimension_of_what_does_not_fit_are_refused(tmp_path, how):
    data = make_dataset(tmp_path / "other", **how)
    ckpt = untrained(tmp_path / "ft.pt", classes=["cat", "dog"])  # with a row for "no class" after these
    sentence = mistake(fid.main, data, ckpt, "--metrics=bpd", "--device=cpu")
    assert "other" in sentence and ("cat" in sentence or "classes" not in how)


def test_bits_per_dimension_are_not_measured_beside_other_figures(tmp_path, dataset):
    ckpt = untrained(tmp_path / "ft.pt")
    assert "only bpd" in mistake(fid.main, dataset, ckpt, "--metrics=bpd,fid", "--device=cpu")
    assert "--stats" in mistake(fid.main, dataset, "--metrics=bpd", "--device=cpu")


# ---------------------------------------------------------------------------------------------
# What users get wrong: one sentence each.


class NotFinite(torch.nn.Module):
    def forward(self, x):
        return x.float().mean((2, 3)) / 0


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("exploded",))


def bad_cases(tmp_path, net):
    good = npz(tmp_path / "good.npz", images())
    np.savez(tmp_path / "three.npz", mu=np.zeros(3), sigma=np.eye(3))
    np.savez(tmp_path / "unknown.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    np.savez(tmp_path / "random.npz", mu=np.zeros(12), sigma=np.eye(12), net="random_fd " + 64 * "0", n=9)
    np.savez(tmp_path / "object.npz", mu=np.array([Bomb()], dtype=object), sigma=np.eye(1))
    np.savez(tmp_path / "floats.npz", arr_0=np.zeros((4, 8, 8, 3)))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "good.npz").read_bytes()[:300])
    (tmp_path / "empty").mkdir()
    folder(tmp_path / "damaged", images(3))
    (tmp_path / "damaged" / "0001.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(20))
    torch.jit.save(torch.jit.script(NotFinite()), str(tmp_path / "nan.pt"))
    (tmp_path / "noise.pt").write_bytes(bytes(range(256)) * 8)
    latents = make_dataset(tmp_path / "latents", dtype=np.float32)
    jit = ["--features", net]
    sentences = {
        "no such source": ([good, tmp_path / "absent", *jit], "absent"),
        "only one source": ([good], "--stats"),
        "an empty folder": ([good, tmp_path / "empty", *jit], "no images"),
        "a damaged image": ([good, tmp_path / "damaged", *jit], "0001.png"),
        "other dimensions": ([tmp_path / "three.npz", good, *jit], "differ"),
        "another network": ([tmp_path / "random.npz", good, *jit], "differ"),
        "statistics of unknown features against random ones": (
            [tmp_path / "unknown.npz", good, "--features=random"], "differ"),
        "float images": ([good, tmp_path / "floats.npz", *jit], "floats.npz"),
        "latents": ([good, latents, *jit], "latents"),
        "NaN features": ([good, good, "--features", tmp_path / "nan.pt"], "finite"),
        "a broken checkpoint": ([good, tmp_path / "noise.pt", *jit], "noise.pt"),
        "fewer images than a subset of kid": ([good, good, "--metrics=kid", *jit], "draws 1000 images"),
        "kid of statistics": ([tmp_path / "three.npz", good, "--metrics=kid", *jit], "images"),
        "an unknown metric": ([good, good, "--metrics=fid,isc"], "pr"),
        "a mistyped flag": ([good, good, "--metric=fid"], "--metric"),
        "no batch": ([good, good, "--batch_size=0", *jit], "--batch_size"),
        "one of each": ([good, good, "--num=1", *jit], "--num"),
    }
    errors = {  # what numpy and torch say by themselves
        "three images for pr": [good, npz(tmp_path / "few.npz", images(3)), "--metrics=pr", *jit],
        "object arrays": [tmp_path / "object.npz", good, *jit],
        "a cut npz": [good, tmp_path / "cut.npz", *jit],
        "no TorchScript": [good, good, "--features", tmp_path / "noise.pt"],
    }
    return sentences, errors


def test_mistakes_end_in_one_sentence_or_in_an_error_and_leave_nothing(tmp_path, net, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sentences, errors = bad_cases(tmp_path, net)
    before = sorted(tmp_path.rglob("*"))
    stats = f"--stats={tmp_path}/stats.npz"
    for case, (args, words) in sentences.items():
        extra = [] if case == "only one source" else [stats]
        assert words in mistake(fid.main, *args, *extra), case
    for case, args in errors.items():
        with pytest.raises((ValueError, RuntimeError, zipfile.BadZipFile)):
            pytest.fail(f"{case}: {fid.main([*map(str, args), stats])}")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("flags", [[], ["--stats=stats.npz"], ["--metrics=fid,pr"]])
def test_one_image_has_no_covariance(tmp_path, net, flags, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = npz(tmp_path / "one.npz", images(1))
    pair = [one] if flags == ["--stats=stats.npz"] else [npz(tmp_path / "good.npz", images()), one]
    assert "one.npz" in mistake(fid.main, *pair, "--features", net, "--device=cpu", *flags)
    assert not os.path.exists("stats.npz")


@pytest.mark.parametrize("name", ["noise", "short", "bomb"])
def test_what_is_wrong_with_a_file_of_weights_is_told_in_one_sentence(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a, path = npz(tmp_path / "a.npz", images()), tmp_path / f"{name}.pth"
    if name == "noise":
        path.write_bytes(bytes(range(256)) * 8)
    else:
        torch.save({"fc.bias": torch.zeros(1) if name == "short" else Bomb()}, path)
    sentence = mistake(fid.main, a, a, "--weights", path)
    assert path.name in sentence and len(sentence) < 1000 and not (tmp_path / "exploded").exists()
