"""Separators, encodings and names of data files."""

from __future__ import annotations

import codecs

import pytest

pytest.importorskip("datasets", reason="the main job needs the extra 'finetune'")

from sparse_optim.finetune.data import DataRequest, load_data
from sparse_optim.finetune.data_files import find_separator, load_file, load_folder
from sparse_optim.finetune.errors import FinetuneError

ROWS = [("one, two", "yes"), ("three", "no"), ('say "so"', "yes"), ("five", "no")]


def quoted(value: str) -> str:
    return '"' + value.replace('"', '""') + '"'


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".CSV"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_separators_are_read_from_the_header(tmp_path, suffix, separator, mark):
    lines = [separator.join(map(quoted, row)) for row in [("text", "label"), *ROWS]]
    path = tmp_path / f"set{suffix}"
    path.write_bytes(mark + "\n".join(lines).encode())
    table = load_file(path)["train"]
    assert table.column_names == ["text", "label"]
    assert list(zip(table["text"], table["label"], strict=True)) == ROWS


@pytest.mark.parametrize(
    ("header", "candidates", "separator"),
    [
        ("text", ",;\t", ","),
        ("text", "\t,;", "\t"),
        ('"a, b, c";label', ",;\t", ";"),
        ("text, or tweet;label;id", ",;\t", ";"),
        ("text\tlabel", ",;\t", "\t"),
    ],
)
def test_the_most_frequent_separator_of_the_header_wins(tmp_path, header, candidates, separator):
    path = tmp_path / "set.csv"
    path.write_text(f"{header}\n1,2,3,4,5,6\n")
    assert find_separator(path, candidates) == separator


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("set.csv", "text,label\nun café,a\n".encode("latin1"), "byte 0xe9 in line 2.*-f latin1"),
        ("set.jsonl", '{"text": "é"}\n'.encode("latin1"), r"set\.jsonl is not UTF-8.*line 1"),
        ("set.csv", "text,label\na,b\n".encode("utf-16"), "byte 0xff in line 1.*-f utf-16"),
    ],
)
def test_other_encodings_are_refused_with_the_line_and_a_command(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FinetuneError, match=message):
        load_file(tmp_path / name)


def test_json_lines_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "set.jsonl"
    path.write_bytes(
        codecs.BOM_UTF8 + b'{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n'
    )
    assert load_file(path)["train"]["text"][:] == ["a", "b"]


def test_splits_of_a_folder_may_have_different_separators(tmp_path):
    (tmp_path / "train.csv").write_text("text;label\na;x\nb;y\n")
    (tmp_path / "test.csv").write_text("text,label\nc,x\n")
    data = load_data(DataRequest(str(tmp_path)))
    assert (data.train["text"][:], data.evaluation["text"][:]) == (["a", "b"], ["c"])


@pytest.mark.parametrize("name", ["dev", "valid", "val", "validation", "Dev", "eval", "testing"])
def test_other_names_of_splits_are_read_by_the_same_rules(tmp_path, name):
    """Their folder was read as comma-separated, and "None" as a missing value."""
    (tmp_path / "train.csv").write_text("text;label\nNone;x\nNA;y\n")
    (tmp_path / f"{name}.tsv").write_text('text\tlabel\n"quoted\tx\n')
    data = load_data(DataRequest(str(tmp_path)))
    assert data.eval_split == ("test" if name in ("eval", "testing") else "validation")
    assert (data.train["text"][:], data.evaluation["text"][:]) == (["None", "NA"], ['"quoted'])


def test_suffixes_of_splits_are_kept(tmp_path):
    for name in ("train", "dev_matched", "dev_mismatched"):
        (tmp_path / f"{name}.csv").write_text(f"text,label\n{name},x\nb,y\n")
    splits = load_folder(tmp_path)
    assert sorted(splits) == ["train", "validation_matched", "validation_mismatched"]
    assert splits["validation_mismatched"]["text"][0] == "dev_mismatched"


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["reviews.csv"], ["train"]),
        (["data/train.csv", "data/test.csv"], ["test", "train"]),
        (["train-0.csv", "train-1.csv", "my-dev.csv"], ["train", "validation"]),
        (["dev.csv", "validation.csv", "train.csv"], ["train", "validation"]),
    ],
)
def test_tables_of_any_name_are_read_by_the_same_rules(tmp_path, names, splits):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"text;label\nNone;x\n{name};y\n")
    (tmp_path / "README.md").write_text("# Some data\n")
    loaded = load_folder(tmp_path)
    assert sorted(loaded) == splits
    texts = [text for split in loaded.values() for text in split["text"]]
    assert sorted(texts) == sorted([*names, *["None"] * len(names)])


def test_a_card_that_assigns_files_to_splits_is_followed(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\na,x\n")
    (tmp_path / "b.csv").write_text("text,label\nb,x\n")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n"
        "    path: a.csv\n  - split: test\n    path: b.csv\n---\n"
    )
    assert sorted(load_folder(tmp_path)) == ["test", "train"]
