"""The network, the masks, the preconditioning and the loss against formulas and brute force."""

import math
from dataclasses import asdict, fields

import numpy as np
import pytest
import torch
from conftest import mistake
from scipy.stats import chisquare
from torch.nn import Linear

import model
import sample
import train
from model import MASKS, Denoiser, ModelConfig, denoising_loss, make_mask, patchify, save_checkpoint, unpatchify

CONFIG = dict(image_size=16, channels=3, patch_size=4, dim=32, depth=2, heads=2)
EVERY = slice(None)  # all rows of a batch


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


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def take(tokens, visible):
    return torch.gather(tokens, 1, visible[:, :, None].expand(-1, -1, tokens.shape[2]))


def some_patches(ratio, batch=3):
    """Which of the 4 x 4 patches are visible, (batch, K), or None where nothing is hidden."""
    if ratio == 0:
        return None
    _, draw = make_mask("patch", 4, ratio)
    return draw(batch, generator(), EVERY)


def test_patchify_cuts_row_major_patches_and_unpatchify_inverts_it():
    images = torch.arange(2 * 8 * 8 * 3).reshape(2, 8, 8, 3)
    tokens = patchify(images, 4)
    for n in range(4):
        row, col = divmod(n, 2)
        patch = images[:, row * 4 : row * 4 + 4, col * 4 : col * 4 + 4]
        assert torch.equal(tokens[:, n], patch.reshape(2, -1))
    assert torch.equal(unpatchify(tokens, 4), images)


# ---- Masks.


@pytest.mark.parametrize("kind, block, ratio, k", [
    ("patch", 1, 0.9, 26), ("patch", 1, 0.5, 128), ("patch", 1, 0.999, 1),
    ("block", 2, 0.9, 256 - 57 * 4), ("block", 4, 0.9, 256 - 14 * 16), ("block", 4, 0.5, 128),
    ("crop", 1, 0.9, 25), ("crop", 1, 0.5, 121),
])
def test_every_image_keeps_the_stated_number_of_distinct_patches(kind, block, ratio, k):
    num_visible, draw = make_mask(kind, 16, ratio, block)
    visible = draw(50, generator(), EVERY)
    assert num_visible == k
    assert visible.shape == (50, k) and visible.dtype == torch.int64
    assert visible.min() >= 0 and visible.max() < 256
    assert (visible.diff(dim=1) > 0).all()  # ascending, hence distinct


@pytest.mark.parametrize("rows", [slice(0, 5), slice(1, None, 3), slice(11, 12)])
@pytest.mark.parametrize("kind", MASKS)
def test_the_rows_of_a_draw_are_those_of_the_whole_batch(kind, rows):
    _, draw = make_mask(kind, 8, 0.7, 2)
    whole_generator, rows_generator = generator(), generator()
    whole = draw(12, whole_generator, EVERY)
    assert torch.equal(draw(12, rows_generator, rows), whole[rows])
    # Whatever is drawn next is the same, too.
    assert torch.equal(whole_generator.get_state(), rows_generator.get_state())


@pytest.mark.parametrize("kind, block", [("patch", 1), ("block", 2), ("crop", 1)])
def test_masks_show_every_patch_as_often_as_they_should(kind, block):
    _, draw = make_mask(kind, 8, 0.75, block)
    counts = draw(4000, generator(), EVERY).flatten().bincount(minlength=64)
    expected = np.full((8, 8), 0.25)
    if kind == "crop":  # a 4 x 4 square in any of 5 x 5 places
        covers = np.array([1, 2, 3, 4, 4, 3, 2, 1]) / 5
        expected = np.outer(covers, covers)
    spread = np.sqrt(4000 * expected * (1 - expected))  # binomial
    assert (np.abs(counts.view(8, 8).numpy() - 4000 * expected) < 5 * spread).all()


@pytest.mark.parametrize("kind, grid, block, num_masks", [
    ("patch", 2, 1, 6),  # 2 patches of 4
    ("block", 4, 2, 6),  # 2 blocks of 4
    ("crop", 4, 1, 4),  # a square of side 3, as 9 is the square nearest to 8
])
def test_all_masks_of_a_kind_are_equally_likely(kind, grid, block, num_masks):
    _, draw = make_mask(kind, grid, 0.5, block)
    drawn = draw(6000, generator(), EVERY)
    _, counts = drawn.unique(dim=0, return_counts=True)
    assert len(counts) == num_masks
    assert chisquare(counts).pvalue > 1e-4


