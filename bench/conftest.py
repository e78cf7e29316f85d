"""Show GB/s of the kernel benchmarks, and their share of the fastest plain read."""

from __future__ import annotations

from typing import Any


def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    """Show unavoidable bytes over the median time, after pytest-benchmark's table."""
    session = getattr(config, "_benchmarksession", None)
    speeds = {
        bench.name: bench.extra_info["moved_bytes"] / bench.stats.median / 1e9
        for bench in (session.benchmarks if session else [])
        if "moved_bytes" in bench.extra_info and bench.stats.rounds
    }
    if not speeds:
        return
    terminalreporter.section("bandwidth")
    for dtype in ("fp32", "bf16"):
        here = {name: speed for name, speed in speeds.items() if dtype in name}
        read = max((speed for name, speed in here.items() if "read" in name), default=0.0)
        for name, speed in here.items():
            share = f"{speed / read:6.0%} of the read" if read else ""
            terminalreporter.write_line(f"{name:36} {speed:7.2f} GB/s  {share}")
