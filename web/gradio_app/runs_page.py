"""The Runs page."""

from __future__ import annotations

import gradio as gr

from .context import AppContext


def build(context: AppContext) -> None:
    """Put the page together; called inside its tab."""
    gr.Markdown("This page comes with the next change.")