def test_block_masks_show_whole_blocks_and_crops_show_one_square():
    _, draw = make_mask("block", 16, 0.9, 4)
    shown = torch.zeros(20, 256).scatter_(1, draw(20, generator(), EVERY), 1)
    blocks = shown.view(20, 4, 4, 4, 4).sum(dim=(2, 4))
    assert set(blocks.flatten().tolist()) == {0, 16}
    _, draw = make_mask("crop", 16, 0.9)
    for image in draw(20, generator(), EVERY):
        rows, cols = image // 16, image % 16
        assert rows.max() - rows.min() == cols.max() - cols.min() == 4


def test_masks_that_do_not_fit_or_hide_nothing_or_all_are_refused_in_a_sentence():
    assert "3 x 3" in mistake(lambda _: make_mask("block", 16, 0.5, 3))
    assert "block_size" in mistake(lambda _: make_mask("block", 16, 0.5, 0))
    for kind, ratio, block, k in ("patch", 0, 1, 16), ("block", 0.9, 4, 16), ("crop", 0, 1, 16), ("patch", 1, 1, 0):
        assert f"shows {k} of 16" in mistake(lambda _: make_mask(kind, 4, ratio, block))


# ---- The network.


def test_preconditioning_is_edm_table_1():
    class Echo(torch.nn.Module):  # stands in for the network and shows what it is given
        final_linear = Linear(1, 1).double()

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
    num_freq = min(128, c.dim // 2)
    angle = math.log(sigma) / 4 * (10000 ** -(torch.arange(num_freq).double() / num_freq)).float().to(x)
    cond = torch.cat([torch.cos(angle), torch.sin(angle)])
    cond = linear(net.time_embed[2], torch.nn.functional.silu(linear(net.time_embed[0], cond)))
    if label is not None:
        cond = cond + net.label_embed.weight[label]
    cond = cond * torch.sigmoid(cond)

    def run(block, heads, h):
        s1, a1, g1, s2, a2, g2 = linear(block.adaLN, cond).chunk(6)
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
        h = torch.stack([linear(net.patch_embed, scaled[n]) + net.positions[n] for n in range(len(x))])
    else:
        patches = [scaled[n] for n in seen] if c.decoder_depth else list(scaled)
        h = torch.stack([linear(net.patch_embed, p) + net.positions[n] for p, n in zip(patches, seen)])
    for i, block in enumerate(net.blocks):
        if c.route and c.route[0] <= i < c.route[1]:
            answer = run(block, c.heads, torch.stack([h[n] for n in seen]))
            h = torch.stack([answer[seen.index(n)] if n in seen else h[n] for n in range(len(x))])
        else:
            h = run(block, c.heads, h)
    if c.decoder_depth:
        rows, (shift, scale) = [], linear(net.decoder_adaLN, cond).chunk(2)
        entered = linear(net.decoder_embed, norm(h) * (1 + scale) + shift)
        for n in range(len(x)):
            row = entered[seen.index(n)] if n in seen else net.mask_token
            rows.append(row + model.sincos_positions(c.grid, c.decoder_dim)[n])
        h = torch.stack(rows)
        for block in net.decoder:
            h = run(block, c.decoder_heads, h)
    shift, scale = linear(net.final_adaLN, cond).chunk(2)
    out = linear(net.final_linear, norm(h) * (1 + scale) + shift)
    return sd**2 / (sigma**2 + sd**2) * x + sigma * sd / math.sqrt(sigma**2 + sd**2) * out


@pytest.mark.parametrize("ratio", [0, 0.5, 0.9])
def test_masked_loss_and_gradients_equal_brute_force_image_by_image(ratio):
    denoiser = random_denoiser(num_classes=3)
    clean, noise, sigma = random_batch()
    labels = torch.tensor([0, 2, -1])
    visible = some_patches(ratio)
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
    visible = some_patches(ratio)
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
    visible = some_patches(0.75)
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
    visible = some_patches(0.5)
    shuffled = visible.flip(1)
    ours = denoiser(take(clean, visible), sigma, visible)
    assert torch.allclose(denoiser(take(clean, shuffled), sigma, shuffled).flip(1), ours)


def test_positions_tell_apart_all_patches_and_follow_the_formula():
    positions = model.sincos_positions(16, 64)
    assert positions.shape == (256, 64)
    assert torch.cdist(positions, positions).fill_diagonal_(1).min() > 0.1
    row, col, j = 5, 11, 7
    assert math.isclose(positions[row * 16 + col, j], math.sin(col / 10000 ** (j / 16)), abs_tol=1e-6)
    assert math.isclose(positions[row * 16 + col, 48 + j], math.cos(row / 10000 ** (j / 16)), abs_tol=1e-6)


@pytest.mark.parametrize("ratio", [0, 0.5, 0.75])
@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("network", [{}, DECODER, ROUTES[0], ROUTES[3]], ids=str)
def test_every_parameter_gets_a_gradient(ratio, classes, network):
    denoiser = random_denoiser(num_classes=classes, **network)
    clean, noise, sigma = random_batch(b=4)
    visible = some_patches(ratio, batch=4)
    x = take(clean, visible) if visible is not None and not network else clean
    labels = torch.tensor([0, 1, 2, -1]) if classes else None
    denoising_loss(denoiser(x, sigma, visible, labels), x, sigma).mean().backward()
    for name, p in denoiser.named_parameters():
        unused = ratio == 0 and name == "net.mask_token"  # its gradient is zero, not absent
        assert p.grad is not None and (p.grad.abs().sum() > 0) == (not unused), name


def test_without_a_decoder_nothing_of_it_exists():
    assert not [n for n in random_denoiser().state_dict() if "decoder" in n or "mask" in n]


def test_blocks_start_as_the_identity_and_output_and_decoder_at_zero():
    torch.manual_seed(0)
    net = Denoiser(ModelConfig(**CONFIG, decoder_depth=2, num_classes=3)).net
    zero = {name for name, p in net.named_parameters() if "weight" in name and not p.any()}
    blocks = {f"{part}.{i}.adaLN.weight" for part in ("blocks", "decoder") for i in range(2)}
    others = {"final_adaLN.weight", "final_linear.weight",  # DiT
              "decoder_adaLN.weight", "decoder_embed.weight"}  # MaskDiT: DecoderLayer
    assert zero == blocks | others
    assert not any(p.any() for name, p in net.named_parameters() if "bias" in name)
    cond = torch.randn(5, 32)
    x = torch.randn(5, 16, 32)
    assert torch.equal(net.blocks[0](x, cond), x)
    for layer in (net.time_embed[0], net.time_embed[2], net.label_embed):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.2)


