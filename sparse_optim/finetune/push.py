"""Upload the result of a job to the Hugging Face hub."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from sparse_optim.finetune.card import CARD_FILE
from sparse_optim.finetune.errors import FinetuneError
from sparse_optim.finetune.output import (
    ADAPTER_FOLDER,
    MODEL_FOLDER,
    SERIES_FOLDER,
    earlier_results,
)


def check_login(repo_id: str) -> None:
    """Raise FinetuneError unless the hub knows who the user is: better now than after training."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    try:
        HfApi().whoami()
    except LocalTokenNotFoundError:
        raise FinetuneError(
            f"--push-to-hub {repo_id}: log in first, by `hf auth login` or the variable HF_TOKEN"
        ) from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise FinetuneError(f"--push-to-hub {repo_id}: {_first_line(error)}") from None


def push_to_hub(run: str | os.PathLike[str], repo_id: str, *, private: bool | None = None) -> str:
    """Upload a run folder: what `finetune` wrote, without checkpoints.

    A whole model, or else an adapter, lies at the top: transformers or peft load it by the name of
    the repository. So does the delta, for `sparse_optim.load_model(repo_id)`.

    Args:
        run: a folder that `finetune` wrote.
        repo_id: "user/name"; the repository is made if there is none.
        private: whether a new repository is private (default: as the user's account says).

    Returns:
        the address of the repository.

    Raises:
        FinetuneError: the folder has no results, or the hub refuses the upload.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    folder = Path(run)
    results = earlier_results(folder)
    if not results:
        raise FinetuneError(f"{folder} has no results of `sparse-optim finetune`")
    with tempfile.TemporaryDirectory() as temporary:
        staged = Path(temporary)
        for name in sorted(results - {MODEL_FOLDER, ADAPTER_FOLDER, SERIES_FOLDER}):
            shutil.copy(folder / name, staged / name)
        if SERIES_FOLDER in results:
            shutil.copytree(folder / SERIES_FOLDER, staged / SERIES_FOLDER)
        top = next((name for name in (MODEL_FOLDER, ADAPTER_FOLDER) if name in results), None)
        if top is not None:
            shutil.copytree(folder / top, staged, dirs_exist_ok=True)
        card = staged / CARD_FILE
        where = str(folder / top) if top else str(folder)
        card.write_text(card.read_text(encoding="utf-8").replace(repr(where), repr(repo_id)))
        api = HfApi()
        try:
            url = api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(
                repo_id=repo_id, folder_path=staged, commit_message="Upload a fine-tuned model"
            )
        except (HfHubHTTPError, OSError, ValueError) as error:
            raise FinetuneError(f"cannot upload to {repo_id}: {_first_line(error)}") from error
    return str(url)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
