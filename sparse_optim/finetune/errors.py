"""The error that a user of the main job can mend."""

from __future__ import annotations


class FinetuneError(ValueError):
    """Bad input to a fine-tuning job: one line that says what is wrong and what to do."""
