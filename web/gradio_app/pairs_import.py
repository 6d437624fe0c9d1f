"""Bringing pairs in, on the Pairs page: folders, an archive or a list, one folder alone, a saved set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from mapo_core import ConfigError
from mapo_core.pairs import (
    PairSet,
    begin_edit,
    keep_files,
    keep_zip,
    list_sets,
    load_pairs,
    pairs_from_dropped,
    pairs_from_folders,
    read_pair_set,
    rejected_folder,
    require_editable,
    set_folder,
)
from mapo_core.runs import run_job

from .cards import EDITS, pair_count
from .context import AppContext, shown
from .train_request import DEMO, model_choices, model_path
from .work import cancel_button, note, shown_while

MATCHES = [("file name", "stem"), ("order", "order"), ("at random, same prompt", "random")]


class ImportSection:
    """The components, and what they do; what was brought in becomes an edit, whose name they hand on."""

    def __init__(self, context: AppContext) -> None:
        self.context = context

    def draw(self) -> None:
        """A tab per source."""
        with gr.Tabs(elem_id="pairs-sources"):
            with gr.Tab("Two folders"):
                gr.Markdown("Folders on the machine that this app runs on, or dropped from yours.")
                with gr.Row():
                    self.chosen = gr.Textbox("", label="Folder of preferred images", elem_id="pairs-chosen")
                    self.rejected = gr.Textbox("", label="Folder of the others", elem_id="pairs-rejected")
                with gr.Row():
                    self.chosen_drop = _folder_drop("Or drop the preferred images", "pairs-chosen-drop")
                    self.rejected_drop = _folder_drop("Or drop the others", "pairs-rejected-drop")
                self.from_folders = gr.Button("Make pairs", variant="primary", elem_id="pairs-from-folders")
            with gr.Tab("Archive or list"):
                gr.Markdown("A zip with folders *chosen* and *rejected*, or with a list; a JSONL, CSV or parquet file.")
                self.file_path = gr.Textbox("", label="Path", elem_id="pairs-file-path")
                self.file_drop = gr.File(
                    label="Or drop a file",
                    file_types=[".zip", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet"],
                    height=110,
                    elem_id="pairs-file-drop",
                )
                self.from_file = gr.Button("Read pairs", variant="primary", elem_id="pairs-from-file")
            with gr.Tab("One folder"):
                gr.Markdown("For every image the base model draws the other one, from the same prompt.")
                self.single = gr.Textbox("", label="Folder of preferred images", elem_id="pairs-single")
                self.single_drop = _folder_drop("Or drop the images", "pairs-single-drop")
                with gr.Row():
                    self.model = gr.Dropdown(
                        model_choices(self.context),
                        value=DEMO,
                        label="Base model",
                        info="One that was found here, a path, a Hub id, or demo.",
                        allow_custom_value=True,
                        elem_id="pairs-draw-model",
                    )
                    self.steps = gr.Number(
                        25, label="Sampling steps", precision=0, minimum=1, maximum=200, elem_id="pairs-draw-steps"
                    )
                    self.per_image = gr.Number(1, label="Rejected images each", precision=0, minimum=1, maximum=8)
                self.generate = gr.Button("Draw rejected images", variant="primary", elem_id="pairs-generate")
                self.stop_generate = cancel_button("generate")
            with gr.Tab("Saved set"):
                self.sets = gr.Dropdown(self._sets(), label="Set", elem_id="pairs-sets")
                self.from_set = gr.Button("Open", variant="primary", elem_id="pairs-from-set")
        with gr.Accordion("How images are paired and where prompts come from", open=False):
            with gr.Row():
                self.match = gr.Dropdown(MATCHES, value="stem", label="Images belong together by")
                self.fixed = gr.Textbox("", label="Prompt for images without one", elem_id="pairs-fixed")
                self.trigger = gr.Textbox("", label="Trigger word", info="Put before every prompt.")
            self.blank = gr.Checkbox(
                label="No prompt from file names: leave it empty, to be written here or by a model", value=False
            )
        self.busy = gr.HTML(elem_id="pairs-busy")

    def connect(self, edit: gr.BrowserState, only: gr.State, view: gr.Dropdown, then: Callable[[Any], object]) -> None:
        """Buttons to functions.

        Args:
            edit, only, view: of the page; they are set to the new pairs, all of them.
            then: is given the event after which the page shows them.
        """
        words = [self.match, self.fixed, self.trigger, self.blank]
        imports = (
            (self.from_folders, self._take_folders, [self.chosen, self.rejected, self.chosen_drop, self.rejected_drop]),
            (self.from_file, self._take_file, [self.file_path, self.file_drop]),
            (self.from_set, self._take_set, [self.sets]),
        )
        for button, function, inputs in imports:
            taken = [edit, only, view, self.busy]
            then(button.click(shown(function), [*inputs, *words], taken, **EDITS, show_progress_on=self.busy))
        then(
            self.generate.click(
                shown(self._generate),
                [self.single, self.single_drop, self.model, self.steps, self.per_image, self.fixed, self.trigger],
                [self.busy, self.stop_generate, edit, only, view],
                api_visibility="private",
                concurrency_limit=2,
            )
        )
        if self.context.app is not None:
            self.context.app.load(lambda: gr.update(choices=self._sets()), None, self.sets, api_visibility="private")

    def saved(self, name: str) -> Any:
        """The update of the list of sets after one was kept."""
        return gr.update(choices=self._sets(), value=name)

    def _take_folders(
        self, chosen: str, rejected: str, chosen_drop: Any, rejected_drop: Any, match: str, fixed: str, trigger: str,
        blank: bool,
    ) -> tuple[Any, ...]:  # fmt: skip
        folders = self._folder(chosen, chosen_drop, "chosen"), self._folder(rejected, rejected_drop, "rejected")
        found = pairs_from_folders(*folders, match=match, **_words(fixed, trigger, blank))  # pyright: ignore
        return self._begin(found, f"{folders[0].name} and {folders[1].name}")

    def _take_file(self, path: str, dropped: Any, match: str, fixed: str, trigger: str, blank: bool) -> tuple[Any, ...]:
        source = Path(str(dropped)) if dropped else self.context.safe_path(path)
        if not source.exists():
            raise ConfigError(f"There is no file or folder {source}. Check the path.")
        if source.suffix.lower() == ".zip":
            folder = keep_zip(source)
            found = pairs_from_dropped(folder, match=match, **_words(fixed, trigger, blank))
        else:
            found = read_pair_set(source)
        return self._begin(found, source.name)

    def _take_set(self, name: str | None, *_: Any) -> tuple[Any, ...]:
        if not name:
            raise ConfigError("Choose a set. Sets are made with Save set, further down.")
        return self._begin(PairSet(load_pairs(set_folder(name) / "pairs.jsonl")), f"set {name}")

    def _generate(
        self, folder: str, dropped: Any, model: str, steps: float, per_image: float, fixed: str, trigger: str,
        request: gr.Request,
    ) -> Iterator[tuple[Any, ...]]:  # fmt: skip
        chosen = self._folder(folder, dropped, "chosen")
        arguments = {
            "settings": {
                "name": "pairs",
                "data": {"pairs": "pairs.jsonl"},
                "model": {"path": model_path(self.context, model)},
            },
            "chosen": str(chosen),
            "prompt": fixed.strip() or None,
            "trigger": trigger,
            "prefix": "",
            "per_image": int(per_image),
            "num_inference_steps": int(steps),
            "guidance_scale": 5.0,
            "seed": 0,
        }

        def finish(result: dict[str, Any]) -> tuple[str, tuple[Any, ...]]:
            edit, only, view, _ = self._begin(PairSet(load_pairs(Path(result["pairs"]))), chosen.name)
            return f"Drawn into {rejected_folder(chosen)}.", (edit, only, view)

        yield from shown_while(
            request,
            "generate",
            lambda progress, stop: run_job("generate_rejected", arguments, progress=progress, should_stop=stop),
            finish,
            3,
        )

    def _folder(self, path: str, dropped: Any, name: str) -> Path:
        if dropped:
            return keep_files([(Path(str(p)).name, Path(str(p))) for p in dropped], name)
        return self.context.safe_path(path)

    def _begin(self, found: PairSet, title: str) -> tuple[Any, ...]:
        require_editable(len(found.pairs))
        self.context.check_readable(
            p for pair in found.pairs for p in (pair.chosen, pair.rejected, pair.chosen_mask, pair.rejected_mask)
        )
        editor = begin_edit(found.pairs, title, found.findings)
        return editor.name, [], "all", note(f"{len(found.pairs)} pairs from {title}.")

    def _sets(self) -> list[tuple[str, str]]:
        return [(f"{name} ({pair_count(count)})", name) for name, count in list_sets().items()]


def _folder_drop(label: str, name: str) -> gr.File:
    return gr.File(label=label, file_count="directory", height=110, elem_id=name)


def _words(fixed: str, trigger: str, blank: bool) -> dict[str, Any]:
    """How prompts are found."""
    fixed = fixed.strip()
    if blank and not fixed:
        return {"prompt": "", "trigger": trigger, "keep_unprompted": True}
    return {"prompt": fixed or None, "trigger": trigger, "keep_unprompted": True}


def is_hub_id(text: str) -> bool:
    """Whether a text is the id of a model on the Hub, and nothing that lies here."""
    words = text.strip()
    return words.count("/") == 1 and not words.startswith((".", "~", "/")) and not Path(words).exists()
