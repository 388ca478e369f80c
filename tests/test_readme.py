"""Every measured table of README is what a file under assets/results/ says."""

import json
import re
from pathlib import Path

import pytest

import bench
import continual
import label_agreement
import reproduce

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
DESCRIBING = ("| flag |", "| file |")  # tables without measurements
TABLE = re.compile(r"(?:<!-- (assets/results/\S+\.json)(?: (\w+))? -->\n)?((?:^\|.*\n)+)", re.MULTILINE)
MEASURED = [m.groups() for m in TABLE.finditer(README) if not m[3].startswith(DESCRIBING)]
MAKERS = {
    "table": lambda r: reproduce.table(r["results"]),
    "ratios": lambda r: reproduce.time_ratios(r["results"]),
    "forgetting": lambda r: continual.table(r["results"], r["tasks"]),
    "levels": lambda r: continual.change_by_level(r["results"], r["first"]),
    "agreement": lambda r: label_agreement.table(r["results"]),
    "speed": lambda r: bench.summary(r["results"]),
    "demo": lambda r: bench.demo_table(r["results"]),
}


@pytest.mark.parametrize("file, kind, text", MEASURED)
def test_table_equals_its_results(file, kind, text):
    assert file, f"no file is named above the table that begins {text.splitlines()[0]}"
    assert text.strip() == MAKERS[kind or "table"](json.loads((ROOT / file).read_text())).strip()


@pytest.mark.parametrize("file", sorted((ROOT / "assets/results").glob("*.json")))
def test_results_can_be_repeated(file):
    stored = json.loads(file.read_text())
    assert re.match("python (tests/)?[a-z_]+.py", stored["command"])
    for r in stored["results"]:
        assert re.fullmatch(r"[0-9a-f]{7,}", r["commit"]) and r["machine"] and r["date"]
    assert file.name in README
    assert "/root" not in file.read_text() and "/tmp" not in file.read_text()
