"""What to run first on a machine with GPUs: does this code work there, and how fast is it?

python tests/tools/gpu_check.py                  # all GPUs, about six minutes
python tests/tools/gpu_check.py --device cpu     # a rehearsal at toy size, without a GPU

Each step says what is expected, then PASS, or LOOK with what was found instead. It goes on after a LOOK; the exit code
is their number. Expected times are arithmetic for an H100: nothing of this has been measured yet.
"""

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import types
from copy import deepcopy
from pathlib import Path

from common import ROOT, records  # puts the project on the path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import model
import sample
import train
from bench import draw_batch, our_loss
from prepare_data import Parser, check, run_script

REPORTS = ["--eval_every=0", "--sample_every=0", "--save_every=0", "--log_every=1", "--warmup=2"]
BIG = dict(network=["--preset=maskdm-64"], batch=256, steps=60, size=64, images=2048)
TOY = dict(network=["--preset=demo", "--dim=32", "--depth=2", "--heads=2", "--lr=1e-3", "--patch_size=4"],
           batch=16, steps=6, size=16, images=64)

def compile_blocks(net, device):
    """As train.py does."""
    train.wrap(types.SimpleNamespace(dropout=0.0, compile=True), net, None, torch.device(device))

class Session:
    """The runs of this check: their scripts, their folder, and how large they are."""

    def __init__(self, device, gpus, folder):
        self.cuda = device == "cuda"
        self.device = device
        self.gpus = gpus
        self.folder = folder
        self.sizes = BIG if self.cuda else TOY
        self.can_compile = self.cuda
        try:
            compile_blocks(model.Denoiser(model.ModelConfig()), device)
        except ValueError:  # no C compiler, or no Python.h
            self.can_compile = False

    def command(self, script, *args, processes=1):
        launch = [sys.executable]
        if processes > 1:
            launch += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--"]
        return [*launch, str(ROOT / script), *map(str, args)]

    def call(self, name, script, *args, processes=1, log=""):
        """Run a script to its end; what it prints is kept in NAME.txt."""
        with open(self.folder / f"{name}.txt", "w") as out:
            environment = os.environ | dict(TORCH_LOGS=log) if log else None
            command = self.command(script, *args, processes=processes)
            code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=environment).returncode
        text = Path(out.name).read_text()
        check(code == 0, f"{' '.join(command[1:])} ended with {code}: {text[-600:]}")
        return text

    def train_flags(self, name, *flags):
        s = self.sizes
        batch = [] if any(f.startswith("--batch_size") for f in flags) else [f"--batch_size={s['batch']}"]
        return [f"--data={self.folder}/set", f"--out_dir={self.folder}/{name}", f"--device={self.device}",
                *s["network"], *batch, f"--steps={s['steps']}", *REPORTS, *flags]

    def train(self, name, *flags, processes=1, log=""):
        """Train stage 1; prints its speed, returns its losses by step and what was printed."""
        flags = self.train_flags(name, "--mask_ratio=0.9", *flags)
        text = self.call(name, "train.py", *flags, processes=processes, log=log)
        rows = [r for r in records(self.folder / name) if "images_per_s" in r]
        seconds = [r["seconds"] for r in rows]
        half = len(rows) // 2
        per_step = (seconds[-1] - seconds[half]) / (len(rows) - 1 - half)
        print(f"   {name}: first step {seconds[0]:.1f} s, then {1e3 * per_step:.2f} ms a step, "
              f"{rows[-1]['images_per_s']:.0f} images/s, loss {rows[-1]['loss']:.4f}", flush=True)
        return [r["loss"] for r in rows], text

def largest_difference(losses, others):
    return max(abs(a / b - 1) for a, b in zip(losses, others, strict=True))

