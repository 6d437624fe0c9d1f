"""The Pairs page: bring pairs in, look at them, mend them, keep them as a named set."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from mapo_core import ConfigError, PairsError
from mapo_core.pairs import (
    CAPTIONERS,
    TITLES,
    FilterHint,
    PairEditor,
    PairSet,
    begin_edit,
    caption_edit,
    check_edit,
    keep_files,
    keep_zip,
    lacks_caption,
    last_check,
    list_sets,
    load_pairs,
    open_edit,
    pairs_from_dropped,
    pairs_from_folders,
    read_pair_set,
    rejected_folder,
    require_editable,
    set_folder,
)
from mapo_core.runs import run_job

from .cards import CARDS, Cards, finding_html
from .context import AppContext, shown
from .work import cancel_button, note, shown_while

MATCHES = [("file name", "stem"), ("order", "order"), ("at random, same prompt", "random")]
FINDINGS = 10
VIEWS = [
    ("All", "all"),
    ("Kept", "kept"),
    ("Excluded", "excluded"),
    ("Held out", "held_out"),
    ("Without a caption", "uncaptioned"),
]
WELCOME = "Bring pairs in above. Nothing of yours is changed: what you do here goes into a copy."
EDITS = {"concurrency_limit": 1, "concurrency_id": "pair-edits", "api_visibility": "private"}


def build(context: AppContext) -> None:
    """Put the page together; called inside its tab."""
    page = _PairsPage(context)
    page.draw()
    page.connect()


class _PairsPage:
    """The components, and what they do."""

    def __init__(self, context: AppContext) -> None:
        self.context = context

    # --- what is on the page ------------------------------------------------------------------------------------------

    def draw(self) -> None:
        """Everything from top to bottom."""
        self.edit = gr.BrowserState("", storage_key="mapo-edit")
        self.shown = gr.State([])  # the indices of the pairs on the cards
        self.only = gr.State([])  # the indices of a finding that is being looked at; [] for none
        with gr.Accordion("Bring pairs in", open=True, elem_id="pairs-import") as self.bring:
            self._draw_import()
        self.summary = gr.Markdown(WELCOME, elem_id="pairs-summary")
        with gr.Column(visible=False) as self.workbench:
            with gr.Row():
                self.undo = gr.Button("Undo", size="sm", min_width=90, elem_id="pairs-undo")
                self.redo = gr.Button("Redo", size="sm", min_width=90, elem_id="pairs-redo")
            with gr.Accordion("Check", open=True, elem_id="pairs-check-box"):
                self._draw_check()
            with gr.Accordion("Write captions with a model", open=False, elem_id="pairs-caption-box"):
                self._draw_captions()
            with gr.Row():
                self.view = gr.Dropdown(VIEWS, value="all", label="Show", elem_id="pairs-view", min_width=150)
                self.search = gr.Textbox("", label="Prompt contains", min_width=150, elem_id="pairs-search")
                self.page = gr.Number(1, label="Page", precision=0, minimum=1, min_width=90, elem_id="pairs-page")
            with gr.Row():
                self.before = gr.Button("Earlier", size="sm", min_width=90)
                self.after = gr.Button("Later", size="sm", min_width=90, elem_id="pairs-later")
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

    def _draw_import(self) -> None:
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
                    self.model = gr.Textbox("demo", label="Base model", info="A file or folder, a Hub id, or demo.")
                    self.steps = gr.Number(25, label="Sampling steps", precision=0, minimum=1, maximum=200)
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

    def _draw_check(self) -> None:
        with gr.Row():
            self.resolution = gr.Number(
                1024, label="Resolution you will train at", precision=0, minimum=64, maximum=4096, elem_id="pairs-res"
            )
            self.check_all = gr.Checkbox(
                label="Decode every image of more than 20 000 pairs too",
                info="Otherwise those of 5000 pairs drawn at random; the rest is checked by header and bytes.",
                value=False,
                elem_id="pairs-check-all",
            )
            with gr.Column(min_width=160):
                self.check = gr.Button("Check all pairs", variant="secondary", elem_id="pairs-check")
                self.stop_check = cancel_button("check")
        self.checked = gr.HTML(elem_id="pairs-checked")
        self.findings: list[dict[str, Any]] = []
        for i in range(FINDINGS):
            with gr.Group(visible=False, elem_id=f"finding-{i}", elem_classes="mapo-finding") as group:
                text = gr.HTML()
                with gr.Row():
                    look = gr.Button("Show", size="sm", min_width=90, elem_id=f"finding-{i}-show")
                    drop = gr.Button("Exclude", size="sm", min_width=90, elem_id=f"finding-{i}-drop")
            self.findings.append({"group": group, "text": text, "look": look, "drop": drop})

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
        findings = [f[name] for f in self.findings for name in ("group", "text", "look", "drop")]
        top = [self.summary, self.workbench, self.undo, self.redo, self.page, self.shown]
        return [*top, *findings, *self.cards.outputs]

    @property
    def looking(self) -> list[Any]:
        """What `_state` needs to know of the page."""
        return [self.edit, self.view, self.search, self.page, self.only]

    def connect(self) -> None:
        """Buttons to functions."""
        words = [self.match, self.fixed, self.trigger, self.blank]
        taken = [self.edit, self.only, self.view, self.busy]
        imports = (
            (self.from_folders, self._take_folders, [self.chosen, self.rejected, self.chosen_drop, self.rejected_drop]),
            (self.from_file, self._take_file, [self.file_path, self.file_drop]),
            (self.from_set, self._take_set, [self.sets]),
        )
        for button, function, inputs in imports:
            event = button.click(shown(function), [*inputs, *words], taken, **EDITS, show_progress_on=self.busy)
            event.success(shown(self._first), self.looking, [*self.everything, self.bring], **EDITS)
        event = self.generate.click(
            shown(self._generate),
            [self.single, self.single_drop, self.model, self.steps, self.per_image, self.fixed, self.trigger],
            [self.busy, self.stop_generate, self.edit, self.only, self.view],
            api_visibility="private",
            concurrency_limit=2,
        )
        event.success(shown(self._first), self.looking, [*self.everything, self.bring], **EDITS)
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
        self._connect_check(again)
        self.caption.click(
            shown(self._caption),
            [self.edit, self.captioner, self.detail, self.trigger, self.beside, self.download],
            [self.captioned, self.stop_caption],
            api_visibility="private",
            concurrency_limit=2,
        ).then(again, self.looking, self.everything, **EDITS)
        self.save.click(shown(self._save), [self.edit, self.name, self.replace], [self.saved, self.sets], **EDITS)
        self.write_txt.click(shown(self._write_txt), [self.edit, self.replace_txt], self.written, **EDITS)
        if self.context.app is not None:
            self.context.app.load(again, self.looking, self.everything, **EDITS)
            self.context.app.load(self._sets_update, None, self.sets, api_visibility="private")

    def _connect_cards(self) -> None:
        for k, card in enumerate(self.cards.cards):
            change = shown(self._captioned(k))
            for trigger in (card.caption.blur, card.caption.submit):
                trigger(change, [self.shown, card.caption, *self.looking], self.everything, **EDITS)
            for button, verb in ((card.swap, "swap"), (card.drop, "toggle")):
                button.click(shown(self._card(k, verb)), [self.shown, *self.looking], self.everything, **EDITS)
            card.held.input(shown(self._held(k)), [self.shown, card.held, *self.looking], self.everything, **EDITS)

    def _connect_check(self, again: Any) -> None:
        self.check.click(
            shown(self._check),
            [self.edit, self.resolution, self.check_all],
            [self.checked, self.stop_check],
            api_visibility="private",
            concurrency_limit=2,
        ).then(again, self.looking, self.everything, **EDITS)
        for i, finding in enumerate(self.findings):
            finding["look"].click(shown(self._look(i)), self.edit, [self.only, self.view, self.page], **EDITS).success(
                again, self.looking, self.everything, **EDITS
            )
            finding["drop"].click(shown(self._drop(i)), self.looking, self.everything, **EDITS)

    # --- bringing in --------------------------------------------------------------------------------------------------

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
        base = model.strip() if model.strip() == "demo" or _is_hub_id(model) else str(self.context.safe_path(model))
        arguments = {
            "settings": {"name": "pairs", "data": {"pairs": "pairs.jsonl"}, "model": {"path": base}},
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
        entries = [e for e in editor.entries if _is_shown(e, view, search, only)]
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
            *self._finding_updates(editor),
            *self.cards.updates(self.context, visible),
        )

    def _finding_updates(self, editor: PairEditor) -> list[Any]:
        hints = (last_check(editor) or [])[:FINDINGS]
        updates: list[Any] = []
        for i in range(FINDINGS):
            if i >= len(hints):
                updates += [gr.update(visible=False), gr.skip(), gr.skip(), gr.skip()]
                continue
            hint = hints[i]
            updates += [
                gr.update(visible=True),
                finding_html(self.context, hint, TITLES[hint.code], editor),
                gr.update(visible=bool(hint.pairs), value=f"Show {_pairs(len(hint.pairs))}"),
                gr.update(visible=bool(hint.drops), value=f"Exclude {_pairs(len(hint.drops))}"),
            ]
        return updates

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

    def _look(self, i: int) -> Any:
        def look(edit: str) -> tuple[Any, ...]:
            hint = _hint(open_edit(edit), i)
            return list(hint.pairs), gr.update(choices=[*VIEWS, (TITLES[hint.code], "only")], value="only"), 1

        return look

    def _drop(self, i: int) -> Any:
        def drop(*looking: Any) -> tuple[Any, ...]:
            editor = open_edit(looking[0])
            hint = _hint(editor, i)
            editor.exclude(hint.drops, TITLES[hint.code])
            return self._state(*looking)

        return drop

    # --- check, captions, save ----------------------------------------------------------------------------------------

    def _check(self, edit: str, resolution: float, check_all: bool, request: gr.Request) -> Iterator[tuple[Any, ...]]:
        def finish(hints: list[FilterHint]) -> tuple[str, tuple[Any, ...]]:
            counts = {level: sum(h.count for h in hints if h.level == level) for level in ("error", "warning", "note")}
            said = ", ".join(f"{n} {level}{'' if n == 1 else 's'}" for level, n in counts.items() if n)
            return f"Checked: {said or 'nothing found'}.", ()

        yield from shown_while(
            request,
            "check",
            lambda progress, stop: check_edit(
                open_edit(edit), int(resolution), check_all=check_all, progress=progress, should_stop=stop
            ),
            finish,
            0,
        )

    def _caption(
        self, edit: str, model: str, detail: str, trigger: str, beside: bool, download: bool, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        editor = open_edit(edit)
        if not _is_hub_id(model):
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
        open_edit(edit).save(name, replace)
        words = f"{list_sets()[name]} pairs kept as {name}. The Train page offers it."
        return note(words), gr.update(choices=self._sets(), value=name)

    def _write_txt(self, edit: str, replace: bool) -> str:
        written = open_edit(edit).write_captions(replace)
        return note(f"{len(written)} .txt files written.")

    def _sets(self) -> list[tuple[str, str]]:
        return [(f"{name} ({_pairs(count)})", name) for name, count in list_sets().items()]

    def _sets_update(self) -> Any:
        return gr.update(choices=self._sets())


def _folder_drop(label: str, name: str) -> gr.File:
    return gr.File(label=label, file_count="directory", height=110, elem_id=name)


def _words(fixed: str, trigger: str, blank: bool) -> dict[str, Any]:
    """How prompts are found."""
    fixed = fixed.strip()
    if blank and not fixed:
        return {"prompt": "", "trigger": trigger, "keep_unprompted": True}
    return {"prompt": fixed or None, "trigger": trigger, "keep_unprompted": True}


def _is_hub_id(text: str) -> bool:
    words = text.strip()
    return words.count("/") == 1 and not words.startswith((".", "~", "/")) and not Path(words).exists()


def _is_shown(entry: Any, view: str, search: str, only: list[int]) -> bool:
    if search.strip() and search.strip().casefold() not in entry.pair.prompt.casefold():
        return False
    return {
        "all": True,
        "kept": not entry.excluded,
        "excluded": entry.excluded,
        "held_out": bool(entry.pair.held_out),
        "uncaptioned": lacks_caption(entry.pair),
        "only": entry.index in only,
    }[view]


def _summary(editor: PairEditor, shown_now: int, at: int, pages: int) -> str:
    entries = editor.entries
    out = sum(e.excluded for e in entries)
    held = sum(bool(e.pair.held_out) for e in entries if not e.excluded)
    lacking = sum(lacks_caption(e.pair) for e in entries if not e.excluded)
    parts = [f"**{_pairs(len(entries) - out)}** from {editor.title}", f"{out} excluded", f"{held} marked as held out"]
    if lacking:
        parts.append(f"{lacking} without a caption")
    if shown_now != len(entries):
        parts.append(f"{shown_now} shown")
    return " · ".join(parts) + (f" · page {at} of {pages}" if pages > 1 else "")


def _hint(editor: PairEditor, i: int) -> FilterHint:
    hints = last_check(editor) or []
    if i >= len(hints):
        raise ConfigError("This finding is gone. Check again.")
    return hints[i]


def _pairs(count: int) -> str:
    return f"{count} pair{'' if count == 1 else 's'}"
