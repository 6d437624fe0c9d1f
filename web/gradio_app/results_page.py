"""The Results page: what a run has brought, in pictures and figures, and the file to take along."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from mapo_core import Comparison, model_card, run_comparisons
from mapo_core.runs import RunDir, best_step, checkpoint_step, run_job

from .context import AppContext, shown
from .figures import figures_html, lines, numbers, run_names, without_head
from .lora_files import FileSection
from .pair_view import PairSection
from .run_view import BEST, LAST, step_of
from .work import cancel_button, note, shown_while

HIDDEN: dict[str, Any] = {"api_visibility": "private"}
NOTHING = "<div class='mapo-status'>Choose a run. Runs are made on the Train page.</div>"


def build(context: AppContext) -> None:
    """Put the page together; called inside its tab."""
    page = _ResultsPage(context)
    page.draw()
    page.connect()


class _ResultsPage:
    """The components, and what they do."""

    def __init__(self, context: AppContext) -> None:
        self.context = context
        self.pairs = PairSection(context)
        self.take = FileSection(context)

    # --- what is on the page ------------------------------------------------------------------------------------------

    def draw(self) -> None:
        """Everything from top to bottom."""
        with gr.Row():
            self.run = gr.Dropdown(run_names(self.context), value=None, label="Run", elem_id="results-run")
            self.step = gr.Dropdown([], label="Checkpoint", elem_id="results-step", interactive=True)
            self.refresh = gr.Button(
                "Look again", size="sm", min_width=110, elem_id="results-refresh", elem_classes="mapo-beside"
            )
        self.figures = gr.HTML(NOTHING, elem_id="results-figures")
        gr.Markdown("### Base model and LoRA")
        with gr.Row():
            self.comparison = gr.Dropdown([], label="Pictures", elem_id="results-comparison", interactive=True)
            self.row = gr.Dropdown([], label="Right side", elem_id="results-row", interactive=True)
            self.prompt = gr.Dropdown([], label="Prompt", elem_id="results-prompt", interactive=True)
        self.slider = gr.ImageSlider(
            label="base model | LoRA", type="filepath", interactive=False, max_height=560, elem_id="results-slider"
        )
        with gr.Accordion("The whole sheet", open=False):
            self.sheet = gr.Image(show_label=False, type="filepath", interactive=False, elem_id="results-sheet")
        with gr.Accordion("Draw new pictures: prompts, strengths, checkpoints", open=False, elem_id="results-draw-box"):
            self._draw_drawing()
        gr.Markdown("### Pairs")
        self.pairs.draw()
        gr.Markdown("### Take it along")
        self.take.draw()

    def _draw_drawing(self) -> None:
        self.prompts = gr.Textbox(
            "",
            label="Prompts, one per line",
            info="Empty: the run's validation prompts, or some of its held-out pairs.",
            lines=3,
            elem_id="results-prompts",
        )
        with gr.Row():
            self.strengths = gr.Textbox(
                "1.0", label="Strengths", info="For example 0.5, 1.0", elem_id="results-strengths"
            )
            self.checkpoints = gr.Dropdown([], label="Checkpoints", multiselect=True, elem_id="results-checkpoints")
            self.seed = gr.Number(0, label="Seed", precision=0, minimum=0)
        self.draw_button = gr.Button("Draw", variant="secondary", elem_id="results-draw")
        self.stop_draw = cancel_button("compare")
        self.drawn = gr.HTML(elem_id="results-drawn")

    # --- what happens -------------------------------------------------------------------------------------------------

    def connect(self) -> None:
        """Buttons to functions."""
        of_run = [self.step, self.checkpoints, self.comparison, self.take.files, self.take.exported]
        of_step = [self.figures, self.take.card]
        of_pictures = [self.row, self.prompt, self.sheet, self.slider]
        picked = [self.run, self.comparison]

        def follow(event: Any) -> None:
            event.success(shown(self._of_step), [self.run, self.step, self.take.licence], of_step, **HIDDEN).success(
                shown(self._of_comparison), picked, of_pictures, **HIDDEN
            ).success(*self.pairs.of_run(self.run, self.step), **HIDDEN)

        follow(self.run.change(shown(self._of_run), self.run, of_run, **HIDDEN))
        follow(self.refresh.click(shown(self._again), self.run, [self.run, *of_run], **HIDDEN))
        for part in (self.step.input, self.take.licence.submit, self.take.licence.blur):
            part(shown(self._of_step), [self.run, self.step, self.take.licence], of_step, **HIDDEN)
        self.pairs.connect(self.run, self.step)
        self.comparison.input(shown(self._of_comparison), picked, of_pictures, **HIDDEN)
        for part in (self.row, self.prompt):
            part.input(shown(self._slide), [*picked, self.row, self.prompt], self.slider, **HIDDEN)
        self.draw_button.click(
            shown(self._draw),
            [self.run, self.prompts, self.strengths, self.checkpoints, self.seed],
            [self.drawn, self.stop_draw, self.comparison],
            concurrency_limit=1,
            concurrency_id="heavy",
            **HIDDEN,
        ).success(shown(self._of_comparison), picked, of_pictures, **HIDDEN)
        self.take.connect(self.run, self.step)
        tab = self.context
        if (app := tab.app) is not None and tab.open_run is not None:
            app.load(shown(self._loaded), tab.open_run, self.run, **HIDDEN)
            self.run.input(lambda name: name or "", self.run, tab.open_run, **HIDDEN)

    def _loaded(self, name: str) -> Any:
        names = run_names(self.context)
        return gr.update(choices=names, value=name if name in names else next(iter(names), None))

    def _again(self, name: str | None) -> tuple[Any, ...]:
        names = run_names(self.context)
        name = name if name in names else next(iter(names), None)
        return gr.update(choices=names, value=name), *self._of_run(name)

    def _of_run(self, name: str | None) -> tuple[Any, ...]:
        closed = gr.update(value=None, visible=False)
        if not name:
            empty = gr.update(choices=[], value=None)
            return empty, gr.update(choices=[], value=[]), empty, closed, ""
        run = self.context.run(name)
        steps = [checkpoint_step(path) for path in run.list_checkpoints()]
        choices = [(f"best on held-out pairs ({best_step(run)})", BEST), (f"last ({steps[-1]})", LAST)] if steps else []
        choices += [(f"step {step}", str(step)) for step in steps]
        return (
            gr.update(choices=choices, value=BEST if steps else None),
            gr.update(choices=[str(s) for s in steps], value=[str(steps[-1])] if steps else []),
            self._pictures(run),
            closed,
            "",
        )

    def _pictures(self, run: RunDir) -> Any:
        found = run_comparisons(run)
        choices = [(f"{c.title} ({len(c.prompts)} prompts)", str(c.sheet.name)) for c in found]
        return gr.update(choices=choices, value=choices[0][1] if choices else None)

    def _of_step(self, name: str | None, step: str | None, licence: str) -> tuple[Any, ...]:
        if not name:
            return NOTHING, ""
        run = self.context.run(name)
        if not step:
            return note(f"Run {name} has no checkpoint yet. Train it, or press Save now on the Train page."), ""
        number = step_of(run, step)
        return figures_html(run, number), without_head(model_card(run, number, licence))

    def _of_comparison(self, name: str | None, sheet: str | None) -> tuple[Any, ...]:
        one = self._comparison(name, sheet)
        if one is None:
            empty = gr.update(choices=[], value=None)
            return empty, empty, None, None
        rows = [title for title, _ in one.rows[1:]]
        prompts = [(f"{i + 1}. {text[:80]}", i) for i, text in enumerate(one.prompts)]
        picture = str(one.sheet) if one.sheet.exists() else None
        slide = (str(one.rows[0][1][0]), str(one.rows[-1][1][0]))
        return gr.update(choices=rows, value=rows[-1]), gr.update(choices=prompts, value=0), picture, slide

    def _slide(self, name: str | None, sheet: str | None, row: str | None, prompt: int | None) -> Any:
        one = self._comparison(name, sheet)
        if one is None:
            return None
        pictures = next((paths for title, paths in one.rows if title == row), one.rows[-1][1])
        i = min(int(prompt or 0), len(one.prompts) - 1)
        return str(one.rows[0][1][i]), str(pictures[i])

    def _comparison(self, name: str | None, sheet: str | None) -> Comparison | None:
        if not name or not sheet:
            return None
        return next((c for c in run_comparisons(self.context.run(name)) if c.sheet.name == sheet), None)

    def _draw(
        self, name: str | None, prompts: str, strengths: str, checkpoints: list[str], seed: float, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        run = self.context.run(name or "")
        arguments = {
            "run": str(run.path),
            "steps": [int(step) for step in checkpoints] or [None],
            "prompts": lines(prompts) or None,
            "strengths": numbers(strengths),
            "seed": int(seed or 0),
        }
        yield from shown_while(
            request,
            "compare",
            lambda progress, stop: run_job("compare", arguments, progress=progress, should_stop=stop),
            lambda result: (f"Drawn: {Path(result['sheet']).name}.", (self._pictures(run),)),
            1,
        )
