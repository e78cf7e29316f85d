"""Reinforcement learning with trl's GRPOTrainer; other processes follow the weights.

    python examples/trl_grpo.py
    python examples/trl_grpo.py --follow   # in another terminal: answer with the newest weights

The trainer writes each version into a folder, as the values of the entries that move: a few
megabytes, where the model takes half a gigabyte. The second command follows, as a server would that
writes the rollouts. Needs trl and the extra "finetune"; SmolLM2-135M is built in.
"""

import argparse
import time
from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

from sparse_optim.finetune.models import find_model, load_tokenizer
from sparse_optim.integrations.from_arguments import from_arguments
from sparse_optim.integrations.publish_callback import PublishCallback
from sparse_optim.integrations.trainer import SelectiveMixin
from sparse_optim.publish import PatchFolder, WeightReceiver

QUESTIONS = ["What is a lake?", "What is a bridge?", "What is a poem?", "What is a bicycle?"]
LETTERS = 30


class SelectiveGRPOTrainer(SelectiveMixin, GRPOTrainer):
    """trl's trainer, with an optimizer that knows the length of the run and clips in its step."""


def brevity(completions: list[Any], **_: Any) -> list[float]:
    """Answers of about thirty letters are rewarded."""
    texts = (completion[0]["content"] for completion in completions)
    return [-abs(len(text) - LETTERS) / LETTERS for text in texts]


def answer(model: Any, tokenizer: Any, question: str) -> str:
    """What a model says."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    written = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    text = tokenizer.decode(written[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return str(text.strip())


def main(argv: Sequence[str] | None = None) -> None:
    """Train and publish, or follow."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="built-in name, folder or hub id")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--budget", type=float, default=0.01, help="share of Linear weights")
    parser.add_argument("--ask", default="What is a lake?")
    parser.add_argument("--weights", default="example-weights", help="folder of the versions")
    parser.add_argument("--follow", action="store_true", help="do not train: follow and answer")
    args = parser.parse_args(argv)

    source = find_model(args.model)
    tokenizer = load_tokenizer(source)
    served = AutoModelForCausalLM.from_pretrained(source.location).eval()
    receiver, folder = WeightReceiver(served), PatchFolder(args.weights)
    while args.follow:  # until it is interrupted
        if folder.newest > receiver.version:
            version = folder.follow(receiver)
            print(f"version {version}: {answer(served, tokenizer, args.ask)!r}", flush=True)
        time.sleep(0.2)

    config = GRPOConfig(
        output_dir="runs/example-grpo",
        max_steps=args.steps,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=24,
        learning_rate=args.lr,
        bf16=False,
        logging_steps=4,
        save_strategy="no",
        report_to="none",
    )
    prompts = [[{"role": "user", "content": question}] for question in QUESTIONS]
    trainer = SelectiveGRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(source.location),
        args=config,
        reward_funcs=brevity,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=tokenizer,
        build_optimizer=from_arguments(config, budget=args.budget),
        callbacks=[PublishCallback(folder)],
    )
    trainer.train()

    before = answer(served, tokenizer, args.ask)
    version = folder.follow(receiver)  # a copy of the base catches up
    newest = max(folder.path.glob("*.safetensors"))
    print(
        f"version {version} is {newest}, {newest.stat().st_size / 1e6:.2f} MB; "
        f"{args.ask!r} was answered {before!r}, now {answer(served, tokenizer, args.ask)!r}."
    )


if __name__ == "__main__":
    main()
