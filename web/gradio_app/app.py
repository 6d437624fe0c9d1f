"""The whole page: a tab per page, each built by its own file."""

from __future__ import annotations

import gradio as gr

from mapo_core import __version__

from . import api, evaluate_page, pairs_page, results_page, runs_page, train
from .context import AppContext
from .theme import CSS, theme

PAGES = (
    ("Pairs", "pairs", pairs_page),
    ("Train", "train", train),
    ("Results", "results", results_page),
    ("Runs", "runs", runs_page),
    ("Evaluate", "evaluate", evaluate_page),
)

LOOK = {"theme": theme(), "css": CSS}  # for `launch`


def build_app(context: AppContext) -> gr.Blocks:
    """The app with all pages; fills in what the context shares between them."""
    with gr.Blocks(
        title="MaPO trainer", analytics_enabled=False, fill_width=True, delete_cache=(3600, 24 * 3600)
    ) as app:
        gr.HTML(
            f"<div class='mapo-head'><h1>MaPO trainer</h1><p>From two folders of pictures to a LoRA · {__version__}"
            "</p></div>",
            padding=False,
        )
        context.open_run = context.remembered("open-run", "")
        context.last = context.remembered("last", {})
        context.clone = gr.State([])
        context.beta = gr.State([])
        context.app = app
        with gr.Tabs(selected="pairs", elem_id="mapo-tabs") as tabs:
            context.tabs = tabs
            for title, name, page in PAGES:
                with gr.Tab(title, id=name, elem_id=f"tab-{name}"):
                    page.build(context)
        api.build(context)
    return app
