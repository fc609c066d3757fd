"""What can be wrong with a model: where it should come from, and what its files say."""

from __future__ import annotations


class ModelSourceError(ValueError):
    """The model cannot be found or fetched; the message says what to do."""


class CheckpointError(ValueError):
    """A checkpoint's files are damaged, incomplete or contradict each other; the message names file and part."""
