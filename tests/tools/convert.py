"""Weights of the official MaskDiT or TREAD network -> a checkpoint that sample.py, fid.py and train.py take.

python tests/tools/convert.py imagenet256.pt out/maskdit.pt --heads 16
python sample.py --ckpt out/maskdit.pt --steps 40 --cfg_scale 1.5 --num 50000 --out out/latents.npz

Their GELU is the tanh approximation, ours is exact: outputs differ by about 5e-5.
"""

import sys
from dataclasses import asdict

from common import ROOT  # noqa: F401, puts the project on the path

import torch

import model
from prepare_data import Parser, check, run_script

LAYERS = {  # theirs: ours
    "t_embedder.mlp": "time_embed",
    "decoder_layer.adaLN_modulation.1": "decoder_adaLN",
    "decoder_layer.linear": "decoder_embed",
    "final_layer.adaLN_modulation.1": "final_adaLN",
    "final_layer.linear": "final_linear",
    "adaLN_modulation.1": "adaLN",
    "decoder_blocks": "decoder",
    "attn.": "", "mlp.": ""}

def find_weights(stored):
    """The averaged weights in their checkpoint, by names without prefixes."""
    for key in ("ema", "ema_state_dict", "model", "model_state_dict"):
        stored = stored.get(key, stored)
    names = {name: name.replace("module.", "").replace("_orig_mod.", "").removeprefix("model.") for name in stored}
    return {names[name]: tensor.float() for name, tensor in stored.items() if not name.endswith("pos_embed")}

def convert(theirs, heads, decoder_heads, image_size):
    """-> our weights and their ModelConfig."""
    ours = {}
    for name, tensor in theirs.items():
        for old, new in LAYERS.items():
            name = name.replace(old, new)
        ours[f"net.{name}"] = tensor
    kernel = ours.pop("net.x_embedder.proj.weight")  # (dim, C, p, p): our patches are (p, p, C)
    ours["net.patch_embed.weight"] = kernel.permute(0, 2, 3, 1).flatten(1)
    ours["net.patch_embed.bias"] = ours.pop("net.x_embedder.proj.bias")
    table = ours.pop("net.y_embedder.embedding_table.weight")
    dim, channels, patch_size, _ = kernel.shape
    if table.shape[0] == dim:  # MaskDiT: a linear layer on one-hot vectors, and zeros for no class
        table = torch.cat([table.T, table.new_zeros(1, dim)])
    ours["net.label_embed.weight"] = table
    sizes = {}
    if "net.mask_token" in ours:
        ours["net.mask_token"] = ours["net.mask_token"].flatten()
        sizes = dict(decoder_depth=count_blocks(ours, "decoder"), decoder_dim=len(ours["net.mask_token"]),
                     decoder_heads=decoder_heads)
    latent = ((0.0,) * channels, (0.5 / 0.18215,) * channels)
    config = model.ModelConfig(patch_size=patch_size, dim=dim, depth=count_blocks(ours, "blocks"), heads=heads,
                               image_size=image_size, channels=channels, num_classes=len(table) - 1, latent=latent, **sizes)
    return ours, config

def count_blocks(weights, kind):
    return len({name.split(".")[2] for name in weights if name.startswith(f"net.{kind}.")})

def main(argv):
    parser = Parser(__doc__)
    parser.add_argument("official", help="their checkpoint")
    parser.add_argument("out", help="ours")
    parser.add("heads", 16, "attention heads (XL and L: 16, B: 12, S: 6)", low=1)
    parser.add("decoder_heads", 16, "of MaskDiT's decoder", low=1)
    parser.add("image_size", 32, "latent cells per side", low=1)
    args = parser.parse_args(argv)
    theirs = find_weights(torch.load(args.official, "cpu"))
    weights, config = convert(theirs, args.heads, args.decoder_heads, args.image_size)
    missing = model.Denoiser(config).state_dict().keys() ^ weights.keys()
    check(not missing, f"{args.official} is not a network of MaskDiT or TREAD: {sorted(missing)[:9]} are missing or unknown")
    model.save_checkpoint(args.out, dict(
        ema=weights, architecture=asdict(config), noise=model.NOISE, network=model.NETWORK, config=dict(label_dropout=0.1)))

if __name__ == "__main__":
    run_script(main)
