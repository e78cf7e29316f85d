"""Fine-tune a model that is sharded over processes (FSDP2), and resume it from a checkpoint.

    torchrun --nproc_per_node 2 examples/fsdp.py
    torchrun --nproc_per_node 3 examples/fsdp.py     # resumes at the half, with another number

Each process holds a share of the parameters; the budget is that of the whole model. Half-way all
processes save a torch.distributed.checkpoint, and a second call goes on from there. Every process
gets the whole delta, and the first one saves it. It runs on the CPU.

Needs the extra "finetune"; MiniLM and TREC questions are built in.
"""

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from sparse_optim import IncrementalMaskedAdamW, apply_delta, param_groups, save_delta
from sparse_optim.finetune.builtin_data import load_builtin
from sparse_optim.finetune.models import find_model


def main(argv: Sequence[str] | None = None) -> None:
    """Train in all processes; the first one saves the delta and tests it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="minilm", help="built-in name, folder or hub id")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch-size", type=int, default=32, help="of all processes together")
    parser.add_argument("--lr", type=float, default=7e-4)
    parser.add_argument("--checkpoint", default="runs/example-fsdp", help="folder, saved half-way")
    parser.add_argument("--output", default="example-fsdp.safetensors", help="file of the delta")
    args = parser.parse_args(argv)

    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    splits = load_builtin("trec6")
    labels = sorted(set(splits["train"]["label"]))
    source = find_model(args.model).location
    tokenizer = AutoTokenizer.from_pretrained(source)
    torch.manual_seed(0)  # the same fresh head in all processes
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=len(labels))
    base = copy.deepcopy(model)

    def batch_of(split: str, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        texts = [splits[split]["text"][row] for row in rows]
        answers = [labels.index(splits[split]["label"][row]) for row in rows]
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        return {**batch, "labels": torch.tensor(answers)}

    mesh = init_device_mesh("cpu", (world,))
    for layer in model.base_model.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # First shard, then build the optimizer, alike in all processes.
    optimizer = IncrementalMaskedAdamW(
        param_groups(model, dense="classifier"),
        lr=args.lr,
        budget=0.01,
        total_steps=args.steps,
        max_grad_norm=1.0,
    )
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, args.steps)

    def state() -> dict[str, dict]:
        """Collective: what a checkpoint holds, in shards."""
        of_model, of_optimizer = get_state_dict(model, optimizer)
        return {
            "model": of_model,
            "optimizer": of_optimizer,
            "scheduler": scheduler.state_dict(),
        }

    begin = 0
    if Path(args.checkpoint, ".metadata").is_file():  # written last: a killed save has none
        saved = state()
        dcp.load(saved, checkpoint_id=args.checkpoint)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=saved["model"],
            optim_state_dict=saved["optimizer"],
        )
        scheduler.load_state_dict(saved["scheduler"])
        begin = int(optimizer.metrics()["step"])

    model.train()
    for step in range(begin, args.steps):
        torch.manual_seed(step)  # so that a resumed run draws the same rows and dropout
        rows = torch.randint(len(splits["train"]["text"]), (args.batch_size,))
        model(**batch_of("train", rows[rank::world].tolist())).loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step + 1 == args.steps // 2 and not begin:
            dcp.save(state(), checkpoint_id=args.checkpoint)

    delta = optimizer.delta(model)  # collective: each process gets the whole delta
    if rank == 0:
        save_delta(delta, args.output)
        apply_delta(base.eval(), delta)
        right, total = 0, len(splits["test"]["text"])
        with torch.no_grad():
            for first in range(0, total, 128):
                batch = batch_of("test", range(first, min(first + 128, total)))
                right += int((base(**batch).logits.argmax(-1) == batch["labels"]).sum())
        print(
            f"{right / total:.1%} of {total} test questions are right after {args.steps} steps "
            f"({begin} of them before) of {world} processes; {args.output} holds "
            f"{delta.num_entries:,} entries ({delta.nbytes / 1e6:.1f} MB)."
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
