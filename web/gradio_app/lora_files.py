"""The part of the Results page that makes a LoRA file, its model card, and copies of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from mapo_core import ConfigError, copy_lora, model_card, save_model_card
from mapo_core.runs import RunDir, run_job

from .context import AppContext, shown
from .figures import without_head
from .run_view import step_of
from .train_request import loras_folder
from .work import cancel_button, note, shown_while

LAYOUTS = [("kohya: for ComfyUI, Forge and others", "kohya"), ("diffusers", "diffusers")]
PRECISIONS = ["fp16", "bf16", "fp32"]
HIDDEN: dict[str, Any] = {"api_visibility": "private"}


class FileSection:
    """The components, and what they do; they follow the page's choice of a run and a checkpoint."""

    def __init__(self, context: AppContext) -> None:
        self.context = context

    def draw(self) -> None:
        """Everything from top to bottom."""
        with gr.Row():
            self.layout = gr.Dropdown(LAYOUTS, value="kohya", label="Format", elem_id="results-layout")
            self.precision = gr.Dropdown(PRECISIONS, value="fp16", label="Precision")
            self.licence = gr.Textbox(
                "",
                label="Licence",
                info="For the model card. Empty: a notice to fill it in.",
                elem_id="results-licence",
            )
        with gr.Row():
            self.export = gr.Button("Make the LoRA file", variant="primary", elem_id="results-export")
            self.stop_export = cancel_button("export")
        self.exported = gr.HTML(elem_id="results-exported")
        self.files = gr.File(label="LoRA and model card", visible=False, interactive=False, elem_id="results-files")
        with gr.Row():
            self.folder = gr.Textbox(
                loras_folder(self.context),
                label="Copy to ComfyUI: its loras folder",
                placeholder=".../ComfyUI/models/loras",
                elem_id="results-folder",
            )
            self.copy = gr.Button(
                "Copy the LoRA file there", size="sm", elem_id="results-copy", elem_classes="mapo-beside"
            )
        self.copied = gr.HTML(elem_id="results-copied")
        with gr.Accordion("Model card", open=False, elem_id="results-card-box"):
            self.card = gr.Markdown("", elem_id="results-card")

    def connect(self, run: gr.Dropdown, step: gr.Dropdown) -> None:
        """Buttons to functions."""
        self.export.click(
            shown(self._export),
            [run, step, self.layout, self.precision, self.licence],
            [self.exported, self.stop_export, self.files, self.card],
            concurrency_limit=1,
            concurrency_id="heavy",
            **HIDDEN,
        )
        self.copy.click(shown(self._copy), [run, step, self.layout, self.precision, self.folder], self.copied, **HIDDEN)

    def _export(
        self, name: str | None, step: str | None, layout: str, precision: str, licence: str, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        run = self.context.run(name or "")
        number = step_of(run, step)
        arguments = {"run": str(run.path), "step": number, "layout": layout, "precision": precision}

        def finish(result: dict[str, Any]) -> tuple[str, tuple[Any, ...]]:
            lora = Path(result["lora"])
            card = model_card(run, number, licence)
            files = [str(lora), str(save_model_card(lora.parent, card))]
            words = f"{lora.name}: {lora.stat().st_size / 2**20:.1f} MB, read back and compared with what was trained."
            return words, (gr.update(value=files, visible=True), without_head(card))

        yield from shown_while(
            request,
            "export",
            lambda progress, stop: run_job("export", arguments, progress=progress, should_stop=stop),
            finish,
            2,
        )

    def _copy(self, name: str | None, step: str | None, layout: str, precision: str, folder: str) -> str:
        run = self.context.run(name or "")
        lora = exported_file(run, step_of(run, step), layout, precision)
        target = copy_lora(lora, self.context.safe_path(folder), run.name)
        return note(f"It is at {target}. In ComfyUI press R, then choose it in Load LoRA.")


def exported_file(run: RunDir, step: int, layout: str, precision: str) -> Path:
    """The file that the button made.

    Raises:
        ConfigError: it has not been made.
    """
    path = run.export / f"{run.name}-{step:08d}-{layout}-{precision}.safetensors"
    if not path.exists():
        raise ConfigError("Make the LoRA file first: press the button above, then copy it.")
    return path
