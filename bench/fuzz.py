"""Damage what is read from files, at random, and see that nothing crashes, hangs or half changes.

    python -m bench.fuzz --seconds 300 --write

Kinds of input, each damaged in 1 to 4 places (bytes flipped, cut, doubled, zeroed; or values of a
loaded state):

    delta file      load_delta, then apply_delta and revert of what loads: the base is back
    checkpoint      load_state_dict, then two steps: an error leaves the optimizer as it was
    checkpoint file torch.load(weights_only=True) of damaged bytes, then as above
    patch           WeightReceiver.receive, then verify and reset: the base is back
    forged patch    as above, with the digest that the damaged contents should have

Each batch of inputs runs in a process of its own, so that a crash is counted and the rest goes on.
An error of the package or of torch in words is "refused"; any other exception is a "fault".
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import multiprocessing
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.environment import describe
from sparse_optim import D3, Increment, MaskedAdamW, apply_delta, load_delta, save_delta
from sparse_optim.errors import SparseOptimError
from sparse_optim.publish import Patch, PatchError, WeightPublisher, WeightReceiver
from sparse_optim.publish._digest import digest_of

BATCH = 200
BATCH_SECONDS = 60.0  # A batch takes a second or two.
RESULTS = Path(__file__).parent / "results"


def build() -> tuple[nn.Module, MaskedAdamW]:
    """A small model, partly ranked and partly dense, and its optimizer."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).to(torch.bfloat16)
    named = list(net.named_parameters())
    groups = [{"params": named[:3]}, {"params": named[3:], "unmask": "all"}]
    return net, MaskedAdamW(groups, importance=D3(1.0), selection=Increment(60, 8))


def train(net: nn.Module, optimizer: MaskedAdamW, steps: int) -> None:
    """Steps on random gradients."""
    for _ in range(steps):
        for param in net.parameters():
            param.grad = torch.randn_like(param)
        optimizer.step()


def damage_bytes(content: bytes, draw: random.Random) -> bytes:
    """1 to 4 changes of a file."""
    data = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(data) or 1)
        size = min(draw.choice([1, 1, 1, 4, 8, 64]), len(data) - at)
        kind = draw.choice(["flip", "random", "zero", "ones", "cut", "double", "drop"])
        if kind == "flip" and size:
            data[at] ^= 1 << draw.randrange(8)
        elif kind == "random":
            data[at : at + size] = draw.randbytes(size)
        elif kind in ("zero", "ones"):
            data[at : at + size] = (b"\0" if kind == "zero" else b"\xff") * size
        elif kind == "cut":
            del data[at:]
        elif kind == "double":
            data[at:at] = data[at : at + size]
        else:
            del data[at : at + size]
    return bytes(data)


def damage_state(state: dict[str, Any], draw: random.Random) -> None:
    """1 to 4 changes of the values of a state_dict, in place."""
    for _ in range(draw.randint(1, 4)):
        holder: Any = draw.choice([*state["state"].values(), *state["param_groups"]])
        if not holder:
            continue
        key = draw.choice(list(holder))
        value = holder[key]
        if not isinstance(value, Tensor):
            holder[key] = draw.choice([None, -1, 2**40, "x", float("nan"), [], (0.5,), {}])
            continue
        kind = draw.choice(["entry", "all", "dtype", "cut", "longer", "flat", "drop"])
        numbers = [-1, 0, 1, 2**31 - 1, -(2**31), float("nan"), float("inf"), 1e30]
        if value.dtype in (torch.int32, torch.int64, torch.uint8):
            limits = torch.iinfo(value.dtype)
            numbers = [n for n in (-1, 0, 1, 7, limits.max, limits.min) if n >= limits.min]
        changed = value.clone()
        if kind == "entry" and changed.numel():
            changed.view(-1)[draw.randrange(changed.numel())] = draw.choice(numbers)
        elif kind == "all":
            changed.fill_(draw.choice(numbers))
        elif kind == "dtype":
            changed = changed.to(draw.choice([torch.float64, torch.int32, torch.float16]))
        elif kind == "cut":
            changed = changed.reshape(-1)[: draw.randint(0, changed.numel())]
        elif kind == "longer":
            changed = torch.cat([changed.reshape(-1), changed.reshape(-1)[:3]])
        elif kind == "flat":
            changed = changed.reshape(1, -1)
        if kind == "drop":
            del holder[key]
        else:
            holder[key] = changed


def bits(tensors: Any) -> list[bytes]:
    """Every bit of some tensors."""
    flat = (tensor.detach().contiguous().view(-1).view(torch.uint8) for tensor in tensors)
    return [tensor.numpy().tobytes() for tensor in flat]


def everything(net: nn.Module, optimizer: MaskedAdamW) -> bytes:
    """Every bit of a model and its optimizer."""
    held = [value for each in optimizer.state_dict()["state"].values() for value in each.values()]
    return b"".join(bits([*net.parameters(), *held]))