def machine(s):
    """Expected: CUDA, bfloat16, a C compiler and Python.h (torch.compile needs both), float32 products without TF32"""
    print(f"   torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        print(f"   GPU {i}: {about.name}, sm_{about.major}{about.minor}, {about.total_memory / 1e9:.0f} GB")
    if s.cuda:
        check(torch.cuda.is_bf16_supported(False), "no bfloat16: train.py computes in float32, four times slower")
        check(s.can_compile, "no C compiler or no Python.h: give train.py --no-compile, or install gcc and python3-dev")
    check(not torch.backends.cuda.matmul.allow_tf32, "float32 products use TF32: the environment sets it")

def one_step(net, batch, device, dtype):
    """Loss and gradient of a batch."""
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        loss = our_loss(net, batch)
        loss.backward()
    return loss.item(), torch.cat([p.grad.double().flatten().cpu() for p in net.parameters()])

def same_as_cpu(s):
    """Expected: a batch's loss and gradient are those of the CPU, to 1e-3 in float32 and 5e-2 in bfloat16"""
    cases = {
        "28 tokens": (dict(dim=128, heads=2, depth=2), (0.9, "block", 2)),
        "64 tokens": (dict(dim=128, heads=2, depth=2), (0.75, "patch", 1)),
        "256 tokens, classes": (dict(dim=128, heads=2, depth=2, num_classes=3), (0,)),
        "decoder": (dict(dim=144, heads=2, depth=2, decoder_depth=1, decoder_dim=64, decoder_heads=2),
                    (0.5, "patch", 1)),
        "route": (dict(dim=128, heads=2, depth=3, route=(1, 2)), (0.5, "patch", 1))}
    wrong = []
    for name, (sizes, mask) in cases.items():
        torch.manual_seed(0)
        net = model.Denoiser(model.ModelConfig(**sizes))
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.05)
        batch = draw_batch(net.config, 16, *mask)
        loss, gradient = one_step(deepcopy(net), batch, "cpu", torch.float32)
        for kind, dtype, limit in (("float32", torch.float32, 1e-3), ("bfloat16", torch.bfloat16, 5e-2),
                                   ("bfloat16, compiled", torch.bfloat16, 5e-2)):
            other = deepcopy(net).to(s.device)
            if "compiled" in kind:
                if not s.can_compile:
                    continue
                compile_blocks(other, s.device)
            other_loss, other_gradient = one_step(other, batch, s.device, dtype)
            off = ((other_gradient - gradient).norm() / gradient.norm()).item()
            print(f"   {name}, {kind}: loss {other_loss:.5f} ({loss:.5f}), gradient off by {off:.1e}", flush=True)
            if not (abs(other_loss / loss - 1) < limit and off < limit):
                wrong.append(f"{name}, {kind}")
    check(not wrong, f"not as on the CPU: {wrong}")

def attention(s):
    """Expected: finite gradients by the default kernel without cuDNN's; train.py keeps cuDNN's away for this reason"""
    if not s.cuda:
        return print("   left out: no GPU")
    wrong = []
    for tokens, width in ((28, 64), (64, 64), (192, 64), (128, 72), (256, 72), (4096, 64)):
        found = []
        for backends in ([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION], [SDPBackend.CUDNN_ATTENTION]):
            q, k, v = (torch.randn(2, 4, tokens, width, device="cuda", dtype=torch.bfloat16) for _ in range(3))
            q[..., 0], k[..., 0] = 1, -120 * math.sqrt(width)  # very negative scores
            leaves = [t.requires_grad_() for t in (q, k, v)]
            try:
                with sdpa_kernel(backends):
                    F.scaled_dot_product_attention(*leaves).sum().backward()
                found.append(all(t.grad.isfinite().all().item() for t in leaves))
            except RuntimeError:
                found.append("not available")
        print(f"   {tokens} tokens, heads of {width}: finite without cuDNN {found[0]}, with it {found[1]}")
        if found[0] is not True:
            wrong.append(tokens)
    check(not wrong, f"gradients for {wrong} tokens are not finite")

def compiled(s):
    """Expected: stage 1 of maskdm-64 at batch 256 takes 12 to 20 ms a step, compiled 8 to 12; the same losses to 1e-2"""
    losses, _ = s.train("eager", "--no-compile")
    if not s.can_compile:
        return print("   not compiled")
    others, text = s.train("compiled", log="recompiles,graph_breaks")
    again = sum("Recompiling" in line or "Graph break" in line for line in text.splitlines())
    check(largest_difference(losses, others) < 1e-2, "compiled and eager losses differ by more than 1e-2")
    check(again <= 1, f"{again} recompilations or graph breaks, expected one at most: the end of the run's output tells why")

def processes(s):
    """Expected: the losses of one process to 1e-2; images/s grow with batch 2048, hardly with 256 (bound by launches)"""
    if s.gpus < 2:
        return print("   left out: one GPU")
    losses, _ = s.train("one", "--no-compile")
    others, _ = s.train("all", "--no-compile", processes=s.gpus)
    if s.cuda:
        s.train("all_2048", "--batch_size=2048", processes=s.gpus)
    check(largest_difference(losses, others) < 1e-2, "losses differ: gradients are not averaged, or noise is another")

def muon(s):
    """Expected: a step with Muon takes 5 to 10 ms longer than an eager one (bound by launches); the loss falls"""
    losses, _ = s.train("muon", "--no-compile", "--optimizer=muon")
    check(losses[-1] < losses[0], f"the loss went from {losses[0]} to {losses[-1]}")

