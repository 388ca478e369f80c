"""Official weights become ours: shapes, names and the order of values, by layers that are written out here."""

import pytest
import torch
from conftest import mistake

import convert
import model
import sample

DIM, HEADS, CLASSES, WIDE = 64, 4, 5, 32


def official(kind, prefix="module.model."):
    """A state dict of their shapes: {name: random tensor}, and the positions, which are not learned."""
    g = torch.Generator().manual_seed(0)
    new = lambda *shape: torch.randn(shape, generator=g)
    weights = {"x_embedder.proj.weight": new(DIM, 4, 2, 2), "x_embedder.proj.bias": new(DIM), "pos_embed": new(1, 16, DIM)}

    def linear(name, n_in, n_out):
        weights[f"{name}.weight"], weights[f"{name}.bias"] = new(n_out, n_in), new(n_out)

    linear("t_embedder.mlp.0", 2 * min(128, DIM // 2), DIM)  # 256 in their networks, which are wider
    linear("t_embedder.mlp.2", DIM, DIM)
    weights["y_embedder.embedding_table.weight"] = new(DIM, CLASSES) if kind == "maskdit" else new(CLASSES + 1, DIM)
    stacks = [("blocks", 3, DIM)]
    width = DIM
    if kind == "maskdit":
        stacks.append(("decoder_blocks", 2, WIDE))
        width = WIDE
        weights["mask_token"], weights["decoder_pos_embed"] = new(1, 1, WIDE), new(1, 16, WIDE)
        linear("decoder_layer.linear", DIM, WIDE)
        linear("decoder_layer.adaLN_modulation.1", DIM, 2 * DIM)
    for stack, depth, d in stacks:
        for i in range(depth):
            linear(f"{stack}.{i}.attn.qkv", d, 3 * d)
            linear(f"{stack}.{i}.attn.proj", d, d)
            linear(f"{stack}.{i}.mlp.fc1", d, 4 * d)
            linear(f"{stack}.{i}.mlp.fc2", 4 * d, d)
            linear(f"{stack}.{i}.adaLN_modulation.1", DIM, 6 * d)
    linear("final_layer.linear", width, 16)
    linear("final_layer.adaLN_modulation.1", DIM, 2 * width)
    return {prefix + name: tensor for name, tensor in weights.items()}


@pytest.mark.parametrize("kind", ["maskdit", "tread"])
def test_official_weights_become_a_checkpoint(tmp_path, kind):
    theirs = official(kind)
    key = "ema" if kind == "maskdit" else "ema_state_dict"
    torch.save({key: theirs, "step": 7}, tmp_path / "theirs.pt")
    path = str(tmp_path / "ours.pt")
    convert.main([str(tmp_path / "theirs.pt"), path, f"--heads={HEADS}", "--decoder_heads=2", "--image_size=8"])
    denoiser, _ = sample.load_denoiser(path)
    net, config = denoiser.net, denoiser.config
    assert (config.dim, config.depth, config.heads, config.num_classes) == (DIM, 3, HEADS, CLASSES)
    assert (config.decoder_depth, config.image_size, config.channels) == (2 if kind == "maskdit" else 0, 8, 4)
    named = {name.removeprefix("module.model."): tensor for name, tensor in theirs.items()}
    images = torch.randn(3, 4, 8, 8)
    embedded = torch.nn.functional.conv2d(
        images, named["x_embedder.proj.weight"], named["x_embedder.proj.bias"], stride=2).flatten(2).mT
    torch.testing.assert_close(net.patch_embed(model.patchify(images.permute(0, 2, 3, 1), 2)), embedded)
    null = net.label_embed.weight[-1]
    if kind == "maskdit":
        one_hot = torch.eye(CLASSES)[3]
        torch.testing.assert_close(net.label_embed.weight[3], named["y_embedder.embedding_table.weight"] @ one_hot)
        assert not null.any() and torch.equal(net.mask_token, named["mask_token"].flatten())
        assert torch.equal(net.decoder[1].fc2.weight, named["decoder_blocks.1.mlp.fc2.weight"])
        assert torch.equal(net.decoder_adaLN.bias, named["decoder_layer.adaLN_modulation.1.bias"])
    else:
        assert torch.equal(null, named["y_embedder.embedding_table.weight"][CLASSES])
    assert torch.equal(net.blocks[2].qkv.weight, named["blocks.2.attn.qkv.weight"])
    assert torch.equal(net.blocks[2].adaLN.weight, named["blocks.2.adaLN_modulation.1.weight"])
    z = torch.ones(2, 2, 2, 4)  # latents as they are meant: scaled by 0.18215
    torch.testing.assert_close(model.normalised(z, config.latent), 0.18215 * z)


def test_another_network_is_refused(tmp_path):
    theirs = official("tread", prefix="")
    theirs["blocks.0.norm.weight"] = torch.ones(DIM)
    torch.save(theirs, tmp_path / "theirs.pt")
    flags = ["--heads=4", "--image_size=8"]
    assert "norm" in mistake(convert.main, tmp_path / "theirs.pt", tmp_path / "ours.pt", *flags)
