"""What the hub's libraries raise in several lines is one line that says what to do."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="the job needs the extra 'finetune'")

from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from sparse_optim.finetune.hub import hub_error


def http_error(kind: type[Exception], message: str) -> Exception:
    """As the hub's client raises it, without the response that its constructor wants."""
    error = kind.__new__(kind)
    error.args = (message,)
    return error


def caused(message: str, cause: Exception) -> Exception:
    error = OSError(message)
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("kind", "error", "reason"),
    [
        (
            "model",
            caused(
                "You are trying to access a gated repo.\nMake sure to have access to it.",
                http_error(GatedRepoError, "403 Client Error. (Request ID: x)\n\nCannot access"),
            ),
            "it is gated: ask for access on its page, https://huggingface.co/who/what, and log in",
        ),
        (
            "data set",
            DatasetNotFoundError("Dataset 'who/what' is a gated dataset on the Hub."),
            "its page, https://huggingface.co/datasets/who/what, and log in with",
        ),
        (
            "model",
            caused(
                "who/what is not a local folder\nIf this is a private repository",
                http_error(RepositoryNotFoundError, "404 Client Error. (Request ID: x)"),
            ),
            "the hub has no such model, or it is private: then log in with `hf auth login`",
        ),
        (
            "data set",
            DatasetNotFoundError("Dataset 'who/what' doesn't exist on the Hub"),
            "the hub has no such data set, or it is private",
        ),
        (
            "data set",
            ValueError(
                "Config name is missing.\nPlease pick one among the available configs: "
                "['cola', 'sst2']\nExample of usage:\n\t`load_dataset('who/what', 'cola')`"
            ),
            "it has several configurations: choose one of ['cola', 'sst2'] with --dataset-config",
        ),
        ("model", OSError("There was an error when loading:\n504 Server Error"), "504 Server"),
        ("model", OSError("first\nsecond"), "first (built-in models: minilm"),
        ("model", RuntimeError(), "RuntimeError"),
    ],
)
def test_what_the_libraries_raise_is_one_line(monkeypatch, kind, error, reason):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    message = str(hub_error(kind, "who/what", ["minilm"], error))
    assert message.startswith(f"cannot load {kind} 'who/what'")
    assert reason in message
    assert "\n" not in message
    assert "Request ID" not in message
