"""Packages: what compiles where, and what the check of a wheel finds."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
from repository import ROOT

COMPILER = shutil.which("c++")
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc", "sparse_optim")
# None of the switches of the build, whatever the tests run under.
ENVIRONMENT = {k: v for k, v in os.environ.items() if not re.match("SPARSE_OPTIM_C|CXX$", k)}


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


wanted = load(ROOT / "csrc" / "wanted.py")


@pytest.fixture
def build_wheel(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "requirements"))  # it imports set_up
    return load(ROOT / "requirements" / "build_wheel.py")


@pytest.fixture
def switches(monkeypatch):
    """Sets CXX and the build's switches, and nothing else of them."""

    def set_switches(**values):
        for name in ("SPARSE_OPTIM_CPP", "SPARSE_OPTIM_CUDA", "CXX"):
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_switches


def test_without_a_compiler_nothing_is_compiled_and_one_line_says_what_runs(switches, capsys):
    switches(CXX="/nonexistent/c++")
    assert not wanted.wants_cpp()
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "no C++ compiler: /nonexistent/c++ was not found" in said
    assert "The reference backend will run, which is exact but slow" in said
    assert "install a compiler (Debian: apt install g++) and reinstall with pip install" in said
    assert "--no-cache-dir" in said  # pip would take the pure wheel that it kept


def test_a_path_without_compilers(switches, monkeypatch, tmp_path, capsys):
    switches(PATH=str(tmp_path))
    monkeypatch.setattr(wanted.sysconfig, "get_config_var", {"CXX": "g++ -pthread"}.get)
    assert not wanted.wants_cpp()
    assert "no C++ compiler: c++ or g++ was not found" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["SPARSE_OPTIM_CPP", "SPARSE_OPTIM_CUDA"])
def test_a_backend_that_is_demanded_is_not_left_out(switches, name):
    switches(**{name: "1"}, CXX="/nonexistent/c++")
    with pytest.raises(SystemExit, match=f"{name}=1 demands .* no C\\+\\+ compiler: /nonexistent"):
        wanted.wants_cpp()


def test_switches(switches, capsys):
    switches(SPARSE_OPTIM_CPP="0", CXX=sys.executable)
    assert not wanted.wants_cpp()
    switches(SPARSE_OPTIM_CPP="1", CXX=f"{sys.executable} --some-option")  # a program that exists
    assert wanted.wants_cpp()
    assert capsys.readouterr().err == ""
    switches(SPARSE_OPTIM_CPP="yes")
    with pytest.raises(SystemExit, match="SPARSE_OPTIM_CPP must be 0 or 1, got 'yes'"):
        wanted.wants_cpp()
    switches(SPARSE_OPTIM_CPP="0", SPARSE_OPTIM_CUDA="1")
    with pytest.raises(
        SystemExit, match="CUDA=1 needs the C\\+\\+ backend, but SPARSE_OPTIM_CPP=0"
    ):
        wanted.wants_cpp()
    switches(SPARSE_OPTIM_CUDA="1")
    with pytest.raises(SystemExit, match="demands the CUDA backend, but torch has no CUDA"):
        wanted.wants_cuda(None, None)


@pytest.mark.parametrize(
    ("release", "torch_cuda", "built"), [("13.0", "13.2", True), ("12.4", "13.0", False)]
)
def test_cuda_is_left_out_where_torch_would_refuse_the_compiler(
    tmp_path, capsys, release, torch_cuda, built
):
    """torch demands the same major version; the build of the CPU kernels must not end with it."""
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V1'\n")
    nvcc.chmod(0o755)
    assert wanted.wants_cuda(torch_cuda, str(tmp_path)) == built
    told = f"nvcc is of CUDA {release}, torch of CUDA {torch_cuda}"
    assert (told in capsys.readouterr().err) != built


