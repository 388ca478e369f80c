"""The network, the masks, the preconditioning and the loss against formulas and brute force."""

import math
from dataclasses import asdict

import pytest
import torch
from conftest import mistake

import model
from model import (Denoiser, ModelConfig, count_visible, denoising_loss, patchify, sample_visible,
                   unpatchify)

CONFIG = dict(image_size=16, channels=3, patch_size=4, dim=32, depth=2, heads=2)


def random_denoiser(seed=0, **changes):
    """A small denoiser in float64 whose weights are all random: nothing is hidden behind zeros."""
    torch.manual_seed(seed)
    denoiser = Denoiser(ModelConfig(**{**CONFIG, **changes})).double()
    for p in denoiser.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return denoiser


def random_batch(b=3, n=16, d=48, seed=1):
    g = torch.Generator().manual_seed(seed)
    clean, noise = torch.randn(2, b, n, d, generator=g, dtype=torch.float64)
    sigma = torch.exp(torch.randn(b, generator=g, dtype=torch.float64))
    return clean, noise, sigma


def take(tokens, visible):
    return torch.gather(tokens, 1, visible[:, :, None].expand(-1, -1, tokens.shape[2]))


def test_patchify_cuts_row_major_patches_and_unpatchify_inverts_it():
    images = torch.arange(2 * 8 * 8 * 3).reshape(2, 8, 8, 3)
    tokens = patchify(images, 4)
    for n in range(4):
        row, col = divmod(n, 2)
        patch = images[:, row * 4 : row * 4 + 4, col * 4 : col * 4 + 4]
        assert torch.equal(tokens[:, n], patch.reshape(2, -1))
    assert torch.equal(unpatchify(tokens, 4), images)


@pytest.mark.parametrize("kind,block,ratio,k", [
    ("patch", 1, 0.9, 26), ("patch", 1, 0.5, 128), ("patch", 1, 0.999, 1),
    ("block", 2, 0.9, 256 - 57 * 4), ("block", 4, 0.9, 256 - 14 * 16), ("block", 4, 0.5, 128),
    ("crop", 1, 0.9, 25), ("crop", 1, 0.5, 121),
])
def test_every_image_keeps_the_stated_number_of_distinct_patches(kind, block, ratio, k):
    visible = sample_visible(50, 16, ratio, kind, block)
    assert visible.shape == (50, k) == (50, count_visible(16, ratio, kind, block))
    assert visible.min() >= 0 and visible.max() < 256
    assert (visible.diff(dim=1) > 0).all()  # ascending, hence distinct


@pytest.mark.parametrize("kind,block", [("patch", 1), ("block", 2)])
def test_patch_and_block_masks_show_every_patch_equally_often(kind, block):
    counts = sample_visible(4000, 8, 0.75, kind, block).flatten().bincount(minlength=64)
    expected, spread = 1000, math.sqrt(4000 * 0.25 * 0.75)  # binomial
    assert (counts - expected).abs().max() < 5 * spread


def test_block_masks_show_whole_blocks_and_crops_show_one_square():
    shown = torch.zeros(20, 256).scatter_(1, sample_visible(20, 16, 0.9, "block", 4), 1)
    blocks = shown.view(20, 4, 4, 4, 4).sum(dim=(2, 4))
    assert set(blocks.flatten().tolist()) == {0, 16}
    for image in sample_visible(20, 16, 0.9, "crop"):
        rows, cols = image // 16, image % 16
        assert rows.max() - rows.min() == cols.max() - cols.min() == 4


def test_masks_that_cannot_be_had_are_refused_in_a_sentence():
    assert "none of the 64 patches" in mistake(lambda _: count_visible(8, 0.2, "block", 4))
    assert "does not divide" in mistake(lambda _: count_visible(16, 0.5, "block", 3))


def test_preconditioning_is_edm_table_1():
    class Echo(torch.nn.Module):  # stands in for the network and shows what it is given
        head = torch.nn.Linear(1, 1).double()

        def forward(self, x, c_noise, visible, labels):
            self.x, self.c_noise = x, c_noise
            return torch.ones_like(x)

    denoiser = Denoiser(ModelConfig(**CONFIG))
    denoiser.net = Echo()
    x, sd = torch.randn(5, 16, 48, dtype=torch.float64), 0.5
    sigma = torch.tensor([0.002, 0.1, 1, 10, 80], dtype=torch.float64)
    out = denoiser(x, sigma)
    for i, s in enumerate(sigma.tolist()):
        assert torch.allclose(denoiser.net.x[i], x[i] / math.sqrt(s**2 + sd**2))
        assert math.isclose(denoiser.net.c_noise[i], math.log(s) / 4)
        expected = x[i] * sd**2 / (s**2 + sd**2) + s * sd / math.sqrt(s**2 + sd**2)
        assert torch.allclose(out[i], expected)


