"""Run by ComfyUI's own Python: load a LoRA file with ComfyUI's code and write the change of every weight.

Arguments: ComfyUI's folder, the LoRA file, a file with the base weights under the LoRA's own layer names, the file to
write. Nothing of this project is imported.
"""

from __future__ import annotations

import sys

folder, lora, base, out = sys.argv[1:5]
sys.argv = [sys.argv[0], "--cpu"]
sys.path.insert(0, folder)

import comfy.options  # noqa: E402  # pyright: ignore[reportMissingImports]

comfy.options.enable_args_parsing()  # else --cpu is not read

import comfy.lora  # noqa: E402  # pyright: ignore[reportMissingImports]
import comfy.utils  # noqa: E402  # pyright: ignore[reportMissingImports]
from safetensors.torch import load_file, save_file  # noqa: E402

weights = load_file(base)
loaded = comfy.lora.load_lora(comfy.utils.load_torch_file(lora, safe_load=True), {name: name for name in weights})
changes = {}
for name, weight in weights.items():
    patched = comfy.lora.calculate_weight([(1.0, loaded[name], 1.0, None, None)], weight.clone(), name)
    changes[name] = (patched - weight).contiguous()
save_file(changes, out)