def stopping(s):
    """Expected: exit code 143 on SIGTERM with the checkpoint saved, and the run goes on from there"""
    flags = s.train_flags("stop", "--mask_ratio=0.9", "--no-compile", "--steps=100000")
    with open(s.folder / "stop.txt", "w") as out:
        process = subprocess.Popen(s.command("train.py", *flags), stdout=out, stderr=subprocess.STDOUT)
    log = s.folder / "stop/log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("images_per_s") > 4):
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    code = process.wait()
    check(code == 143, f"exit code {code}: {Path(out.name).read_text()[-300:]}")
    step = torch.load(s.folder / "stop/pt.pt", weights_only=True)["step"]
    text = s.call("again", "train.py", *flags, "--resume", f"--steps={step + 3}")
    check(f"starts at step {step}" in text, f"it did not go on from step {step}: {text[-300:]}")

def later_stages(s):
    """Expected: whole images, consistency tuning, samples and FID's code run; samples of 1 and of all processes agree"""
    few = ["--no-compile", "--batch_size=16", "--steps=3"]
    s.call("ft", "train.py", *s.train_flags("ft", *few), f"--init_from={s.folder}/eager/pt.pt")
    s.call("cm", "train.py", *s.train_flags("cm", *few, "--loss=consistency", f"--init_from={s.folder}/ft/ft.pt"))
    arrays = []
    for n in (1, s.gpus):
        path = s.folder / f"samples{len(arrays)}.npz"
        s.call(f"sample{len(arrays)}", "sample.py", "--ckpt", f"{s.folder}/ft/ft.pt", "--num", 32, "--steps", 4,
               "--device", s.device, "--batch_size", 16, "--out", path, processes=n)
        arrays.append(np.load(path)["arr_0"].astype(int))
    s.call("few", "sample.py", "--ckpt", f"{s.folder}/cm/cm.pt", "--steps", 2, "--num", 4, "--device", s.device,
           "--out", s.folder / "few.png")
    text = s.call("fid", "fid.py", f"{s.folder}/set", s.folder / "samples0.npz", "--features", "random", "--num", 32,
                  "--device", s.device)
    check("random_fd" in text, "fid.py printed no distance")
    off = abs(arrays[0] - arrays[1]).max()
    check(off <= 2, f"samples of one and of several processes differ by {off} of 255, expected 2 at most")

def parts(s):
    """Expected: bench.py's share of the matrix products' peak well below 0.4 at ratio 0.9, where launches are the limit"""
    if not s.cuda:
        return print("   left out: no GPU")
    print(s.call("bench", "tests/tools/bench.py", "steps", "--only", "512x13 64px ratio 0.9"))

STEPS = (machine, same_as_cpu, attention, compiled, processes, muon, stopping, later_stages, parts)

def make_set(folder, size, images):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split, n in ("train", images), ("val", 16):
        coarse = rng.integers(0, 256, (n, size // 4, size // 4, 3), dtype=np.uint8)
        np.save(folder / f"{split}.npy", coarse.repeat(4, axis=1).repeat(4, axis=2))
    meta = dict(num_train=images, num_val=16, size=size, channels=3, dtype="uint8", class_names=None, latent=None)
    (folder / "meta.json").write_text(json.dumps(meta))

def main(argv):
    parser = Parser(__doc__)
    parser.add("device", "cuda", "where to run", choices=("cuda", "cpu"))
    parser.add("only", "", "the steps whose names contain this")
    args = parser.parse_args(argv)
    gpus = torch.cuda.device_count() if args.device == "cuda" else 2
    check(gpus, "no GPU here: --device cpu rehearses this at toy size")
    sample.pick_device(args.device)
    folder = Path(tempfile.mkdtemp())
    session = Session(args.device, gpus, folder)
    make_set(folder / "set", session.sizes["size"], session.sizes["images"])
    looks = []
    for step in STEPS:
        if args.only not in step.__name__:
            continue
        print(f"{step.__name__}. {step.__doc__}", flush=True)
        begin = time.time()
        try:
            step(session)
            print(f"   PASS ({time.time() - begin:.0f} s)", flush=True)
        except (ValueError, RuntimeError, OSError) as error:
            looks.append(step.__name__)
            print(f"   LOOK: {error}", flush=True)
    print(f"look at {', '.join(looks)}" if looks else "all passed", f"(logs in {folder})")
    sys.exit(len(looks))

if __name__ == "__main__":
    run_script(main)
