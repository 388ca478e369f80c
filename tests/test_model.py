"""The network, the masks, the preconditioning and the loss against formulas and brute force."""

import math
from dataclasses import asdict

import pytest
import torch
from conftest import mistake, save_checkpoint

import model
import sample
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


def test_blocks_that_do_not_fit_the_grid_are_refused_in_a_sentence():
    assert "block_size 3" in mistake(lambda _: count_visible(16, 0.5, "block", 3))


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
    loss = denoising_loss(denoiser(noisy, sigma), 0.5 * clean, sigma)
    assert abs(loss.mean().item() - 1) < 0.01


def plain_network(denoiser, x, sigma, visible, label=None):
    """One image through the published equations, loops and explicit softmax, from the weights.

    x (K, d), its visible patches, or with a decoder or a route (N, d), all of them; visible: which
    patches are visible; label: the row of its class in the table, of which the last is "no class".
    """
    net, c = denoiser.net, denoiser.config

    def linear(m, v):
        return v @ m.weight.T + m.bias

    def norm(v):
        mean, var = v.mean(-1, keepdim=True), v.var(-1, unbiased=False, keepdim=True)
        return (v - mean) / torch.sqrt(var + 1e-6)

    sd = 0.5
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
    if c.route:  # every patch comes in, and the hidden ones pass by the middle blocks
        h = torch.stack([linear(net.embed, scaled[n]) + net.positions[n] for n in range(len(x))])
    else:
        patches = [scaled[n] for n in seen] if c.decoder_depth else list(scaled)
        h = torch.stack([linear(net.embed, p) + net.positions[n] for p, n in zip(patches, seen)])
    for i, block in enumerate(net.blocks):
        if c.route and c.route[0] <= i < c.route[1]:
            answer = run(block, c.heads, torch.stack([h[n] for n in seen]))
            h = torch.stack([answer[seen.index(n)] if n in seen else h[n] for n in range(len(x))])
        else:
            h = run(block, c.heads, h)
    if c.decoder_depth:
        rows, (shift, scale) = [], linear(net.decoder_modulation, cond).chunk(2)
        entered = linear(net.decoder_embed, norm(h) * (1 + scale) + shift)
        for n in range(len(x)):
            row = entered[seen.index(n)] if n in seen else net.mask_token
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
    labels = torch.tensor([0, 2, -1])
    visible = sample_visible(3, 4, ratio, generator=torch.Generator().manual_seed(0))
    whole = torch.arange(16).expand(3, 16)
    shown = whole if visible is None else visible
    noisy = clean + sigma.view(-1, 1, 1) * noise
    ours = denoiser(take(noisy, shown), sigma, visible, labels)
    loss = denoising_loss(ours, take(clean, shown), sigma).mean()
    parameters = list(denoiser.parameters())
    gradients = torch.autograd.grad(loss, parameters)

    expected = 0
    for i in range(3):
        s = sigma[i].item()
        denoised = plain_network(denoiser, noisy[i][shown[i]], s, shown[i], labels[i] % 4)
        patches = [(denoised[j] - clean[i, n]).square().mean() for j, n in enumerate(shown[i])]
        expected = expected + (s**2 + 0.25) / (s * 0.5) ** 2 * sum(patches) / len(patches) / 3
    assert torch.allclose(loss, expected, rtol=1e-10)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, parameters)):
        assert torch.allclose(ours, theirs, rtol=1e-7, atol=1e-9)


DECODER = dict(decoder_depth=2, decoder_dim=48, decoder_heads=3)  # MaskDiT
ROUTES = [dict(depth=3, route=ends) for ends in ((1, 2), (0, 2), (1, 3), (0, 3))]  # TREAD


