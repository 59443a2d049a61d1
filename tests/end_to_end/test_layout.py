"""Imports run one way, and what must be quick imports no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "cifar_lightning"
# Left may not import right; modules of one layer may import each other only in the order given here.
LAYERS = [
    [
        "errors",
        "limits",
        "memory",
        "wording",
        "recipes",
        "flags",
        "files",
        "operations",
        "policies",
        "augment",
        "splits",
        "speednet",
        "resnets",
        "stems",
        "zoo",
        "models",
        "views",
        "evaluation",
        "optim",
        "schedules",
        "steps",
        "agreement",
        "totals",
        "mixing",
        "averaging",
        "environment",
        "runs",
        "images",
        "folders",
        "download",
        "synthetic",
        "sources",
        "add_checksum",
        "signals",
        "guard",
    ],
    ["significance", "calibration", "analysis", "gallery"],
    ["loader", "figures"],
    ["weights", "pretrained"],
    ["data"],
    ["classifier"],
    ["results", "insights", "findings", "comparison", "charts", "page", "terminal", "report", "model_card"],
    ["callbacks", "answers", "dashboard", "progress", "predict", "export", "doctor"],
    ["exact", "checkpoint"],
    ["precision", "resume", "tune", "parser", "noise", "failures", "training"],
    ["help", "cli"],
]
ORDER = [name for layer in LAYERS for name in layer]
NEVER_TOGETHER = {"data": {"classifier", "report"}, "classifier": {"data", "report"}, "report": {"data", "classifier"}}


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("cifar_lightning"):
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_imports_run_one_way(path):
    if path.stem == "__init__":
        return
    assert path.stem in ORDER, "a new module needs its place in the order"
    for imported in imported_modules(path):
        assert ORDER.index(imported) < ORDER.index(path.stem)
        assert imported not in NEVER_TOGETHER.get(path.stem, set())


@pytest.mark.parametrize("module", ["cifar_lightning", "cifar_lightning.runs.folder", "cifar_lightning.data.datasets"])
def test_quick_modules_import_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, timeout=60).returncode == 0


def test_every_module_has_its_tests_and_stays_below_400_lines():
    for path in PACKAGE.glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) < 400, path.name
        if path.stem not in ("__init__", "errors"):
            assert (Path(__file__).parent / f"test_{path.stem}.py").exists(), path.name
