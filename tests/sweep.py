"""The Frechet distance for a list of values of one sampling flag of fid.py.

python tests/sweep.py data/noto out/cm.pt mid_sigma 0.2,0.4,0.8,1.6 --steps 2 --features random --num 500

Flags that this script does not know go to fid.py as they are.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

FID = Path(__file__).resolve().parent.parent / "fid.py"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="the reference, as for fid.py")
    parser.add_argument("ckpt", help="checkpoint that draws the samples")
    parser.add_argument("flag", help="such as mid_sigma, steps, cfg_scale")
    parser.add_argument("values", help="with commas")
    args, others = parser.parse_known_args()
    print(f"| {args.flag} | distance |\n|---|---|")
    for value in args.values.split(","):
        command = [sys.executable, str(FID), args.data, args.ckpt, f"--{args.flag}={value}", "--json", *others]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            sys.exit((result.stderr.strip() or "fid.py was killed").splitlines()[-1])
        found = json.loads(result.stdout.splitlines()[-1])
        print(f"| {value} | {found.get('fid', found.get('random_fd', found.get('fd'))):.4g} |", flush=True)


if __name__ == "__main__":
    main()
