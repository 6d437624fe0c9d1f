"""Pictures and tensors, folders and names: what `nodes/_comfy.py` converts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mapo_core import ConfigError, ModelError, PairsError


def test_pictures_survive_the_way_through_a_tensor(pack: Any) -> None:
    comfy = pack.module("_comfy")
    picture = Image.effect_noise((20, 12), 80).convert("RGB")
    tensor = comfy.to_tensor([picture, picture])
    assert tensor.shape == (2, 12, 20, 3)
    assert tensor.dtype == torch.float32
    assert 0 <= tensor.min() <= tensor.max() <= 1
    assert all(np.array_equal(np.asarray(p), np.asarray(picture)) for p in comfy.to_pictures(tensor))


def test_an_alpha_channel_is_dropped_and_values_are_clipped(pack: Any) -> None:
    comfy = pack.module("_comfy")
    tensor = torch.zeros(1, 4, 6, 4)
    tensor[..., 0], tensor[..., 1], tensor[..., 3] = 1.7, -0.3, 0.5
    (picture,) = comfy.to_pictures(tensor)
    assert picture.mode == "RGB"
    assert picture.getpixel((0, 0)) == (255, 0, 0)
    assert comfy.to_tensor([Image.new("RGBA", (3, 2)), Image.new("L", (3, 2))]).shape == (2, 2, 3, 3)


def test_smaller_pictures_are_placed_on_the_largest_size(pack: Any) -> None:
    wide, high = Image.new("RGB", (8, 2), "white"), Image.new("RGB", (3, 5), "white")
    tensor = pack.module("_comfy").to_tensor([wide, high])
    assert tensor.shape == (2, 5, 8, 3)
    assert tensor[0, :2].min() == 1
    assert tensor[0, 2:].max() == 0
    assert tensor[1, :5, :3].min() == 1
    assert tensor[1, :, 3:].max() == 0


def test_folders_are_absolute_or_below_input(pack: Any, tmp_path: Path) -> None:
    comfy = pack.module("_comfy")
    (pack.comfy.base / "input" / "good ones").mkdir()
    assert comfy.images_folder(' "good ones" ', "chosen") == pack.comfy.base / "input" / "good ones"
    assert comfy.images_folder(str(tmp_path), "chosen") == tmp_path
    with pytest.raises(PairsError, match=r"chosen: name a folder.*good ones"):
        comfy.images_folder(" ", "chosen")
    with pytest.raises(PairsError, match=r"rejected: .*nowhere does not exist"):
        comfy.images_folder("nowhere", "rejected")
    (tmp_path / "file").touch()
    with pytest.raises(PairsError, match="is a file"):
        comfy.images_folder(str(tmp_path / "file"), "chosen")


def test_the_state_of_a_folder_changes_with_its_files(pack: Any, tmp_path: Path) -> None:
    state, folder = pack.module("_comfy").folder_state, tmp_path / "images"
    (folder / "below").mkdir(parents=True)
    path = folder / "below" / "a.txt"
    path.write_text("one", encoding="utf-8")
    before = state(folder)
    assert before == state(folder)
    path.write_text("two", encoding="utf-8")
    os.utime(path, ns=(1, 1))
    assert state(folder) != before


def test_checkpoints_by_name(pack: Any) -> None:
    comfy = pack.module("_comfy")
    file = pack.comfy.base / "models" / "checkpoints" / "sub" / "a.safetensors"
    file.parent.mkdir()
    file.touch()
    assert comfy.checkpoint_names() == ["demo (built in)", "sub/a.safetensors"]
    assert comfy.checkpoint_path("demo (built in)") == "demo"
    assert comfy.checkpoint_path("sub/a.safetensors") == str(file)
    assert comfy.checkpoint_of_model(str(file)) == "sub/a.safetensors"
    assert comfy.checkpoint_of_model("elsewhere") is None
    with pytest.raises(ModelError, match="no checkpoint 'b'"):
        comfy.checkpoint_path("b")


def test_a_published_lora_replaces_nothing(pack: Any, tmp_path: Path) -> None:
    comfy = pack.module("_comfy")
    lora = tmp_path / "ink.safetensors"
    lora.write_bytes(b"one")
    assert comfy.published_name(lora) is None
    first = comfy.publish_lora(lora)
    assert Path(first) == Path("mapo/ink.safetensors")
    assert comfy.publish_lora(lora) == first
    assert comfy.published_name(lora) == first
    lora.write_bytes(b"and two")
    second = comfy.publish_lora(lora)
    assert Path(second) == Path("mapo/ink-2.safetensors")
    folder = pack.comfy.base / "models" / "loras"
    assert (folder / first).read_bytes() == b"one"
    assert comfy.published_name(lora) == second
    assert Path(comfy.publish_lora(lora, "brush")) == Path("mapo/brush.safetensors")
    names = ["brush.safetensors", "ink-2.safetensors", "ink.safetensors"]
    assert sorted(p.name for p in (folder / "mapo").iterdir()) == names


def test_a_cancel_is_remembered_until_the_work_has_ended(pack: Any) -> None:
    bar = pack.module("_comfy").Progress("7")
    assert not bar.cancelled()
    pack.comfy.cancelled = True
    assert bar.cancelled()
    assert bar.cancelled(), "ComfyUI's own flag is reset by the first look at it"
    assert bar.stop is not None
    assert bar.interruption() is None, "it is told once; a second Cancel is another one"


def test_a_cancel_that_comfyuis_own_bar_sees_first_is_not_lost(pack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    comfy = pack.module("_comfy")
    bar = comfy.Progress("7")

    def update(*_: Any) -> None:
        raise comfy.management.InterruptProcessingException

    monkeypatch.setattr(bar._bar, "update_absolute", update)
    bar.show(1, 2)
    assert bar.cancelled()
    with pytest.raises(comfy.management.InterruptProcessingException):
        bar.check(2, 2)


def test_missing_packages_are_named_with_the_command(pack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    comfy = pack.module("_comfy")
    assert comfy.missing_packages() is None
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else found(name))
    with pytest.raises(ConfigError, match=r"peft missing in ComfyUI's Python.*-m pip install -r .*requirements\.txt"):
        comfy.require_packages()


def test_home_is_below_output_unless_the_user_has_his_own(pack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    comfy = pack.module("_comfy")
    monkeypatch.setenv("MAPO_HOME", "/own")
    comfy.set_home()
    assert os.environ["MAPO_HOME"] == "/own"
    monkeypatch.delenv("MAPO_HOME")
    comfy.set_home()
    assert os.environ["MAPO_HOME"] == str(pack.comfy.base / "output" / "mapo")
    monkeypatch.setenv("MAPO_HOME", "/own")  # so that it is gone after this test
