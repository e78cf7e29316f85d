"""Train the most important part of a LoRA: ID3 on top of a peft adapter.

    python examples/lora.py
    python examples/lora.py --model google-bert/bert-base-uncased --rank 32 --steps 300

Needs the extras "finetune" and "peft"; MiniLM and TREC questions are built in.
"""

import argparse
from collections.abc import Sequence

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from sparse_optim import IncrementalMaskedAdamW
from sparse_optim.finetune.builtin_data import load_builtin
from sparse_optim.finetune.models import find_model
from sparse_optim.integrations import adapter_groups


def main(argv: Sequence[str] | None = None) -> None:
    """Train, save an ordinary peft adapter, load it with peft alone."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="minilm", help="built-in name, folder or hub id")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--output", default="example-adapter", help="folder of the adapter")
    args = parser.parse_args(argv)

    table = load_builtin("trec6")
    labels = sorted(set(table["train"]["label"]))
    source = find_model(args.model).location
    tokenizer = AutoTokenizer.from_pretrained(source)

    def load_base() -> torch.nn.Module:
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_pretrained(source, num_labels=len(labels))

    def encode(split: str, rows: slice) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        texts, answers = table[split]["text"][rows], table[split]["label"][rows]
        numbers = torch.tensor([labels.index(answer) for answer in answers])
        return tokenizer(texts, padding=True, return_tensors="pt"), numbers

    settings = LoraConfig(
        task_type="SEQ_CLS",
        r=args.rank,
        lora_alpha=2 * args.rank,
        target_modules=["query", "value"],
        modules_to_save=["classifier"],
    )
    model = get_peft_model(load_base(), settings)
    groups = adapter_groups(model)  # ranks the LoRA, trains the head whole, leaves the base alone
    optimizer = IncrementalMaskedAdamW(groups, lr=args.lr, budget=0.2, total_steps=args.steps)
    size, count = 32, len(table["train"]["text"])
    model.train()
    for step in range(args.steps):
        start = step * size % (count - size)
        batch, answers = encode("train", slice(start, start + size))
        model(**batch, labels=answers).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(args.output)

    with torch.no_grad():
        batch, answers = encode("test", slice(0, 256))
        trained = model.eval()(**batch).logits
        loaded = PeftModel.from_pretrained(load_base(), args.output).eval()(**batch).logits
    right = (trained.argmax(-1) == answers).float().mean()
    ranked = sum(param.numel() for _, param in groups[0]["params"])
    same = "the same" if torch.equal(trained, loaded) else "OTHER"
    print(
        f"{right:.1%} of the test questions are right with {optimizer.metrics()['active']:,} of "
        f"the adapter's {ranked:,} entries; peft loads {args.output} with {same} outputs."
    )


if __name__ == "__main__":
    main()