def test_zero_initialisation_and_muon_go_by_module_and_not_by_name():
    """Layers that a fork adds are named like ours, but are neither zero nor matrices for Muon."""
    denoiser = Denoiser(ModelConfig(**CONFIG, decoder_depth=1))
    owners = (denoiser, denoiser.net, denoiser.net.blocks[0])
    for owner in owners:
        owner.repa_head = Linear(32, 8)
        owner.text_proj = Linear(32, 32)
        owner.final_adaLN_decoder_embed = Linear(32, 32)
    torch.manual_seed(0)
    denoiser.net.init_weights()
    for owner in owners:
        for layer in (owner.repa_head, owner.text_proj, owner.final_adaLN_decoder_embed):
            assert layer.weight.all()

    ours = {f"net.{part}.{name}.weight" for part in ("blocks.0", "blocks.1", "decoder.0")
            for name in ("qkv", "proj", "fc1", "fc2")}
    cfg, _, _ = train.parse(["--device=cpu", "--optimizer=muon"])
    adamw, muon = train.configure_optimizers(denoiser, cfg)
    assert isinstance(adamw, torch.optim.AdamW) and isinstance(muon, model.Muon)
    names = {name: p for name, p in denoiser.named_parameters()}
    given = [{id(p) for group in optimizer.param_groups for p in group["params"]} for optimizer in (adamw, muon)]
    assert given[1] == {id(names[name]) for name in ours}
    assert given[0] == {id(p) for p in names.values()} - given[1]


@pytest.mark.parametrize("shape", [(16, 16), (16, 48), (8, 100)])
def test_newton_schulz_moves_the_singular_values_towards_1_and_keeps_the_vectors(shape):
    x = torch.randn(shape, generator=generator(), dtype=torch.float64)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    s = s / s.square().sum().sqrt()
    for _ in range(5):  # Muon's polynomial, of each value alone
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    ours = model.newton_schulz(x)
    assert torch.allclose(ours, u @ s.diag() @ vh, atol=1e-9)
    values = torch.linalg.svdvals(ours)
    assert 0.6 < values.min() and values.max() < 1.3


def test_label_minus_1_is_the_last_row_of_the_table():
    denoiser = random_denoiser(num_classes=3)
    x, _, sigma = random_batch()
    null = denoiser(x, sigma, labels=torch.tensor([-1, -1, -1]))
    assert not torch.allclose(null, denoiser(x, sigma, labels=torch.tensor([0, 1, 2])))
    with torch.no_grad():  # now every class has the row of "no class"
        denoiser.net.label_embed.weight[:3] = denoiser.net.label_embed.weight[3]
    assert torch.equal(null, denoiser(x, sigma, labels=torch.tensor([0, 1, 2])))


