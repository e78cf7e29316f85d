"""Set-up: what is pinned, and what a step that fails says."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from repository import ROOT

REQUIREMENTS = ROOT / "requirements"
spec = importlib.util.spec_from_file_location("set_up", REQUIREMENTS / "set_up.py")
set_up = importlib.util.module_from_spec(spec)
spec.loader.exec_module(set_up)

PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")


def pins(file, python):
    """Names and versions that a file of requirements pins for a version of CPython on Linux."""
    text = (REQUIREMENTS / file).read_text().replace("\\\n", " ")
    lines = [line.split(" --hash")[0] for line in text.splitlines() if re.match(r"\w", line)]
    where = {"python_version": python, "python_full_version": f"{python}.7"}
    where |= {"sys_platform": "linux", "platform_machine": "x86_64", "os_name": "posix"}
    found = {}
    for need in map(Requirement, lines):
        if need.marker is None or need.marker.evaluate(where):
            (version,) = need.specifier
            assert version.operator == "=="
            assert need.name not in found, f"{need.name} is pinned twice for python {python}"
            found[need.name] = version.version
    return found


@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_pins_what_the_package_and_its_extras_require(python):
    tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert set(extras) == set(set_up.EXTRAS)
    locked = pins("lock.txt", python)
    for line in [*project["dependencies"], *(line for extra in extras.values() for line in extra)]:
        need = Requirement(line)
        if need.name == "torch":
            assert "torch" not in locked
        elif need.marker is None or need.marker.evaluate({"python_version": python}):
            assert need.specifier.contains(locked[need.name]), f"{line}: make lock"
    assert {"pip", "setuptools"} <= set(locked)
    assert not [name for name in locked if re.match("nvidia|cuda|triton", name)]


@pytest.mark.parametrize("file", ["lock.txt", "demo-data.txt", "test-data.txt"])
def test_every_pin_has_a_hash(file):
    text = (REQUIREMENTS / file).read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if re.match(r"\w", line)]
    assert lines
    assert [line for line in lines if not re.search(r"--hash=sha256:[0-9a-f]{64}", line)] == []


def test_nothing_is_built_but_this_package(tmp_path):
    """A source distribution of somebody else's is refused, not built."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "setup.py").write_text("raise SystemExit('it was built')\n")
    done = subprocess.run(
        ["tar", "czf", "other-1.0.tar.gz", "other"], cwd=tmp_path, capture_output=True, check=False
    )
    assert done.returncode == 0
    (tmp_path / "pins.txt").write_text("other==1.0 --hash=sha256:" + "0" * 64 + "\n")
    venv = set_up.Venv(tmp_path)
    venv.python = Path(sys.executable)
    links = ["--no-index", "--find-links", str(tmp_path), "--target", str(tmp_path / "there")]
    with pytest.raises(set_up.SetupError, match=r"No matching distribution found for other==1.0"):
        venv.pip("a step", *set_up.EXACT, *links, "-r", str(tmp_path / "pins.txt"))
    assert "it was built" not in venv.log.read_text()


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ("ERROR: No matching distribution found for numpy==9", "renew the lock"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES from the file", "another file|other than"),
        ("OSError: [Errno 28] No space left on device", "free some space"),
        ("error: command 'g++' failed: No such file or directory", "apt install g++"),
        ("SPARSE_OPTIM_CPP=1 demands a compiled backend, but there is no C++ compiler: c++ was not "
         "found", "apt install g++"),
        ("fatal error: Python.h: No such file or directory", "apt install python3-dev"),
        ("The virtual environment was not created: ensurepip is not available", "python3-venv"),
        ("ERROR: NewConnectionError: Temporary failure in name resolution", "the network"),
        (
            "WARNING: Retrying after connection broken by 'NewConnectionError': /simple/numpy/; "
            "ERROR: No matching distribution found for numpy==2.4",
            "no package index was reached",
        ),
    ],
)  # fmt: skip
def test_a_failed_step_says_what_to_do(tmp_path, capsys, said, remedy):
    venv = set_up.Venv(tmp_path)
    code = f"import sys; print('Collecting x'); print({said!r}); sys.exit(1)"
    with pytest.raises(set_up.SetupError) as raised:
        venv.run("a step", [sys.executable, "-c", code])
    assert said in str(raised.value)
    assert re.search(f"What to do: .*{re.escape(remedy) if '+' in remedy else remedy}",
                     str(raised.value))  # fmt: skip
    assert str(venv.log) in str(raised.value)
    assert capsys.readouterr().out == "a step ...\n  failed\n"
    assert said in venv.log.read_text()


def test_warnings_about_this_package_are_shown(tmp_path, capsys):
    code = (
        "print('WARNING: Location /nowhere is ignored')\n"
        "print('WARNING: sparse-optim 0.1.0 does not provide the extra x')\n"
        'print("ERROR: pip\'s dependency resolver does not take into account")\n'
    )
    set_up.Venv(tmp_path).run("a step", [sys.executable, "-c", code])
    shown = capsys.readouterr().out
    assert "does not provide the extra x" in shown
    assert "dependency resolver" in shown
    assert "/nowhere" not in shown


def test_a_python_with_torch_lends_it_to_the_venv(tmp_path):
    """A python that sees a package called torch; the venv sees it, and none of it is changed."""
    packages = tmp_path / "site-packages"
    (packages / "torch").mkdir(parents=True)
    (packages / "torch" / "__init__.py").write_text("__version__ = (2, 11)\n")
    done = subprocess.run(
        [sys.executable, REQUIREMENTS / "set_up.py", "environment", "--venv", tmp_path / "venv"],
        capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(packages)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "with torch (2, 11)" in done.stdout
    venv = set_up.Venv(tmp_path / "venv")
    assert venv.ask("import torch; print(torch.__file__)").startswith(str(packages))
    assert venv.ask("import pip; print(pip.__file__)").startswith(str(venv.folder))


def test_a_venv_that_runs_the_set_up_is_not_lent_to_itself(tmp_path, monkeypatch, capsys):
    """`python -m venv .venv`, activated, with torch installed in it."""
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    set_up.environment(set_up.Venv(tmp_path.resolve()))
    assert "the python that runs this" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_venv_of_another_python_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(set_up.Venv, "ask", lambda self, code: "3.9")
    with pytest.raises(set_up.SetupError, match=r"(?s)has python 3\.9, but this is .*VENV=\.\.\."):
        set_up.check_python(set_up.Venv(tmp_path))


def test_settings_that_put_packages_elsewhere_do_not_reach_pip(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_TARGET", "/elsewhere")
    venv = set_up.Venv(tmp_path)
    code = "import os; print('PIP_TARGET' in os.environ)"
    venv.run("a step", [sys.executable, "-c", code])
    assert "False" in venv.log.read_text()
