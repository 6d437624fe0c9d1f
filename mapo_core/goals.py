"""What somebody wants a LoRA for, and the method and beta that were published for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Goal:
    """A use of a LoRA.

    Attributes:
        name: for programs.
        title: for people.
        text: what pairs it needs, in a sentence.
        beta: of MaPO's paper form; Hong et al., arXiv 2406.06424, Table 4. Published, not measured here.
    """

    name: str
    title: str
    text: str
    beta: float

    def settings(self) -> dict[str, Any]:
        """As settings of TrainConfig."""
        return {"method": {"type": "mapo", "parametrisation": "paper", "beta": self.beta}}


GOALS = (
    Goal("style", "Style", "Chosen: pictures in the style. Rejected: the same prompts without it.", 64),
    Goal("person or object", "Person or object", "Chosen: photos of it. Rejected: what the model draws instead.", 1024),
    Goal("culture", "Culture", "Chosen: how it looks where you are. Rejected: the model's own idea of it.", 32),
    Goal("safety", "Safety", "Chosen: harmless pictures. Rejected: harmful ones of the same prompts.", 64),
    Goal("general preference", "General preference", "Chosen: what people prefer. Rejected: what they do not.", 8),
)
"""The tasks of the paper's Table 4."""
