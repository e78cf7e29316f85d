"""Start processes that train together, as torchrun does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import NoReturn


def free_port() -> str:
    """A port at which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def leave_group() -> NoReturn:
    """End this process of a group as soon as the others are ready to end, too.

    Without Python's own end: a thread of torch's that frees a tensor meanwhile (DDP's and gloo's
    do) asks for Python's lock in vain, and the C++ runtime then aborts ("terminate called without
    an active exception"), now and then, with three processes on a busy machine.
    """
    from torch import distributed

    distributed.barrier()
    distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def start_group(
    command: Sequence[str], count: int = 2, **environment: str
) -> list[subprocess.CompletedProcess[str]]:
    """Run a command in processes of one group; their outcomes, by rank."""
    group = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    shared = {**os.environ, **group, "OMP_NUM_THREADS": "1", **environment}
    running = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(count)
    ]  # fmt: skip
    ended = []
    try:
        for process in running:
            out, err = process.communicate(timeout=120)
            ended.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    finally:
        for process in running[len(ended) :]:
            process.kill()
            process.communicate()
    return ended
