"""The judge: its kinds of damage are what they are called, and its features tell more damage from less."""

import json

import numpy as np
import pytest
import torch
from conftest import make_dataset, mistake
from scipy import ndimage

import fid
import judge

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
KINDS = judge.LEARNED | judge.UNSEEN


def images(n=6, size=24, seed=0):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 255


def damaged(x, name, strength, seed=0):
    ((function, _),) = (kind for key, kind in KINDS.items() if key.startswith(name))
    return function(x.clone(), strength, torch.Generator().manual_seed(seed))


def test_blur_is_a_gaussian_filter():
    x = images()
    for sigma in (0.4, 0.8, 1.6):
        expected = ndimage.gaussian_filter(x.double().numpy(), (0, 0, sigma, sigma), mode="nearest", radius=8)
        assert np.abs(damaged(x, "blur", sigma).numpy() - expected).max() < 1e-3


def test_the_other_kinds_are_what_they_are_called():
    x = images()
    noise = damaged(x, "noise", 8) - x
    assert noise.std() == pytest.approx(8, rel=0.03) and abs(noise.mean()) < 0.3
    moved = damaged(x, "every second patch", 2)
    for row, column in np.ndindex(24, 24):
        there = (column - 2) % 24 if (row // 4 + column // 4) % 2 else column
        assert torch.equal(moved[:, :, row, column], x[:, :, row, there])
    large = damaged(x, "pixels", 4)
    means = x.reshape(6, 3, 6, 4, 6, 4).mean((3, 5)).numpy()
    assert np.allclose(large, means.repeat(4, axis=2).repeat(4, axis=3), atol=1e-3)
    assert torch.allclose(damaged(x, "another image", 0.2)[3], 0.8 * x[3] + 0.2 * x[2], atol=1e-3)
    assert len(damaged(x, "only", 2).unique(dim=0)) == 2 and torch.equal(damaged(x, "brighter", 4), x + 4)


def test_brightness_varies_by_image_and_not_within_it():
    flat = torch.full((500, 3, 4, 4), 100.0)
    seen = judge.varied(flat, torch.Generator().manual_seed(0))
    assert (seen.amax((2, 3)) - seen.amin((2, 3))).max() == 0 and 5 < seen[:, 0, 0, 0].std() < 15
    assert abs(seen.mean() - 100) < 2 and (seen[:, 0] - seen[:, 1]).abs().max() > 5


def test_a_warp_moves_a_ramp_by_what_it_says():
    """On a ramp of one grey level a pixel, a move of so many pixels is a change of so many levels."""
    ramp = torch.arange(64.0).expand(200, 3, 64, 64)
    moves = (damaged(ramp, "warped", 1.5) - ramp)[:, 0, 8:-8, 8:-8]
    assert abs(moves.mean()) < 0.1 and 0.8 < moves.std() < 1.6  # between its nodes the field is flatter
    assert torch.allclose(damaged(images(), "warped", 0), images(), atol=1e-2)


def test_features_tell_more_damage_from_less(tmp_path, capsys):
    """A short training on smooth images: standard units, and each kind of damage the further the stronger it is."""
    rng = np.random.default_rng(0)
    smooth = ndimage.gaussian_filter(rng.standard_normal((400, 32, 32, 3)), (0, 2, 2, 0))
    smooth = (smooth / smooth.std() * 50 + 128).clip(0, 255).astype(np.uint8)
    net = judge.fit(smooth[:300], 60, batch=32)

    def features(x):
        return net(x.round().clamp(0, 255).byte()).double().numpy()

    real = features(judge.as_input(smooth[:300]))
    assert np.allclose(real.mean(0), 0, atol=1e-3) and np.cov(real.T).trace() == pytest.approx(100, rel=1e-3)

    def distance(x):
        y = features(x)
        return fid.frechet_distance(real.mean(0), np.cov(real.T), y.mean(0), np.cov(y.T))

    x = judge.as_input(smooth[300:])
    for name, strengths in (("blur", (0.8, 1.6, 3)), ("noise", (4, 8, 16)), ("every second patch", (1, 2, 3)),
                            ("pixels", (2, 4, 8)), ("only", (50, 10, 5))):
        found = [distance(x), *(distance(damaged(x, name, s)) for s in strengths)]
        assert found == sorted(found), (name, found)


def test_the_file_is_for_fid_py(tmp_path, capsys):
    data, out = make_dataset(tmp_path / "set", n=30), tmp_path / "judge.pt"
    judge.main([str(data), "--out", str(out), "--steps", "3", "--no-table"])
    fid.main([str(data), str(data), "--features", str(out), "--json"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["fd"] == pytest.approx(0, abs=1e-3)
    latents = make_dataset(tmp_path / "latents", n=30, channels=4, dtype=np.float32)
    assert "holds latents, expected images" in mistake(judge.main, latents, "--no-table")


def test_the_table_compares_both_kinds_of_features(tmp_path, monkeypatch, capsys):
    """With a judge that knows images by their corner pixels, in place of random features, too."""
    class Corner(torch.nn.Module):
        def forward(self, x):
            return x[:, :, :3, 0].flatten(1).float()

    data = make_dataset(tmp_path / "set", n=30, n_val=30)
    np.save(data / "val.npy", np.load(data / "train.npy"))
    monkeypatch.setattr(judge, "LEARNED", {"noise": (judge.noisy, (40,))})
    monkeypatch.setattr(judge, "UNSEEN", {"brighter": (lambda x, by, g: x + by, (20,))})
    monkeypatch.setattr(fid, "load_features", lambda args: (Corner(), "random_fd corner"))
    none, noise, brighter = judge.compare(data, Corner(), 30)
    for name in ("judge", "random"):
        assert none[name] == pytest.approx(0, abs=1e-6) and noise[name] > 100 and brighter[name] > 100
        assert none[name + "_kid"] < noise[name + "_kid"]
    assert noise["number"] == 30 and noise["strength"] == 40 and "commit" in noise


def test_a_line_of_the_table_is_a_kind_of_damage():
    rows = [dict(kind=k, strength=s, judge=s + 0.5, random=2.0, judge_kid=0.001, random_kid=0.25)
            for k, s in (("none", 0), ("blur", 1), ("blur", 2))]
    assert judge.table(rows).splitlines()[2:] == [
        "| none | 0.5 | 2 | 0.001 | 0.25 |", "| blur: 1, 2 | 1.5, 2.5 | 2, 2 | 0.001, 0.001 | 0.25, 0.25 |"]