def test_presets_have_the_published_sizes():
    def network(name):
        cfg, _, _ = train.parse([f"--preset={name}", "--device=cpu"])
        return {key: getattr(cfg, key) for key in train.NETWORK_SETTINGS}

    def millions(name, **changes):
        with torch.device("meta"):
            net = Denoiser(ModelConfig(**network(name), **changes))
        return sum(p.numel() for p in net.parameters()) / 1e6

    # DiT table 1 (with 4 latent channels, two outputs per channel and 1000 classes there).
    for name, published in ("dit-s", 33), ("dit-b", 130), ("dit-l", 458), ("dit-xl", 675):
        ours = millions(name, image_size=32, channels=4, num_classes=1000)
        assert abs(ours / published - 1) < 0.02, (name, ours)
    # MaskDM's networks have 13 blocks, which without adaLN are lighter (44.3 M and 102.4 M).
    assert [network(name)["depth"] for name in ("maskdm-64", "maskdm-256")] == [13, 13]
    assert millions("maskdm-64") == pytest.approx(62.5, abs=0.1)
    # MaskDiT sec. 4.1: the encoder of DiT-XL/2, and 8 blocks of width 512 on all tokens.
    xl = network("maskdit-xl")
    decoder = {f"decoder_{name}": value for name, value in (("depth", 8), ("dim", 512), ("heads", 16))}
    assert xl == network("dit-xl") | decoder
    # TREAD's configs/model/tread.yaml: DiT-B/2, routed from block 2 until after block 8.
    assert network("tread-b") == network("dit-b") | dict(route=(2, 9))


@pytest.mark.parametrize("wrong, said", [
    (dict(image_size=30), "image size 30"),
    (dict(dim=30, heads=2), "width 30"),  # sines and cosines of rows and columns
    (dict(dim=32, heads=3), "3 heads"),
    (dict(decoder_depth=1, decoder_dim=18, decoder_heads=2), "width 18"),
    (dict(decoder_depth=1, decoder_dim=32, decoder_heads=5), "5 heads"),
    (dict(route=(1,)), "route is (1,)"),
    (dict(route=(1, 2, 3)), "route is (1, 2, 3)"),
    (dict(route=(2, 1)), "route is (2, 1)"),
    (dict(route=(1, 1)), "route is (1, 1)"),
    (dict(route=(1, 9)), "depth 6"),
    (dict(route=(-1, 2)), "route is (-1, 2)"),
    (dict(route=(1, 2), decoder_depth=1), "no decoder")])
def test_sizes_that_do_not_fit_are_refused_in_a_sentence(wrong, said):
    assert said in mistake(lambda _: Denoiser(ModelConfig(**wrong)))


# ---- Checkpoints.


def stored(denoiser, **changes):
    """What train.py writes."""
    return dict(model=denoiser.state_dict(), ema=denoiser.state_dict(), optimizer=[], config={}, step=1,
                class_names=None, architecture=asdict(denoiser.config), noise="edm", network="dit-2") | changes


@pytest.fixture
def whole():
    return stored(random_denoiser(num_classes=3).float(), class_names=["ant", "bee", "cat"])


def refused(tmp_path, content, **how):
    """The sentence with which a checkpoint is refused."""
    path = str(tmp_path / "x.pt")
    torch.save(content, path)
    sentence = mistake(lambda _: model.load_checkpoint(path, **how))
    assert path in sentence
    return sentence


def test_a_checkpoint_comes_back_as_it_was_and_keeps_the_one_before(tmp_path):
    path = str(tmp_path / "ft.pt")
    denoiser = random_denoiser(num_classes=3, depth=3, route=(1, 2)).float()
    save_checkpoint(path, stored(denoiser))
    save_checkpoint(path, stored(denoiser, step=2))
    assert model.load_checkpoint(path, resume=True)["step"] == 2
    assert model.load_checkpoint(str(tmp_path / "ft.prev.pt"))["step"] == 1
    again, _ = sample.load_denoiser(path)
    assert again.config == denoiser.config
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), denoiser.parameters()))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["ft.prev.pt", "ft.pt"]


