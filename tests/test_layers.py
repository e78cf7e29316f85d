"""The layers of the package (pyproject.toml, [tool.importlinter]): arrows run down."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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
