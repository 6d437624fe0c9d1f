"""Prompts that have nothing to do with a training set: where a LoRA should change little."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

GENERAL_PROMPTS = (
    "a photo of a red bicycle leaning against a brick wall",
    "two cups of coffee on a wooden table, morning light",
    "a mountain lake in autumn, wide angle",
    "portrait of an old fisherman with a grey beard",
    "a bowl of oranges, still life, oil painting",
    "a crowded street market at night in the rain",
    "a small robot watering a plant, digital illustration",
    "a black cat asleep on a stack of books",
    "an empty railway station, symmetrical, black and white photograph",
    "a watercolour of a village by the sea",
    "a chess board seen from above",
    "a woman in a yellow raincoat walking a dog on the beach",
    "a plate of spaghetti with basil, food photography",
    "an astronaut standing in a field of sunflowers",
    "a pencil drawing of a human hand",
    "a modern glass building reflecting clouds",
)
COUNT = len(GENERAL_PROMPTS)
_DEMO_SEED = 31  # of the demo world's captions; other evaluations use other seeds


def outside_prompts(model: str, trained: Iterable[str], given: Iterable[str] = ()) -> list[str]:
    """Prompts outside a training set.

    Args:
        model: the base model's path, id or "demo"; the demo model gets captions of its own world.
        trained: prompts of the training set, which are left out.
        given: the user's own list; empty: the built-in one.
    """
    wanted = list(given)
    if not wanted and model == "demo":
        from ..demo.scenes import evaluation_scenes

        wanted = [scene.caption for scene in evaluation_scenes(COUNT, _DEMO_SEED)]
    candidates = dict.fromkeys(wanted or GENERAL_PROMPTS)
    known = {p for p in trained if p in candidates}
    return [p for p in candidates if p not in known]
