"""The model card (README.md) of a result, and the lines that load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparse_optim.finetune.builtin_data import MODELS
from sparse_optim.finetune.config import FinetuneConfig
from sparse_optim.finetune.metrics import describe_metric
from sparse_optim.finetune.spec import ModelSpec
from sparse_optim.finetune.tasks import TASKS
from sparse_optim.integrations.peft_package import in_transformers
from sparse_optim.methods import METHODS

CARD_FILE = "README.md"
PIPELINES = {
    "sequence-classification": "text-classification",
    "multi-label-classification": "text-classification",
    "regression": "text-classification",
    "token-classification": "token-classification",
    "causal-lm": "text-generation",
    "summarization": "summarization",
}


def load_run(run: str) -> str:
    """Python that loads the result of a job from its folder or hub id."""
    return f"import sparse_optim\n\nmodel, tokenizer = sparse_optim.load_model({run!r})"


def load_folder(folder: str, spec: ModelSpec, model: Any) -> str:
    """Python that uses a whole model folder."""
    if TASKS[spec.task].writes:
        return write_with(folder, spec)
    trust = ", trust_remote_code=True" if not in_transformers(model) else ""
    return (
        "from transformers import pipeline\n\n"
        f"model = pipeline({PIPELINES[spec.task]!r}, {folder!r}{trust})"
    )


def write_with(folder: str, spec: ModelSpec) -> str:
    """Python that lets an encoder-decoder write: transformers 5 has no pipeline for it."""
    targets = spec.lengths.targets
    prefix = targets.prefix if targets is not None else ""
    return (
        "from transformers import AutoModelForSeq2SeqLM, AutoTokenizer\n\n"
        f"model = AutoModelForSeq2SeqLM.from_pretrained({folder!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({folder!r})\n"
        f"text = {prefix + 'A text'!r}\n"
        f"inputs = tokenizer(text, truncation=True, max_length={spec.max_length}, "
        'return_tensors="pt")\n'
        "ids = model.generate(**inputs)[0]\n"
        "print(tokenizer.decode(ids, skip_special_tokens=True))"
    )


def load_adapter(folder: str, spec: ModelSpec, model: Any) -> str:
    """Python that loads an adapter folder on its base."""
    if spec.adapter in ("pfeiffer", "houlsby"):
        return (
            "from sparse_optim.integrations.bottleneck import load_bottlenecks\n\n"
            f"load_bottlenecks(base, {folder!r})  # base: the model with the head of this task"
        )
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    options = ""
    if spec.labels is not None and len(spec.labels) != 2:
        options = f", num_labels={len(spec.labels)}"
    if spec.task == "regression":
        options = ", num_labels=1"
    if not in_transformers(base):
        options += f", import_allowlist=[{type(base).__module__!r}]"
    return (
        "from peft import AutoPeftModel\n\n"
        f"model = AutoPeftModel.from_pretrained({folder!r}{options})"
    )


def write_card(
    folder: Path,
    use: str,
    spec: ModelSpec,
    config: FinetuneConfig,
    metrics: Mapping[str, Any],
) -> None:
    """Write the card of a result.

    Args:
        folder: gets README.md.
        use: Python that loads what is in the folder.
        config: the job, with the method's defaults filled in.
        metrics: as in metrics.json.
    """
    from huggingface_hub import ModelCardData

    is_hub_id = not Path(spec.base).is_absolute() and spec.base not in MODELS
    header = ModelCardData(
        base_model=spec.base if is_hub_id else None,
        library_name="transformers" if config.adapter is None else "peft",
        pipeline_tag=PIPELINES[spec.task],
        tags=["sparse-optim", config.method],
        metrics=[metrics["metric"]["name"]],
    )
    series = metrics.get("series")  # beside the run's card, not beside those of its folders
    changed, parameters = metrics["active_entries"], metrics["model"]["parameters"]
    data = metrics["data"]
    rows = {
        "base model": Path(spec.base).name,
        "data": f"{Path(config.dataset).name}: {data['train_examples']:,} training examples, "
        f"{data['eval_examples']:,} for evaluation ({data['eval_split']})",
        "task": spec.task,
        "prefix": spec.source_prefix or None,
        "beams": spec.num_beams,
        "method": f"{config.method} ({METHODS[config.method].about})",
        "adapter": config.adapter,
        "budget": config.budget,
        "learning rate": config.lr,
        "steps": metrics["steps"],
        "batch size": config.batch_size * config.accumulation,
        "seed": config.seed,
    }
    known = ("loss", *TASKS[spec.task].metrics)
    values = {
        describe_metric(name, spec.task): value
        for name, value in metrics["final"].items()
        if name in known
    }
    lines = [
        f"---\n{header.to_yaml()}\n---",
        f"# {Path(spec.base).name} fine-tuned on {Path(config.dataset).name}",
        f"{changed:,} of {parameters:,} parameters ({changed / parameters:.2%}) were trained, with "
        "sparse_optim.",
        f"## Use\n\n```python\n{use}\n```",
        "## Results\n\n" + _table(f"on {data['eval_split']}", values),
        *([_series(series)] if series and (folder / series[0]["file"]).exists() else []),
        "## Training\n\n" + _table("", rows),
    ]
    if spec.labels is not None:
        lines.append("## Labels\n\n" + ", ".join(f"`{name}`" for name in spec.labels))
    (folder / CARD_FILE).write_text("\n\n".join(lines) + "\n", encoding="utf-8")


def _series(rows: Sequence[Mapping[str, Any]]) -> str:
    """The models at parts of the budget."""
    name = rows[0]["metric"]
    return "\n".join(
        [
            "## Smaller models of this run\n",
            f"| file | share of the budget | entries | step | {name} |",
            "| :-- | --: | --: | --: | --: |",
            *(
                f"| {row['file']} | {100 * row['share']:.3g}% | {row['entries']:,} | "
                f"{row['step']:,} | {row['value']:.4g} |"
                for row in rows
            ),
        ]
    )


def _table(heading: str, rows: Mapping[str, Any]) -> str:
    shown = (
        f"| {name} | {value:.4g} |" if isinstance(value, float) else f"| {name} | {value} |"
        for name, value in rows.items()
        if value is not None
    )
    return "\n".join([f"| {heading} | |", "| :-- | :-- |", *shown])
