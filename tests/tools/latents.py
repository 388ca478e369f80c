"""Images to the latents of Stable Diffusion's autoencoder and back; needs `pip install diffusers` and a GPU.

python tests/tools/latents.py encode data/imagenet latents.npy labels.npy   # a set prepared with --size 256
python tests/tools/latents.py decode out/latents.npz out/samples.npz        # samples, for fid.py
"""

import sys

import numpy as np
import torch

BATCH = 64

def encode(vae, folder, latents, labels):
    """Training images of a prepared set -> latents, drawn once, float32 (N, 4, S/8, S/8), and their labels."""
    images = np.load(f"{folder}/train.npy", mmap_mode="r")
    parts = []
    for start in range(0, len(images), BATCH):
        pixels = torch.from_numpy(images[start : start + BATCH]).permute(0, 3, 1, 2)
        moments = vae.encode(pixels.cuda() / 127.5 - 1)
        parts.append(moments.latent_dist.sample().cpu().numpy())
    np.save(latents, np.concatenate(parts))
    np.save(labels, np.load(f"{folder}/train_labels.npy"))

def decode(vae, latents, out):
    """Latents drawn by sample.py -> images, uint8 (N, S, S, 3)."""
    z = torch.from_numpy(np.load(latents)["arr_0"])
    parts = []
    for part in z.split(BATCH):
        pixels = (vae.decode(part.cuda()).sample + 1) * 127.5
        parts.append(pixels.clamp(0, 255).byte().cpu().permute(0, 2, 3, 1).numpy())  # truncated, as MaskDiT does
    np.savez(out, arr_0=np.concatenate(parts))

@torch.no_grad()
def main(command, *paths):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained("stabilityai/sd-vae-ft-ema").eval().cuda()
    {"encode": encode, "decode": decode}[command](vae, *paths)

if __name__ == "__main__":
    main(*sys.argv[1:])
