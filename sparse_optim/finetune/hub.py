"""Check that the Hugging Face hub can be reached; otherwise explain in one line what to do."""

from __future__ import annotations

import difflib
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from sparse_optim.finetune.errors import FinetuneError


@lru_cache(maxsize=1)
def hub_is_reachable(timeout: float = 5.0) -> bool:
    """Send one request: without a network, the libraries retry for about 25 s for each file."""
    from huggingface_hub import constants

    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=timeout).close()
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        # Python and the hub's client may trust different certificates: let the client try.
        return isinstance(error.reason, ssl.SSLError)
    except OSError:
        return False
    return True


def require_hub(kind: str, name: str, builtins: Iterable[str]) -> None:
    """Check that a hub id can be looked up; in offline mode the libraries serve their cache.

    Raises:
        FinetuneError: the hub cannot be reached, or the name is a path that does not exist.
    """
    from huggingface_hub import is_offline_mode

    known = ", ".join(builtins)
    if name.startswith(("/", ".", "~")) or Path(name).suffix in DATA_SUFFIXES:
        raise FinetuneError(f"no such file or folder: {name} (built-in {kind}s: {known})")
    if not is_offline_mode() and not hub_is_reachable():
        raise FinetuneError(
            f"{kind} {name!r} is not a local path{did_you_mean(name, builtins)}, and the Hugging "
            f"Face hub is unreachable; give a local folder or a built-in {kind} ({known}), or set "
            "HF_HUB_OFFLINE=1 to use a copy in the hub cache"
        )


DATA_SUFFIXES = {".csv", ".tsv", ".json", ".jsonl", ".parquet"}


def hub_error(kind: str, name: str, builtins: Iterable[str], error: Exception) -> FinetuneError:
    """Turn what a library raised into one line that says what to do."""
    reason = explain(kind, name, error)
    known = list(builtins)
    if name in known or Path(name).expanduser().exists():
        return FinetuneError(f"cannot load {kind} {name!r}: {reason}")
    return FinetuneError(
        f"cannot load {kind} {name!r}{did_you_mean(name, known)}: no folder of this name is here, "
        f"and from the hub: {reason} (built-in {kind}s: {', '.join(known)})"
    )


def explain(kind: str, name: str, error: Exception) -> str:
    """What a library's error says in its first line, or what to do where later lines say it."""
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub import is_offline_mode
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if is_offline_mode() and not Path(name).expanduser().exists():
        return "it is not in the hub cache, and HF_HUB_OFFLINE prevents a download"
    log_in = "log in with `hf auth login`"
    chain = list(_chain(error))
    if any(isinstance(each, GatedRepoError) or " a gated " in str(each) for each in chain):
        page = f"https://huggingface.co/{'datasets/' if kind == 'data set' else ''}{name}"
        return f"it is gated: ask for access on its page, {page}, and {log_in}"
    if any(isinstance(each, (RepositoryNotFoundError, DatasetNotFoundError)) for each in chain):
        return f"the hub has no such {kind}, or it is private: then {log_in}"
    lines = str(_cause(error)).strip().splitlines() or [type(error).__name__]
    if lines[0] == "Config name is missing." and len(lines) > 1:
        known = lines[1].partition(": ")[2]
        return f"it has several configurations: choose one of {known} with --dataset-config"
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _cause(error: BaseException) -> BaseException:
    """What went wrong in a file: `datasets` wraps it in "an error occurred"."""
    from datasets.exceptions import DatasetGenerationError  # slow, and not needed for --help

    while isinstance(error, DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint with the nearest known name, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
