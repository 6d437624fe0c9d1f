"""The two captioning models, tiny and with random weights, through the loading code that users meet."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mapo_core.demo.scenes import render, scenes
from mapo_core.errors import MissingWeightsError, ModelError
from mapo_core.pairs import (
    CaptionSettings,
    PreferencePair,
    begin_edit,
    caption_edit,
    caption_file,
    load_captioner,
    read_captions,
    uncaptioned,
    write_caption_files,
)
from mapo_core.pairs.captioner import BLIP, FLORENCE
from mapo_core.runs import JobStoppedError, run_job

WORDS = "a red star on blue ground boat fish tree moon what does the image describe in detail shown is".split()
SIDE = 64


def tokenizer(specials: dict[str, str], **extra: str) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([*specials.values(), *extra.values(), *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, specials["unk_token"]))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, **specials, extra_special_tokens=extra or None)


@pytest.fixture(scope="module")
def florence(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Florence2Config, Florence2ForConditionalGeneration, Florence2Processor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder = tmp_path_factory.mktemp("models") / "florence"
    words = tokenizer(
        {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}, image_token="<image>"
    )
    side = {"height": SIDE, "width": SIDE}
    pictures = CLIPImageProcessorPil(size=side, do_center_crop=False, crop_size=side)
    pictures.image_seq_length = (SIDE // 32) ** 2 + 1
    torch.manual_seed(0)
    vision = {"embed_dim": [8, 8, 8, 16], "num_heads": [1] * 4, "num_groups": [1] * 4, "depths": [1] * 4}
    text = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": len(words)}
    ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    config = Florence2Config(
        vision_config={**vision, "window_size": 4, "projection_dim": 16},
        text_config={"model_type": "bart", **text, **heads, **ids, "forced_eos_token_id": 2, "init_std": 0.5},
        image_token_id=words.image_token_id,
        **ids,
    )
    Florence2ForConditionalGeneration(config).save_pretrained(folder)
    Florence2Processor(pictures, words).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipProcessor
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    folder = tmp_path_factory.mktemp("models") / "blip"
    specials = {"pad_token": "[PAD]", "bos_token": "[DEC]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    words = tokenizer({**specials, "cls_token": "[CLS]"})
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": 1, "pad_token_id": 0, "sep_token_id": 2, "eos_token_id": 2}
    config = BlipConfig(
        text_config={**sizes, **ids, "vocab_size": len(words), "encoder_hidden_size": 16, "initializer_range": 0.5},
        vision_config={**sizes, "image_size": 32, "patch_size": 16},
    )
    BlipForConditionalGeneration(config).save_pretrained(folder)
    BlipProcessor(BlipImageProcessorPil(size={"height": 32, "width": 32}), words).save_pretrained(folder)
    return folder


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    paths = []
    for i, scene in zip(range(4), scenes(3, held_out=False), strict=False):
        paths.append(tmp_path / f"{i}.png")
        render(scene, "cartoon", 64).save(paths[-1])
    return paths


@pytest.mark.parametrize("name", ["florence", "blip"])
def test_a_model_writes_words_beside_images_that_have_none(
    name: str, images: list[Path], request: pytest.FixtureRequest
) -> None:
    settings = CaptionSettings(model=str(request.getfixturevalue(name)), trigger="mystyle", prefix="seen:")
    images[1].with_suffix(".txt").write_text("by hand", encoding="utf-8")
    assert uncaptioned(images) == [images[0], *images[2:]]
    captioner = load_captioner(settings)
    seen: list[tuple[int, int]] = []
    made = write_caption_files(images, captioner, settings, progress=lambda *at: seen.append(at))
    assert sorted(made.written) == [images[0], *images[2:]]
    assert made.kept == [images[1]]
    assert images[1].with_suffix(".txt").read_text(encoding="utf-8") == "by hand"
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
    texts = [p.with_suffix(".txt").read_text(encoding="utf-8") for p in made.written]
    for text in texts:
        assert text.startswith("mystyle, seen: ")
        said = text.removeprefix("mystyle, seen: ").split()
        assert said
        assert set(said) <= set(WORDS)  # no special token is left
    again = write_caption_files(images, captioner, settings)
    assert not again.written
    assert len(again.kept) == 4


def test_florences_task_and_picture_change_what_is_said(florence: Path) -> None:
    model = load_captioner(CaptionSettings(model=str(florence)))
    inputs = model._processor(text="<CAPTION>", images=Image.new("RGB", (90, 40), "red"), return_tensors="pt")  # type: ignore[attr-defined]
    words = model._processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])  # type: ignore[attr-defined]
    assert words.count("<image>") == 5
    assert [w for w in words if w in WORDS] == "does the image describe".split()  # "What" is not in the vocabulary
    assert inputs["pixel_values"].shape == (1, 3, SIDE, SIDE)
    longest = load_captioner(CaptionSettings(model=str(florence), detail="longest"))
    picture = render(next(scenes(1, held_out=False)), "plain", 64)
    assert longest.caption(picture) != model.caption(picture)


def test_a_damaged_image_does_not_end_the_work(blip: Path, images: list[Path]) -> None:
    images[0].write_bytes(b"no picture")
    settings = CaptionSettings(model=str(blip))
    made = write_caption_files(images, load_captioner(settings), settings)
    assert list(made.failed) == [images[0]]
    assert len(made.written) == 3
    assert not images[0].with_suffix(".txt").exists()


def test_the_job_is_cancelled_between_images_and_goes_on_later(blip: Path, images: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "captions"
    arguments = {"images": [str(p) for p in images], "out": str(out), "model": str(blip), "device": "cpu"}
    done: list[int] = []
    with pytest.raises(JobStoppedError):
        run_job(
            "caption",
            arguments,
            progress=lambda what, n, total: done.append(n if what == "writing captions" else 0),
            should_stop=lambda: max(done, default=0) >= 1,
        )
    first = read_captions(images, out)
    assert first
    stamps = {p: caption_file(p, out).stat().st_mtime_ns for p in first}
    assert run_job("caption", arguments)["written"] == 4 - len(first)
    assert set(read_captions(images, out)) == set(images)
    assert {p: caption_file(p, out).stat().st_mtime_ns for p in first} == stamps
    assert not [p for p in images if p.with_suffix(".txt").exists()]


def test_an_edit_gets_captions_where_it_has_none_and_they_can_be_undone(
    blip: Path, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAPO_HOME", str(tmp_path / "home"))
    named = [PreferencePair(prompt="0", chosen=p, rejected=p, source="stem; prompt from the file name") for p in images]
    named[1] = PreferencePair(prompt="by hand", chosen=images[1], rejected=images[1], source="stem; prompt from 1.txt")
    editor = begin_edit(named, "x")
    count, failed = caption_edit(editor, {"model": str(blip), "trigger": "mystyle"})
    assert (count, failed) == (3, {})
    prompts = [e.pair.prompt for e in editor.entries]
    assert prompts[1] == "by hand"
    assert all(prompts[i].startswith("mystyle, ") for i in (0, 2, 3))
    assert not [p for p in images if p.with_suffix(".txt").exists()]
    assert caption_edit(editor, {"model": str(blip), "trigger": "mystyle"}) == (0, {})
    editor.undo()  # all of them are one step
    assert [e.pair.prompt for e in editor.entries] == ["0", "by hand", "0", "0"]


def test_a_missing_model_is_named_with_what_to_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAPO_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    for model in (FLORENCE, BLIP):
        with pytest.raises(MissingWeightsError) as error:
            load_captioner(CaptionSettings(model=model))
        folder = tmp_path / "models" / model.rpartition("/")[2].lower()
        assert f"hf download {model} " in str(error.value)
        assert f'--local-dir "{folder}"' in str(error.value)
        assert "--model FOLDER" in str(error.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingWeightsError, match=r"lacks config\.json"):
        load_captioner(CaptionSettings(model=str(tmp_path / "empty")))
    with pytest.raises(MissingWeightsError, match="There is no folder"):
        load_captioner(CaptionSettings(model=str(tmp_path / "nowhere")))


def test_other_models_are_refused_and_no_code_of_theirs_runs(blip: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    for path in blip.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "git"}))
    with pytest.raises(ModelError, match="not Florence-2 or BLIP"):
        load_captioner(CaptionSettings(model=str(folder)))
    (folder / "own.py").write_text("raise SystemExit(9)")
    own = {"model_type": "mine", "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"}}
    (folder / "config.json").write_text(json.dumps({**config, **own}))
    with pytest.raises(ModelError, match="cannot be read as a captioning model"):
        load_captioner(CaptionSettings(model=str(folder)))


def test_the_command(blip: Path, images: list[Path]) -> None:
    command = [sys.executable, "-m", "mapo_core", "pairs", "caption", str(images[0].parent), "--model", str(blip)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "4 captions written; 0 of 4" in done.stdout
    done = subprocess.run([*command[:-1], "Salesforce/none"], capture_output=True, text=True, check=False)
    assert "0 captions written; 4 of 4" in done.stdout  # nothing to do, so nothing is loaded
