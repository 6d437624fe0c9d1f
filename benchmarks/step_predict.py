"""How much memory a step of the full SDXL takes, without a GPU: the engine's own step on tensors without content.

    python benchmarks/step_predict.py

torch's fake tensors have shapes, precisions and lifetimes, and no content, so everything that a step would allocate can
be counted. What is not seen: what kernels take for themselves while they run, fragmentation, CUDA's own context (some
0.5 GB). The engine's autocast of the CPU stands for CUDA's.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
from step_measures import LiveTensors  # noqa: E402
from step_models import SIZES, build_part, part_config  # noqa: E402
from torch import Tensor  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

NOTE = """No GPU was at hand: this is the engine's own step in bfloat16 on torch's fake tensors, which have shapes and
lifetimes but no content (`benchmarks/step_predict.py`). It counts every tensor that torch allocates; it does not see
what kernels take for themselves, fragmentation, nor CUDA's own context (some 0.5 GB). "nf4" counts the linear layers'
weights at 4.5 bits (a scale for every 64) and the rest as they are; a layer's unpacked weights are not counted (at most
26 MB). VAE and text encoders are not on the device during steps; encoding comes before, and stands in the last row."""

CASES = {  # title: (method, split pairs, gradient checkpointing)
    "SFT": ("sft", "off", False),
    "MaPO": ("mapo", "off", False),
    "MaPO, split pairs": ("mapo", "on", False),
    "SFT, checkpointing": ("sft", "off", True),
    "MaPO, checkpointing": ("mapo", "off", True),
    "MaPO, split pairs, checkpointing": ("mapo", "on", True),
}


class EmptyPairs:
    """Stands for the encoded pairs: the sizes of what the cache would hand out."""

    def __init__(self, size: str) -> None:
        from mapo_core.families.base import ImageGeometry

        side, unet = SIZES[size].resolution, part_config(size, "unet")
        scale = 2 ** (len(part_config(size, "vae")["block_out_channels"]) - 1)
        self.shape = (4, side // scale, side // scale)
        self.states = unet["cross_attention_dim"]
        self.pooled = unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]
        image = SimpleNamespace(geometry=ImageGeometry((side, side), (0, 0), (side, side)), path=None)
        entry = SimpleNamespace(
            chosen=image,
            rejected=image,
            prompt="",
            rejected_prompt="",
            base_prompt=None,
            weight=1.0,
            scores=None,
            bucket=(side, side),
        )
        self.entries = [entry]
        self.latent_scale = scale

    def latent_shape(self, index: int) -> tuple[int, int, int]:
        return self.shape

    def latents(self, image: Any, latent_noise: Tensor, flip: bool = False) -> Tensor:
        return torch.zeros(self.shape)

    def prompt(self, prompt: str) -> dict[str, Tensor]:
        return {"prompt_embeds": torch.zeros(77, self.states), "pooled_prompt_embeds": torch.zeros(self.pooled)}


def predict(size: str, method: str, split: str, checkpointing: bool, precision: str = "bf16") -> dict[str, int]:
    """Bytes of the frozen weights, of those of the linear layers in it, and of a step beyond them."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from diffusers import DDPMScheduler

    from mapo_core import backward, build_config
    from mapo_core.adapter import add_lora
    from mapo_core.backward import backward_batch
    from mapo_core.data_order import Draw
    from mapo_core.families import FAMILIES
    from mapo_core.families.base import DiffusionModel
    from mapo_core.fused_lora import fuse_lora
    from mapo_core.noising import PairRandomness
    from mapo_core.session import Session

    values = {
        "name": "predicted",
        "model": {"path": "none"},
        "data": {"pairs": "none"},
        "method": {"type": method},
        "training": {"precision": precision, "gradient_checkpointing": checkpointing, "device": "cpu"},
        "memory": {"split_pairs": split},
    }
    config = build_config(values)
    AcceleratorState._reset_state(reset_partial_state=True)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            unet = build_part(size, "unet")
    finally:
        torch.set_default_dtype(torch.float32)
    family = FAMILIES["sdxl"]
    model = DiffusionModel("sdxl", unet, None, [], [], scheduler, None, "epsilon", "", SIZES[size].resolution, 8, "")
    add_lora(model, family, config.adapter, 0)
    fuse_lora(unet)
    with FakeTensorMode(allow_non_fake_inputs=True):
        materialise(unet)
        unet.train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        session = cast(Any, Session.__new__(Session))
        session.__dict__.update(
            config=config,
            model=model,
            family=family,
            loss=config.method.build("sdxl"),
            pairs=EmptyPairs(size),
            train_indices=[0],
            class_images=None,
            precision=precision,
            split_pairs=split == "on",
            accelerator=Accelerator(cpu=True, mixed_precision="bf16" if precision == "bf16" else "no"),
            step=1,
        )
        frozen = [p for p in unet.parameters() if not p.requires_grad]
        linear = {id(m.weight) for m in unet.modules() if type(m) is torch.nn.Linear and not m.weight.requires_grad}
        noise = torch.zeros(session.pairs.shape)
        shown = PairRandomness(flip=False, drop_prompt=False, timestep=500, noise=noise, latent_noise=noise)
        backward.draw_randomness = lambda *_, **__: shown  # drawing needs content
        backward_batch(session, [Draw(0, 0)], 1)  # the gradients are there from now on
        with LiveTensors() as live:
            backward_batch(session, [Draw(0, 0)], 1)
        adapter = sum(p.nbytes for p in unet.parameters() if p.requires_grad)
    return {
        "weights_bytes": sum(p.nbytes for p in frozen) + 2 * adapter + adapter // 2,  # with gradients, 8-bit state
        "linear_bytes": sum(p.nbytes for p in frozen if id(p) in linear),
        "peak_live_bytes": live.peak,
    }


def predict_encoding(size: str) -> dict[str, int]:
    """Bytes of VAE (float32) and text encoders (bfloat16), and of encoding one picture beyond them."""
    with torch.device("meta"):
        vae = build_part(size, "vae")
        texts = [build_part(size, part) for part in ("text_encoder", "text_encoder_2")]
    side = SIZES[size].resolution
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        materialise(vae)
        picture = torch.empty(1, 3, side, side)
        with LiveTensors() as live:
            vae.encode(picture)
    numbers = sum(p.numel() for text in texts for p in text.parameters())
    weights = sum(p.nbytes for p in vae.parameters()) + 2 * numbers
    return {"weights_bytes": weights, "linear_bytes": 0, "peak_live_bytes": live.peak}


def materialise(module: torch.nn.Module) -> None:
    """Parameters of the meta device become those of the current one, without content."""
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                empty = torch.empty(p.shape, dtype=p.dtype)
                part._parameters[name] = torch.nn.Parameter(empty, requires_grad=p.requires_grad)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for title, (method, split, checkpointing) in CASES.items():
        found = predict(options.size, method, split, checkpointing)
        rows.append({"title": title, **found})
        print(rows[-1], flush=True)
        if (split, checkpointing) == ("on", True):
            packed = found["weights_bytes"] - found["linear_bytes"] + round(found["linear_bytes"] * 4.5 / 16)
            rows.append({**rows[-1], "title": f"{title}, nf4", "weights_bytes": packed})
    rows.append({"title": "encoding, before the steps", **predict_encoding(options.size)})
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "command": "python benchmarks/step_predict.py",
        "note": NOTE,
        "arms": rows,
    }
    (options.out / "train_step_predicted.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
