"""Fine-tune a chat model with trl's SFTTrainer; a delta is saved beside each checkpoint.

    python examples/trl_sft.py
    python examples/trl_sft.py --model HuggingFaceTB/SmolLM2-360M-Instruct --steps 60

Needs trl and the extra "finetune"; SmolLM2-135M is built in (4-bit weights, expanded to float32).
`SelectiveMixin` goes in front of any trainer of trl in the same way: DPOTrainer, GRPOTrainer, ...
"""

import argparse
from collections.abc import Sequence

from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from sparse_optim import save_delta
from sparse_optim.finetune.models import find_model, load_tokenizer
from sparse_optim.integrations.callback import SelectiveCallback
from sparse_optim.integrations.from_arguments import from_arguments
from sparse_optim.integrations.trainer import SelectiveMixin

ANSWERS = {
    "When do you open on Sunday?": "On Sunday we open at ten and close at four.",
    "Do you repair bicycles?": "Yes, we repair bicycles. Most repairs take two days.",
    "Can I pay by card?": "Yes, by card and in cash.",
    "Where are you?": "We are at the corner of Mill Lane and Station Road.",
}


class SelectiveSFTTrainer(SelectiveMixin, SFTTrainer):
    """trl's trainer, with an optimizer that knows the length of the run and clips in its step."""


def main(argv: Sequence[str] | None = None) -> None:
    """Train on the conversations, save the delta, then ask."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="built-in name, folder or hub id")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--lr", type=float, default=7e-4)
    parser.add_argument("--budget", type=float, default=0.01, help="share of Linear weights")
    parser.add_argument("--ask", default="When do you open on Sunday?")
    parser.add_argument("--output", default="example-trl.safetensors", help="file of the delta")
    args = parser.parse_args(argv)

    source = find_model(args.model)
    tokenizer = load_tokenizer(source)
    chats = [
        {
            "prompt": [{"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": answer}],
        }
        for question, answer in ANSWERS.items()
    ]
    config = SFTConfig(
        output_dir="runs/example-trl",
        max_steps=args.steps,
        per_device_train_batch_size=3,
        learning_rate=args.lr,
        bf16=False,
        logging_steps=4,
        save_steps=max(1, args.steps // 2),
        save_only_model=True,
        report_to="none",
    )
    trainer = SelectiveSFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(source.location),
        args=config,
        train_dataset=Dataset.from_list(chats),
        processing_class=tokenizer,
        # Rate, decay and clipping are the config's; rows of embeddings do not compete.
        build_optimizer=from_arguments(config, budget=args.budget),
    )
    SelectiveCallback().attach(trainer)  # logs metrics, and saves a delta with each checkpoint
    trainer.train()
    delta = trainer.raw_optimizer.delta(trainer.model)
    save_delta(delta, args.output)

    model = trainer.model.eval()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": args.ask}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    ).to(model.device)
    written = model.generate(**prompt, max_new_tokens=30, do_sample=False)
    answer = tokenizer.decode(written[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    print(
        f"{args.output} holds {delta.num_entries:,} entries ({delta.nbytes / 1e6:.1f} MB) after "
        f"{args.steps} steps; {args.ask!r} is answered: {answer.strip()!r}."
    )


if __name__ == "__main__":
    main()
