"""The Evaluate page: which measures can be taken here, a first beta, a run's figures, and small grids of settings."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from mapo_core import ConfigError, demo_pairs, demo_values, load_config, merge_settings
from mapo_core.evaluate import SCORERS
from mapo_core.pairs import list_sets, open_pairs, set_folder, write_pairs
from mapo_core.runs import mapo_home, run_job

from .context import AppContext, shown
from .evaluate_tables import report_html, scorers_html, sweep_html
from .figures import lines, run_names
from .run_view import BEST, step_of
from .train_request import DATA, DEMO, model_choices, model_path
from .work import cancel_button, shown_while

HEAVY: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "heavy", "api_visibility": "private"}
HIDDEN: dict[str, Any] = {"api_visibility": "private"}
HEURISTIC = (
    "How far the chosen images are from what the base model draws, and a first beta for MaPO. **The suggestion is a "
    "heuristic**, not a measured optimum: try the three values that the report names."
)


def build(context: AppContext) -> None:
    """Put the page together; called inside its tab."""
    page = _EvaluatePage(context)
    with gr.Tabs(elem_id="evaluate-parts"):
        with gr.Tab("A run"):
            page.draw_run()
        with gr.Tab("First beta"):
            page.draw_mismatch()
        with gr.Tab("Sweep"):
            page.draw_sweep()
        with gr.Tab("Scorers", elem_id="evaluate-scorers-tab") as scorers:
            page.draw_scorers(scorers)


class _EvaluatePage:
    """The components, and what they do."""

    def __init__(self, context: AppContext) -> None:
        self.context = context

    # --- a run --------------------------------------------------------------------------------------------------------

    def draw_run(self) -> None:
        """Held-out pairs, win rate, drift, diversity of one checkpoint."""
        gr.Markdown("Held-out pairs, win rates, drift on other prompts and diversity, with 95 % intervals.")
        with gr.Row():
            run = gr.Dropdown(run_names(self.context), value=None, label="Run", elem_id="evaluate-run")
            step = gr.Textbox(BEST, label="Checkpoint", info="best, last, or a step that is kept.")
            scorers = gr.Dropdown(
                ["auto", *SCORERS], value=["auto"], multiselect=True, label="Scorers", elem_id="evaluate-scorers",
                info="auto: those whose weights are here.",
            )  # fmt: skip
        prompts = gr.Textbox("", label="Prompts, one per line", info="Empty: those of the held-out pairs.", lines=2)
        with gr.Row():
            count = gr.Number(16, label="At most so many prompts", precision=0, minimum=1, elem_id="evaluate-count")
            seeds = gr.Number(2, label="Pictures per prompt", precision=0, minimum=1, maximum=64)
        go = gr.Button("Evaluate", variant="primary", elem_id="evaluate-go")
        stop = cancel_button("evaluate")
        busy = gr.HTML(elem_id="evaluate-busy")
        table = gr.HTML(elem_id="evaluate-table")
        sheet = gr.Image(
            label="Base model above, LoRA below",
            type="filepath",
            interactive=False,
            visible=False,
            elem_id="evaluate-sheet",
        )
        go.click(
            shown(self._evaluate), [run, step, scorers, prompts, count, seeds], [busy, stop, table, sheet], **HEAVY
        )
        self._load(run, lambda: gr.update(choices=run_names(self.context)))
        run.focus(lambda: gr.update(choices=run_names(self.context)), None, run, **HIDDEN)

    def _evaluate(
        self, name: str | None, step: str, scorers: list[str], prompts: str, count: float, seeds: float,
        request: gr.Request,
    ) -> Iterator[tuple[Any, ...]]:  # fmt: skip
        run = self.context.run(name or "")
        names = [s for s in scorers if s != "auto"] or ["auto"]
        arguments = {
            "run": str(run.path),
            "step": step_of(run, step.strip() or BEST),
            "scorers": names,
            "prompts": lines(prompts),
            "count": int(count),
            "seeds": int(seeds),
        }

        def finish(result: dict[str, Any]) -> tuple[str, tuple[Any, ...]]:
            return f"Measured step {arguments['step']} of {run.name}.", (
                report_html(result["evaluation"], result["text"]),
                gr.update(value=result["sheet"], visible=True),
            )

        yield from shown_while(request, "evaluate", _job("evaluate", arguments), finish, 2)

    # --- first beta ---------------------------------------------------------------------------------------------------

    def draw_mismatch(self) -> None:
        """Reference mismatch and the beta it suggests."""
        gr.Markdown(HEURISTIC)
        with gr.Row():
            pairs = gr.Dropdown(self._sets(), value=DEMO, label="Pairs", elem_id="mismatch-pairs")
            model = gr.Dropdown(
                model_choices(self.context), value=DEMO, label="Base model", allow_custom_value=True,
                info="One that was found here, a path, a Hub id, or demo.", elem_id="mismatch-model",
            )  # fmt: skip
        with gr.Row():
            count = gr.Number(24, label="Prompts to draw", precision=0, minimum=2, elem_id="mismatch-count")
            steps = gr.Number(16, label="Sampling steps", precision=0, minimum=1, maximum=200)
            cfg = gr.Number(5.0, label="Guidance", minimum=0, maximum=30)
            embedder = gr.Dropdown(
                ["auto", "dinov2", "demo"], value="auto", label="Similarity by",
                info="auto: DINOv2, whose weights must be here; for the demo model its own.",
            )  # fmt: skip
        go = gr.Button("Measure", variant="primary", elem_id="mismatch-go")
        stop = cancel_button("mismatch")
        busy = gr.HTML(elem_id="mismatch-busy")
        text = gr.Textbox(label="Report", lines=6, visible=False, elem_classes="mapo-log", elem_id="mismatch-text")
        beta = gr.Number(label="Suggested beta (heuristic)", visible=False, interactive=False, elem_id="mismatch-beta")
        use = gr.Button("Use this beta on the Train page", visible=False, elem_id="mismatch-use")
        sheet = gr.Image(label="Chosen images and the base model's", type="filepath", interactive=False, visible=False)
        go.click(
            shown(self._mismatch),
            [pairs, model, count, steps, cfg, embedder],
            [busy, stop, text, beta, use, sheet],
            **HEAVY,
        )
        self._connect_beta(use, beta)
        self._load(pairs, lambda: gr.update(choices=self._sets()))
        pairs.focus(lambda: gr.update(choices=self._sets()), None, pairs, **HIDDEN)

    def _connect_beta(self, use: gr.Button, beta: gr.Number) -> None:
        def hand_over(value: float) -> Any:
            return [value, time.time()], gr.Tabs(selected="train")

        use.click(shown(hand_over), beta, [self.context.beta, self.context.tabs], **HIDDEN)

    def _mismatch(
        self, pairs: str, model: str, count: float, steps: float, cfg: float, embedder: str, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        folder = mapo_home() / "ui" / "mismatch" / time.strftime("%Y%m%d-%H%M%S")
        source = self._pairs(pairs, folder)
        settings = {"name": "mismatch", **DATA, "model": {"path": model_path(self.context, model)}}
        arguments = {
            "settings": settings,
            "pairs": str(source),
            "count": int(count),
            "num_inference_steps": int(steps),
            "guidance_scale": float(cfg),
            "embedder": embedder,
            "sheet": str(self.context.pictures / f"mismatch-{folder.name}.png"),
        }

        def finish(result: dict[str, Any]) -> tuple[str, tuple[Any, ...]]:
            found = result["beta"]
            return "Measured.", (
                gr.update(value=result["text"], visible=True),
                gr.update(value=found, visible=found is not None),
                gr.update(visible=found is not None),
                gr.update(value=arguments["sheet"], visible=True),
            )

        yield from shown_while(request, "mismatch", _job("mismatch", arguments), finish, 4)

    # --- sweep --------------------------------------------------------------------------------------------------------

    def draw_sweep(self) -> None:
        """A grid of settings."""
        gr.Markdown(
            "Every combination is trained for the same number of steps, measured on held-out pairs, and ranked. Every "
            "trial is a run of its own. Cancel keeps what is done: the same sweep goes on where it was."
        )
        with gr.Row():
            name = gr.Textbox("sweep", label="Name", elem_id="sweep-name")
            pairs = gr.Dropdown(self._sets(), value=DEMO, label="Pairs", elem_id="sweep-pairs")
            base = gr.Dropdown(
                self._bases(), value=DEMO, label="Other settings as in", elem_id="sweep-base",
                info="The demo's, or those of a run.",
            )  # fmt: skip
        with gr.Row():
            grid = gr.Textbox(
                "method.beta=8,32,64",
                label="What varies, one setting per line",
                info="For example optimizer.learning_rate=1e-4,1e-3",
                lines=3,
                elem_id="sweep-grid",
            )
            with gr.Column():
                steps = gr.Number(100, label="Steps of each trial", precision=0, minimum=1, elem_id="sweep-steps")
                rank = gr.Dropdown(
                    ["accuracy", "margin", *SCORERS], value="accuracy", label="Ranked by", elem_id="sweep-rank",
                    info="A scorer's weights must be here.",
                )  # fmt: skip
        go = gr.Button("Start the sweep", variant="primary", elem_id="sweep-go")
        stop = cancel_button("sweep")
        busy = gr.HTML(elem_id="sweep-busy")
        table = gr.HTML(elem_id="sweep-table")
        go.click(shown(self._sweep), [name, pairs, base, grid, steps, rank], [busy, stop, table], **HEAVY)
        self._load(pairs, lambda: gr.update(choices=self._sets()))
        pairs.focus(lambda: gr.update(choices=self._sets()), None, pairs, **HIDDEN)
        base.focus(lambda: gr.update(choices=self._bases()), None, base, **HIDDEN)

    def _sweep(
        self, name: str, pairs: str, base: str, grid: str, steps: float, rank: str, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        folder = mapo_home() / "ui" / "sweeps"
        source = self._pairs(pairs, folder / time.strftime("%Y%m%d-%H%M%S"))
        arguments = {
            "settings": sweep_settings(self._base(base), name, int(steps)),
            "pairs": str(source),
            "grid": grid_of(grid),
            "evaluate": {"scorers": [rank] if rank in SCORERS else [], "count": 8, "seeds": 1},
            "rank_by": rank,
        }
        yield from shown_while(
            request,
            "sweep",
            _job("sweep", arguments),
            lambda result: ("Done.", (sweep_html(result["sweep"], result["text"]),)),
            1,
        )

    # --- scorers ------------------------------------------------------------------------------------------------------

    def draw_scorers(self, tab: gr.Tab) -> None:
        """Which can be used here, and what the others lack."""
        gr.Markdown("Scorers judge pictures. Nothing is downloaded by itself; what is missing is named.")
        go = gr.Button("Look again", size="sm", elem_id="scorers-go")
        stop = cancel_button("scorers")
        busy = gr.HTML(elem_id="scorers-busy")
        table = gr.HTML(elem_id="scorers-table")
        for event in (go.click, tab.select):
            event(shown(self._scorers), None, [busy, stop, table], **HIDDEN)

    def _scorers(self, request: gr.Request) -> Iterator[tuple[Any, ...]]:
        yield from shown_while(
            request,
            "scorers",
            _job("scorers", {}),
            lambda result: ("", (scorers_html(result["scorers"]),)),
            1,
        )

    # --- shared -------------------------------------------------------------------------------------------------------

    def _load(self, component: Any, update: Any) -> None:
        if (app := self.context.app) is not None:
            app.load(update, None, component, **HIDDEN)

    def _sets(self) -> list[tuple[str, str]]:
        kept = [(f"{name} ({count} pairs)", f"set:{name}") for name, count in list_sets().items()]
        return [*kept, ("demo: cartoon pictures (built in)", DEMO)]

    def _bases(self) -> list[tuple[str, str]]:
        return [("the demo", DEMO), *((name, f"run:{name}") for name in run_names(self.context))]

    def _pairs(self, choice: str, folder: Path) -> Path:
        """A pair set as a file."""
        if choice.startswith("set:"):
            path = set_folder(choice.removeprefix("set:")) / "pairs.jsonl"
            self.context.check_readable(p for pair in open_pairs(path) for p in (pair.chosen, pair.rejected))
            return path
        write_pairs(folder / "pairs.jsonl", demo_pairs("cartoon").pairs)
        return folder / "pairs.jsonl"

    def _base(self, choice: str) -> dict[str, Any]:
        if choice.startswith("run:"):
            return load_config(self.context.run(choice.removeprefix("run:")).config).model_dump(mode="json")
        return demo_values("demo")


def _job(name: str, arguments: dict[str, Any]) -> Any:
    return lambda progress, stop: run_job(name, dict(arguments), progress=progress, should_stop=stop)


def sweep_settings(values: dict[str, Any], name: str, steps: int) -> dict[str, Any]:
    """The settings that all trials share: measured at the end alone, no pictures and checkpoints in between."""
    own = {
        "name": name.strip(),
        "training": {"steps": steps},
        "validation": {"every_steps": 0, "sample_every_steps": 0},
        "checkpoint": {"every_steps": 0},
    }
    merged = merge_settings(values, own)
    merged.pop("parent", None)
    optimizer = merged.get("optimizer") or {}
    if isinstance(warmup := optimizer.get("warmup_steps"), int):
        optimizer["warmup_steps"] = min(warmup, steps // 2)
    return merged


def grid_of(text: str) -> dict[str, list[str]]:
    """`setting=a,b,c` lines as a grid.

    Raises:
        ConfigError: a line is not of this form.
    """
    grid: dict[str, list[str]] = {}
    for line in lines(text):
        name, found, values = line.partition("=")
        words = [word.strip() for word in values.split(",") if word.strip()]
        if not found or not words:
            raise ConfigError(f"{line!r}: write a setting and its values, for example method.beta=8,32,64.")
        grid[name.strip()] = words
    return grid
