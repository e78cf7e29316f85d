"""Keep transformers from printing while a model is loaded: what matters is in our own log."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils import logging


@contextmanager
def quiet(location: str) -> Iterator[None]:
    """Silence its reports, such as that of a missing head, and its progress bars inside the block.

    Args:
        location: what is loaded; the bars of a download stay.
    """
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    bars = bars and Path(location).is_dir()
    logging.set_verbosity_error()
    if bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