def test_an_untrained_network_is_the_best_linear_skip_and_has_edms_unit_loss():
    # F = 0 gives D = c_skip x, whose weighted error on data of variance sigma_data^2 is 1 (EDM B.6).
    denoiser = Denoiser(ModelConfig(**CONFIG))
    g = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 2000, 16, 48, generator=g)
    sigma = torch.exp(torch.randn(2000, generator=g))
    noisy = 0.5 * clean + sigma.view(-1, 1, 1) * noise
    loss = denoising_loss(denoiser(noisy, sigma), 0.5 * clean, sigma, 0.5)
    assert abs(loss.mean().item() - 1) < 0.01


def plain_network(denoiser, x, sigma, visible, label=None):
    """One image through the published equations, loops and explicit softmax, from the weights.

    x (K, d), its visible patches, or with a decoder (N, d), all of them; visible: their numbers.
    """
    net, c = denoiser.net, denoiser.config

    def linear(m, v):
        return v @ m.weight.T + m.bias

    def norm(v):
        mean, var = v.mean(-1, keepdim=True), v.var(-1, unbiased=False, keepdim=True)
        return (v - mean) / torch.sqrt(var + 1e-6)

    sd = c.sigma_data
    angle = math.log(sigma) / 4 * net.freq
    cond = torch.cat([torch.sin(angle), torch.cos(angle)])
    cond = linear(net.time[2], torch.nn.functional.silu(linear(net.time[0], cond)))
    if label is not None:
        cond = cond + net.labels.weight[label]
    cond = cond * torch.sigmoid(cond)

    def run(block, heads, h):
        s1, a1, g1, s2, a2, g2 = linear(block.modulation, cond).chunk(6)
        q, k, v = linear(block.qkv, norm(h) * (1 + a1) + s1).chunk(3, dim=1)
        size = h.shape[1] // heads
        attended = []
        for i in range(heads):
            part = slice(i * size, (i + 1) * size)
            weights = torch.softmax(q[:, part] @ k[:, part].T / math.sqrt(size), dim=1)
            attended.append(weights @ v[:, part])
        h = h + g1 * linear(block.proj, torch.cat(attended, dim=1))
        u = linear(block.fc1, norm(h) * (1 + a2) + s2)
        return h + g2 * linear(block.fc2, 0.5 * u * (1 + torch.erf(u / math.sqrt(2))))

    scaled = x / math.sqrt(sigma**2 + sd**2)
    seen = visible.tolist()
    if c.dense_depth:  # every patch goes through the first blocks, then the visible ones go on
        h = torch.stack([linear(net.embed, scaled[n]) + net.positions[n] for n in range(len(x))])
        for block in net.blocks[: c.dense_depth]:
            h = run(block, c.heads, h)
        shallow, h = h, torch.stack([h[n] for n in seen])
    else:
        patches = [scaled[n] for n in seen] if c.decoder_depth else list(scaled)
        h = torch.stack([linear(net.embed, p) + net.positions[n] for p, n in zip(patches, seen)])
    for block in net.blocks[c.dense_depth :]:
        h = run(block, c.heads, h)
    if c.decoder_depth:
        rows = []
        for n in range(len(x)):
            row = linear(net.decoder_embed, h[seen.index(n)]) if n in seen else net.mask_token
            if c.dense_depth:
                row = linear(net.fuse, torch.cat([row, shallow[n]]))
            rows.append(row + model.sincos_positions(c.grid, c.decoder_dim)[n])
        h = torch.stack(rows)
        for block in net.decoder:
            h = run(block, c.decoder_heads, h)
    shift, scale = linear(net.modulation, cond).chunk(2)
    out = linear(net.head, norm(h) * (1 + scale) + shift)
    return sd**2 / (sigma**2 + sd**2) * x + sigma * sd / math.sqrt(sigma**2 + sd**2) * out


