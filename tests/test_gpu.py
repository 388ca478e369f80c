"""The path of the scripts on a GPU, on a pretended one: right places, one wait a step, the losses of the CPU.

`tests/pretend_gpu.py` says what is pretended. Bugs of the usual kinds are planted, and found.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, few_images, make_dataset

import gpu_check
import model
import train

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
STEPS = 3
SAME = ["--batch_size=12", f"--steps={STEPS}", "--log_every=1", *[flag for flag in TINY if "device" not in flag]]
MASKED = ["--mask_ratio=0.5", "--mask_type=patch"]
RUNS = {
    "masked": ["--data=SET", *MASKED, "--class_cond", "--hflip", "--micro_batch=4"],
    "decoder": ["--data=SET", *MASKED, "--decoder_depth=1"],
    "route": ["--data=SET", *MASKED, "--route=0,1", "--class_cond"],
    "decoder in bfloat16": ["--data=SET", *MASKED, "--decoder_depth=1", "--class_cond", "--dtype=bfloat16"],
    "two processes": ["--data=SET", *MASKED, "--micro_batch=3", "--grad_clip=1"],
    "muon": ["--data=SET", *MASKED, "--optimizer=muon"],
    "latents": ["--data=LATENTS"],
    "continual": ["--data=SET", "--init_from=FIRST", "--replay=OLD", "--replay_frac=0.3", "--distill_from=FIRST",
                  "--ewc=10", *MASKED],
    "SCT": ["--data=SET", "--init_from=FIRST", "--loss=consistency", "--ref_batch=9"]}
MOVE = "{name: self.move(tensor) for name"  # of a batch


PROCESSES = {"two processes": 2}
TOLERANCE = {"decoder in bfloat16": 0.02, "muon": 0.02}  # torch's Muon works in bfloat16; else 1e-4


def unmoved(name):
    return "masked", "train.py", MOVE, f"{{name: self.move(tensor) if name != '{name}' else tensor for name"


BUGS = {  # what is wrong: (a run, a file, the right text, the wrong one)
    "noise is by a generator of the CPU": ("masked", "train.py", "2, step, device=self.device)", "2, step)"),
    "sigma comes late": unmoved("sigma"),
    "visible comes late": unmoved("visible"),
    "labels come late": unmoved("labels"),
    "weights of the images come late": unmoved("weight"),
    "patches come late": ("masked", "train.py", "normalised(self.move(patches)", "normalised((patches)"),
    "labels of references come late": ("SCT", "train.py", "reference_labels=self.move(labels)",
                                       "reference_labels=labels"),
    "frequencies are no buffer": ("masked", "model.py", 'self.register_buffer("freq", torch.from_numpy(freq).float(), '
                                  "persistent=False)", "self.freq = torch.from_numpy(freq).float()"),
    "decoder's positions are no buffer": ("decoder", "model.py", 'self.register_buffer("decoder_positions", positions, '
                                          "persistent=False)", "self.decoder_positions = positions"),
    "a loss is read in every part": ("masked", "train.py", "means[name] +=", "loss.sum().item(); means[name] +="),
    "the flag to stop is elsewhere": ("masked", "train.py", "torch.full_like(norm, len(received))",
                                      "torch.full((), float(len(received)))"),
    "the validation set stays": ("masked", "train.py", "{name: tensor.to(device) for name", "{name: tensor for name"),
    "an anchor comes late": ("continual", "train.py", "(p.detach() - anchor) * strength",
                             "(p.detach() - anchor.cpu()) * strength"),
    "the scale of latents stays": ("latents", "model.py", "torch.tensor(latent).to(data.device, non_blocking=True)",
                                   "torch.tensor(latent)"),
    "importance is read as numbers": ("continual", "model.py", "{name: t / num_images for", "{name: t.numpy() for"),
    "copies wait in the loader": ("masked", "train.py", "tensor.to(self.device, non_blocking=True)",
                                  "tensor.to(self.device)"),
    "memory is not pinned": ("masked", "train.py", "tensor.contiguous().pin_memory()", "tensor.contiguous()"),
    "the loader takes the first GPU": ("masked", "train.py", "loader.submit(torch.cuda.set_device, device)", "pass"),
    "compile is given an option that there is not": ("masked", "train.py", "combo_kernels=True", "combo_kernel=True"),
    "a weight stays in float32": ("decoder in bfloat16", "model.py", "self.mask_token.to(x.dtype)", "self.mask_token"),
    "processes meet through gloo": ("two processes", "train.py", "dist.init_process_group(",
                                    "dist.init_process_group('gloo', "),
    "gradients are never averaged": ("two processes", "train.py", "model.require_backward_grad_sync = now",
                                     "model.require_backward_grad_sync = False"),
    "gradients are averaged but the last time": ("two processes", "train.py", "start + micro_batch == local_batch)",
                                                 "start + micro_batch < local_batch)"),
    "the network is not in DDP": ("two processes", "train.py", "return DDP(denoiser, gradient_as_bucket_view=True, "
                                  "forward_sync_buffers=False)", "return denoiser"),
    "losses are of one process": ("two processes", "train.py", "dist.all_reduce(tensor)", "pass"),
    "a process leaves early": ("two processes", "train.py", "        dist.barrier()\n", ""),
    "float64 reaches the network": ("sample", "model.py", "(c_in * x).to(dtype)", "c_in * x"),
    "noise levels of float64 reach it": ("sample", "model.py", "c_noise.to(dtype)", "c_noise"),
    "samples stay": ("sample", "sample.py", "unpatchify(x, c.patch_size).float().cpu()",
                     "unpatchify(x, c.patch_size).float()"),
    "noise of samples stays": ("sample", "sample.py", ".to(device, torch.float64)", ".to(torch.float64)"),
    "classes of samples stay": ("sample", "sample.py", "torch.tensor(cycled, device=device)", "torch.tensor(cycled)")}


def numbers(folder):
    """The losses in a run's log."""
    rows = [json.loads(line) for line in open(folder / "log.jsonl")]
    return [r.get("loss", r.get("val_loss")) for r in rows if "loss" in r or "val_loss" in r]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """{run or bug: what is wrong with it on the pretended GPU, or None}."""
    top = tmp_path_factory.mktemp("gpu")
    make_dataset(top / "SET", classes=3)
    make_dataset(top / "OLD", classes=3, seed=1)
    make_dataset(top / "LATENTS", channels=4, dtype=np.float32)

    def flags(folder, *more):
        return [f.replace("=FIRST", f"={top}/first/ft.pt").replace("=SET", f"={top}/SET").replace("=OLD", f"={top}/OLD")
                .replace("=LATENTS", f"={top}/LATENTS") for f in (f"--out_dir={top}/{folder}", *SAME, *more)]

    train.main(flags("first", "--data=SET", "--class_cond", "--device=cpu"))
    with few_images(8):  # as on the pretended GPU
        for name, run in RUNS.items():
            train.main(flags(f"cpu/{name}", *run, "--device=cpu"))
    jobs = {name: dict(script="train", args=flags(f"gpu/{name}", *run), processes=PROCESSES.get(name, 1))
            for name, run in RUNS.items()}
    draw = ["--ckpt", f"{top}/first/ft.pt", "--num=3", "--steps=2", "--cfg_scale=2", "--sampler=consistency", "--out"]
    jobs["sample"] = dict(script="sample", args=[*draw, f"{top}/sample.npz"])
    judge = [f"{top}/SET", f"{top}/OLD", "--features=random", "--num=4", "--metrics=fid,pr"]
    jobs["fid"] = dict(script="fid", args=judge)
    for name, (run, file, old, new) in BUGS.items():
        args = [*draw, f"{top}/{name}.npz"] if run == "sample" else flags(f"gpu/{name}", *RUNS[run])
        jobs[name] = dict(script="sample" if run == "sample" else "train", args=args, edit=[file, old, new],
                          processes=PROCESSES.get(run, 1))
    halves = [list(jobs.values())[start::2] for start in (0, 1)]  # for two cores
    running = []
    for i, half in enumerate(halves):
        (top / f"jobs{i}.json").write_text(json.dumps(half))
        command = [sys.executable, ROOT / "tests/pretend_gpu.py", top / f"jobs{i}.json"]
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=open(top / f"errors{i}.txt", "w"), text=True,
                                        env={**os.environ, "OMP_NUM_THREADS": "1"}))
    lines = [None] * len(jobs)
    for start, process in enumerate(running):
        found = [json.loads(line) for line in process.communicate()[0].splitlines() if line.startswith('{"error"')]
        assert len(found) == len(halves[start]), (top / f"errors{start}.txt").read_text()[-2000:]
        lines[start::2] = found

    def verdict(name, line):
        if line["error"] or jobs[name]["script"] != "train":
            return line["error"]
        if line["waits"][1:STEPS] != [["tolist"]] * (STEPS - 1):  # after the last step it evaluates and saves
            return f"waits {line['waits'][1:]}"
        if line["waits_elsewhere"]:
            return f"the loader waits: {line['waits_elsewhere']}"
        run = BUGS.get(name, [name])[0]
        ours, theirs = (numbers(top / place) for place in (f"gpu/{name}", f"cpu/{run}"))
        same = np.allclose(ours, theirs, rtol=TOLERANCE.get(run, 1e-4))
        return None if same else f"losses {ours}, expected {theirs}"

    return {name: verdict(name, line) for name, line in zip(jobs, lines)}


