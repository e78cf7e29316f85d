"""What finished runs measured, from their `metrics.json`, in groups that can be compared.

Metrics are only comparable on the same examples: a group has the same data set, split, number of
examples and metric. Cost (step time, state, delta) is given as measured, with the settings that
differ beside it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparse_optim.analysis.record import RecordError

METRICS_FILE = "metrics.json"

# Settings that change quality or cost: a table names those that differ between its runs.
SETTINGS = ("model", "device", "dtype", "batch_size", "max_length", "lr", "steps", "seed")


@dataclass(frozen=True)
class DataKey:
    """What runs must share for their metrics to be comparable.

    Attributes:
        dataset: built-in name, hub id, or path: below the working directory if it is there.
        split: name, or the share of train that was held out.
        tokens: for language models, how texts became tokens, which perplexity depends on: length,
            model (for its tokenizer) and whether the chat template was used; else "".
    """

    dataset: str
    dataset_config: str | None
    split: str
    examples: int
    metric: str
    tokens: str = ""

    @property
    def title(self) -> str:
        """For headings: the metric and the examples."""
        return f"{self.metric} on {self.place}"

    @property
    def place(self) -> str:
        """Data set, split and number of examples."""
        name = f"{self.dataset} {self.dataset_config}" if self.dataset_config else self.dataset
        tokens = f", {self.tokens}" if self.tokens else ""
        return f"{name} ({self.split}, {self.examples:,} examples{tokens})"


@dataclass(frozen=True)
class Run:
    """What a finished run measured.

    Attributes:
        name: for tables and legends.
        folder: the run's output folder.
        method: of fine-tuning, with the adapter if there is one.
        data: what its metric was computed on.
        settings: the values of SETTINGS.
        value: the metric of the model that was kept: with --best of the best evaluation, else of
            the last; None if it was not finite.
        active_entries: entries that training may have changed, a fresh head included.
        state_bytes: of the optimizer.
        step_ms, update_ms: median of a step, and of its clipping and update.
        delta_bytes: size of the delta file.
        verified: whether base + delta was found to be the trained model; None: not checked.
        evaluations: (step, metric), finite values only.
    """

    name: str
    folder: str
    method: str
    data: DataKey
    settings: dict[str, Any]
    value: float | None
    active_entries: int
    parameters: int
    state_bytes: int
    step_ms: float
    update_ms: float
    delta_bytes: int
    verified: bool | None
    evaluations: list[tuple[int, float]]

    def as_json(self) -> dict[str, Any]:
        """JSON values, under these names."""
        return asdict(self)


def run_of(name: str, folder: Path, metrics: Mapping[str, Any]) -> Run:
    """Read a run from what its metrics.json holds.

    Raises:
        RecordError: a value is missing.
    """
    try:
        config, data, metric = metrics["config"], metrics["data"], metrics["metric"]["name"]
        adapter = config.get("adapter")
        settings = _settings(metrics)
        return Run(
            name=name,
            folder=str(folder),
            method=f"{config['method']} on {adapter}" if adapter else config["method"],
            data=DataKey(
                dataset=dataset_of(str(config["dataset"])),
                dataset_config=config.get("dataset_config"),
                split=data["eval_split"],
                examples=data["eval_examples"],
                metric=metric,
                tokens=_tokens(settings) if metrics.get("task") == "causal-lm" else "",
            ),
            settings={key: settings[key] for key in SETTINGS},
            value=metrics["metric"]["value"],
            active_entries=metrics["active_entries"],
            parameters=metrics["model"]["parameters"],
            state_bytes=metrics["state_bytes"],
            step_ms=metrics["step_ms"],
            update_ms=metrics["update_ms"],
            delta_bytes=metrics["delta_bytes"],
            verified=metrics["verified"],
            evaluations=[
                (row["step"], row[metric])
                for row in metrics["evaluations"]
                if row.get(metric) is not None
            ],
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise RecordError(
            f"{folder / METRICS_FILE} lacks {error}: another version wrote it; run the job again"
        ) from error


def _settings(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the run used; of an earlier version, those that the user gave."""
    measured = {key: metrics[key] for key in ("device", "steps")}
    return {**metrics["config"], **measured, **metrics.get("used", {})}


def _tokens(settings: Mapping[str, Any]) -> str:
    # Evaluation examples are never packed.
    chat = ", chat" if settings.get("chat") else ""
    return f"at most {settings['max_length']} tokens of {settings['model']}{chat}"


def dataset_of(name: str) -> str:
    """One spelling for a path that can be written in several ways; other names as they are."""
    path = Path(name).expanduser()
    if not path.exists():
        return name
    path, here = path.resolve(), Path.cwd().resolve()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def load_runs(folders: Sequence[Path]) -> list[Run]:
    """Read finished runs from their output folders.

    Raises:
        RecordError: a folder is given twice, or has no whole metrics.json.
    """
    repeated = [path for path, count in Counter(map(Path.resolve, folders)).items() if count > 1]
    if repeated:
        raise RecordError(f"{repeated[0]} is given twice; name each run once")
    return [
        run_of(name, folder, read_metrics(folder)) for name, folder in run_names(folders).items()
    ]


def read_metrics(folder: Path) -> dict[str, Any]:
    """The content of a run's metrics.json.

    Raises:
        RecordError: there is none, or it is damaged.
    """
    path = folder / METRICS_FILE
    if not path.is_file():
        raise RecordError(
            f"{folder} has no {METRICS_FILE}: `sparse-optim finetune` writes it when a run ends; "
            "name the --output folder of a finished run"
        )
    try:
        metrics = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RecordError(f"{path} is cut or not JSON; run the job again") from error
    if not isinstance(metrics, dict):
        raise RecordError(f"{path} is not a JSON object; run the job again")
    return metrics


def run_names(folders: Sequence[Path]) -> dict[str, Path]:
    """Name each folder: by its own name, or by its path where two names are equal."""
    names = Counter(folder.resolve().name for folder in folders)
    return {
        name if names[name := folder.resolve().name] == 1 else str(folder): folder
        for folder in folders
    }


def groups_of(runs: Sequence[Run]) -> dict[DataKey, list[Run]]:
    """The runs by what their metric was computed on, in the order given."""
    groups: dict[DataKey, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.data, []).append(run)
    return groups


def differing_settings(runs: Sequence[Run]) -> list[str]:
    """Names of the settings that are not the same in all runs."""
    return [name for name in SETTINGS if len({str(run.settings[name]) for run in runs}) > 1]


def _text(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:g}" if isinstance(value, float) else str(value)


def table_of(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the table of one group; settings that differ have a column."""
    settings = differing_settings(runs)
    methods = ["method"] if any(run.name != run.method for run in runs) else []
    headings = [
        *("run", *methods, *(name.replace("_", " ") for name in settings)),
        *(runs[0].data.metric, "entries trained", "state MB"),
        *("step ms", "update ms", "delta MB", "exact"),
    ]
    exact = {True: "yes", False: "NO", None: "-"}
    cells = [
        [
            *(
                run.name,
                *(run.method for _ in methods),
                *(_text(run.settings[name]) for name in settings),
            ),
            "-" if run.value is None else f"{run.value:.4f}",
            f"{run.active_entries:,}",
            f"{run.state_bytes / 1e6:.2f}",
            f"{run.step_ms:.1f}",
            f"{run.update_ms:.2f}",
            f"{run.delta_bytes / 1e6:.2f}",
            exact[run.verified],
        ]
        for run in runs
    ]
    return headings, cells
