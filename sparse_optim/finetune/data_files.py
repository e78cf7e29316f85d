"""Read CSV, TSV, JSON, JSON lines and parquet files, alone or in a folder."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from pathlib import Path

from datasets import Dataset, DatasetDict, concatenate_datasets, load_dataset, load_from_disk
from datasets.data_files import SPLIT_KEYWORDS, DataFilesDict, get_data_patterns

from sparse_optim.finetune.errors import FinetuneError
from sparse_optim.finetune.hub import DATA_SUFFIXES

SPLITS = {word: str(split) for split, words in SPLIT_KEYWORDS.items() for word in words}
SPLIT_NAME = re.compile(f"({'|'.join(SPLITS)})(_[a-z]+)?")  # with MNLI's validation_matched
CARD_CONFIGS = re.compile("^configs:", re.MULTILINE)  # in a README.md that assigns files to splits
TSV_FIELD = r'("([^"]|"")*"|[^"\t][^\t]*|)'
TSV_LINE = re.compile(f"{TSV_FIELD}(\t{TSV_FIELD})*")
QUOTED = re.compile('"[^"]*"')
SEPARATORS = {".csv": ",;\t", ".tsv": "\t,;"}  # the first wins where a header has none
UTF16 = (b"\xff\xfe", b"\xfe\xff")


def load_file(path: Path) -> DatasetDict:
    """Load one CSV, TSV, JSON, JSON lines or parquet file as a train split."""
    suffix = path.suffix.lower()
    if suffix not in DATA_SUFFIXES:
        known = ", ".join(sorted(DATA_SUFFIXES))
        raise FinetuneError(
            f"{path}: cannot read files with suffix {path.suffix!r}; known: {known}"
        )
    if path.stat().st_size == 0:
        raise FinetuneError(f"{path} is empty")
    return read_files({"train": path}, suffix)


def load_folder(path: Path) -> DatasetDict:
    """Load a folder written by `save_to_disk`, or data files named after their splits."""
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        loaded = load_from_disk(str(path))
        return loaded if isinstance(loaded, DatasetDict) else DatasetDict({"train": loaded})
    if not any(file.suffix.lower() in DATA_SUFFIXES for file in path.rglob("*")):
        known = ", ".join(sorted(DATA_SUFFIXES))
        raise FinetuneError(f"{path} has no data file ({known})")
    # `load_dataset` would take validation_matched and validation_mismatched for one split.
    files = [file for file in sorted(path.iterdir()) if file.suffix.lower() in DATA_SUFFIXES]
    named = {name: file for file in files if (name := split_of(file)) is not None}
    if not named or len(named) < len(files):
        return load_any_names(path)
    splits: dict[str, Dataset] = {}
    for suffix in sorted({file.suffix.lower() for file in files}):
        alike = {name: file for name, file in named.items() if file.suffix.lower() == suffix}
        splits |= read_files(alike, suffix)
    return DatasetDict(splits)


def split_of(file: Path) -> str | None:
    """The split that a file's name means ("dev.csv": validation); None if it means none."""
    match = SPLIT_NAME.fullmatch(file.stem.lower())
    return None if match is None else SPLITS[match[1]] + (match[2] or "")


def load_any_names(path: Path) -> DatasetDict:
    """Load a folder in which `datasets` finds the files of each split, by its own rules.

    It would also read them, but CSV and TSV files not as `read_table` does.
    """
    card = path / "README.md"
    if card.exists() and CARD_CONFIGS.search(card.read_text(errors="replace")):
        return load_dataset(str(path))
    found = DataFilesDict.from_patterns(get_data_patterns(str(path)), base_path=str(path))
    splits = {
        str(name): [file for file in map(Path, files) if file.suffix.lower() in DATA_SUFFIXES]
        for name, files in found.items()
    }
    if {file.suffix.lower() for files in splits.values() for file in files} - SEPARATORS.keys():
        return load_dataset(str(path))
    return DatasetDict(
        {
            name: concatenate_datasets(
                [read_files({name: file}, file.suffix.lower())[name] for file in files]
            )
            for name, files in splits.items()
            if files
        }
    )


def read_files(files: Mapping[str, Path], suffix: str) -> DatasetDict:
    """Load files of one kind, by split."""
    if suffix == ".parquet":
        return load_dataset("parquet", data_files=as_text(files))
    for path in files.values():
        check_utf8(path)
    if suffix in (".json", ".jsonl"):
        return load_dataset("json", data_files=as_text(files))
    splits: dict[str, Dataset] = {}
    for split, path in files.items():
        splits |= read_table(split, path, suffix)
    return DatasetDict(splits)


def read_table(split: str, path: Path, suffix: str) -> DatasetDict:
    """Load one CSV or TSV file."""
    separator = find_separator(path, SEPARATORS[suffix])
    literal = separator == "\t" and not quotes_are_syntax(path)
    return load_dataset(
        "csv",
        data_files={split: str(path)},
        sep=separator,
        quoting=csv.QUOTE_NONE if literal else csv.QUOTE_MINIMAL,
        keep_default_na=False,  # "None", "NA" and "null" are words; an empty field has no value
        na_values=[""],
    )


def find_separator(path: Path, candidates: str) -> str:
    """The candidate that occurs most often in the header outside quotes; of equals, the first."""
    with path.open(encoding="utf-8-sig") as file:
        header = QUOTED.sub("", file.readline())
    return max(candidates, key=header.count)


def quotes_are_syntax(path: Path) -> bool:
    """Whether each field of a TSV file that begins with a quote is a whole quoted field.

    If not, quotes are text: many TSV files (those of GLUE) are written without quoting, and a
    lone quote would swallow the lines up to the next one.
    """
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        return all(TSV_LINE.fullmatch(line.rstrip("\r\n")) for line in file)


def check_utf8(path: Path) -> None:
    """Raise FinetuneError if a file is not UTF-8: other encodings are not guessed."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                guess = "utf-16" if number == 1 and line.startswith(UTF16) else "latin1"
                raise FinetuneError(
                    f"{path} is not UTF-8: byte 0x{line[error.start]:02x} in line {number}; "
                    f"convert it first, for instance with: iconv -f {guess} -t utf-8 {path} > "
                    f"utf8{path.suffix}"
                ) from None


def as_text(files: Mapping[str, Path]) -> dict[str, str]:
    """Paths as `datasets` takes them."""
    return {split: str(path) for split, path in files.items()}
