"""Pairs as cards on a page: two pictures, the prompt, and what can be done with them."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from mapo_core import ConfigError
from mapo_core.pairs import EditedPair, FilterHint, PairEditor, lacks_caption

from .context import AppContext

CARDS = 6
VIEWS = [
    ("All", "all"),
    ("Kept", "kept"),
    ("Excluded", "excluded"),
    ("Held out", "held_out"),
    ("Without a caption", "uncaptioned"),
]
EDITS = {"concurrency_limit": 1, "concurrency_id": "pair-edits", "api_visibility": "private"}
_SIDE = 384  # pixels of a picture on a card
_SMALL = 128
_EXAMPLES = 4


@dataclass(frozen=True)
class Card:
    """The components of one card."""

    group: gr.Group
    pictures: gr.HTML
    caption: gr.Textbox
    swap: gr.Button
    drop: gr.Button
    held: gr.Checkbox


class Cards:
    """A page of pairs."""

    def __init__(self) -> None:
        """Draw as many empty cards as a page has."""
        self.cards: list[Card] = []
        with gr.Row(elem_classes="mapo-cards"):
            for k in range(CARDS):
                with gr.Column(min_width=320, elem_classes="mapo-card"):
                    self.cards.append(_draw(k))

    @property
    def outputs(self) -> list[Any]:
        """What `updates` is for."""
        return [part for c in self.cards for part in (c.group, c.pictures, c.caption, c.swap, c.drop, c.held)]

    def updates(self, context: AppContext, entries: Sequence[EditedPair]) -> list[Any]:
        """The cards with these pairs; the rest is hidden."""
        updates: list[Any] = []
        for k in range(CARDS):
            if k >= len(entries):
                updates += [gr.update(visible=False), *(gr.skip(),) * 5]
                continue
            entry = entries[k]
            updates += [
                gr.update(visible=True),
                _pictures(context, entry),
                gr.update(value=entry.pair.prompt, interactive=not entry.excluded),
                gr.update(interactive=not entry.excluded),
                gr.update(value="Take back" if entry.excluded else "Exclude"),
                gr.update(value=bool(entry.pair.held_out), interactive=not entry.excluded),
            ]
        return updates


def _draw(k: int) -> Card:
    with gr.Group(visible=False, elem_id=f"card-{k}") as group:
        pictures = gr.HTML(padding=False)
        caption = gr.Textbox(
            "", show_label=False, lines=2, max_lines=4, placeholder="no caption yet", elem_id=f"card-{k}-caption"
        )
        with gr.Row(elem_classes="mapo-card-row"):
            swap = gr.Button("Swap", size="sm", min_width=70, elem_id=f"card-{k}-swap")
            drop = gr.Button("Exclude", size="sm", min_width=70, elem_id=f"card-{k}-drop")
            held = gr.Checkbox(label="Held out", min_width=90, container=False, elem_id=f"card-{k}-held")
    return Card(group, pictures, caption, swap, drop, held)


def _pictures(context: AppContext, entry: EditedPair) -> str:
    state = "excluded" if entry.excluded else ""
    why = f" · {html.escape(entry.reason)}" if entry.excluded and entry.reason else ""
    badge = f"<span class='mapo-badge'>excluded{why}</span>" if entry.excluded else ""
    figures = "".join(
        f"<figure>{picture_html(context, path, f'{name}: {entry.pair.prompt}', _SIDE)}"
        f"<figcaption>{name}</figcaption></figure>"
        for name, path in (("chosen", entry.pair.chosen), ("rejected", entry.pair.rejected))
    )
    head = f"<div class='mapo-card-head'>{entry.index + 1} · {html.escape(entry.pair.chosen.name)} {badge}</div>"
    return f"<div class='mapo-pair {state}'>{head}<div class='mapo-two'>{figures}</div></div>"


def picture_html(context: AppContext, path: Path, words: str, side: int) -> str:
    """An image tag of a small copy; in its place words where the file is not a picture."""
    try:
        copy = context.picture(path, side)
    except (OSError, ValueError, SyntaxError, ConfigError):
        return f"<div class='mapo-gone'>cannot be shown: {html.escape(path.name)}</div>"
    return (
        f"<img loading='lazy' src='{html.escape(file_url(copy), quote=True)}' alt='{html.escape(words, quote=True)}'>"
    )


def file_url(path: str | Path) -> str:
    """Where a browser fetches a served file, from whatever address the page has."""
    from urllib.parse import quote

    return f"gradio_api/file={quote(str(path))}"


def finding_html(context: AppContext, hint: FilterHint, title: str, editor: PairEditor) -> str:
    """A finding in words and pictures."""
    entries = editor.entries
    shown = "".join(
        "<div class='mapo-two small'>"
        + "".join(
            picture_html(context, path, entries[i].pair.prompt, _SMALL)
            for path in (entries[i].pair.chosen, entries[i].pair.rejected)
        )
        + "</div>"
        for i in hint.pairs[:_EXAMPLES]
    )
    first = html.escape(hint.messages[0] if hint.messages else "")
    more = f" <em>and {hint.count - 1} more</em>" if hint.count > 1 else ""
    return (
        f"<div class='mapo-status'><span class='mapo-badge {hint.level}'>{hint.level}</span> "
        f"<b>{html.escape(title)}</b> ({hint.count})<div class='mapo-message'>{first}{more}</div>"
        f"<div class='mapo-strip'>{shown}</div></div>"
    )


def is_shown(entry: EditedPair, view: str, search: str, only: Sequence[int]) -> bool:
    """Whether a pair belongs to a view (one of VIEWS, or "only" those of a finding) and its prompt has the words."""
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


def pair_count(count: int) -> str:
    """A number of pairs in words."""
    return f"{count} pair{'' if count == 1 else 's'}"
