"""Time and bytes of publishing weights: python -m bench.publishing

On a model in bfloat16 with random gradients, after a step each, in one process of one thread (of
two, the other takes milliseconds to wake up in whichever operation is the first to use it):

    patch           WeightPublisher.patch, with its file
    gather          the values of the active entries out of the model by torch alone: the limit
    snapshot diff   what finds the changed entries without an optimizer that knows them: each tensor
                    is compared with a copy; positions (int32) and values are taken; the copy
                    follows
    receive         WeightReceiver.receive: read, check, write
    dense copy      all weights written over those of another model

Times are those of runs whose budget is spent, in all but the last two rows, where a part of it is
unmasked in each step. Bytes are the mean of thirty versions from the first step on, of which twenty
unmask; a snapshot scheme is counted with the whole model as its first version and before every
tenth, by which late and damaged receivers find a start.

`--write` records bench/results/publishing-<date>.json.
"""

from __future__ import annotations

import json
import statistics
from datetime import date
from itertools import pairwise

import torch
from torch import Tensor

from bench import console
from bench.environment import RESULTS, Conditions, describe
from bench.models import MODELS
from bench.tables import table
from bench.timing import Subject, interleave
from sparse_optim import D3, Increment, MaskedAdamW
from sparse_optim.delta._tensors import bits
from sparse_optim.publish import WeightPublisher, WeightReceiver

VERSIONS, UNMASKING, ANCHOR = 30, 20, 10
LIMIT, DIFF = "gather", "snapshot diff"
NEW, NEW_LIMIT = "patch with new entries", "gather with new entries"


class Scene:
    """A model in training, and a copy of it in memory as it was.

    Args:
        share: of the entries, that the optimizer may move.
        steps: in which they are unmasked.
    """

    def __init__(self, model: str, share: float, steps: int) -> None:
        torch.manual_seed(0)
        self.net = MODELS[model].build().to(torch.bfloat16)
        self.params = list(self.net.parameters())
        self.entries = sum(param.numel() for param in self.params)
        selection = Increment(int(share * self.entries), steps, unmask_steps=steps)
        named = self.net.named_parameters()
        self.optimizer = MaskedAdamW(named, lr=1e-3, importance=D3(), selection=selection)
        self.copies = [param.detach().clone() for param in self.params]
        for param in self.params:  # kept: freed memory goes back to the system a while later, which
            param.grad = torch.empty_like(param)  # takes milliseconds of whatever runs then

    def step(self) -> None:
        """One step on random gradients."""
        for param in self.params:
            assert param.grad is not None
            param.grad.normal_()
        self.optimizer.step()

    def gather(self) -> Tensor:
        """The values of the active entries."""
        active = self.optimizer.engine.active
        offsets = active.offsets.tolist()
        pieces = active.position[: offsets[-1]].split([b - a for a, b in pairwise(offsets)])
        return torch.cat(
            [
                param.detach().view(-1).index_select(0, piece)
                for param, piece in zip(self.params, pieces, strict=True)
            ]
        )

    def compare(self) -> int:
        """A snapshot diff; its bytes."""
        size = 0
        for param, copy in zip(self.params, self.copies, strict=True):
            now, before = bits(param).view(-1), bits(copy).view(-1)
            position = (now != before).nonzero().view(-1)
            value = now[position]
            size += position.int().nbytes + value.nbytes
            before[position] = value
        return size

    def copy_all(self) -> None:
        """A dense copy."""
        for param, copy in zip(self.params, self.copies, strict=True):
            copy.copy_(param.detach())


def count_bytes(model: str, share: float) -> dict[str, float]:
    """Mean bytes of a version."""
    scene = Scene(model, share, UNMASKING)
    served = {name: param.detach().clone() for name, param in scene.net.named_parameters()}
    publisher, receiver = WeightPublisher(scene.optimizer), WeightReceiver(served)
    sent: dict[str, list[int]] = {"patch": [], DIFF: []}
    for version in range(VERSIONS):
        scene.step()
        data = publisher.patch().to_bytes()
        receiver.receive(data)
        sent["patch"].append(len(data))
        sent[DIFF].append(scene.compare() + (0 if version % ANCHOR else 2 * scene.entries))
    for name, param in scene.net.named_parameters():
        if not torch.equal(bits(served[name]), bits(param)):
            raise RuntimeError(f"{name}: the receiver has other weights")
    return {name: statistics.mean(sizes) for name, sizes in sent.items()}


def measure_times(model: str, share: float, rounds: int) -> dict[str, float]:
    """Median milliseconds of each subject."""
    spent, growing = Scene(model, share, 1), Scene(model, share, UNMASKING * 10)
    served = {name: param.detach().clone() for name, param in spent.net.named_parameters()}
    receiver, source = WeightReceiver(served), WeightPublisher(spent.optimizer)
    publisher, further = WeightPublisher(spent.optimizer), WeightPublisher(growing.optimizer)
    data: list[bytes] = []

    def publish_next() -> None:
        spent.step()
        data[:] = [source.patch().to_bytes()]

    subjects = [
        Subject({"name": "patch"}, lambda: publisher.patch().to_bytes(), prepare=spent.step),
        Subject({"name": LIMIT}, spent.gather, prepare=spent.step),
        Subject({"name": DIFF}, spent.compare, prepare=spent.step),
        Subject({"name": "receive"}, lambda: receiver.receive(data[0]), prepare=publish_next),
        Subject({"name": "dense copy"}, spent.copy_all, prepare=spent.step),
        Subject(
            {"name": NEW},
            lambda: further.patch().to_bytes(),
            prepare=growing.step,
        ),
        Subject({"name": NEW_LIMIT}, growing.gather, prepare=growing.step),
    ]
    records = interleave(subjects, rounds, warmup=2)
    return {each["name"]: statistics.median(each["us"]) / 1e3 for each in records}


def main() -> None:
    """Measure, and print."""
    parser = console.parser("publishing", __doc__)
    parser.add_argument("--model", default="SmolLM2-135M", choices=MODELS)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--write", action="store_true", help="record under bench/results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    conditions, found = Conditions.begin(), {}
    for share in (0.001, 0.01):
        times = measure_times(options.model, share, options.rounds)
        sizes = count_bytes(options.model, share)
        found[f"{share:.1%}"] = {"milliseconds": times, "bytes": sizes}
        lines = [
            [name, f"{spent:.2f}", f"{spent / times[LIMIT]:.2f}", f"{times[DIFF] / spent:.1f}"]
            for name, spent in times.items()
        ]
        print(table([f"{share:.1%} active", "ms", "/ gather", "snapshot diff /"], lines))
        print(
            f"{sizes['patch'] / 1e6:.2f} MB a version, {sizes[DIFF] / sizes['patch']:.1f} times "
            f"fewer than a snapshot scheme's {sizes[DIFF] / 1e6:.2f} MB\n",
            flush=True,
        )
    if options.write:
        record = describe() | {"model": options.model, "conditions": conditions.end()} | found
        path = RESULTS / f"publishing-{date.today().isoformat()}.json"
        path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
