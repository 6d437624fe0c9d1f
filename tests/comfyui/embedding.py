"""Run by ComfyUI's own Python: load an embedding as ComfyUI does, for each of its text encoders.

Arguments: ComfyUI's folder, the folder with the embedding, its name, the file to write, then key and width by turns.
Nothing of this project is imported.
"""

from __future__ import annotations

import sys

folder, embeddings, name, out, *encoders = sys.argv[1:]
sys.argv = [sys.argv[0], "--cpu"]
sys.path.insert(0, folder)

import comfy.options  # noqa: E402  # pyright: ignore[reportMissingImports]

comfy.options.enable_args_parsing()  # else --cpu is not read

from comfy.sd1_clip import load_embed  # noqa: E402  # pyright: ignore[reportMissingImports]
from safetensors.torch import save_file  # noqa: E402

found = {}
for key, width in zip(encoders[::2], encoders[1::2], strict=True):
    found[key] = load_embed(name, embeddings, int(width), key).contiguous()
save_file(found, out)