@pytest.mark.parametrize("network", [DECODER, *ROUTES], ids=str)
@pytest.mark.parametrize("ratio", [0, 0.5, 0.75])
def test_decoder_and_route_equal_a_loop_over_images(ratio, network):
    denoiser = random_denoiser(num_classes=3, **network)
    x, _, sigma = random_batch()
    labels = torch.tensor([0, 2, -1])
    visible = sample_visible(3, 4, ratio, generator=torch.Generator().manual_seed(0))
    shown = torch.arange(16).expand(3, 16) if visible is None else visible
    ours = denoiser(x, sigma, visible, labels)
    for i in range(3):
        theirs = plain_network(denoiser, x[i], sigma[i].item(), shown[i], labels[i] % 4)
        assert torch.allclose(ours[i], theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("network", ROUTES, ids=str)
def test_a_route_has_the_weights_of_the_plain_network_and_is_it_on_whole_images(network):
    routed, plain = random_denoiser(**network), random_denoiser(**(network | dict(route=())))
    x, _, sigma = random_batch()
    assert [(n, p.shape) for n, p in routed.named_parameters()] == [
        (n, p.shape) for n, p in plain.named_parameters()]
    assert torch.equal(routed(x, sigma), plain(x, sigma))


def test_hidden_patches_reach_the_others_by_a_route_alone():
    x, _, sigma = random_batch()
    visible = sample_visible(3, 4, 0.75, generator=torch.Generator().manual_seed(0))
    hidden = torch.ones(3, 16, dtype=torch.bool).scatter(1, visible, False)
    changed = torch.where(hidden[:, :, None], torch.randn_like(x), x)
    skip = (0.25 / (sigma**2 + 0.25)).view(-1, 1, 1)
    # After MaskDiT's encoder they reach nothing but their own skip; blocks outside a route see them.
    for network, blind in ((DECODER, True), (ROUTES[0], False)):
        denoiser = random_denoiser(**network)
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
@pytest.mark.parametrize("network", [{}, DECODER, ROUTES[0], ROUTES[3]], ids=str)
def test_every_parameter_gets_a_gradient(ratio, classes, network):
    denoiser = random_denoiser(num_classes=classes, **network)
    clean, noise, sigma = random_batch(b=4)
    visible = sample_visible(4, 4, ratio)
    x = take(clean, visible) if visible is not None and not network else clean
    labels = torch.tensor([0, 1, 2, -1]) if classes else None
    denoising_loss(denoiser(x, sigma, visible, labels), x, sigma).mean().backward()
    for name, p in denoiser.named_parameters():
        unused = ratio == 0 and name == "net.mask_token"  # its gradient is zero, not absent
        assert p.grad is not None and (p.grad.abs().sum() > 0) == (not unused), name


def test_without_a_decoder_nothing_of_it_exists():
    assert not [n for n in random_denoiser().state_dict() if "decoder" in n or "mask" in n]


def test_the_decoder_starts_with_positions_and_mask_tokens_alone():
    torch.manual_seed(0)
    net = Denoiser(ModelConfig(image_size=16, dim=32, depth=2, heads=2, decoder_depth=2)).net
    assert not net.decoder_embed.weight.any() and not net.decoder_modulation.weight.any()  # MaskDiT: DecoderLayer
    assert net.embed.weight.any() and net.time[0].weight.any() and net.blocks[0].qkv.weight.any()
    zero = [n for n, p in net.named_parameters() if "weight" in n and not p.any()]
    blocks = [f"{part}.{i}.modulation.weight" for part in ("blocks", "decoder") for i in range(2)]
    assert sorted(zero) == sorted([*blocks, "decoder_embed.weight", "decoder_modulation.weight", "head.weight",
                                   "modulation.weight"])  # fmt: skip


def test_label_minus_1_is_the_last_row_of_the_table():
    denoiser = random_denoiser(num_classes=3)
    x, _, sigma = random_batch()
    null = denoiser(x, sigma, labels=torch.tensor([-1, -1, -1]))
    assert not torch.allclose(null, denoiser(x, sigma, labels=torch.tensor([0, 1, 2])))
    with torch.no_grad():  # now every class has the row of "no class"
        denoiser.net.labels.weight[:3] = denoiser.net.labels.weight[3]
    assert torch.equal(null, denoiser(x, sigma, labels=torch.tensor([0, 1, 2])))


def test_presets_have_the_published_sizes():
    def millions(name, **changes):
        with torch.device("meta"):
            net = Denoiser(ModelConfig(**{**model.PRESETS[name], **changes}))
        return sum(p.numel() for p in net.parameters()) / 1e6

    # DiT table 1 (with 4 latent channels, two outputs per channel and 1000 classes there).
    for name, published in (("dit-s", 33), ("dit-b", 130), ("dit-l", 458), ("dit-xl", 675)):
        ours = millions(name, image_size=32, channels=4, num_classes=1000)
        assert abs(ours / published - 1) < 0.02, (name, ours)
    # MaskDM's networks have 13 blocks, which without adaLN are lighter (44.3 M and 102.4 M).
    assert [model.PRESETS[name]["depth"] for name in ("maskdm-64", "maskdm-256")] == [13, 13]
    assert millions("maskdm-64") == pytest.approx(62.5, abs=0.1)


def test_sizes_that_do_not_fit_are_refused_in_a_sentence():
    assert "[1, 2, 3, 5, 6, 10, 15, 30]" in mistake(lambda _: ModelConfig(image_size=30, patch_size=4))
    for wrong in (dict(route=(2, 1)), dict(route=(1, 9)), dict(route=(1, 2), decoder_depth=1)):
        assert "route is" in mistake(lambda _: ModelConfig(**wrong))


def stored(denoiser, **changes):
    """What train.py writes, as far as others need it."""
    return dict(model=denoiser.state_dict(), ema=denoiser.state_dict(), config={}, step=1,
                architecture=asdict(denoiser.config), noise="edm") | changes


def test_a_checkpoint_comes_back_as_it_was_and_keeps_the_one_before(tmp_path):
    path = str(tmp_path / "ft.pt")
    denoiser = random_denoiser(num_classes=3, depth=3, route=(1, 2)).float()
    save_checkpoint(path, stored(denoiser))
    save_checkpoint(path, stored(denoiser, step=2))
    assert model.load_checkpoint(path)["step"] == 2
    assert model.load_checkpoint(str(tmp_path / "ft.prev.pt"))["step"] == 1
    again, _ = sample.load_denoiser(path)
    assert again.config == denoiser.config
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), denoiser.parameters()))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["ft.prev.pt", "ft.pt"]


