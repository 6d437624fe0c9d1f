"""The Pairs section of the Results page: what a run has made of each pair, and training on without some of them."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from mapo_core import ConfigError, continue_run, read_inspection
from mapo_core.runs import RunDir, add_to_queue, run_job

from .cards import picture_html
from .context import AppContext, shown
from .run_view import step_of
from .work import cancel_button, note, shown_while

HIDDEN: dict[str, Any] = {"api_visibility": "private"}
COLUMNS = {
    "Pair": "number",
    "Class": "str",
    "Accuracy, base": "number",
    "Accuracy": "number",
    "Margin, base": "number",
    "Margin": "number",
    "Influence": "number",
    "Prompt": "str",
}
_CLASSES = ("harmful", "resisted", "undecided", "learned")
_SIDE = 384  # pixels of a picture of the chosen pair
_INTRO = (
    "Which pairs the checkpoint has **learned** (their margin rose), which it **resisted**, and which are **harmful**: "
    "learning them lowers the margin of the held-out pairs. A hint which pictures to look at, not a proof. "
    "The run stays as it is."
)
_UNSEEN = "This checkpoint's pairs have not been measured yet."


class PairSection:
    """The components, and what they do; they follow the page's choice of a run and a checkpoint."""

    def __init__(self, context: AppContext) -> None:
        self.context = context

    def draw(self) -> None:
        """Everything from top to bottom."""
        gr.Markdown(_INTRO)
        with gr.Row():
            self.draws = gr.Number(
                8,
                label="Timesteps per pair",
                info="More: surer classes, and it takes longer.",
                precision=0,
                minimum=2,
                maximum=256,
                elem_id="inspect-draws",
            )
            self.most = gr.Number(
                256,
                label="At most so many pairs",
                info="Of a larger set so many are measured, spread over it.",
                precision=0,
                minimum=1,
                elem_id="inspect-most",
            )
        self.go = gr.Button("Look at the pairs", elem_id="inspect-go")
        self.stop = cancel_button("inspect")
        self.busy = gr.HTML(elem_id="inspect-busy")
        self.classes = gr.HTML(note(_UNSEEN), elem_id="inspect-classes")
        with gr.Column(visible=False) as self.found:
            self._draw_found()

    def _draw_found(self) -> None:
        self.table = gr.Dataframe(
            headers=list(COLUMNS),
            datatype=list(COLUMNS.values()),
            interactive=False,
            max_height=320,
            column_widths=["70px", "110px", "130px", "110px", "130px", "110px", "120px", "430px"],
            show_label=False,
            buttons=["fullscreen"],
            elem_id="inspect-table",
        )
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                self.pictures = gr.HTML(elem_id="inspect-pictures")
                with gr.Row():
                    self.drop_it = gr.Button("Leave this one out", size="sm", elem_id="inspect-drop")
                    self.turn_it = gr.Button("Turn this one round", size="sm", elem_id="inspect-turn")
                self.looked_at = gr.State(None)  # the number of the pair in the pictures
            with gr.Column(scale=3, min_width=320):
                self.exclude = _several("Leave out", "inspect-exclude")
                self.flip = _several("Turn round: chosen and rejected change places", "inspect-flip")
                with gr.Row():
                    self.name = gr.Textbox(
                        "", label="Name", info="Empty: this run's, with -next.", elem_id="inspect-name"
                    )
                    self.steps = gr.Number(
                        0,
                        label="Steps",
                        info="0: those left, else as many as this run.",
                        precision=0,
                        minimum=0,
                        elem_id="inspect-steps",
                    )
                self.train_on = gr.Button("Train on from this checkpoint", variant="primary", elem_id="inspect-train")
                self.started = gr.HTML(elem_id="inspect-started")
        with gr.Accordion("The pairs to look at first, as one picture", open=False):
            self.sheet = gr.Image(show_label=False, type="filepath", interactive=False, elem_id="inspect-sheet")

    @property
    def outputs(self) -> list[Any]:
        """What an inspection fills."""
        lists = [self.exclude, self.flip]
        return [self.classes, self.found, self.table, *lists, self.looked_at, self.pictures, self.sheet]

    def of_run(self, run: gr.Dropdown, step: gr.Dropdown) -> tuple[Callable[..., Any], list[Any], list[Any]]:
        """Function, inputs and outputs of what is to happen when another run or checkpoint is chosen."""
        return shown(self._of_step), [run, step], [*self.outputs, self.busy, self.started]

    def connect(self, run: gr.Dropdown, step: gr.Dropdown) -> None:
        """Buttons to functions."""
        which = [run, step]
        step.input(*self.of_run(run, step), **HIDDEN)
        self.go.click(
            shown(self._inspect),
            [*which, self.draws, self.most],
            [self.busy, self.stop, *self.outputs],
            concurrency_limit=1,
            concurrency_id="heavy",
            **HIDDEN,
        )
        self.table.select(shown(self._look), which, [self.looked_at, self.pictures], **HIDDEN)
        for button, into, other in (
            (self.drop_it, self.exclude, self.flip),
            (self.turn_it, self.flip, self.exclude),
        ):
            button.click(shown(_put), [self.looked_at, into, other], [into, other], **HIDDEN)
        self.train_on.click(
            shown(self._train_on),
            [*which, self.exclude, self.flip, self.name, self.steps],
            [self.started, self.context.open_run],
            **HIDDEN,
        )

    # --- what happens -------------------------------------------------------------------------------------------------

    def _of_step(self, name: str | None, step: str | None) -> tuple[Any, ...]:
        found = self._stored(name, step) if name and step else None
        return *self._shown(found), "", ""

    def _stored(self, name: str | None, step: str | None) -> dict[str, Any] | None:
        run = self.context.run(name or "")
        return read_inspection(run, step_of(run, step))

    def _inspect(
        self, name: str | None, step: str | None, draws: float | None, most: float | None, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        run = self.context.run(name or "")
        arguments = {
            "run": str(run.path),
            "step": step_of(run, step),
            "draws": int(draws or 8),
            "max_pairs": int(most or 256),
        }

        def finish(result: dict[str, Any]) -> tuple[str, tuple[Any, ...]]:
            found = result["inspection"]
            return f"Measured {len(found['pairs'])} of {found['all_pairs']} pairs.", self._shown(found)

        yield from shown_while(
            request,
            "inspect",
            lambda progress, stop: run_job("inspect_pairs", arguments, progress=progress, should_stop=stop),
            finish,
            len(self.outputs),
        )

    def _shown(self, found: dict[str, Any] | None) -> tuple[Any, ...]:
        if found is None:
            none = gr.update(choices=[], value=[])
            return note(_UNSEEN), gr.update(visible=False), None, none, none, None, "", None
        pairs = found["pairs"]
        choices = [(f"{p['index']} · {p['verdict']} · {p['prompt'][:60]}", p["index"]) for p in pairs]
        lists = gr.update(choices=sorted(choices, key=lambda c: c[1]), value=[])
        sheet = found["sheet"] if Path(found["sheet"]).exists() else None
        first = self._pair(pairs[0]) if pairs else ""
        index = pairs[0]["index"] if pairs else None
        rows = [row(p) for p in pairs]
        return classes_html(found), gr.update(visible=True), rows, lists, lists, index, first, sheet

    def _look(self, name: str | None, step: str | None, event: gr.SelectData) -> tuple[Any, str]:
        index = int(event.row_value[0])  # the row itself says, since its place changes when the table is sorted
        found = self._stored(name, step)
        pair = next((p for p in (found or {"pairs": []})["pairs"] if p["index"] == index), None)
        if pair is None:
            raise ConfigError(f"Pair {index} is not among those that were measured any more. Look at the pairs again.")
        return index, self._pair(pair)

    def _pair(self, pair: dict[str, Any]) -> str:
        prompt = pair["prompt"]
        figures = "".join(
            f"<figure>{picture_html(self.context, Path(pair[side]), f'{side}: {prompt}', _SIDE)}"
            f"<figcaption>{side}</figcaption></figure>"
            for side in ("chosen", "rejected")
        )
        held = " · held out" if pair["held_out"] else ""
        head = f"<b>Pair {pair['index']}</b> · {pair['verdict']}{held} · {html.escape(prompt)}"
        head = f"<div class='mapo-card-head'>{head}</div>"
        return f"<div class='mapo-pair'>{head}<div class='mapo-two'>{figures}</div></div>"

    def _train_on(
        self,
        name: str | None,
        step: str | None,
        exclude: list[int],
        flip: list[int],
        new_name: str,
        steps: float | None,
    ) -> tuple[str, str]:
        run = self.context.run(name or "")
        new = continue_run(
            run,
            exclude=exclude or (),
            flip=flip or (),
            step=step_of(run, step),
            name=new_name.strip() or None,
            settings={"training": {"steps": int(steps)}} if steps else None,
            home=self.context.home,
        )
        return note(started_words(new, add_to_queue(new))), new.name


def row(pair: dict[str, Any]) -> list[Any]:
    """A pair as a line of the table; see COLUMNS."""
    numbers = [pair["accuracy"][0], pair["accuracy"][-1], pair["margin"][0], pair["margin"][-1], pair["influence"]]
    rounded = [None if value is None else round(value, 4) for value in numbers]
    held = "held out · " if pair["held_out"] else ""
    return [pair["index"], pair["verdict"], *rounded, held + pair["prompt"]]


def classes_html(found: dict[str, Any]) -> str:
    """How many pairs are of which class, and how that was found out."""
    counts = {name: sum(p["verdict"] == name for p in found["pairs"]) for name in _CLASSES}
    said = ", ".join(f"{count} {name}" for name, count in counts.items())
    how = f"<div class='mapo-card-head'>{html.escape(found['how'])}</div>"
    return f"<div class='mapo-status'><b>Step {found['steps'][-1]}: {said}</b>{how}</div>"


def started_words(run: RunDir, ahead: int) -> str:
    """What to say of a run that was queued behind so many others."""
    begins = f"waits for {ahead} other run(s)" if ahead else "starts"
    return f"{run.name} {begins}. The Train and Runs pages show it."


def _several(label: str, name: str) -> gr.Dropdown:
    return gr.Dropdown([], value=[], label=label, multiselect=True, interactive=True, elem_id=name)


def _put(index: int | None, into: list[int], other: list[int]) -> tuple[list[int], list[int]]:
    """The pair goes into one list, and out of the other: it cannot be both left out and turned round."""
    if index is None:
        raise ConfigError("Choose a pair in the table first.")
    return [*(i for i in into or [] if i != index), index], [i for i in other or [] if i != index]
