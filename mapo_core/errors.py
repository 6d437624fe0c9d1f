"""The errors that a user may meet. Every message says what is wrong, where, and what to do next."""

from __future__ import annotations


class MapoError(Exception):
    """Base of all errors that are meant for the user; anything else is a defect of ours."""


class ConfigError(MapoError):
    """A setting is missing, unknown or out of range."""


class PairsError(MapoError):
    """A pair set cannot be built or read; `problems` lists every fault found, not only the first."""

    def __init__(self, message: str, problems: list[str] | None = None) -> None:
        super().__init__(message)
        self.problems = problems or []


class ModelError(MapoError):
    """A model file or folder cannot be recognised or loaded."""


class MissingWeightsError(ModelError):
    """A scorer's weights are not on this machine; the message names the download and the place."""


class CacheError(MapoError):
    """A cached latent or prompt embedding cannot be written."""


class TrainingError(MapoError):
    """Training cannot go on: out of memory, or losses that are not finite."""


class MemoryShortError(TrainingError):
    """The device's memory is used up and nothing is left to save; what was trained is kept."""


class ExportError(MapoError):
    """A LoRA file was written but does not give back what was trained."""


class RunError(MapoError):
    """A run folder cannot be created, found, resumed or changed."""
