"""What to run first on a machine with GPUs: does this code work there, and how fast is it?

python tests/tools/gpu_check.py                  # all GPUs, about six minutes
python tests/tools/gpu_check.py --device cpu     # a rehearsal at toy size, without a GPU

Each step says what is expected, then PASS, or LOOK with what was found instead. It goes on after a LOOK; the exit code
is their number. Expected times are arithmetic for an H100: nothing of this has been measured yet.
"""

import os
import subprocess
import sys
import tempfile
import time
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

from common import ROOT, records, where_from  # puts the project on the path

import numpy as np
import torch

import model
import train
from bench import draw_batch, our_loss
from prepare_data import Parser, check, run_script

# Flags of train.py, and of prepare_data.py.
BIG = ["--preset=maskdm-64", "--batch_size=256", "--steps=60"], ["--size=64", "--num=2048"]
TOY = ["--preset=demo", "--dim=32", "--depth=2", "--batch_size=16", "--steps=6"], ["--size=16", "--num=64"]
REPORTS = ["--eval_every=0", "--sample_every=0", "--save_every=0", "--log_every=1", "--warmup=2"]

def check_same(losses, others):
    off = max(abs(a / b - 1) for a, b in zip(losses, others, strict=True))
    check(off < 1e-2, f"the losses differ by {off:.1e}, expected less than 1e-2")

