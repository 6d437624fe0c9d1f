"""Every setting has a widget of the right kind, and values go through the form unchanged."""

from __future__ import annotations

from typing import Any

import pytest

gr = pytest.importorskip("gradio", reason="install gradio to test the page")

from mapo_core import METHODS, build_config, demo_values, form_groups, merge_settings  # noqa: E402
from web.gradio_app.forms import BASIC, HIDDEN, SettingsForm  # noqa: E402

NAMED = {"name": "x", "model": {"path": "demo"}, "data": {"pairs": "pairs.jsonl"}}


@pytest.fixture(scope="module")
def form() -> SettingsForm:
    form = SettingsForm({})
    with gr.Blocks():
        form.draw_basic(*BASIC)
        form.draw_rest()
    return form


def test_every_setting_has_one_widget_with_its_text(form: SettingsForm) -> None:
    keys = {(*group.path, field.name) for group in form_groups() for field in group.fields}
    assert set(form.widgets) == keys - HIDDEN
    kinds = {
        "int": gr.Number,
        "float": gr.Number,
        "bool": gr.Checkbox,
        "choice": gr.Dropdown,
        "toggles": gr.CheckboxGroup,
        "text": gr.Textbox,
        "lines": gr.Textbox,
        "numbers": gr.Textbox,
    }
    for key, widget in form.widgets.items():
        field = form.fields[key]
        assert isinstance(widget, kinds[field.kind]), key
        assert widget.info == field.text
        if field.kind in ("int", "float"):
            assert (widget.minimum, widget.maximum) == (field.minimum, field.maximum), key


def test_untouched_forms_say_nothing(form: SettingsForm) -> None:
    assert form.values(form.updates({})) == {"method": {"type": "mapo"}}


@pytest.mark.parametrize("method", list(METHODS))
def test_settings_go_through_the_form_unchanged(form: SettingsForm, method: str) -> None:
    special: dict[str, Any] = {
        "seed": 7,
        "model": {"zero_terminal_snr": True, "vae": "some/vae"},
        "adapter": {"alpha": 4.0, "targets": ["conv"]},
        "optimizer": {"betas": [0.8, 0.95], "learning_rate": 2e-6},
        "training": {"gradient_checkpointing": False},
        "validation": {"prompts": ["a house", "a tree"], "width": 512},
    }
    given = merge_settings(demo_values("x", method), special, NAMED)
    back = merge_settings(form.values(form.updates(given)), NAMED)
    assert build_config(back) == build_config(given)


def test_a_goal_takes_the_place_of_the_other_form(form: SettingsForm) -> None:
    first = form.updates({"method": {"type": "mapo", "margin_weight": 0.5}})
    goal = {"method": {"type": "mapo", "parametrisation": "paper", "beta": 8.0}}
    after = form.values(form.updates({**form.values(first), **goal}))
    assert after["method"] == goal["method"]
    build_config(merge_settings(after, NAMED))


def test_the_search_finds_by_name_and_text(form: SettingsForm) -> None:
    keys = form._searched()
    found = form._found("learning rate", "mapo")[len(form.boxes) :]
    hits = {key for key, update in zip(keys, found, strict=True) if update["visible"]}
    assert ("optimizer", "learning_rate") in hits
    assert ("adapter", "rank") not in hits
    boxes = dict(zip(form.boxes, form._found("learning rate", "mapo"), strict=False))
    assert boxes[("optimizer",)]["visible"]
    assert boxes[("optimizer",)]["open"]
    assert not boxes[("export",)]["visible"]
    assert not any(update["open"] for update in form._found("", "mapo")[: len(form.boxes)])
    assert not dict(zip(form.boxes, form._found("", "dco"), strict=False))[("method", "mapo")]["visible"]