@pytest.mark.parametrize("ratio", [0, 0.5, 0.9])
def test_masked_loss_and_gradients_equal_brute_force_image_by_image(ratio):
    denoiser = random_denoiser(num_classes=3)
    clean, noise, sigma = random_batch()
    labels = torch.tensor([0, 2, 3])  # 3 is the null class
    visible = sample_visible(3, 4, ratio, generator=torch.Generator().manual_seed(0))
    whole = torch.arange(16).expand(3, 16)
    shown = whole if visible is None else visible
    noisy = clean + sigma.view(-1, 1, 1) * noise
    ours = denoiser(take(noisy, shown), sigma, visible, labels)
    loss = denoising_loss(ours, take(clean, shown), sigma, 0.5).mean()
    parameters = list(denoiser.parameters())
    gradients = torch.autograd.grad(loss, parameters)

    expected = 0
    for i in range(3):
        s = sigma[i].item()
        denoised = plain_network(denoiser, noisy[i][shown[i]], s, shown[i], labels[i])
        patches = [(denoised[j] - clean[i, n]).square().mean() for j, n in enumerate(shown[i])]
        expected = expected + (s**2 + 0.25) / (s * 0.5) ** 2 * sum(patches) / len(patches) / 3
    assert torch.allclose(loss, expected, rtol=1e-10)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, parameters)):
        assert torch.allclose(ours, theirs, rtol=1e-7, atol=1e-9)


DECODERS = [dict(decoder_depth=2, decoder_dim=48, decoder_heads=3),  # MaskDiT
            dict(depth=3, dense_depth=1, decoder_depth=2)]  # SPRINT


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("ratio", [0, 0.5, 0.75])
def test_the_decoder_equals_brute_force_image_by_image(ratio, decoder):
    denoiser = random_denoiser(num_classes=3, **decoder)
    x, _, sigma = random_batch()
    labels = torch.tensor([0, 2, 3])
    visible = sample_visible(3, 4, ratio, generator=torch.Generator().manual_seed(0))
    shown = torch.arange(16).expand(3, 16) if visible is None else visible
    ours = denoiser(x, sigma, visible, labels)
    for i in range(3):
        theirs = plain_network(denoiser, x[i], sigma[i].item(), shown[i], labels[i])
        assert torch.allclose(ours[i], theirs, rtol=1e-7, atol=1e-9)


def test_after_maskdits_encoder_hidden_patches_reach_nothing_but_their_own_skip():
    x, _, sigma = random_batch()
    visible = sample_visible(3, 4, 0.75, generator=torch.Generator().manual_seed(0))
    hidden = torch.ones(3, 16, dtype=torch.bool).scatter(1, visible, False)
    changed = torch.where(hidden[:, :, None], torch.randn_like(x), x)
    skip = (0.25 / (sigma**2 + 0.25)).view(-1, 1, 1)
    for decoder, blind in zip(DECODERS, (True, False)):  # SPRINT's first blocks do see them
        denoiser = random_denoiser(**decoder)
        moved = denoiser(changed, sigma, visible) - denoiser(x, sigma, visible)
        assert torch.allclose(moved, skip * (changed - x)) == blind


@pytest.mark.parametrize("k", [1, 7, 15])
def test_reconstruction_loss_equals_a_loop_over_hidden_patches(k):
    noisy, denoised, _ = random_batch()
    visible = torch.stack([torch.randperm(16)[:k] for _ in range(3)])
    expected = []
    for i in range(3):
        errors = []
        for n in set(range(16)) - set(visible[i].tolist()):
            patch = noisy[i, n].tolist()
            mean = sum(patch) / 48
            variance = sum((v - mean) ** 2 for v in patch) / 47
            target = [(v - mean) / math.sqrt(variance + 1e-6) for v in patch]
            errors.append(sum((d - t) ** 2 for d, t in zip(denoised[i, n].tolist(), target)) / 48)
        expected.append(sum(errors) / len(errors))
    ours = model.reconstruction_loss(denoised, noisy, visible)
    assert torch.allclose(ours, torch.tensor(expected, dtype=torch.float64), rtol=1e-10)


def test_everything_visible_is_the_whole_image():
    denoiser = random_denoiser()
    clean, noise, sigma = random_batch()
    noisy = clean + sigma.view(-1, 1, 1) * noise
    everything = torch.arange(16).expand(3, 16)
    assert torch.equal(denoiser(noisy, sigma, everything), denoiser(noisy, sigma))


