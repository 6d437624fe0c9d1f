"""The nodes in a real ComfyUI, over its API: training, reuse, cancel, kill, wrong inputs, and the stock loader."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mapo_core.runs import RunDir, is_same_process, read_events

from ..families.checkpoints import write_random_checkpoint
from .conftest import ROOT, Comfy

pytestmark = [pytest.mark.comfyui, pytest.mark.timeout(1200)]

Prompt = dict[str, Any]


def demo_prompt(name: str, steps: int, first: int = 1, **train: Any) -> Prompt:
    """Demo pairs into Train LoRA; node ids begin at `first`."""
    demo, trainer = str(first), str(first + 1)
    return {
        demo: {"class_type": "MaPODemoModel", "inputs": {"style": "cartoon", "steps": steps, "seed": 0}},
        trainer: {
            "class_type": "MaPOTrainLoRA",
            "inputs": {
                "checkpoint": "demo (built in)",
                "pairs": [demo, 0],
                "name": name,
                "seed": 0,
                "if_stopped": "go on",
                "settings": [demo, 1],
                **train,
            },
        },
    }


def wait_for_steps(run: RunDir, steps: int, timeout_s: float = 180.0) -> None:
    deadline = time.monotonic() + timeout_s
    while sum(e["type"] == "step" for e in read_events(run.events)) < steps:
        assert time.monotonic() < deadline, f"{run.path} did not train"
        time.sleep(0.1)


def process_of(run: RunDir) -> tuple[int, float | None]:
    start = next(e for e in reversed(read_events(run.events)) if e["type"] in ("run_started", "run_resumed"))
    return start["pid"], start["pid_started"]


def wait_gone(process: tuple[int, float | None], timeout_s: float) -> float:
    """Seconds until a process was gone."""
    began = time.monotonic()
    while is_same_process(*process):
        assert time.monotonic() - began < timeout_s, f"process {process[0]} is still there"
        time.sleep(0.05)
    return time.monotonic() - began


def test_every_node_is_offered_and_nothing_is_complained_of(comfy: Comfy) -> None:
    offered = {name for name in comfy.get("/object_info") if name.startswith("MaPO")}
    source = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "nodes").glob("*.py"))
    written = set(re.findall(r'"(MaPO[A-Z]\w+)"', source)) - {"MaPOMethod"}  # that one is only a beginning
    assert written <= offered
    assert not [line for line in comfy.log.splitlines() if "MaPO" in line and re.search(r"warn|error|fail", line, re.I)]
    assert "IMPORT FAILED" not in "".join(line for line in comfy.log.splitlines() if "MaPO" in line)


def test_the_demo_trains_and_the_same_request_is_not_trained_twice(comfy: Comfy) -> None:
    prompt = {
        **demo_prompt("end to end", 12),
        "3": {
            "class_type": "MaPOCompare",
            "inputs": {
                "run_name": "newest",
                "run": ["2", 2],
                "prompts": "a red circle\na blue house",
                "strengths": "0.5, 1",
                "checkpoints": "best",
                "seed": 0,
            },
        },
        "4": {"class_type": "MaPORunReport", "inputs": {"run_name": "newest", "run": ["2", 2]}},
        "5": {"class_type": "PreviewImage", "inputs": {"images": ["2", 3]}},
        "6": {"class_type": "PreviewImage", "inputs": {"images": ["2", 4]}},
    }
    outputs = comfy.run(prompt)
    assert outputs["2"]["mapo_run"] == ["end to end"]
    assert outputs["2"]["mapo_lora"] == [str(Path("mapo") / "end to end.safetensors")]
    lora = comfy.base / "models" / "loras" / "mapo" / "end to end.safetensors"
    assert lora.read_bytes() == (comfy.runs / "end to end" / "export" / "end to end.safetensors").read_bytes()
    assert "finished, step 12 of 12" in outputs["4"]["mapo_text"][0]
    sheet = Image.open(comfy.base / "temp" / outputs["3"]["images"][0]["filename"])
    assert sheet.height > 3 * 192  # base, strength 0.5, strength 1
    trained = (comfy.runs / "end to end" / "events.jsonl").stat().st_mtime_ns

    again = comfy.run(demo_prompt("end to end", 12, first=11))  # other node ids: nothing of it is in ComfyUI's cache
    assert again["12"]["mapo_run"] == ["end to end"]
    assert (comfy.runs / "end to end" / "events.jsonl").stat().st_mtime_ns == trained
    other = comfy.run(demo_prompt("end to end", 12, first=21, seed=1))
    assert other["22"]["mapo_run"] == ["end to end-2"]
    assert sorted(p.name for p in lora.parent.glob("end to end*")) == [
        "end to end-2.safetensors",
        "end to end.safetensors",
    ]


def test_cancel_keeps_a_lora_and_the_next_run_goes_on(comfy: Comfy) -> None:
    prompt_id = comfy.queue(demo_prompt("cancelled", 3000))
    run = RunDir(comfy.runs / "cancelled")
    wait_for_steps(run, 3)
    process = process_of(run)
    asked = time.time()
    comfy.post("/interrupt", {"prompt_id": prompt_id})
    entry = comfy.wait(prompt_id, 120)
    assert any(kind == "execution_interrupted" for kind, _ in entry["status"]["messages"])
    events = read_events(run.events)
    acknowledged = next(e["time"] for e in events if e["type"] == "phase" and e.get("phase") == "stopping")
    assert acknowledged - asked < 1.0
    assert events[-1]["type"] == "run_stopped"
    assert not is_same_process(*process)
    lora = comfy.base / "models" / "loras" / "mapo" / f"cancelled-{events[-1]['step']:08d}.safetensors"
    assert lora.read_bytes() == (run.export / "cancelled.safetensors").read_bytes()

    done = events[-1]["step"]
    prompt_id = comfy.queue(demo_prompt("cancelled", 3000))
    wait_for_steps(run, done + 2)
    comfy.post("/interrupt", {"prompt_id": prompt_id})
    comfy.wait(prompt_id, 120)
    assert [e["step"] for e in read_events(run.events) if e["type"] == "run_resumed"] == [done]


def test_killing_comfyui_leaves_no_process(start_comfy: Callable[..., Comfy]) -> None:
    comfy = start_comfy()
    comfy.queue(demo_prompt("orphan", 3000))
    run = RunDir(comfy.runs / "orphan")
    wait_for_steps(run, 2)
    process = process_of(run)
    os.kill(comfy.process.pid, signal.SIGKILL)
    comfy.process.wait()
    wait_gone(process, 30)
    assert (run.export / "orphan.safetensors").exists()  # the work is kept even so


def folders(comfy: Comfy, chosen: str, rejected: str) -> Prompt:
    inputs = {"match": "file name", "prompt": "", "trigger": "", "check_resolution": 64}
    return {"1": {"class_type": "MaPOPairsFromFolders", "inputs": {"chosen": chosen, "rejected": rejected, **inputs}}}


def test_wrong_inputs_are_explained(comfy: Comfy) -> None:
    (comfy.base / "input" / "empty").mkdir(exist_ok=True)
    for side, colour in (("good", "red"), ("bad", "blue")):
        (comfy.base / "input" / side).mkdir(exist_ok=True)
        Image.new("RGB", (64, 64), colour).save(comfy.base / "input" / side / f"{side}.png")
    broken = comfy.base / "models" / "checkpoints" / "broken.safetensors"
    broken.write_bytes(b"\x10\0\0\0\0\0\0\0{not json at all")

    assert "does not exist" in comfy.complaint(folders(comfy, "nowhere", "good"))
    assert "name a folder" in comfy.complaint(folders(comfy, "", "good"))
    assert "There are no images in" in comfy.complaint(folders(comfy, "empty", "good"))
    assert "No pair results" in comfy.complaint(folders(comfy, "good", "bad"))
    assert "cannot be a file name" in comfy.complaint(demo_prompt("../../evil", 2))
    assert "broken.safetensors" in comfy.complaint(demo_prompt("x", 2, checkpoint="broken.safetensors"))
    assert "no checkpoint" in comfy.complaint(demo_prompt("x", 2, checkpoint="gone.safetensors"))
    text = {"class_type": "MaPOSettingsText", "inputs": {"lines": "optimizer.learning_rat = 1"}}
    complaint = comfy.complaint({**demo_prompt("x", 2, settings=["9", 0]), "9": text})
    assert "learning_rate" in complaint


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_full_size_sd15_lora_loads_completely_in_the_stock_loader(comfy: Comfy) -> None:
    name = "random sd15.safetensors"
    write_random_checkpoint("sd15", comfy.base / "models" / "checkpoints" / name)
    settings = {
        "class_type": "MaPOSettingsText",
        "inputs": {
            "lines": "adapter.targets = attention,feed_forward,conv\noptimizer.learning_rate = 0.05\n"
            "training.steps = 2\ntraining.gradient_accumulation_steps = 1\ndata.resolution = 64\n"
            "validation.prompts = a star\nvalidation.num_inference_steps = 2"
        },
    }
    for number in range(4):
        for side, colour in (("sd chosen", (255, 60 * number, 0)), ("sd rejected", (0, 60 * number, 255))):
            (comfy.base / "input" / side).mkdir(exist_ok=True)
            picture = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
            Image.blend(picture, Image.new("RGB", (64, 64), colour), 0.7).save(
                comfy.base / "input" / side / f"a star {number}.png"
            )
    prompt = demo_prompt("full size", 2, checkpoint=name, settings=["9", 0])
    prompt["1"] = folders(comfy, "sd chosen", "sd rejected")["1"]
    prompt |= {
        "9": settings,
        "3": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": name}},
        "4": {
            "class_type": "LoraLoader",
            "inputs": {
                "model": ["3", 0],
                "clip": ["3", 1],
                "lora_name": ["2", 0],
                "strength_model": 1.0,
                "strength_clip": 1.0,
            },
        },
    }
    prompt |= sampled("with", ["4", 0], ["4", 1]) | sampled("without", ["3", 0], ["3", 1])
    prompt |= {
        "own": {
            "class_type": "MaPOLoadLoRA",
            "inputs": {
                "model": ["3", 0],
                "clip": ["3", 1],
                "run_name": "newest",
                "run": ["2", 2],
                "checkpoint": "best",
                "strength_model": 1.0,
                "strength_clip": 1.0,
            },
        },
        "drawn": {
            "class_type": "MaPOGenerateRejected",
            "inputs": {
                "chosen": "sd chosen",
                "checkpoint": "use the wired model",
                "prompt": "a star",
                "trigger": "",
                "per_image": 1,
                "steps": 1,
                "cfg": 1.0,
                "seed": 0,
                "model": ["3", 0],
                "clip": ["3", 1],
                "vae": ["3", 2],
                "settings": ["9", 0],
            },
        },
    }
    prompt |= sampled("own", ["own", 0], ["own", 1])
    outputs = comfy.run(prompt, timeout_s=1500)
    pictures = [
        Image.open(comfy.base / "temp" / outputs[f"{n} picture"]["images"][0]["filename"]).tobytes()
        for n in ("with", "without", "own")
    ]
    assert pictures[0] != pictures[1]
    assert pictures[0] == pictures[2]  # our loader and the stock one
    assert len(list((comfy.base / "output" / "mapo" / "rejected").glob("sd chosen*/*.png"))) == 4
    assert "not loaded" not in comfy.log
    assert json.loads((comfy.runs / "full size" / "config.json").read_text())["training"]["steps"] == 2


def sampled(name: str, model: list[Any], clip: list[Any]) -> Prompt:
    """A stock picture of 64 pixels, in two steps."""
    inputs = {"seed": 1, "steps": 2, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    return {
        f"{name} text": {"class_type": "CLIPTextEncode", "inputs": {"text": "a star", "clip": clip}},
        f"{name} size": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        f"{name} sampler": {
            "class_type": "KSampler",
            "inputs": {
                "model": model,
                "positive": [f"{name} text", 0],
                "negative": [f"{name} text", 0],
                "latent_image": [f"{name} size", 0],
                **inputs,
            },
        },
        f"{name} pixels": {"class_type": "VAEDecode", "inputs": {"samples": [f"{name} sampler", 0], "vae": ["3", 2]}},
        f"{name} picture": {"class_type": "PreviewImage", "inputs": {"images": [f"{name} pixels", 0]}},
    }


def test_the_other_nodes_work_on_the_demo_model(comfy: Comfy) -> None:
    """Pairs from images, join, split, filter, rejected images of the base model, mismatch, evaluation, settings."""
    images = comfy.base / "input" / "only chosen"
    images.mkdir(exist_ok=True)
    for number, colour in enumerate(("red", "green", "blue", "yellow")):
        picture = Image.new("RGB", (64, 64), "white")
        picture.paste(colour, (8 + 4 * number, 8, 40 + 4 * number, 40))
        picture.save(images / f"{number}.png")
        (images / f"{number}.txt").write_text(f"a {colour} square", encoding="utf-8")
    colours = {"width": 64, "height": 64, "batch_size": 2}
    prompt = {
        "red": {"class_type": "EmptyImage", "inputs": {**colours, "color": 0xFF0000}},
        "blue": {"class_type": "EmptyImage", "inputs": {**colours, "color": 0x0000FF}},
        "named": {
            "class_type": "MaPOPairsFromImages",
            "inputs": {"chosen": ["red", 0], "rejected": ["blue", 0], "prompts": "a square", "set_name": "votes"},
        },
        "made": {
            "class_type": "MaPOGenerateRejected",
            "inputs": {
                "chosen": "only chosen",
                "checkpoint": "demo (built in)",
                "prompt": "",
                "trigger": "",
                "per_image": 2,
                "steps": 4,
                "cfg": 3.0,
                "seed": 0,
            },
        },
        "joined": {"class_type": "MaPOJoinPairs", "inputs": {"pairs_1": ["named", 0], "pairs_2": ["made", 0]}},
        "split": {"class_type": "MaPOSplitPairs", "inputs": {"pairs": ["joined", 0], "share": 0.4, "seed": 0}},
        "kept": {
            "class_type": "MaPOFilterPairs",
            "inputs": {
                "pairs": ["split", 0],
                "drop_repeated": True,
                "drop_near_duplicates": False,
                "drop_nearly_identical": False,
                "drop_contradictory": False,
                "drop_low_resolution": False,
                "drop_much_cropped": False,
                "drop_without_prompt": True,
                "check_resolution": 64,
            },
        },
        "mismatch": {
            "class_type": "MaPOReferenceMismatch",
            "inputs": {
                "checkpoint": "demo (built in)",
                "pairs": ["made", 0],
                "count": 4,
                "steps": 4,
                "cfg": 3.0,
                "embedder": "auto",
            },
        },
        "text": {
            "class_type": "MaPOSettingsText",
            "inputs": {
                "lines": "training.steps = 3\noptimizer.learning_rate = 1e-3  # a comment\n"
                "adapter.targets = attention\nvalidation.num_inference_steps = 2\n"
                "training.gradient_accumulation_steps = 1"
            },
        },
        "train": {
            "class_type": "MaPOTrainLoRA",
            "inputs": {
                "checkpoint": "demo (built in)",
                "pairs": ["kept", 0],
                "name": "others",
                "seed": 3,
                "if_stopped": "go on",
                "settings": ["text", 0],
            },
        },
        "evaluate": {
            "class_type": "MaPOEvaluate",
            "inputs": {
                "run_name": "newest",
                "run": ["train", 2],
                "checkpoint": "last",
                "scorers": "auto",
                "prompts": "a red square\na blue circle",
                "count": 2,
                "seeds": 2,
            },
        },
    }
    outputs = comfy.run(prompt)
    assert "1 pairs added, 1 in the set" in outputs["named"]["mapo_text"][0]  # both pictures of the batch are the same
    assert len(list((comfy.base / "output" / "mapo" / "rejected").glob("only chosen*/*.png"))) == 8
    assert "Reference mismatch of demo" in outputs["mismatch"]["mapo_text"][0]
    assert "win rate" in outputs["evaluate"]["mapo_text"][0]
    config = json.loads((comfy.runs / "others" / "config.json").read_text(encoding="utf-8"))
    assert config["training"]["steps"] == 3
    assert config["optimizer"]["learning_rate"] == 1e-3
    assert config["seed"] == 3
