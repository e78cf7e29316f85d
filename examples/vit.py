"""Fine-tune a vision transformer with ID3 in an ordinary training loop.

    python examples/vit.py [--steps 120]

A small ViT learns the digits 0 to 4 of scikit-learn's 8x8 images; that is the base. Then the
digits 5 to 9 are learnt from 150 images, with a new head, in three ways: the head alone, ID3 at 1%
of the Linear weights, and all entries. Nothing is downloaded; it takes about 15 seconds on a CPU.

For a real model, replace `pretrain` and the data; the rest stays:

    from transformers import AutoImageProcessor, ViTForImageClassification

    name = "google/vit-base-patch16-224-in21k"
    processor = AutoImageProcessor.from_pretrained(name)
    base = ViTForImageClassification.from_pretrained(name, num_labels=NUMBER_OF_CLASSES)
    pixels = processor(images=list_of_pil_images, return_tensors="pt")["pixel_values"]
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from sparse_optim import IncrementalMaskedAdamW, param_groups, save_delta

BATCH_SIZE = 32
EVALUATED = 0.5  # share of the new digits that is held out
EXAMPLES = 150  # of the new digits to learn from

Data = tuple[Tensor, Tensor]  # pixels (n, 1, 8, 8), labels (n,)


def digits(low: int, high: int) -> Data:
    """The images of the digits from `low` to `high`, in random order, with labels from 0."""
    images, labels = load_digits(return_X_y=True)
    chosen = torch.from_numpy((labels >= low) & (labels <= high))
    pixels = torch.from_numpy(images).float().view(-1, 1, 8, 8)[chosen] / 16
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    return pixels[order], (torch.from_numpy(labels)[chosen] - low)[order]


def new_model() -> ViTForImageClassification:
    """A ViT of 16 patches of 2x2 pixels and about 90,000 entries."""
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_labels=5,
    )
    return ViTForImageClassification(config)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: Data, steps: int) -> None:
    """An ordinary loop: the optimizer unmasks entries by itself."""
    model.train()
    pixels, labels = data
    draw = torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = torch.randint(len(pixels), (BATCH_SIZE,), generator=draw)
        model(pixel_values=pixels[batch], labels=labels[batch]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """Share of correct answers."""
    pixels, labels = data
    answers = model.eval()(pixel_values=pixels).logits.argmax(-1)
    return float((answers == labels).float().mean())


def pretrain(steps: int) -> ViTForImageClassification:
    """The base: trained on the digits 0 to 4, with a fresh head for five new classes."""
    model = new_model()
    train(model, torch.optim.AdamW(model.parameters(), lr=2e-3), digits(0, 4), steps)
    model.classifier.reset_parameters()
    return model


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run it; return the accuracy of each way."""
    parser = argparse.ArgumentParser(description="Fine-tune a vision transformer with ID3.")
    parser.add_argument("--steps", type=int, default=120, help="steps of each fine-tuning")
    parser.add_argument("--budget", type=float, default=0.01, help="share of entries for ID3")
    parser.add_argument("--output", help="also save the delta of ID3 to this file")
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    base = pretrain(2 * arguments.steps)
    pixels, labels = digits(5, 9)
    held_out = int(EVALUATED * len(pixels))
    evaluation = pixels[:held_out], labels[:held_out]
    training = pixels[held_out:][:EXAMPLES], labels[held_out:][:EXAMPLES]

    found = {}
    for way in ("head alone", "id3", "full"):
        model = copy.deepcopy(base)
        if way == "head alone":
            model.vit.requires_grad_(False)
            optimizer = torch.optim.AdamW(model.classifier.parameters(), lr=1e-2)
        elif way == "id3":
            # The new head is trained whole. Weights of attention and feed-forward blocks compete
            # for the budget; rank="all" adds embeddings, the class token, biases and norms.
            optimizer = IncrementalMaskedAdamW(
                param_groups(model, dense="classifier"),
                lr=5e-3,
                budget=arguments.budget,
                total_steps=arguments.steps,
            )
        else:
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        train(model, optimizer, training, arguments.steps)
        found[way] = accuracy(model, evaluation)
        changed = sum(
            int((new != old).sum())
            for new, old in zip(model.parameters(), base.parameters(), strict=True)
        )
        print(f"{way:>10}: accuracy {found[way]:.3f}, {changed:,} entries changed")
        if way == "id3" and arguments.output:
            save_delta(optimizer.delta(model), arguments.output)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)  # more threads are slower for tensors of this size
    main()