def test_files_that_are_no_whole_checkpoints_are_refused_in_a_sentence(tmp_path):
    path = tmp_path / "x.pt"
    torch.save(stored(random_denoiser().float()), path)
    model.load_checkpoint(str(path))
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1  # a single bit of a weight
    for damaged in (bytes(flipped), content[:100], content[:-100], b"", b"a text"):
        path.write_bytes(damaged)
        sentence = mistake(lambda _: model.load_checkpoint(str(path)))
        assert str(path) in sentence and "not a whole checkpoint" in sentence
    for other in ({"weights": 1}, [1, 2]):
        assert "checkpoint" in refused(tmp_path, other)


def test_a_checkpoint_that_is_not_there_is_not_called_damaged(tmp_path):
    path = str(tmp_path / "none.pt")
    sentence = mistake(lambda _: model.load_checkpoint(path))
    assert path in sentence and "not a whole" not in sentence


def test_fields_of_the_architecture_that_are_missing_or_unknown_are_named(tmp_path, whole):
    for name in [f.name for f in fields(ModelConfig)]:
        fewer = {key: value for key, value in whole["architecture"].items() if key != name}
        sentence = refused(tmp_path, whole | dict(architecture=fewer))
        assert f"'{name}'" in sentence and "not a whole" not in sentence
    sentence = refused(tmp_path, whole | dict(architecture=fewer | dict(rope=True, qk_norm=True)))
    assert all(f"'{word}'" in sentence for word in (name, "rope", "qk_norm")) and "not a whole" not in sentence


@pytest.mark.parametrize("kind, ours", [("noise", "edm"), ("network", "dit-2")])
def test_a_model_of_another_noise_or_network_is_refused_with_both_names(tmp_path, whole, kind, ours):
    sentence = refused(tmp_path, whole | {kind: "flow"})
    assert f"'{kind}': 'flow'" in sentence and ours in sentence and "not a whole" not in sentence
    del whole[kind]
    assert f"'{kind}': None" in refused(tmp_path, whole)


@pytest.mark.parametrize("kept, weights", [("model", "raw"), ("model", "ema"), ("ema", "raw"), ("ema", "ema")])
def test_a_checkpoint_that_was_stripped_for_sharing_can_be_sampled_but_not_resumed(tmp_path, whole, kept, weights):
    path = str(tmp_path / "x.pt")
    shared = {name: whole[name] for name in (kept, "architecture", "noise", "network")}
    torch.save(shared, path)
    denoiser, checkpoint = sample.load_denoiser(path, weights)
    assert all(torch.equal(p, whole[kept][name]) for name, p in denoiser.named_parameters())
    assert checkpoint["class_names"] == ["0", "1", "2"]  # where it has none
    sample.main(["--ckpt", path, "--num=1", "--steps=1", "--device=cpu", f"--out={tmp_path}/x.npz"])
    sentence = refused(tmp_path, shared, resume=True)
    for name in {"model", "ema", "optimizer", "config", "step"} - {kept}:
        assert f"'{name}'" in sentence
    assert f"'{kept}'" not in sentence and "not a whole" not in sentence
    del shared[kept]
    assert "neither model nor ema" in refused(tmp_path, shared)


def test_a_run_goes_on_from_its_checkpoint_or_the_one_before(tmp_path, whole, capsys):
    path = str(tmp_path / "ft.pt")
    assert model.find_checkpoint(path) is None
    for step in (1, 2):
        save_checkpoint(path, whole | dict(step=step))
    assert model.find_checkpoint(path)["step"] == 2
    (tmp_path / "ft.pt").write_bytes(b"damaged")
    assert model.find_checkpoint(path)["step"] == 1 and "the one before" in capsys.readouterr().err
    (tmp_path / "ft.pt").unlink()
    assert model.find_checkpoint(path)["step"] == 1
    (tmp_path / "ft.prev.pt").write_bytes(b"damaged")  # no whole one is left: the run is not started afresh
    assert "ft.prev.pt" in mistake(lambda _: model.find_checkpoint(path))


@pytest.mark.parametrize("place", ["open", "save"])
def test_a_full_disk_leaves_both_checkpoints_whole(tmp_path, monkeypatch, whole, place):
    path = str(tmp_path / "ft.pt")
    for step in (1, 2):
        save_checkpoint(path, whole | dict(step=step))

    def full(*args, **kwargs):
        if place == "save":
            args[1].write(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model if place == "open" else torch, place, full, raising=place == "save")
    assert "No space left" in mistake(lambda _: save_checkpoint(path, whole | dict(step=3)))
    monkeypatch.undo()
    assert model.load_checkpoint(path)["step"] == 2
    assert model.load_checkpoint(str(tmp_path / "ft.prev.pt"))["step"] == 1
    assert sorted(f.name for f in tmp_path.iterdir()) == ["ft.prev.pt", "ft.pt"]