def test_the_order_of_visible_patches_does_not_matter():
    denoiser = random_denoiser()
    clean, noise, sigma = random_batch()
    visible = sample_visible(3, 4, 0.5)
    shuffled = visible.flip(1)
    ours = denoiser(take(clean, visible), sigma, visible)
    assert torch.allclose(denoiser(take(clean, shuffled), sigma, shuffled).flip(1), ours)


def test_positions_tell_apart_all_patches_and_follow_the_formula():
    positions = model.sincos_positions(16, 64)
    assert positions.shape == (256, 64)
    assert torch.cdist(positions, positions).fill_diagonal_(1).min() > 0.1
    row, col, j = 5, 11, 7
    assert math.isclose(positions[row * 16 + col, j], math.sin(row / 10000 ** (j / 16)), abs_tol=1e-6)
    assert math.isclose(positions[row * 16 + col, 48 + j], math.cos(col / 10000 ** (j / 16)), abs_tol=1e-6)


@pytest.mark.parametrize("ratio", [0, 0.5, 0.75])
@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("decoder", [{}, *DECODERS])
def test_every_parameter_gets_a_gradient(ratio, classes, decoder):
    denoiser = random_denoiser(num_classes=classes, **decoder)
    clean, noise, sigma = random_batch(b=4)
    visible = sample_visible(4, 4, ratio)
    x = take(clean, visible) if visible is not None and not decoder else clean
    labels = torch.tensor([0, 1, 2, 3]) if classes else None
    denoising_loss(denoiser(x, sigma, visible, labels), x, sigma, 0.5).mean().backward()
    for name, p in denoiser.named_parameters():
        unused = ratio == 0 and name == "net.mask_token"  # its gradient is zero, not absent
        assert p.grad is not None and (p.grad.abs().sum() > 0) == (not unused), name


def test_without_a_decoder_nothing_of_it_exists():
    assert not [n for n in random_denoiser().state_dict() if "decoder" in n or "mask" in n or "fuse" in n]
    assert "decoder_depth" in mistake(lambda _: ModelConfig(**CONFIG, dense_depth=1), [])


def test_presets_have_the_published_sizes():
    def millions(name, **changes):
        with torch.device("meta"):
            net = Denoiser(ModelConfig(**{**model.PRESETS[name], **changes}))
        return sum(p.numel() for p in net.parameters()) / 1e6

    # DiT table 1 (with 4 latent channels, two outputs per channel and 1000 classes there).
    for name, published in (("dit-s", 33), ("dit-b", 130), ("dit-l", 458), ("dit-xl", 675)):
        ours = millions(name, image_size=32, channels=4, num_classes=1000)
        assert abs(ours / published - 1) < 0.02, (name, ours)


def test_sizes_that_do_not_fit_name_those_that_do():
    sentence = mistake(lambda _: ModelConfig(image_size=30, patch_size=4))
    assert "patch_size of 3 or 5" in sentence and "28 or 32 px" in sentence
    assert "heads" in mistake(lambda _: ModelConfig(dim=100, heads=8))


def test_a_checkpoint_comes_back_as_it_was_and_keeps_the_one_before(tmp_path):
    path = str(tmp_path / "ft.pt")
    denoiser = random_denoiser(num_classes=3).float()
    content = dict(model=denoiser.state_dict(), ema=denoiser.state_dict(), config={}, step=1,
                   architecture=asdict(denoiser.config))
    model.save_checkpoint(path, content)
    model.save_checkpoint(path, content | {"step": 2})
    assert model.load_checkpoint(path)["step"] == 2
    assert model.load_checkpoint(model.previous_name(path))["step"] == 1
    again = model.denoiser_from_checkpoint(model.load_checkpoint(path))
    assert again.config == denoiser.config
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), denoiser.parameters()))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["ft.prev.pt", "ft.pt"]


def test_files_that_are_no_checkpoints_are_refused_in_a_sentence(tmp_path):
    path = tmp_path / "x.pt"
    assert "no checkpoint at" in mistake(lambda _: model.load_checkpoint(str(path)))
    torch.save({"weights": 1}, path)
    assert "it has no model" in mistake(lambda _: model.load_checkpoint(str(path)))
    torch.save([1, 2], path)
    assert "is not a checkpoint" in mistake(lambda _: model.load_checkpoint(str(path)))
    path.write_bytes(path.read_bytes()[:100])
    assert "damaged or of another kind" in mistake(lambda _: model.load_checkpoint(str(path)))
    path.write_bytes(b"")
    assert "damaged or of another kind" in mistake(lambda _: model.load_checkpoint(str(path)))
