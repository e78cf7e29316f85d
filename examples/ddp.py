"""Fine-tune in several processes: your own loop, DistributedDataParallel, sampled gradients.

    torchrun --nproc_per_node 2 examples/ddp.py
    torchrun --nproc_per_node 4 examples/ddp.py --model google-bert/bert-base-uncased --steps 300

The order counts: process group, then the optimizer with `model=model`, then the wrapper. Steps that
unmask nothing exchange 4 bytes for each active entry, not every gradient. It runs on the CPU.

Needs the extra "finetune"; MiniLM and TREC questions are built in.
"""

import argparse
import copy
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from sparse_optim import IncrementalMaskedAdamW, apply_delta, param_groups, save_delta
from sparse_optim.finetune.builtin_data import load_builtin
from sparse_optim.finetune.models import find_model


def main(argv: Sequence[str] | None = None) -> None:
    """Train in all processes; the first one saves the delta and tests it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="minilm", help="built-in name, folder or hub id")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch-size", type=int, default=16, help="of each process")
    parser.add_argument("--lr", type=float, default=7e-4)
    parser.add_argument("--output", default="example-ddp.safetensors", help="file of the delta")
    args = parser.parse_args(argv)

    dist.init_process_group("gloo")
    splits = load_builtin("trec6")
    labels = sorted(set(splits["train"]["label"]))
    source = find_model(args.model).location
    tokenizer = AutoTokenizer.from_pretrained(source)
    torch.manual_seed(0)  # the same fresh head in all processes
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=len(labels))
    base = copy.deepcopy(model)

    def collate(rows: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
        texts, answers = zip(*rows, strict=True)
        batch = tokenizer(list(texts), padding=True, return_tensors="pt")
        return {**batch, "labels": torch.tensor([labels.index(answer) for answer in answers])}

    def rows(split: str) -> list[tuple[str, str]]:
        return list(zip(splits[split]["text"], splits[split]["label"], strict=True))

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        """Of this process's share of the examples, in another order in each epoch."""
        data = rows("train")
        sampler = DistributedSampler(data)
        loader = DataLoader(data, args.batch_size, sampler=sampler, collate_fn=collate)
        epoch = 0
        while True:
            sampler.set_epoch(epoch)
            yield from loader
            epoch += 1

    optimizer = IncrementalMaskedAdamW(
        param_groups(model, dense="classifier"),
        lr=args.lr,
        budget=0.01,
        total_steps=args.steps,
        max_grad_norm=1.0,  # of the averaged gradients; clip_grad_norm_ would see a part of them
        model=model,
        sampled_backward=True,
    )
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, args.steps)
    wrapped = DistributedDataParallel(model).train()
    for _, batch in zip(range(args.steps), batches(), strict=False):
        wrapped(**batch).loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

    if dist.get_rank() == 0:  # all processes have the same model, and the same delta
        delta = optimizer.delta(model)
        save_delta(delta, args.output)
        apply_delta(base.eval(), delta)
        right = total = 0
        with torch.no_grad():
            for batch in DataLoader(rows("test"), 128, collate_fn=collate):
                right += int((base(**batch).logits.argmax(-1) == batch["labels"]).sum())
                total += len(batch["labels"])
        print(
            f"{right / total:.1%} of {total} test questions are right after {args.steps} steps of "
            f"{dist.get_world_size()} processes; {args.output} holds {delta.num_entries:,} entries "
            f"({delta.nbytes / 1e6:.1f} MB)."
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
