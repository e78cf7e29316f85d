"""The layers of the package (pyproject.toml, [tool.importlinter]): arrows run down."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from repository import ROOT


def lint(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_arrows_run_down() -> None:
    done = lint()
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


def test_an_arrow_up_is_found(tmp_path: Path) -> None:
    """With two layers exchanged, the imports between them point up."""
    rules = (ROOT / "pyproject.toml").read_text()
    upside_down = rules.replace('"policy",\n    "backends",', '"backends",\n    "policy",')
    assert upside_down != rules
    (tmp_path / "pyproject.toml").write_text(upside_down)
    done = lint("--config", str(tmp_path / "pyproject.toml"))
    assert done.returncode == 1
    assert "sparse_optim.policy" in done.stdout


def imported(folder: str) -> set[str]:
    """Modules that the files of a folder import, and attributes `torch.optim` that they read."""
    found: set[str] = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found |= {str(node.module), *(f"{node.module}.{each.name}" for each in node.names)}
            elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.optim":
                found.add("torch.optim")
    return found


@pytest.mark.parametrize("layer", ["engine", "policy", "backends"])
def test_the_engine_and_what_is_below_know_no_torch_optim(layer: str) -> None:
    names = imported(f"sparse_optim/{layer}")
    assert "torch" in names
    assert not [name for name in names if name.startswith("torch.optim")]
    assert any(name.startswith("torch.optim") for name in imported("sparse_optim/optim"))


def test_triton_kernels_know_operands_and_targets_alone() -> None:
    """They lie outside of the package that import-linter reads."""
    ours = {name for name in imported("triton_kernels") if name.startswith("sparse_optim")}
    modules = {".".join(name.split(".")[:3]) for name in ours}
    assert modules == {"sparse_optim.backends.operands", "sparse_optim.backends.targets"}
