"""The built-in model's data and settings, so that everything can be tried without a download."""

from __future__ import annotations

from comfy_api.latest import io

from ..mapo_core import demo_pairs, demo_values
from ._types import Pairs, Settings
from .pairs import shown

STYLES = ("cartoon", "sticker", "neon")


class DemoModel(io.ComfyNode):
    """Pairs and settings for the built-in model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MaPODemoModel",
            display_name="Demo Model",
            category="MaPO",
            description="Pictures, pairs and settings for the small model that comes with the pack. Wire them to Train LoRA with the checkpoint demo (built in): it trains on any machine in minutes.",
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "style",
                    options=list(STYLES),
                    default="cartoon",
                    tooltip="Drawing style to teach. neon is one that the model has never seen, and harder.",
                ),
                io.Int.Input(
                    "steps",
                    default=400,
                    min=1,
                    max=10_000,
                    tooltip="Training steps; more take longer and show more of the style.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**31,
                    control_after_generate=False,
                    tooltip="Another seed draws other pictures.",
                ),
            ],
            outputs=[Pairs.Output("pairs", display_name="pairs"), Settings.Output("settings", display_name="settings")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, style: str, steps: int, seed: int) -> io.NodeOutput:
        values = demo_values("demo", steps=steps, seed=seed)
        values["validation"] = {**values["validation"], "sample_every_steps": max(1, steps // 4)}
        for name in ("name", "seed", "model"):  # these are Train LoRA's
            values.pop(name)
        values["data"].pop("pairs")
        found = demo_pairs(style, seed)
        note = (
            f"{style}: {len(found.pairs)} pairs of 64 x 64 pixels. The check below notes that the two styles differ in "
            "simple ways, such as brightness; here that is meant."
        )
        out = shown(cls, found, 64, note)
        return io.NodeOutput(out.args[0], values, ui=out.ui)


NODES = [DemoModel]