def test_files_that_are_no_checkpoints_are_refused_in_a_sentence(tmp_path):
    path = tmp_path / "x.pt"

    def says(content=None):
        if content is not None:
            content = path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        sentence = mistake(lambda _: model.load_checkpoint(str(path)))
        assert str(path) in sentence
        return sentence

    says()  # there is none
    says({"weights": 1})
    says([1, 2])
    whole = path.read_bytes()
    says(whole[:100])
    says(b"")
    torch.save(stored(random_denoiser().float()), path)
    model.load_checkpoint(str(path))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # a single bit of a weight
    says(bytes(content))


def test_a_model_of_another_kind_of_noise_is_refused_in_a_sentence(tmp_path):
    torch.save(stored(random_denoiser().float(), noise="flow"), tmp_path / "x.pt")
    sentence = mistake(lambda _: model.load_checkpoint(str(tmp_path / "x.pt")))
    assert "flow" in sentence and model.NOISE in sentence


@pytest.mark.parametrize("place", ["open", "save"])
def test_a_full_disk_leaves_both_checkpoints_whole(tmp_path, monkeypatch, place):
    path, content = str(tmp_path / "ft.pt"), stored(random_denoiser().float())
    for step in (1, 2):
        save_checkpoint(path, content | {"step": step})

    def full(*args, **kwargs):
        if place == "save":
            args[1].write(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model if place == "open" else torch, place, full, raising=place == "save")
    assert "No space left" in mistake(lambda _: save_checkpoint(path, content | {"step": 3}))
    monkeypatch.undo()
    assert model.load_checkpoint(path)["step"] == 2
    assert model.load_checkpoint(str(tmp_path / "ft.prev.pt"))["step"] == 1
    assert sorted(f.name for f in tmp_path.iterdir()) == ["ft.prev.pt", "ft.pt"]
