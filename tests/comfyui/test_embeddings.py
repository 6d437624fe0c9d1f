"""ComfyUI's own code on the file of a new word: each text encoder gets its vectors."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mapo_core.new_tokens import WordTable, export_tokens

pytestmark = pytest.mark.comfyui


class Encoder(nn.Module):
    """As much of a text encoder as holds words."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = WordTable(nn.Embedding(5, width), torch.randn(3, width))

    def get_input_embeddings(self) -> WordTable:
        return self.table


@pytest.mark.parametrize(("family", "widths"), [("sdxl", {"clip_l": 768, "clip_g": 1280}), ("sd15", {"clip_l": 768})])
def test_comfyui_reads_the_vectors_of_a_new_word(
    family: str, widths: dict[str, int], installation: tuple[Path, str], tmp_path: Path
) -> None:
    folder, python = installation
    encoders = [Encoder(width) for width in widths.values()]
    model: Any = SimpleNamespace(family=family, unet=nn.Identity(), text_encoders=encoders, new_tokens=("<toy>=toy",))
    (path,) = export_tokens(model, tmp_path / "style.safetensors")
    out = tmp_path / "read.safetensors"
    script = Path(__file__).with_name("embedding.py")
    pairs = [str(part) for item in widths.items() for part in item]
    command = [python, str(script), str(folder), str(tmp_path), path.stem, str(out), *pairs]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_file(out)
    for encoder, key in zip(encoders, widths, strict=True):
        assert torch.equal(found[key], encoder.table.vectors)
