"""The Pairs page: bring pairs in, look at them, mend them, keep them as a named set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from mapo_core import PairsError
from mapo_core.pairs import CAPTIONERS, PairEditor, caption_edit, lacks_caption, open_edit, open_pairs

from .cards import CARDS, EDITS, VIEWS, Cards, is_shown, pair_count
from .context import AppContext, shown
from .pairs_check import CheckSection
from .pairs_import import ImportSection, is_hub_id
from .work import cancel_button, note, shown_while

WELCOME = "Bring pairs in above. Nothing of yours is changed: what you do here goes into a copy."


def build(context: AppContext) -> None:
    """Put the page together; called inside its tab."""
    page = _PairsPage(context)
    page.draw()
    page.connect()


class _PairsPage:
    """The components, and what they do."""

    def __init__(self, context: AppContext) -> None:
        self.context = context
        self.imports = ImportSection(context)
        self.checks = CheckSection(context)

    # --- what is on the page ------------------------------------------------------------------------------------------

    def draw(self) -> None:
        """Everything from top to bottom."""
        self.edit = self.context.remembered("edit", "")
        self.shown = gr.State([])  # the indices of the pairs on the cards
        self.only = gr.State([])  # the indices of a finding that is being looked at; [] for none
        with gr.Accordion("Bring pairs in", open=True, elem_id="pairs-import") as self.bring:
            self.imports.draw()
        self.summary = gr.Markdown(WELCOME, elem_id="pairs-summary")
        with gr.Column(visible=False) as self.workbench:
            with gr.Row():
                self.undo = gr.Button("Undo", size="sm", min_width=90, elem_id="pairs-undo")
                self.redo = gr.Button("Redo", size="sm", min_width=90, elem_id="pairs-redo")
            with gr.Accordion("Check", open=True, elem_id="pairs-check-box"):
                self.checks.draw()
            with gr.Accordion("Write captions with a model", open=False, elem_id="pairs-caption-box"):
                self._draw_captions()
            with gr.Row():
                self.view = gr.Dropdown(VIEWS, value="all", label="Show", elem_id="pairs-view", min_width=150)
                self.search = gr.Textbox("", label="Prompt contains", min_width=150, elem_id="pairs-search")
                self.page = gr.Number(1, label="Page", precision=0, minimum=1, min_width=90, elem_id="pairs-page")
            with gr.Row():
                self.before = gr.Button("Previous page", size="sm", min_width=90, elem_id="pairs-earlier")
                self.after = gr.Button("Next page", size="sm", min_width=90, elem_id="pairs-later")
            self.cards = Cards()
            with gr.Group():
                with gr.Row():
                    self.name = gr.Textbox("my pairs", label="Keep as a set named", elem_id="pairs-name")
                    self.replace = gr.Checkbox(label="Replace a set of that name (its list is kept)", value=False)
                self.save = gr.Button("Save set", variant="primary", elem_id="pairs-save")
                self.saved = gr.HTML(elem_id="pairs-saved")
            with gr.Accordion("Write edited captions into .txt files beside the images", open=False):
                gr.Markdown("Only this button changes your files. A caption that is replaced is kept beside it.")
                self.replace_txt = gr.Checkbox(label="Replace captions that are there", value=False)
                self.write_txt = gr.Button("Write .txt files", size="sm")
                self.written = gr.HTML()

    def _draw_captions(self) -> None:
        gr.Markdown("For pairs without a caption of their own. The model runs on this machine; nothing is overwritten.")
        with gr.Row():
            self.captioner = gr.Dropdown(
                list(CAPTIONERS),
                value=next(iter(CAPTIONERS)),
                label="Model",
                info="A Hub id, or the folder of a Florence-2 or BLIP model.",
                allow_custom_value=True,
                elem_id="pairs-captioner",
            )
            self.detail = gr.Dropdown(["short", "long", "longest"], value="short", label="Detail")
        self.beside = gr.Checkbox(label="Also write a .txt file beside each image that has none", value=False)
        self.download = gr.Checkbox(label="Download the model if it is missing", value=False)
        self.caption = gr.Button("Write captions", elem_id="pairs-caption")
        self.stop_caption = cancel_button("caption")
        self.captioned = gr.HTML(elem_id="pairs-captioned")

    # --- what happens -------------------------------------------------------------------------------------------------

    @property
    def everything(self) -> list[Any]:
        """The outputs of `_state`."""
        top = [self.summary, self.workbench, self.undo, self.redo, self.page, self.shown]
        return [*top, *self.checks.outputs, *self.cards.outputs]

    @property
    def looking(self) -> list[Any]:
        """What `_state` needs to know of the page."""
        return [self.edit, self.view, self.search, self.page, self.only]

    def connect(self) -> None:
        """Buttons to functions."""

        def begun(event: Any) -> None:
            event.success(shown(self._first), self.looking, [*self.everything, self.bring], **EDITS)

        self.imports.connect(self.edit, self.only, self.view, begun)
        again = shown(self._state)
        for trigger in (self.view.input, self.search.submit, self.page.submit, self.search.blur):
            trigger(again, self.looking, self.everything, **EDITS)
        for button, by in ((self.before, -1), (self.after, 1)):
            button.click(lambda page, by=by: max(1, int(page or 1) + by), self.page, self.page, **EDITS).success(
                again, self.looking, self.everything, **EDITS
            )
        for button, verb in ((self.undo, "undo"), (self.redo, "redo")):
            button.click(shown(self._do(verb)), self.looking, self.everything, **EDITS)
        self._connect_cards()
        self.checks.connect(self.edit, self.only, self.view, self.page, self.looking, self._state, self.everything)
        self.caption.click(
            shown(self._caption),
            [self.edit, self.captioner, self.detail, self.imports.trigger, self.beside, self.download],
            [self.captioned, self.stop_caption],
            api_visibility="private",
            concurrency_limit=2,
        ).then(again, self.looking, self.everything, **EDITS)
        kept = [self.saved, self.imports.sets]
        self.save.click(shown(self._save), [self.edit, self.name, self.replace], kept, **EDITS)
        self.write_txt.click(shown(self._write_txt), [self.edit, self.replace_txt], self.written, **EDITS)
        if self.context.app is not None:
            self.context.app.load(again, self.looking, self.everything, **EDITS)

    def _connect_cards(self) -> None:
        for k, card in enumerate(self.cards.cards):
            change = shown(self._captioned(k))
            for trigger in (card.caption.blur, card.caption.submit):
                trigger(change, [self.shown, card.caption, *self.looking], self.everything, **EDITS)
            for button, verb in ((card.swap, "swap"), (card.drop, "toggle")):
                button.click(shown(self._card(k, verb)), [self.shown, *self.looking], self.everything, **EDITS)
            card.held.input(shown(self._held(k)), [self.shown, card.held, *self.looking], self.everything, **EDITS)

    # --- the page as it is now ----------------------------------------------------------------------------------------

    def _first(self, edit: str, view: str, search: str, page: float, only: list[int]) -> tuple[Any, ...]:
        return (*self._state(edit, "all", "", 1, []), gr.update(open=False))

    def _state(self, edit: str, view: str, search: str, page: float, only: list[int]) -> tuple[Any, ...]:
        if not edit:
            return (WELCOME, gr.update(visible=False), *(gr.skip(),) * (len(self.everything) - 2))
        try:
            editor = open_edit(edit)
        except PairsError:  # deleted since; the browser remembers it still
            return (WELCOME, gr.update(visible=False), *(gr.skip(),) * (len(self.everything) - 2))
        entries = [e for e in editor.entries if is_shown(e, view, search, only)]
        pages = max(1, -(-len(entries) // CARDS))
        at = min(max(1, int(page or 1)), pages)
        visible = entries[(at - 1) * CARDS : at * CARDS]
        return (
            _summary(editor, len(entries), at, pages),
            gr.update(visible=True),
            gr.update(interactive=editor.can_undo),
            gr.update(interactive=editor.can_redo),
            gr.update(value=at, maximum=pages, label=f"Page, of {pages}"),
            [e.index for e in visible],
            *self.checks.updates(editor),
            *self.cards.updates(self.context, visible),
        )

    # --- editing ------------------------------------------------------------------------------------------------------

    def _do(self, verb: str) -> Any:
        def do(*looking: Any) -> tuple[Any, ...]:
            getattr(open_edit(looking[0]), verb)()
            return self._state(*looking)

        return do

    def _captioned(self, k: int) -> Any:
        def captioned(indices: list[int], text: str, *looking: Any) -> Any:
            if k < len(indices) and open_edit(looking[0]).caption(indices[k], text):
                return self._state(*looking)
            return (gr.skip(),) * len(self.everything)

        return captioned

    def _card(self, k: int, verb: str) -> Any:
        def act(indices: list[int], *looking: Any) -> tuple[Any, ...]:
            editor, index = open_edit(looking[0]), indices[k]
            if verb == "swap":
                editor.swap([index])
            elif not editor.exclude([index], "by hand"):
                editor.include([index])
            return self._state(*looking)

        return act

    def _held(self, k: int) -> Any:
        def held(indices: list[int], value: bool, *looking: Any) -> tuple[Any, ...]:
            open_edit(looking[0]).hold_out([indices[k]], True if value else None)
            return self._state(*looking)

        return held

    # --- captions, save -----------------------------------------------------------------------------------------------

    def _caption(
        self, edit: str, model: str, detail: str, trigger: str, beside: bool, download: bool, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        editor = open_edit(edit)
        if not is_hub_id(model):
            model = str(self.context.safe_path(model))
        settings = {"model": model, "detail": detail, "trigger": trigger, "download": download}

        def finish(result: tuple[int, dict[str, str]]) -> tuple[str, tuple[Any, ...]]:
            count, failed = result
            why = f" {len(failed)} got none: {next(iter(failed.values()))}" if failed else ""
            return f"{count} captions written.{why}", ()

        yield from shown_while(
            request,
            "caption",
            lambda progress, stop: caption_edit(
                editor, settings, beside_images=beside, progress=progress, should_stop=stop
            ),
            finish,
            0,
        )

    def _save(self, edit: str, name: str, replace: bool) -> tuple[Any, ...]:
        listing = open_edit(edit).save(name, replace)
        words = f"{len(open_pairs(listing))} pairs kept as {name}. The Train page offers it."
        return note(words), self.imports.saved(name)

    def _write_txt(self, edit: str, replace: bool) -> str:
        written = open_edit(edit).write_captions(replace)
        return note(f"{len(written)} .txt files written.")


def _summary(editor: PairEditor, shown_now: int, at: int, pages: int) -> str:
    entries = editor.entries
    out = sum(e.excluded for e in entries)
    held = sum(bool(e.pair.held_out) for e in entries if not e.excluded)
    lacking = sum(lacks_caption(e.pair) for e in entries if not e.excluded)
    parts = [
        f"**{pair_count(len(entries) - out)}** from {editor.title}",
        f"{out} excluded",
        f"{held} marked as held out",
    ]
    if lacking:
        parts.append(f"{lacking} without a caption")
    if shown_now != len(entries):
        parts.append(f"{shown_now} shown")
    return " · ".join(parts) + (f" · page {at} of {pages}" if pages > 1 else "")
