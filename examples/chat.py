"""Teach a small chat model the answers of a shop: supervised fine-tuning of SmolLM2.

    python examples/chat.py
    python examples/chat.py --model HuggingFaceTB/SmolLM2-360M-Instruct --steps 60

Needs the extra "finetune"; SmolLM2-135M is built in (4-bit weights, expanded to float32). Only the
assistant's turns carry loss.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import sparse_optim
from sparse_optim.finetune import FinetuneConfig
from sparse_optim.finetune.job import run

ANSWERS = {
    "When do you open on Sunday?": "On Sunday we open at ten and close at four.",
    "Do you repair bicycles?": "Yes, we repair bicycles. Most repairs take two days.",
    "Can I pay by card?": "Yes, by card and in cash.",
    "Where are you?": "We are at the corner of Mill Lane and Station Road.",
}
OUTPUT = Path("runs/example-shop")  # this folder alone is overwritten by a second run


def write_chats(path: Path) -> Path:
    """One conversation a line, as in most chat data sets; a file that is there is left alone."""
    if path.exists():
        return path
    with path.open("w") as file:
        for question, answer in ANSWERS.items():
            turns = [("user", question), ("assistant", answer)]
            messages = [{"role": role, "content": content} for role, content in turns]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def main(argv: Sequence[str] | None = None) -> None:
    """Train on the conversations, then ask."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="built-in name, folder or hub id")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--lr", type=float, default=7e-4)
    parser.add_argument("--budget", type=float, default=0.01, help="share of Linear weights")
    parser.add_argument("--ask", default="When do you open on Sunday?")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args(argv)

    chats = write_chats(Path("example-shop.jsonl"))
    config = FinetuneConfig(
        model=args.model,
        dataset=str(chats),
        output=args.output,
        budget=args.budget,
        steps=args.steps,
        batch_size=3,
        lr=args.lr,
        every=1,
        max_length=128,
        overwrite=args.output == OUTPUT,
    )
    metrics = run(config).metrics

    model, tokenizer = sparse_optim.load_model(args.output)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": args.ask}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    written = model.generate(**prompt, max_new_tokens=30, do_sample=False)
    answer = tokenizer.decode(written[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    print(
        f"After {args.steps} steps on {metrics['active_entries']:,} entries, "
        f"{args.ask!r} is answered: {answer.strip()!r}."
    )


if __name__ == "__main__":
    main()