@pytest.mark.parametrize("name", [*RUNS, "sample", "fid"])
def test_it_runs_with_the_losses_of_the_cpu_and_waits_once_a_step(found, name):
    assert found[name] is None


def test_on_a_gpu_muon_is_torchs(found, tmp_path_factory):
    (path,) = tmp_path_factory.getbasetemp().glob("gpu0/gpu/muon/pt.pt")
    adamw, muon = torch.load(path, weights_only=True)["optimizer"]
    assert {"momentum_buffer"} == set(muon["state"][0]) and muon["param_groups"][0]["adjust_lr_fn"] == "match_rms_adamw"


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_found(found, name):
    assert found[name] is not None


def test_gpu_check_at_toy_size(capsys):
    """The whole of what is to be run first on a GPU."""
    result = subprocess.run([sys.executable, ROOT / "tests/tools/gpu_check.py", "--device=cpu"], capture_output=True,
                            text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0 and "all passed" in result.stdout, result.stdout + result.stderr
    assert result.stdout.count("   PASS") == len(gpu_check.STEPS) == 9


def test_gpu_check_tells_what_is_not_as_expected(monkeypatch, capsys):
    loss = model.denoising_loss
    wrong_in_bfloat16 = lambda *tensors: loss(*tensors) * (1 + 0.1 * torch.is_autocast_enabled("cpu"))
    monkeypatch.setattr(model, "denoising_loss", wrong_in_bfloat16)
    with pytest.raises(SystemExit) as end:
        gpu_check.main(["--device=cpu", "--only=same"])
    out = capsys.readouterr().out
    assert "LOOK: not as on the CPU: ['28 tokens, bfloat16'," in out and "'28 tokens, float32'" not in out
    assert end.value.code == 1
