"""Publish to processes that are killed, cut off and lied to: every version must be the trainer's.

    python -m bench.followers --write   # the shape of SmolLM2-135M, 200 steps, each killed 50 times

One process trains and publishes with a key. Three others follow from the same base: two over TCP on
this machine, one of which joins late, and one by a folder. All four are killed at random points and
started again, the trainer from its last checkpoint (the optimizer's state and a whole patch). Of
what is sent over TCP a third is damaged: cut, with flipped bits, of an older or a later version, or
a patch that somebody without the key has made, with positions beyond its tensors among them.

After each version that it takes, a process hashes all weights of its model and reports to the one
that started it, which compares the hash with the trainer's.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import socket
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import date
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import xxhash
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench import console
from bench.environment import RESULTS, describe
from bench.models import MODELS
from sparse_optim import D3, Increment, MaskedAdamW
from sparse_optim.files import replacing
from sparse_optim.publish import (
    MissingVersionError,
    Patch,
    PatchError,
    PatchFolder,
    WeightPublisher,
    WeightReceiver,
)

KEY, AUTHKEY = b"of trainer and receivers", b"of everyone here"
HISTORY = 3  # increments that the trainer still serves
LIES = 0.33  # share of answers that are damaged
PATIENCE = 120.0  # seconds without any report after which something hangs


Address = tuple[str, int]


@dataclass(frozen=True)
class Plan:
    """What all processes know.

    Attributes:
        folder: of base, patches and checkpoint.
        model: name in bench.models.
        steps: to train.
        share: of the entries, that may move.
        pause: seconds between steps, for models that train faster than others follow.
        judge, trainer: where those listen that start and that train.
    """

    folder: Path
    model: str
    steps: int
    share: float
    pause: float
    judge: Address
    trainer: Address


def hash_of(tensors: Mapping[str, Tensor]) -> str:
    """Of all bits."""
    state = xxhash.xxh3_128()
    for name in sorted(tensors):
        state.update(tensors[name].detach().view(torch.int16).numpy().data)
    return state.hexdigest()


def train(plan: Plan, seed: int) -> None:
    """Train, publish and serve, from the last checkpoint on."""
    torch.set_num_threads(1)
    shape = MODELS[plan.model]
    model = shape.build().to(torch.bfloat16)
    model.load_state_dict(load_file(plan.folder / "base.safetensors"), strict=False)
    named = list(model.named_parameters())
    budget = int(plan.share * sum(param.numel() for _, param in named))
    optimizer = MaskedAdamW(
        named, lr=0.01, importance=D3(), selection=Increment(budget, plan.steps, every=2)
    )
    folder, checkpoint = PatchFolder(plan.folder / "patches"), plan.folder / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        WeightReceiver(model, key=KEY).receive(saved["weights"])
        optimizer.load_state_dict(saved["optimizer"])
    publisher = WeightPublisher(optimizer, model, key=KEY, version=folder.newest)
    served = Served()
    Thread(target=serve, args=(plan, served, seed), daemon=True).start()
    judge = Client(plan.judge, authkey=AUTHKEY)
    weights, inputs = dict(named), shape.inputs()

    def publish(taken: int) -> None:
        judge.send(("trainer", publisher.version + 1, hash_of(weights), taken))
        version = folder.publish(publisher)
        # Only now: a version that nobody can read after a crash must not have been served.
        served.whole = publisher.whole()
        path = plan.folder / "patches" / f"{version:09d}.patch.safetensors"
        if path.exists():
            served.history.append(Patch.from_bytes(path.read_bytes()))

    taken = int(optimizer.metrics()["step"])
    if taken:  # receivers that were cut off ask this process from now on
        publish(taken)
    while taken < plan.steps:
        tokens = (inputs["input_ids"][:1, :8] + 7919 * taken) % shape.sizes["vocab_size"]
        labels = tokens if shape.kind == "llama" else inputs["labels"][:1]
        model(input_ids=tokens, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        taken += 1
        time.sleep(plan.pause)
        publish(taken)
        state = {"optimizer": optimizer.state_dict(), "weights": publisher.whole().to_bytes()}
        with replacing(checkpoint) as temporary:
            torch.save(state, temporary)
    judge.send(("done", publisher.version, ""))
    time.sleep(PATIENCE)


@dataclass
class Served:
    """What the trainer gives to those that ask: the newest version, and increments to it."""

    whole: Patch | None = None
    history: deque[Patch] = field(default_factory=lambda: deque(maxlen=HISTORY))


def serve(plan: Plan, served: Served, seed: int) -> None:
    """Answer receivers, a thread for each."""
    listener = Listener(plan.trainer, authkey=AUTHKEY)
    while True:
        try:
            connection = listener.accept()
        except (OSError, EOFError, multiprocessing.AuthenticationError):
            continue  # killed while it said hello
        Thread(target=answer, args=(connection, served, seed), daemon=True).start()


def answer(connection: Connection, served: Served, seed: int) -> None:
    """The version after the one that a receiver names, whole after version 0."""
    rng = random.Random(f"{seed} {time.monotonic_ns()}")
    try:
        while True:
            version, whole = connection.recv(), served.whole
            if whole is None or version == whole.version:
                connection.send_bytes(b"none")
                continue
            history = [*served.history]
            following = [patch for patch in history if patch.version == version + 1]
            patch = following[0] if following and version else whole
            lie = rng.random() < LIES
            connection.send_bytes(lies(patch, history, rng) if lie else patch.to_bytes())
    except (OSError, EOFError):
        return


def lies(patch: Patch, history: list[Patch], rng: random.Random) -> bytes:
    """Not the patch that was asked for."""
    data = patch.to_bytes()
    kind = rng.randrange(6)
    if kind == 0:
        return data[: rng.randrange(len(data))]
    if kind == 1:
        flipped = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(flipped)
    if kind == 2 and history:
        return rng.choice(history).to_bytes()
    if kind == 3:  # twice the length, as if two had run into each other
        return data + data
    position = patch.position.clone()
    if position.numel():
        position[rng.randrange(position.numel())] = rng.choice([-1, 2**31 - 1, 0])
    forged = replace(patch, position=position, version=patch.version + rng.randrange(2))
    return replace(forged, value=patch.value.flip(0)).to_bytes()


def follow_trainer(plan: Plan, name: str) -> None:
    """Follow over TCP."""
    receiver, report = joined(plan, name)
    while True:
        try:
            with Client(plan.trainer, authkey=AUTHKEY) as trainer:
                wanted = receiver.version
                while True:
                    trainer.send(wanted)
                    data = trainer.recv_bytes()
                    if data == b"none":
                        time.sleep(0.02)
                        continue
                    try:
                        took = receiver.receive(data)
                        wanted = receiver.version
                        report("took" if took else "older")
                    except MissingVersionError:
                        wanted = 0
                        report("missing")
                    except PatchError:
                        report("refused")
        except (OSError, EOFError, multiprocessing.AuthenticationError):
            time.sleep(0.05)


def follow_folder(plan: Plan, name: str) -> None:
    """Follow by the folder."""
    receiver, report = joined(plan, name)
    folder = PatchFolder(plan.folder / "patches")
    while not folder.path.is_dir():
        time.sleep(0.02)
    while True:
        before = receiver.version
        try:
            folder.follow(receiver)
        except MissingVersionError:  # files come and go
            report("missing")
        if receiver.version > before:
            report("took")
        time.sleep(0.02)


def joined(plan: Plan, name: str) -> tuple[WeightReceiver, Callable[[str], None]]:
    """A receiver of the base, and what tells the judge about it."""
    torch.set_num_threads(1)
    model = load_file(plan.folder / "base.safetensors")
    receiver = WeightReceiver(model, key=KEY)
    judge = Client(plan.judge, authkey=AUTHKEY)

    def report(event: str) -> None:
        judge.send((name, event, receiver.version, hash_of(model)))

    return receiver, report


class Judge:
    """Hears all processes and compares.

    Attributes:
        truth, trained: hash of the weights by version and by step, as the trainer has it.
        counts: events by process.
        faults: what should not be.
        taken, last: steps of the trainer so far; its last version, once it has ended.
        reached: version of each receiver.
        reports: receiver, version, hash of its weights.
    """

    def __init__(self, address: Address, base: str) -> None:
        self.truth: dict[int, str] = {0: base}
        self.trained: dict[int, str] = {}
        self.counts: dict[str, Counter[str]] = {}
        self.faults: list[str] = []
        self.reached: dict[str, int] = {}
        self.reports: set[tuple[str, int, str]] = set()
        self.last = self.taken = 0
        self.heard = time.monotonic()
        self.listener = Listener(address, authkey=AUTHKEY)
        Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection = self.listener.accept()
            except (OSError, EOFError, multiprocessing.AuthenticationError):
                continue
            Thread(target=self._hear, args=(connection,), daemon=True).start()

    def _hear(self, connection: Connection) -> None:
        try:
            while True:
                self._note(*connection.recv())
        except (OSError, EOFError):
            return

    def _note(self, name: str, *message: Any) -> None:
        self.heard = time.monotonic()
        if name == "done":
            self.last = message[0]
        elif name == "trainer":
            version, found, self.taken = message
            self.truth[version] = found  # again, if the trainer was killed before it was written
            if self.trained.setdefault(self.taken, found) != found:
                self.faults.append(f"step {self.taken}: other weights after it was resumed")
        else:
            event, version, found = message
            self.counts.setdefault(name, Counter())[event] += 1
            self.reached[name] = version
            self.reports.add((name, version, found))

    def verdict(self) -> list[str]:
        """All faults: what two processes say of a version comes in any order."""
        return self.faults + [
            f"{name}: other weights than the trainer at {version}"
            for name, version, found in sorted(self.reports)
            if self.truth.get(version) != found
        ]


def free_addresses() -> tuple[Address, Address]:
    """Two, at which nobody listens."""
    with socket.socket() as one, socket.socket() as other:
        for each in (one, other):
            each.bind(("127.0.0.1", 0))
        return one.getsockname(), other.getsockname()


def run(
    model: str, steps: int, kills: int, share: float = 0.01, pause: float = 0.0, seed: int = 0
) -> dict[str, Any]:
    """Train, follow and kill; what happened.

    Raises:
        TimeoutError: nothing was reported for two minutes.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.models", "sparse_optim.publish", "transformers"])
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        plan = Plan(folder, model, steps, share, pause, *free_addresses())
        base = MODELS[model].build().to(torch.bfloat16)
        tensors = {name: param.detach().clone() for name, param in base.named_parameters()}
        save_file(tensors, folder / "base.safetensors")
        judge = Judge(plan.judge, hash_of(tensors))
        targets: dict[str, Callable[[], Any]] = {
            "trainer": lambda: context.Process(target=train, args=(plan, rng.randrange(1 << 30))),
            "tcp": lambda: context.Process(target=follow_trainer, args=(plan, "tcp")),
            "tcp, late": lambda: context.Process(target=follow_trainer, args=(plan, "tcp, late")),
            "folder": lambda: context.Process(target=follow_folder, args=(plan, "folder")),
        }
        points = {name: sorted(rng.uniform(0, 0.95) for _ in range(kills)) for name in targets}
        joins = {"tcp, late": 0.4}
        processes: dict[str, Any] = {}
        killed: Counter[str] = Counter()
        begun = time.monotonic()
        judge.heard = begun
        try:
            while (
                not judge.last
                or any(points.values())
                or any(
                    judge.reached.get(name, 0) < judge.last for name in targets if name != "trainer"
                )
            ):
                progress = judge.taken / steps
                for name, start in targets.items():
                    process = processes.get(name)
                    if process is None:
                        if progress >= joins.get(name, 0.0):
                            processes[name] = start()
                            processes[name].start()
                    elif points[name] and progress >= points[name][0]:
                        points[name].pop(0)
                        time.sleep(rng.uniform(0, 0.2))
                        process.kill()
                        process.join()
                        killed[name] += 1
                        processes[name] = start()
                        processes[name].start()
                    elif not process.is_alive():
                        judge.faults.append(f"{name} ended with {process.exitcode}")
                        return summary(judge, killed, begun)
                if time.monotonic() - judge.heard > PATIENCE:
                    raise TimeoutError(f"nothing was reported for {PATIENCE:.0f} s")
                time.sleep(rng.uniform(0.01, 0.1))
            return summary(judge, killed, begun)
        finally:
            for process in processes.values():
                process.kill()
                process.join()
            judge.listener.close()


def summary(judge: Judge, killed: Counter[str], begun: float) -> dict[str, Any]:
    """What happened, by process."""
    return {
        "versions": max(judge.truth),
        "seconds": round(time.monotonic() - begun, 1),
        "faults": judge.verdict(),
        "killed": dict(sorted(killed.items())),
        "events": {name: dict(counts) for name, counts in sorted(judge.counts.items())},
    }


def main() -> None:
    """Run it, print and record."""
    parser = console.parser("followers", __doc__)
    parser.add_argument("--model", default="SmolLM2-135M", choices=MODELS)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--kills", type=int, default=50, help="of each process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="record under bench/results")
    options = parser.parse_args()
    found = run(options.model, options.steps, options.kills, seed=options.seed)
    print(json.dumps(found, indent=1))
    if options.write:
        record = describe() | {"model": options.model, "steps": options.steps} | found
        path = RESULTS / f"followers-{date.today().isoformat()}.json"
        path.write_text(json.dumps(record, indent=1) + "\n")
    if found["faults"]:
        raise SystemExit("the weights differ")


if __name__ == "__main__":
    main()
