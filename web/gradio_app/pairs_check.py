"""The check on the Pairs page: what the linter finds, with pictures, and what a click then does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from mapo_core import ConfigError
from mapo_core.pairs import TITLES, FilterHint, PairEditor, check_edit, last_check, open_edit

from .cards import EDITS, VIEWS, finding_html, pair_count
from .context import AppContext, shown
from .work import cancel_button, shown_while

FINDINGS = 10


class CheckSection:
    """The components, and what they do."""

    def __init__(self, context: AppContext) -> None:
        self.context = context

    def draw(self) -> None:
        """The button, and as many empty findings as the page has."""
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

    @property
    def outputs(self) -> list[Any]:
        """What `updates` is for."""
        return [f[name] for f in self.findings for name in ("group", "text", "look", "drop")]

    def updates(self, editor: PairEditor) -> list[Any]:
        """The findings of the last check; the rest is hidden."""
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
                gr.update(visible=bool(hint.pairs), value=f"Show {pair_count(len(hint.pairs))}"),
                gr.update(visible=bool(hint.drops), value=f"Exclude {pair_count(len(hint.drops))}"),
            ]
        return updates

    def connect(
        self, edit: gr.BrowserState, only: gr.State, view: gr.Dropdown, page: gr.Number, looking: list[Any], again: Any,
        everything: list[Any],
    ) -> None:  # fmt: skip
        """Buttons to functions.

        Args:
            edit, only, view, page: what the page shows; "Show" sets it to the pairs of a finding.
            looking, everything: inputs and outputs of `again`.
            again: shows the page as it is now.
        """
        self.check.click(
            shown(self._check),
            [edit, self.resolution, self.check_all],
            [self.checked, self.stop_check],
            api_visibility="private",
            concurrency_limit=2,
        ).then(shown(again), looking, everything, **EDITS)
        for i, finding in enumerate(self.findings):
            finding["look"].click(shown(self._look(i)), edit, [only, view, page], **EDITS).success(
                shown(again), looking, everything, **EDITS
            )
            finding["drop"].click(shown(self._drop(i, again)), looking, everything, **EDITS)

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

    def _look(self, i: int) -> Any:
        def look(edit: str) -> tuple[Any, ...]:
            hint = _hint(open_edit(edit), i)
            return list(hint.pairs), gr.update(choices=[*VIEWS, (TITLES[hint.code], "only")], value="only"), 1

        return look

    def _drop(self, i: int, again: Any) -> Any:
        def drop(*looking: Any) -> tuple[Any, ...]:
            editor = open_edit(looking[0])
            hint = _hint(editor, i)
            editor.exclude(hint.drops, TITLES[hint.code])
            return again(*looking)

        return drop


def _hint(editor: PairEditor, i: int) -> FilterHint:
    hints = last_check(editor) or []
    if i >= len(hints):
        raise ConfigError("This finding is gone. Check again.")
    return hints[i]
