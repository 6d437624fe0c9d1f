"""What the Train page puts into its form, and what it says of a memory plan, without a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

gr = pytest.importorskip("gradio", reason="install gradio to test the page")

from mapo_core import TrainConfig, demo_values, merge_settings  # noqa: E402
from web.gradio_app.context import AppContext  # noqa: E402
from web.gradio_app.train_form import form_defaults, without_demo  # noqa: E402
from web.gradio_app.train_request import loras_folder, model_choices, plan_note, remember_needs  # noqa: E402


def test_another_model_does_not_get_the_demos_settings() -> None:
    """The demo's learning rate is thirty times too large for a real model."""
    assert without_demo(form_defaults()) == {"method": {"type": "mapo"}}
    own = merge_settings(form_defaults(), {"training": {"steps": 77}, "seed": 5, "export": {"trigger": "x"}})
    assert without_demo(own) == {
        "method": {"type": "mapo"}, "training": {"steps": 77}, "seed": 5, "export": {"trigger": "x"}
    }  # fmt: skip
    assert (
        demo_values("x")["optimizer"]["learning_rate"]
        > 10 * TrainConfig.model_fields["optimizer"].default.learning_rate
    )


def test_a_plan_says_what_it_begins_with_and_what_was_measured(tmp_path: Path) -> None:
    context = AppContext(home=tmp_path)
    values: dict[str, Any] = {"name": "x", "model": {"path": "/m/a.safetensors"}, "memory": {"plan": "8GB"}}
    note = plan_note(context, values)
    assert "base in int8, gradient checkpointing, split pairs, batch 1 x " in note
    assert "adamw8bit" in note
    assert "Measured" not in note
    needs = {
        "family": "Stable Diffusion XL",
        "resolution": 1024,
        "peak_memory_bytes": 7 * 2**30,
        "seconds_per_step": 2.345,
        "device": "cuda",
    }
    remember_needs(context, values, needs)
    remember_needs(context, {**values, "memory": {}}, {**needs, "seconds_per_step": 1.0})
    note = plan_note(context, values)
    assert "**8GB**: Stable Diffusion XL at 1024 px, 7.0 GiB, about 2.3 s per step on cuda (20" in note
    assert "**auto**: " in note
    assert "Measured" not in plan_note(context, {**values, "model": {"path": "demo"}})
    (tmp_path / "ui" / "measured.json").write_text("{")
    assert "Measured" not in plan_note(context, values)


def test_what_a_browser_keeps_can_be_read_after_a_restart(tmp_path: Path) -> None:
    """gradio's own key changes with every start of the server."""
    with gr.Blocks():
        first, again, other = (AppContext(home=tmp_path / home).remembered("last", {}) for home in "aab")
        named = AppContext(home=tmp_path / "a").remembered("edit", "")
    assert (first.secret, first.storage_key) == (again.secret, again.storage_key)
    assert other.secret != first.secret
    assert len({first.storage_key, other.storage_key, named.storage_key}) == 3


def test_a_comfyui_that_is_known_is_offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loras = tmp_path / "ComfyUI" / "models" / "loras"
    monkeypatch.setenv("COMFYUI_DIR", str(tmp_path / "ComfyUI"))
    assert loras_folder(AppContext(home=tmp_path)) == ""
    loras.mkdir(parents=True)
    assert loras_folder(AppContext(home=tmp_path)) == str(loras)
    assert loras_folder(AppContext(home=tmp_path, listen=True)) == ""  # it is not for every visitor


def test_models_are_looked_for_once_and_again_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from web.gradio_app import train_request

    looked: list[int] = []
    monkeypatch.setattr(train_request, "find_models", lambda folders: looked.append(1) or [tmp_path / "a.safetensors"])
    context = AppContext(home=tmp_path)
    assert model_choices(context) == model_choices(context)
    assert model_choices(context)[1] == (f"a.safetensors  ({tmp_path})", str(tmp_path / "a.safetensors"))
    assert len(looked) == 1
    model_choices(context, again=True)
    assert len(looked) == 2
