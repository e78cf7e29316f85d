"""The switch of .ci/run: tests that miss a tool fail instead of skipping."""

import gpu_tools
import pytest
from repository import ROOT

RUN = ROOT / ".ci" / "run"


@pytest.fixture
def _no_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_tools.shutil, "which", lambda name: None)


@pytest.mark.usefixtures("_no_tools")
def test_missing_tools_are_an_error_where_they_are_required(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(gpu_tools.SWITCH, "1")
    with pytest.raises(RuntimeError, match="nvcc is not installed, and SPARSE_OPTIM_REQUIRE_GPU_"):
        gpu_tools.nvcc()
    with pytest.raises(RuntimeError, match="no_such_module is not installed, and SPARSE_OPTIM_"):
        gpu_tools.require("no_such_module")


@pytest.mark.usefixtures("_no_tools")
def test_missing_tools_skip_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(gpu_tools.SWITCH, raising=False)
    with pytest.raises(pytest.skip.Exception, match="nvcc is not installed"):
        gpu_tools.nvcc()
    with pytest.raises(pytest.skip.Exception, match="no_such_module is not installed"):
        gpu_tools.require("no_such_module")


def test_ci_requires_them() -> None:
    assert f"export {gpu_tools.SWITCH}=1" in RUN.read_text()
