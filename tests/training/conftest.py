"""A tiny SDXL with random weights, a few drawn pairs, and runs on them, in process."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from mapo_core import build_config
from mapo_core.demo.scenes import render, scenes
from mapo_core.runs import EventWriter, RequestWatcher, RunDir, create_run
from mapo_core.trainer import train

VOCABULARY = Path(__file__).parents[2] / "mapo_core" / "families" / "assets" / "clip_tokenizer"
Run = Callable[..., RunDir]


@pytest.fixture(scope="module", autouse=True)
def _same_sums_in_the_same_order() -> Iterator[None]:
    """oneDNN chooses its convolution by the batch size; without it a sample's rounding errors are its own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.backends.mkldnn.flags(enabled=False):
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder with SDXL's classes, 32 pixels, some 0.3 M parameters beside the word embeddings."""
    folder = tmp_path_factory.mktemp("models") / "tiny-sdxl"
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(VOCABULARY, model_max_length=77)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 1],
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        cross_attention_dim=32,
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=8 * 6 + 16,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )
    pipe = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        text_encoder_2=CLIPTextModelWithProjection(text),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def drawn_pairs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Twelve pairs with scores: the same scene in neon and plainly; four of them are wide."""
    folder = tmp_path_factory.mktemp("pictures")
    records: list[dict[str, Any]] = []
    for i, scene in enumerate(itertools.islice(scenes(7, held_out=False), 12)):
        record: dict[str, Any] = {"prompt": scene.caption, "chosen_score": 22 + i / 6, "rejected_score": 20 - i / 12}
        for side, style in (("chosen", "neon"), ("rejected", "plain")):
            picture = render(scene, style, 48)
            path = folder / f"{side}-{i}.png"
            (picture.crop((0, 8, 48, 40)) if i % 3 == 0 else picture).save(path)
            record[side] = str(path)
        records.append(record)
    return records


@pytest.fixture(scope="session")
def shared_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One home for all runs of a session, so that images and prompts are encoded once."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def new_run(
    tiny_model: Path,
    drawn_pairs: list[dict[str, str]],
    shared_home: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Run:
    """Create a run; keyword arguments are groups of settings, `pairs` replaces the pair set.

    The caches are those of `shared_home`; the run lies in the test's own folder, so that no test takes another's name.
    """
    monkeypatch.setenv("MAPO_HOME", str(shared_home))

    def make(name: str = "run", pairs: list[dict[str, Any]] | None = None, **groups: Any) -> RunDir:
        values: dict[str, Any] = {
            "name": name,
            "model": {"path": str(tiny_model)},
            "data": {"pairs": "pairs.jsonl", "resolution": 32, "bucket_step": 8, "held_out": 0.2},
            "adapter": {"rank": 4, "targets": ["attention"]},
            "optimizer": {"type": "adamw", "learning_rate": 1e-3},
            "training": {
                "steps": 4,
                "train_batch_size": 2,
                "gradient_accumulation_steps": 2,
                "device": "cpu",
                "gradient_checkpointing": False,
            },
            "validation": {"every_steps": 0, "draws": 2, "sample_every_steps": 0, "num_inference_steps": 1},
            "checkpoint": {"every_steps": 0},
        }
        for group, fields in groups.items():
            values[group] = {**values.get(group, {}), **fields} if isinstance(fields, dict) else fields
        text = "".join(json.dumps(r) + "\n" for r in pairs or drawn_pairs)
        return create_run(name, build_config(values).to_json(), text, home=tmp_path)

    return make


def run_here(run: RunDir, before_training: Callable[[RunDir], None] | None = None) -> None:
    """Train in this process, as the child does."""
    AcceleratorState._reset_state(reset_partial_state=True)
    with EventWriter(run) as events, RequestWatcher(run) as watcher:
        newest = run.latest_checkpoint()
        events.emit("run_resumed" if newest else "run_started", int(newest.name[5:]) if newest else 0)
        if before_training is not None:
            before_training(run)
        train(run, events, watcher)


def lora_of(run: RunDir, step: int | None = None) -> dict[str, Tensor]:
    """The LoRA of a run's checkpoint."""
    path = run.latest_checkpoint() if step is None else run.checkpoint_path(step)
    assert path is not None
    return load_file(path / "lora.safetensors")


def relative_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest difference between two LoRAs, relative to the largest up weight: those start at zero, so it is what
    training has changed."""
    assert a.keys() == b.keys()
    learned = max(b[k].abs().max() for k in b if "lora_B" in k)
    assert learned > 0
    return (max((a[k] - b[k]).abs().max() for k in a) / learned).item()


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