class Session:
    """The runs of this check: where they compute, how large they are, and their folder."""
    def __init__(self, device):
        self.device = device
        self.cuda = device == "cuda"
        self.gpus = torch.cuda.device_count() if self.cuda else 2
        check(self.gpus, "no GPU here: --device cpu rehearses this at toy size")
        self.folder = Path(tempfile.mkdtemp())
        network, images = BIG if self.cuda else TOY
        self.flags = [f"--data={self.folder}/set", f"--device={device}", *network, *REPORTS]
        self.call("set", "prepare_data.py", *images, "--val_frac=0.002", f"--out={self.folder}/set")

    def start(self, name, script, *args, processes=1):
        """Start a script. What it prints goes to NAME.txt, also why something is compiled again."""
        launch = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--"] if processes > 1 else []
        command = [sys.executable, *launch, ROOT / script, *args]
        environment = os.environ | dict(TORCH_LOGS="recompiles,graph_breaks")
        with open(self.folder / f"{name}.txt", "w") as out:
            return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)

    def call(self, name, script, *args, processes=1):
        """Run a script to its end -> what it printed."""
        code = self.start(name, script, *args, processes=processes).wait()
        text = (self.folder / f"{name}.txt").read_text()
        check(code == 0, f"{name}: {script} ended with {code}: {text[-600:]}")
        return text

    def train(self, name, *flags, processes=1):
        """Train stage 1; prints its speed, returns the loss of each step and what was printed."""
        flags = [*self.flags, f"--out_dir={self.folder}/{name}", "--mask_ratio=0.9", *flags]
        text = self.call(name, "train.py", *flags, processes=processes)
        rows = [r for r in records(self.folder / name) if "images_per_s" in r]
        first, middle, last = rows[0], rows[len(rows) // 2], rows[-1]
        per_step = (last["seconds"] - middle["seconds"]) / (last["step"] - middle["step"])
        print(f"   {name}: first step {first['seconds']:.1f} s, then {1e3 * per_step:.2f} ms a step, "
              f"{last['images_per_s']:.0f} images/s, loss {last['loss']:.4f}", flush=True)
        return [r["loss"] for r in rows], text

def machine(s):
    """Expected: CUDA, bfloat16, a C compiler and Python.h (torch.compile needs both), float32 products without TF32"""
    print(f"   {s.gpus} processes, {where_from()}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    if s.cuda:
        check(torch.cuda.is_bf16_supported(False), "no bfloat16: train.py computes in float32, four times slower")
        compile_blocks(model.Denoiser(model.ModelConfig()), s.device)
    check(not torch.backends.cuda.matmul.allow_tf32, "float32 products use TF32: the environment sets it")

def compile_blocks(net, device):
    """As train.py does, which says what is missing."""
    train.wrap(SimpleNamespace(dropout=0.0, compile=True), net, None, torch.device(device))

def one_step(net, batch, device, dtype):
    """Loss and gradient of a batch."""
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        loss = our_loss(net, batch)
        loss.backward()
    return loss.item(), torch.cat([p.grad.double().flatten().cpu() for p in net.parameters()])

CASES = {  # the network, and its mask
    "28 tokens": (dict(dim=128, heads=2, depth=2), (0.9, "block", 2)),
    "64 tokens": (dict(dim=128, heads=2, depth=2), (0.75,)),
    "256 tokens, classes": (dict(dim=128, heads=2, depth=2, num_classes=3), (0,)),
    "decoder": (dict(dim=144, heads=2, depth=2, decoder_depth=1, decoder_dim=64, decoder_heads=2), (0.5,)),
    "route": (dict(dim=128, heads=2, depth=3, route=(1, 2)), (0.5,))}

def compare(s, kind, dtype, limit):
    """Compare loss and gradient of every case with those of the CPU in float32."""
    wrong = []
    for name, (sizes, mask) in CASES.items():
        torch.manual_seed(0)
        net = model.Denoiser(model.ModelConfig(**sizes))
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.05)
        batch = draw_batch(net.config, 16, *mask)
        other = deepcopy(net).to(s.device)
        if kind == "compiled":
            compile_blocks(other, s.device)
        loss, gradient = one_step(net, batch, "cpu", torch.float32)
        other_loss, other_gradient = one_step(other, batch, s.device, dtype)
        off = ((other_gradient - gradient).norm() / gradient.norm()).item()
        print(f"   {name}, {kind}: loss {other_loss:.5f} ({loss:.5f}), gradient off by {off:.1e}", flush=True)
        if not (abs(other_loss / loss - 1) < limit and off < limit):
            wrong.append(f"{name}, {kind}")
    check(not wrong, f"not as on the CPU: {wrong}")

def same_as_cpu(s):
    """Expected: a batch's loss and gradient are those of the CPU, to 1e-3 in float32 and 5e-2 in bfloat16"""
    compare(s, "float32", torch.float32, 1e-3)
    compare(s, "bfloat16", torch.bfloat16, 5e-2)

def attention(s):
    """Expected: finite gradients where scores are very negative, without cuDNN's kernel, which train.py switches off"""
    for tokens, width in ((28, 64), (64, 64), (192, 64), (128, 72), (256, 72), (4096, 64)):
        qkv = torch.randn(3, 2, 4, tokens, width, device=s.device, dtype=torch.bfloat16)
        qkv[0, ..., 0] = 1
        qkv[1, ..., 0] = -120 * width**0.5
        qkv.requires_grad_()
        torch.nn.functional.scaled_dot_product_attention(*qkv).sum().backward()
        check(qkv.grad.isfinite().all(), f"gradients for {tokens} tokens are not finite")

def compiled(s):
    """Expected: stage 1 of maskdm-64 at batch 256 takes 12 to 20 ms a step, compiled 8 to 12; losses agree to 1e-2"""
    losses, _ = s.train("eager", "--no-compile")
    others, text = s.train("compiled")
    check_same(losses, others)
    again = [line for line in text.splitlines() if "Recompiling" in line or "Graph break" in line]
    check(len(again) <= 1, f"{len(again)} recompilations or graph breaks, expected one at most: compiled.txt tells why")
    compare(s, "compiled", torch.bfloat16, 5e-2)

def processes(s):
    """Expected: the losses of one process to 1e-2; images/s grow with batch 2048, less with 256 (bound by launches)"""
    if s.gpus < 2:
        return print("   left out: one GPU")
    losses, _ = s.train("one", "--no-compile")
    others, _ = s.train("all", "--no-compile", processes=s.gpus)
    if s.cuda:
        s.train("all_2048", "--batch_size=2048", processes=s.gpus)
    check_same(losses, others)

def muon(s):
    """Expected: a step with Muon takes 5 to 10 ms longer than an eager one (bound by launches); the loss falls"""
    losses, _ = s.train("muon", "--no-compile", "--optimizer=muon")
    check(losses[-1] < losses[0], f"the loss went from {losses[0]} to {losses[-1]}")

def stopping(s):
    """Expected: exit code 143 on SIGTERM with the checkpoint saved, and the run goes on from there"""
    flags = [*s.flags, f"--out_dir={s.folder}/stop", "--mask_ratio=0.9", "--no-compile", "--steps=100000"]
    process = s.start("stop", "train.py", *flags)
    log = s.folder / "stop/log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("images_per_s") > 4):
        time.sleep(0.2)
    process.terminate()
    check(process.wait() == 143, f"exit code {process.returncode}: stop.txt tells why")
    step = torch.load(s.folder / "stop/pt.pt", weights_only=True)["step"]
    text = s.call("again", "train.py", *flags, "--resume", f"--steps={step + 3}")
    check(f"starts at step {step}" in text, f"it did not go on from step {step}: {text[-300:]}")

def later_stages(s):
    """Expected: whole images, consistency tuning, samples and FID's code run; samples of one and all processes agree"""
    few = [*s.flags, "--no-compile", "--batch_size=16", "--steps=3"]
    folder = s.folder
    s.call("ft", "train.py", *few, f"--out_dir={folder}/ft", f"--init_from={folder}/eager/pt.pt")
    s.call("cm", "train.py", *few, f"--out_dir={folder}/cm", "--loss=consistency", f"--init_from={folder}/ft/ft.pt")
    draw = ["sample.py", f"--device={s.device}", "--batch_size=16"]
    s.call("few", *draw, f"--ckpt={folder}/cm/cm.pt", "--steps=2", "--num=4", f"--out={folder}/few.png")
    arrays = []
    for name, n in ("alone", 1), ("together", s.gpus):
        out = folder / f"{name}.npz"
        s.call(name, *draw, f"--ckpt={folder}/ft/ft.pt", "--steps=4", "--num=32", f"--out={out}", processes=n)
        arrays.append(np.load(out)["arr_0"].astype(int))
    s.call("fid", "fid.py", folder / "set", folder / "alone.npz", "--features=random", "--num=32",
           f"--device={s.device}")
    check(abs(arrays[0] - arrays[1]).max() <= 2, "samples of one and of all processes differ by more than 2 of 255")

def parts(s):
    """Expected: bench.py's share of the matrix products' peak is well below 0.4 at ratio 0.9 (launches limit it)"""
    if s.cuda:
        print(s.call("bench", "tests/tools/bench.py", "steps", "--only", "512x13 64px ratio 0.9"))

STEPS = (machine, same_as_cpu, attention, compiled, processes, muon, stopping, later_stages, parts)

def main(argv):
    parser = Parser(__doc__)
    parser.add("device", "cuda", "where to run", choices=("cuda", "cpu"))
    parser.add("only", "", "the steps whose names contain this")
    args = parser.parse_args(argv)
    torch.backends.cuda.enable_cudnn_sdp(False)  # as train.py does
    session = Session(args.device)
    looks = []
    for step in [step for step in STEPS if args.only in step.__name__]:
        print(f"{step.__name__}. {step.__doc__}", flush=True)
        begin = time.time()
        try:
            step(session)
            print(f"   PASS ({time.time() - begin:.0f} s)", flush=True)
        except (ValueError, RuntimeError, OSError) as error:
            looks.append(step.__name__)
            print(f"   LOOK: {error}", flush=True)
    print(f"look at {', '.join(looks)}" if looks else "all passed", f"(logs in {session.folder})")
    sys.exit(len(looks))

if __name__ == "__main__":
    run_script(main)