@pytest.fixture
def checkout(tmp_path):
    """The sources of a build, away from the checkout and what was built there."""
    folder = tmp_path / "sources"
    folder.mkdir()
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    for name in (*SOURCES, "triton_kernels"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def pip_wheel(checkout, *python_path, **environment):
    """`pip wheel`: the finished process; verbose, as pip else hides what a good build says."""
    arguments = ["wheel", "-v", "--no-deps", "--no-build-isolation", "-w", checkout / "dist"]
    return subprocess.run(
        [sys.executable, "-m", "pip", *arguments, checkout],
        capture_output=True, text=True, check=False,
        env=ENVIRONMENT | environment | {"PYTHONPATH": os.pathsep.join(map(str, python_path))},
    )  # fmt: skip


@pytest.fixture
def broken_torch(tmp_path):
    """A folder with a torch that cannot be imported."""
    (tmp_path / "broken" / "torch").mkdir(parents=True)
    (tmp_path / "broken" / "torch" / "__init__.py").write_text("raise ImportError('no libcudnn')\n")
    return tmp_path / "broken"


@pytest.mark.slow
def test_without_a_compiler_the_package_is_pure_python_and_trains(checkout, broken_torch, tmp_path):
    """The build does not touch torch either; the first optimizer warns what it runs on."""
    built = pip_wheel(checkout, broken_torch, CXX="/nonexistent/c++")
    assert built.returncode == 0, built.stderr
    assert "no C++ compiler: /nonexistent/c++ was not found" in built.stdout + built.stderr
    (wheel,) = (checkout / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if ".so" in name]
        archive.extractall(tmp_path / "installed")
    code = (
        # The finder of an editable installation would find the extension of the checkout.
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"
        "import torch, sparse_optim\n"
        "model = torch.nn.Linear(8, 8)\n"
        "optimizer = sparse_optim.IncrementalMaskedAdamW(\n"
        "    model.named_parameters(), lr=0.1, budget=4, total_steps=1)\n"
        "model(torch.ones(1, 8)).sum().backward()\n"
        "optimizer.step()\n"
        "print(sparse_optim.__file__, optimizer.backend)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path,
        env=ENVIRONMENT | {"PYTHONPATH": str(tmp_path / "installed")},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith(str(tmp_path / "installed"))
    assert ran.stdout.endswith("reference\n")
    assert ran.stderr.count("RuntimeWarning") == 1
    assert "`SPARSE_OPTIM_CPP=1 pip install --no-build-isolation .`" in ran.stderr


def test_with_a_compiler_a_torch_that_cannot_be_imported_is_named(checkout, broken_torch):
    built = pip_wheel(checkout, broken_torch, CXX=sys.executable)
    assert built.returncode != 0
    assert "`import torch` fails: no libcudnn. Install torch >= 2.11" in built.stdout + built.stderr


@pytest.mark.slow
def test_a_compiler_that_fails_is_an_error_with_its_output(checkout, tmp_path):
    compiler = tmp_path / "c++"
    broken = (
        'case "$*" in *--version*) exec c++ "$@";; esac; echo this compiler is broken >&2; exit 1'
    )
    compiler.write_text(f"#!/bin/sh\n{broken}\n")
    compiler.chmod(0o755)
    built = pip_wheel(checkout, CXX=str(compiler))
    assert built.returncode != 0
    assert "this compiler is broken" in built.stdout + built.stderr
    assert not (checkout / "dist").exists() or not list((checkout / "dist").iterdir())


def library(folder, code):
    """An extension of these few lines, which nothing but their own declarations is needed for."""
    if COMPILER is None:
        pytest.skip("needs a C++ compiler")
    pytest.importorskip("torch_abi_audit", reason="torch-abi-audit needs python 3.11")
    source = folder / "extension.cpp"
    source.write_text(
        f'{code}\nextern "C" int PyModule_Create2();\n'
        'extern "C" int PyInit__C() { use(); return PyModule_Create2(); }\n'
    )
    target = folder / "_C.abi3.so"
    subprocess.run([COMPILER, "-shared", "-fPIC", "-o", target, source], check=True)
    return target


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ('extern "C" int aoti_torch_get_dim(); void use() { aoti_torch_get_dim(); }', None),
        ("namespace c10 { void warn(); } void use() { c10::warn(); }", "warn"),
        ("namespace at { int get_num_threads(); } void use() { at::get_num_threads(); }",
         "get_num_threads"),
        ('extern "C" int torch_of_2099(); void use() { torch_of_2099(); }', "torch_of_2099"),
        ('extern "C" int _Py_IsFinalizing(); void use() { _Py_IsFinalizing(); }',
         "_Py_IsFinalizing"),
    ],
)  # fmt: skip
def test_symbols_outside_the_stable_abis_are_found(build_wheel, tmp_path, code, message):
    planted = library(tmp_path, code)
    if message is None:
        build_wheel.check_symbols(planted)
        return
    with pytest.raises(build_wheel.SetupError, match=f"outside the stable ABIs: .*{message}"):
        build_wheel.check_symbols(planted)


def test_a_symbol_that_the_oldest_torch_lacks_is_found(build_wheel, tmp_path):
    code = 'extern "C" int torch_parallel_for(); void use() { torch_parallel_for(); }'
    build_wheel.OLDEST_TORCH = (2, 9)
    with pytest.raises(build_wheel.SetupError, match=r"needs torch 2\.10\.0 or newer, because of"):
        build_wheel.check_symbols(library(tmp_path, code))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("sparse_optim-0.1-cp310-abi3-linux_x86_64.whl", (), "must be cp310-abi3-manylinux_"),
        ("sparse_optim-0.1-py3-none-any.whl", (), "must be cp310-abi3-manylinux_"),
        ("sparse_optim-0.1-cp310-abi3-manylinux_2_34_x86_64.whl", (), "must contain .* has \\[\\]"),
        ("sparse_optim-0.1-cp310-abi3-manylinux_2_34_x86_64.whl",
         ("sparse_optim/_C.abi3.so", "sparse_optim.libs/libc10-1234.so.1"), "libc10-1234"),
    ],
)  # fmt: skip
def test_a_wheel_with_wrong_tags_or_libraries_is_found(
    build_wheel, tmp_path, name, content, message
):
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        for file in content:
            archive.writestr(file, b"")
    with pytest.raises(build_wheel.SetupError, match=message):
        build_wheel.check(tmp_path / name)
