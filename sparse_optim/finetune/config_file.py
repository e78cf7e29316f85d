"""A configuration as a YAML file: read what a user wrote, write what a run used."""

from __future__ import annotations

import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

from sparse_optim.files import replacing
from sparse_optim.finetune.config import FinetuneConfig, field_types, settings
from sparse_optim.finetune.errors import FinetuneError
from sparse_optim.finetune.hub import did_you_mean
from sparse_optim.finetune.settings import convert

CONFIG_FILE = "config.yaml"

# Repeating a run from its file must not replace the results beside the file, and begins at the
# beginning: it ends where the resumed run did, and the checkpoint may be gone by then.
NOT_WRITTEN = ("overwrite", "resume", "push_to_hub")

HEADER = "# Repeat this run: sparse-optim finetune --config {} --output ANOTHER_FOLDER\n"


def read_config(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, by name of the field.

    Raises:
        FinetuneError: the file cannot be read, is no YAML mapping, has an unknown key, or a value
            of the wrong type. The message names the file and the key.
    """
    found = {}
    for key, value in _mapping(path).items():
        if key not in settings():
            known = ", ".join(settings())
            hint = did_you_mean(str(key).replace("-", "_"), settings())
            raise FinetuneError(f"{path}: unknown setting {key!r}{hint}; known: {known}")
        try:
            found[key] = _value(key, value)
        except (TypeError, FinetuneError) as error:
            raise FinetuneError(f"{path}: {key}: {error}") from None
    return found


def write_config(config: FinetuneConfig, path: Path, place: Path | None = None) -> None:
    """Write a configuration so that `read_config` gives it back.

    Args:
        path: the file to write.
        place: where the file will be, for its first line (default: `path`).

    A setting that is None by default and None here is left out; so are `overwrite` and `resume`.
    """
    import yaml

    content = {
        field.name: _plain(value)
        for field in fields(config)
        if field.name not in NOT_WRITTEN
        and not ((value := getattr(config, field.name)) is None and field.default is None)
    }
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    header = HEADER.format(shlex.quote(str(place or path)))
    with replacing(path) as temporary:
        temporary.write_text(header + text, encoding="utf-8")


def _mapping(path: Path) -> dict[Any, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FinetuneError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise FinetuneError(f"{path}: not valid YAML ({reason})") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise FinetuneError(f"{path}: expected lines of the form 'setting: value'")
    return content


def _value(key: str, value: Any) -> Any:
    about = settings()[key]
    if about.read is None or value is None:
        return convert(value, field_types()[key])
    if about.written is str and isinstance(value, str):
        return about.read(value)
    found = convert(value, field_types()[key])
    return found if about.written is str else about.read(found)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value
