"""Record what a result depends on: machine, versions, commit, and load of the machine."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import sparse_optim
from sparse_optim.experiments.machine import cpu_model

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PREPARED = ROOT / ".gpu"  # what `bench.gpu_prepare` made for a machine without git and network
CODE = (".py", ".cpp", ".cu", ".h")
GENERATED = (":!bench/results", ":!README.md", ":!docs")  # do not affect what is measured


def describe() -> dict[str, Any]:
    """Return machine, versions, commit and date, for the head of a results file."""
    commit, dirty = _commit()
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": dirty,
        "machine": {
            "cpu": cpu_model(),
            "cores": len(os.sched_getaffinity(0)),
            "threads": torch.get_num_threads(),
            # torch's own switch: tensors of 2 MB and more use huge pages.
            "huge_pages": os.environ.get("THP_MEM_ALLOC_ENABLE") == "1",
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "system": f"{platform.system()} {platform.machine()}",
            "vector": torch.backends.cpu.get_cpu_capability(),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "sparse_optim": sparse_optim.__version__,
        },
    }


def _commit() -> tuple[str, bool]:
    """Return the commit and whether files have changed since: by git, else from .gpu/COMMIT."""
    commit = _git("rev-parse", "HEAD")
    if commit:
        return commit, bool(_changes())
    lines = _lines(str(PREPARED / "COMMIT"))
    commit, _, noted = "".join(lines[:1]).partition(" ")
    return commit, bool(lines) and (len(lines) > 1 or noted != sources_digest())


def _changes() -> str:
    return _git("status", "--porcelain", "--", ".", *GENERATED)


def write_commit() -> None:
    """Write the commit, a digest of the sources and the changes since to .gpu/COMMIT."""
    commit = f"{_git('rev-parse', 'HEAD')} {sources_digest()}"
    (PREPARED / "COMMIT").write_text(f"{commit}\n{_changes()}")


def sources_digest(root: Path = ROOT) -> str:
    """Return a digest of what is measured: all code, by path and content."""
    root = root.resolve()
    files = [root / "setup.py", root / "pyproject.toml"]
    for folder in ("bench", "csrc", "sparse_optim", "triton_kernels"):
        files += (path for path in (root / folder).rglob("*") if path.suffix in CODE)
    digest = hashlib.sha256()
    for path in sorted(files):
        if path.resolve() != path:  # the Triton kernels are linked into the package
            continue
        digest.update(f"{path.relative_to(root)}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _git(*arguments: str) -> str:
    """Return the output of a git command in this repository; "" without a repository or git."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def run_delay_ns() -> int:
    """Return the nanoseconds for which threads of this process waited for a core (Linux).

    The kernel counts them for each thread: /proc/<pid>/task/*/schedstat, second field.
    """
    delay = 0
    try:
        threads = os.listdir("/proc/self/task")
    except OSError:
        return 0
    for thread in threads:
        for line in _lines(f"/proc/self/task/{thread}/schedstat"):
            delay += int(line.split()[1])
    return delay


@dataclass
class Conditions:
    """Measure the load that other processes put on the machine between `begin` and `end`."""

    load: float
    ticks: dict[str, int]
    own_seconds: float

    @staticmethod
    def begin() -> Conditions:
        """Start measuring."""
        times = os.times()
        return Conditions(os.getloadavg()[0], _ticks(), times.user + times.system)

    def end(self) -> dict[str, float]:
        """Return load averages and the shares of CPU time used by the host and other processes."""
        now = Conditions.begin()
        spent = {name: now.ticks[name] - self.ticks[name] for name in now.ticks}
        total = max(sum(spent.values()), 1)
        own = (now.own_seconds - self.own_seconds) * os.sysconf("SC_CLK_TCK")
        busy = total - spent.get("idle", 0) - spent.get("steal", 0)
        return {
            "load_before": self.load,
            "load_after": now.load,
            "steal_share": round(spent.get("steal", 0) / total, 4),
            "others_share": round(max(busy - own, 0.0) / total, 4),
        }


def _ticks() -> dict[str, int]:
    """Return the CPU time of the whole machine by kind, in clock ticks."""
    names = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")
    for line in _lines("/proc/stat")[:1]:
        ticks = dict(zip(names, map(int, line.split()[1:9]), strict=True))
        ticks["idle"] += ticks.pop("iowait")
        return ticks
    return {}
