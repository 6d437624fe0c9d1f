"""Pictures and sheets."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from PIL import Image

from mapo_core.sampling import _embeds, contact_sheet


def test_prompts_of_different_lengths_are_repeated_never_cut() -> None:
    def prompt(windows: int) -> dict[str, torch.Tensor]:
        return {"prompt_embeds": torch.randn(windows * 4, 3), "pooled_prompt_embeds": torch.randn(5)}

    model = SimpleNamespace(unet=torch.nn.Linear(1, 1), device=torch.device("cpu"))
    prompts, negative = [prompt(2), prompt(3)], prompt(1)
    found = _embeds(model, prompts, negative)
    assert found["prompt_embeds"].shape == (2, 24, 3)
    assert torch.equal(found["prompt_embeds"][0], prompts[0]["prompt_embeds"].repeat(3, 1))
    assert torch.equal(found["negative_prompt_embeds"][1], negative["prompt_embeds"].repeat(6, 1))
    assert found["negative_pooled_prompt_embeds"].shape == (2, 5)


def test_a_sheet_has_a_place_for_every_picture_and_title() -> None:
    rows = [[Image.new("RGB", (64, 64), c) for c in ("red", "blue", "green")] for _ in range(2)]
    sheet = contact_sheet(rows, ["base", "LoRA"], ["a", "b", "a very long caption " * 10], tile=128)
    assert sheet.size == (110 + 3 * 134, 24 + 2 * 134)
    assert sheet.getpixel((110 + 64, 24 + 64)) == (255, 0, 0)
    assert sheet.getpixel((110 + 2 * 134 + 64, 24 + 134 + 64)) == (0, 128, 0)