def fuzz_delta(content: bytes, draw: random.Random) -> str:
    """A damaged delta file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "delta.safetensors"
        path.write_bytes(damage_bytes(content, draw))
        base, _ = build()
        before = bits(base.parameters())
        try:
            handle = apply_delta(base, load_delta(path))
        except SparseOptimError:
            return "refused" if bits(base.parameters()) == before else "half changed"
        handle.revert()
        return "loaded" if bits(base.parameters()) == before else "half changed"


def fuzz_checkpoint(content: bytes, draw: random.Random) -> str:
    """A state with damaged values."""
    state = torch.load(io.BytesIO(content), weights_only=True)
    damage_state(state, draw)
    return load_and_step(state)


def fuzz_checkpoint_file(content: bytes, draw: random.Random) -> str:
    """A state in a damaged file."""
    try:
        state = torch.load(io.BytesIO(damage_bytes(content, draw)), weights_only=True)
    except Exception:  # whatever torch.load raises: it is torch's
        return "refused"
    return load_and_step(state) if isinstance(state, dict) else "refused"


def fuzz_patch(content: bytes, draw: random.Random) -> str:
    """A damaged whole patch."""
    return receive(damage_bytes(content, draw))


def fuzz_forged_patch(content: bytes, draw: random.Random) -> str:
    """A damaged patch of somebody who knows how digests are made, where no key is used."""
    try:
        patch = Patch.from_bytes(damage_bytes(content, draw))
    except PatchError:
        return "refused"
    if patch.manifest is None:  # lost to the damage: an increment, whose digest nobody can make
        return receive(patch)
    return receive(replace(patch, digest=digest_of(patch, key=None)))


def receive(patch: Patch | bytes) -> str:
    """An error leaves the model as it was; what is taken can be taken back."""
    base, _ = build()
    before, receiver = bits(base.state_dict().values()), WeightReceiver(base)
    try:
        receiver.receive(patch)
    except PatchError:
        return "refused" if bits(base.state_dict().values()) == before else "half changed"
    receiver.verify()
    receiver.reset()
    return "loaded" if bits(base.state_dict().values()) == before else "half changed"


def load_and_step(state: dict[str, Any]) -> str:
    """An error leaves the optimizer as it was; what loads takes steps."""
    net, optimizer = build()
    train(net, optimizer, 2)
    before = everything(net, optimizer)
    try:
        optimizer.load_state_dict(copy.deepcopy(state))
    except (ValueError, TypeError):
        return "refused" if everything(net, optimizer) == before else "half changed"
    train(net, optimizer, 2)
    return "loaded"


KINDS: dict[str, Callable[[bytes, random.Random], str]] = {
    "delta file": fuzz_delta,
    "checkpoint": fuzz_checkpoint,
    "checkpoint file": fuzz_checkpoint_file,
    "patch": fuzz_patch,
    "forged patch": fuzz_forged_patch,
}


def sources() -> dict[str, bytes]:
    """What is damaged: a delta, a checkpoint and a patch of the same run."""
    net, optimizer = build()
    train(net, optimizer, 5)
    state, file = io.BytesIO(), tempfile.NamedTemporaryFile(suffix=".safetensors")  # noqa: SIM115
    torch.save(optimizer.state_dict(), state)
    with file:
        save_delta(optimizer.delta(net), file.name)
        delta = Path(file.name).read_bytes()
    patch = WeightPublisher(optimizer, net).patch().to_bytes()
    return {
        "delta file": delta,
        "checkpoint": state.getvalue(),
        "checkpoint file": state.getvalue(),
        "patch": patch,
        "forged patch": patch,
    }


def run_batch(kind: str, content: bytes, seed: int, outcomes: Any, faults: Any) -> None:
    """In a process of its own: BATCH inputs, their outcomes counted as they come."""
    torch.set_num_threads(1)
    for number in range(BATCH):
        draw = random.Random(f"{kind} {seed} {number}")
        try:
            outcome = KINDS[kind](content, draw)
        except Exception as error:
            outcome = "fault"
            faults.put((kind, seed, number, f"{type(error).__name__}: {error}"[:200]))
        outcomes.put(outcome)
    outcomes.put(None)


def fuzz(seconds: float, seed: int = 0) -> dict[str, Any]:
    """Run batches of all kinds until the time is over.

    Returns:
        for each kind the number of inputs and of each outcome; `faults` lists what went wrong.
    """
    context = multiprocessing.get_context("spawn")
    counts = {kind: Counter[str]() for kind in KINDS}
    found: list[Any] = []
    contents, end = sources(), time.monotonic() + seconds
    while True:
        for kind in KINDS:
            outcomes, faults = context.SimpleQueue(), context.SimpleQueue()
            process = context.Process(
                target=run_batch, args=(kind, contents[kind], seed, outcomes, faults)
            )
            process.start()
            process.join(BATCH_SECONDS)
            hangs = process.is_alive()
            if hangs:
                process.kill()
                process.join()
            done = 0
            while not outcomes.empty() and (outcome := outcomes.get()) is not None:
                counts[kind][outcome] += 1
                done += 1
            if done < BATCH:
                counts[kind]["hang" if hangs else "crash"] += 1
                found.append((kind, seed, done, f"exit code {process.exitcode}"))
            while not faults.empty():
                found.append(faults.get())
        seed += 1
        if time.monotonic() > end:
            break
    kinds = {
        kind: {"inputs": sum(outcomes.values()), **outcomes} for kind, outcomes in counts.items()
    }
    return {"seconds": seconds, "kinds": kinds, "faults": found}


def wrongs(found: dict[str, Any]) -> int:
    """How many inputs were neither refused nor loaded: faults, crashes, hangs, half changes."""
    right = ("inputs", "refused", "loaded")
    kinds = found["kinds"].values()
    return sum(count for kind in kinds for outcome, count in kind.items() if outcome not in right)


def main() -> None:
    """Fuzz, print the counts, and record them if asked."""
    parser = argparse.ArgumentParser(description="Damage files at random and load them.")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="record under bench/results")
    options = parser.parse_args()
    found = fuzz(options.seconds, options.seed)
    print(json.dumps(found, indent=1))
    if options.write:
        record = {"environment": describe(), **found}
        path = RESULTS / f"fuzz-{time.strftime('%Y-%m-%d')}.json"
        path.write_text(json.dumps(record, indent=1) + "\n")
    if wrong := wrongs(found):
        sys.exit(f"{wrong} inputs were neither refused nor loaded")


if __name__ == "__main__":
    main()
