"""The scorers: what they are called, and how one is loaded. A new one is a file beside this and a line in SCORERS.

A scorer's file has `SOURCES`, the weights it needs, and `load(options)`. Importing this module loads none of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import ConfigError, MissingWeightsError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from PIL import Image

SCORERS: dict[str, str] = {
    "aesthetic": "aesthetic",
    "hpsv2": "hpsv2",
    "pickscore": "pickscore",
    "siglip": "siglip",
    "clip": "clip_score",
    "dinov2": "dinov2",
    "vlm-judge": "vlm_judge",
    "demo-style": "demo_world",
    "demo-content": "demo_world",
}
AUTO = "auto"
_DEMO = ("demo-style", "demo-content")
_NOT_AUTO = {"vlm-judge"}  # minutes per picture on a small machine: only when asked for


class Scorer(Protocol):
    """Pictures to numbers; larger is better."""

    name: str
    title: str

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """One number per picture, made for the prompt at the same place; not a number where it cannot say."""
        ...


@dataclass(frozen=True)
class ScorerOptions:
    """What a scorer may be told.

    Attributes:
        device: as of `training.device`.
        download: fetch missing weights from the Hub.
        folders: name of weights (`WeightSource.name`) to the folder or file where the user has them.
        references: chosen images, for scorers that compare with them.
        sha256: hash of a pickled checkpoint that the user vouches for.
        judge_endpoint: base URL of an OpenAI-compatible server for the VLM judge; None: a local model.
        judge_model: Hub id or folder of the local judge, or the model's name at the endpoint.
    """

    device: str = "auto"
    download: bool = False
    folders: Mapping[str, Path] = field(default_factory=dict)
    references: Sequence[Image.Image] = ()
    sha256: str | None = None
    judge_endpoint: str | None = None
    judge_model: str | None = None


def load_scorer(name: str, options: ScorerOptions | None = None) -> Scorer:
    """Load a scorer.

    Raises:
        ConfigError: there is no such scorer, or it lacks an option.
        MissingWeightsError: its weights are not here; the message says what to download and where to put it.
        ModelError: the weights are not what they should be.
    """
    return _module(name).load(name, options or ScorerOptions())


def missing_weights(name: str, options: ScorerOptions | None = None) -> str | None:
    """What a scorer lacks on this machine, as a message, or None; nothing is downloaded or loaded."""
    from .weights import find_weights

    options = replace(options or ScorerOptions(), download=False)
    try:
        for source in _module(name).SOURCES:
            find_weights(source, options.folders.get(source.name))
    except MissingWeightsError as error:
        return str(error)
    return None


def describe_scorer(name: str) -> str:
    """What a scorer measures, in one line."""
    about = (_module(name).__doc__ or "").strip().splitlines()[0].rstrip(".")
    demo = {"demo-style": "how much a picture is in the chosen style", "demo-content": "how well it fits its prompt"}
    return f"Demo model only: {demo[name]}" if name in demo else about


def choose_scorers(
    names: Sequence[str], model: str, options: ScorerOptions | None = None
) -> tuple[list[str], dict[str, str]]:
    """Which scorers are used.

    Args:
        names: scorers, or "auto" alone: for the demo model its own, for others those whose weights are here.
        model: the base model's path, id or "demo".
        options: where weights are.

    Returns:
        The scorers, and for "auto" what those left out lack.

    Raises:
        ConfigError: there is no such scorer, or it cannot judge this model's pictures.
        MissingWeightsError: one that was asked for lacks weights.
    """
    options = options or ScorerOptions()
    if list(names) == [AUTO]:
        if model == "demo":
            return list(_DEMO), {}
        candidates = [n for n in SCORERS if n not in {*_DEMO, *_NOT_AUTO}]
        lacking = {n: text for n in candidates if (text := missing_weights(n, options)) is not None}
        return [n for n in candidates if n not in lacking], lacking
    for name in names:
        _module(name)
        if name in _DEMO and model != "demo":
            raise ConfigError(f"Scorer {name} knows the demo model's pictures alone.")
        if not options.download and not (name == "vlm-judge" and (options.judge_endpoint or options.judge_model)):
            text = missing_weights(name, options)
            if text is not None:
                raise MissingWeightsError(text)
    return list(dict.fromkeys(names)), {}


def _module(name: str) -> Any:
    if name not in SCORERS:
        raise ConfigError(f"There is no scorer {name!r}: use auto, {', '.join(SCORERS)}.")
    return import_module(f".{SCORERS[name]}", __package__)
