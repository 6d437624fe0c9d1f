from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mapo_core.pairs import prompt_from_image
from mapo_core.pairs.comfy_graph import graph_of_workflow, prompt_of_graph
from mapo_core.pairs.metadata import decode_user_comment, parse_parameters

A1111 = (
    "a red fox, <lora:fur_detail:0.8> in\nthe snow\nNegative prompt: blurry,\nlow quality\n"
    "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 4091, Size: 512x512, Model: sd15, Version: v1.9"
)

Graph = dict[str, Any]


def save_png(path: Path, **fields: object) -> Path:
    info = PngInfo()
    for key, value in fields.items():
        info.add_text(key, value if isinstance(value, str) else json.dumps(value))
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


def node(kind: str, **inputs: object) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def basic(positive: object = "a red fox", **more: dict[str, Any]) -> Graph:
    """ComfyUI's default workflow as its API gets it."""
    return {
        "3": node(
            "KSampler", seed=42, steps=20, model=["4", 0], positive=["6", 0], negative=["7", 0], latent_image=["5", 0]
        ),
        "4": node("CheckpointLoaderSimple", ckpt_name="sd.safetensors"),
        "5": node("EmptyLatentImage", width=512, height=512, batch_size=1),
        "6": node("CLIPTextEncode", text=positive, clip=["4", 1]),
        "7": node("CLIPTextEncode", text="blurry", clip=["4", 1]),
        "8": node("VAEDecode", samples=["3", 0], vae=["4", 2]),
        "9": node("SaveImage", filename_prefix="ComfyUI", images=["8", 0]),
        **more,
    }


# --- A1111


def test_a1111_text_in_a_png(tmp_path: Path) -> None:
    found = prompt_from_image(save_png(tmp_path / "a.png", parameters=A1111))
    assert found == ("a red fox, in the snow", "blurry, low quality", 4091, "A1111 metadata")


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
@pytest.mark.parametrize("encoding", ["utf-16-be", "utf-16-le", "ascii"])
def test_a1111_text_in_exif(tmp_path: Path, suffix: str, encoding: str) -> None:
    text = A1111 if encoding == "ascii" else A1111.replace("fox", "Füchsin 狐")
    exif = Image.Exif()
    code = b"ASCII\0\0\0" if encoding == "ascii" else b"UNICODE\0"
    exif.get_ifd(0x8769)[0x9286] = code + text.encode(encoding)
    Image.new("RGB", (8, 8)).save(tmp_path / f"a.{suffix}", exif=exif)
    found = prompt_from_image(tmp_path / f"a.{suffix}")
    assert found is not None
    assert found.prompt == ("a red fox, in the snow" if encoding == "ascii" else "a red Füchsin 狐, in the snow")
    assert (found.negative, found.seed) == ("blurry, low quality", 4091)


def test_user_comments_of_every_code() -> None:
    assert decode_user_comment(b"UNICODE\0" + b"\xff\xfe" + "hi".encode("utf-16-le")) == "hi"
    assert decode_user_comment(b"\0" * 8 + b"hi\0") == "hi"
    assert decode_user_comment(b"just text") == "just text"


def test_the_comment_of_a_camera_is_no_prompt(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0Screenshot"
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", exif=exif)
    assert prompt_from_image(tmp_path / "a.jpg") is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a fox\nSteps: 20, Seed: 7", ("a fox", None, 7)),
        ("a fox", ("a fox", None, None)),
        ("a fox\r\nNegative prompt: dull\r\nSteps: 20, Seed: 7", ("a fox", "dull", 7)),
        ("two Steps: to heaven\nSteps: 5", ("two Steps: to heaven", None, None)),
        ("Negative prompt: dull\nSteps: 20", None),
        ("<lora:x:1>\nSteps: 20", None),
    ],
)
def test_a1111_forms(text: str, expected: tuple[str, str | None, int | None] | None) -> None:
    found = parse_parameters(text)
    assert (found[:3] if found else None) == expected


def test_json_under_parameters_is_no_a1111_text(tmp_path: Path) -> None:
    assert prompt_from_image(save_png(tmp_path / "a.png", parameters='{"sui_image_params": {"prompt": "x"}}')) is None


# --- ComfyUI


def test_the_default_graph(tmp_path: Path) -> None:
    found = prompt_from_image(save_png(tmp_path / "a.png", prompt=basic("a  red\nfox")))
    assert found == ("a red fox", "blurry", 42, "ComfyUI metadata")


def test_a1111_text_goes_before_a_graph(tmp_path: Path) -> None:
    found = prompt_from_image(save_png(tmp_path / "a.png", prompt=basic("from the graph"), parameters=A1111))
    assert found is not None
    assert found.source == "A1111 metadata"


def test_a_graph_in_exif_as_comfyui_writes_webp(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0110] = "prompt:" + json.dumps(basic("a fox: red"))
    exif[0x010F] = "workflow:{}"
    Image.new("RGB", (8, 8)).save(tmp_path / "a.webp", exif=exif)
    found = prompt_from_image(tmp_path / "a.webp")
    assert found is not None
    assert found.prompt == "a fox: red"


def test_text_from_a_string_node() -> None:
    found = prompt_of_graph(basic(["10", 0], **{"10": node("PrimitiveStringMultiline", value="a linked fox")}))
    assert found is not None
    assert found.positive == "a linked fox"


def test_text_through_nodes_that_join_and_show() -> None:
    graph = basic(
        ["10", 0],
        **{
            "10": node("ShowText|pysssss", text=["11", 0], text_0="shown the last time"),
            "11": node("StringConcatenate", string_a=["12", 0], string_b="in the snow", delimiter=" "),
            "12": node("Reroute", **{"": ["13", 0]}),
            "13": node("PrimitiveString", value="a fox"),
        },
    )
    found = prompt_of_graph(graph)
    assert found is not None
    assert found.positive == "a fox in the snow"


def test_text_that_is_not_in_the_graph_gives_no_prompt() -> None:
    assert prompt_of_graph(basic(["10", 0], **{"10": node("LLMChat", model="x", temperature=0.7)})) is None


def test_through_controlnet_and_combined_conditionings() -> None:
    graph = basic(
        **{
            "20": node(
                "ControlNetApplyAdvanced", positive=["21", 0], negative=["7", 0], control_net=["30", 0], image=["31", 0]
            ),
            "21": node("ConditioningCombine", conditioning_1=["6", 0], conditioning_2=["22", 0]),
            "22": node("ConditioningSetArea", conditioning=["23", 0], width=64),
            "23": node("CLIPTextEncode", text="a snowy wood", clip=["4", 1]),
        }
    )
    graph["3"]["inputs"] |= {"positive": ["20", 0], "negative": ["20", 1]}
    found = prompt_of_graph(graph)
    assert found == ("a red fox, a snowy wood", "blurry", 42)


def test_sdxl_encoder_with_two_texts() -> None:
    graph = basic()
    graph["6"] = node("CLIPTextEncodeSDXL", text_g="a fox", text_l="red fur", width=1024, clip=["4", 1])
    assert prompt_of_graph(graph) == ("a fox, red fur", "blurry", 42)
    graph["6"]["inputs"]["text_l"] = "a fox"
    assert prompt_of_graph(graph) == ("a fox", "blurry", 42)


def test_guider_noise_and_guidance_nodes() -> None:
    graph = {
        "1": node("SaveImage", filename_prefix="x", images=["2", 0]),
        "2": node("VAEDecode", samples=["3", 0]),
        "3": node("SamplerCustomAdvanced", noise=["4", 0], guider=["5", 0], latent_image=["9", 0]),
        "4": node("RandomNoise", noise_seed=99),
        "5": node("BasicGuider", model=["8", 0], conditioning=["6", 0]),
        "6": node("FluxGuidance", guidance=3.5, conditioning=["7", 0]),
        "7": node("CLIPTextEncodeFlux", clip_l="fox", t5xxl="a fox in the snow", guidance=3.5, clip=["8", 1]),
        "8": node("CheckpointLoaderSimple", ckpt_name="flux"),
        "9": node("EmptyLatentImage"),
    }
    assert prompt_of_graph(graph) == ("a fox in the snow", "", 99)
    graph["5"] = node("CFGGuider", model=["8", 0], positive=["6", 0], negative=["10", 0], cfg=3)
    graph["10"] = node("CLIPTextEncode", text="bad", clip=["8", 1])
    assert prompt_of_graph(graph) == ("a fox in the snow", "bad", 99)


def test_the_sampler_that_feeds_the_saved_image_is_meant() -> None:
    """Another sampler, a preview and a detailer with a prompt of its own stand in the same graph."""
    other = basic("an unrelated cat")
    graph = {f"1{key}": {**n, "inputs": {k: relink(v) for k, v in n["inputs"].items()}} for key, n in other.items()}
    graph["19"]["class_type"] = "PreviewImage"
    graph |= basic()
    graph["50"] = node(
        "FaceDetailer", image=["8", 0], seed=5, positive=["51", 0], negative=["7", 0], bbox_detector=["52", 0]
    )
    graph["51"] = node("CLIPTextEncode", text="a detailed face", clip=["4", 1])
    graph["9"]["inputs"]["images"] = ["50", 0]
    assert prompt_of_graph(graph) == ("a red fox", "blurry", 42)


def relink(value: object) -> object:
    return [f"1{value[0]}", value[1]] if isinstance(value, list) else value


def test_the_file_name_chooses_among_saving_nodes() -> None:
    first = basic("a fox")
    second = basic("a cat")
    graph = first | {
        f"1{k}": {**n, "inputs": {i: relink(v) for i, v in n["inputs"].items()}} for k, n in second.items()
    }
    graph["9"]["inputs"]["filename_prefix"] = "run/foxes"
    graph["19"]["inputs"]["filename_prefix"] = "run/cats"
    for name, prompt in (("foxes_00001_.png", "a fox"), ("cats_00002_.png", "a cat")):
        found = prompt_of_graph(graph, name)
        assert found is not None
        assert found.positive == prompt


def test_the_seed_is_of_the_sampler_that_adds_noise() -> None:
    graph = basic()
    graph["3"]["inputs"]["seed"] = ["11", 0]
    graph["11"] = node("Seed (rgthree)", seed=1234)
    graph["40"] = node(
        "KSamplerAdvanced",
        add_noise="disable",
        noise_seed=0,
        positive=["6", 0],
        negative=["7", 0],
        latent_image=["3", 0],
    )
    graph["8"]["inputs"]["samples"] = ["40", 0]
    assert prompt_of_graph(graph) == ("a red fox", "blurry", 1234)


def test_loaders_that_hold_both_prompts() -> None:
    graph = basic()
    graph["6"] = node("Efficient Loader", positive="a fox by a loader", negative="dull", clip_skip=-1)
    graph["3"]["inputs"] |= {"positive": ["6", 1], "negative": ["6", 2]}
    assert prompt_of_graph(graph) == ("a fox by a loader", "dull", 42)


def test_a_zeroed_negative_is_none(tmp_path: Path) -> None:
    graph = basic()
    graph["7"] = node("ConditioningZeroOut", conditioning=["6", 0])
    found = prompt_from_image(save_png(tmp_path / "a.png", prompt=graph))
    assert found is not None
    assert (found.prompt, found.negative) == ("a red fox", None)


def workflow() -> dict[str, Any]:
    """The same as `basic`, as the user interface stores it, with a bypassed ControlNet and a muted other end."""
    return {
        "nodes": [
            {"id": 1, "type": "SaveImage", "mode": 2, "widgets_values": ["ComfyUI"],
             "inputs": [{"name": "images", "type": "IMAGE", "link": 11}]},
            {"id": 14, "type": "KSampler", "mode": 0, "widgets_values": [1, "fixed"],
             "inputs": [{"name": "positive", "type": "CONDITIONING", "link": 12}]},
            {"id": 3, "type": "KSampler", "mode": 0, "widgets_values": [42, "randomize", 20, 7.0, "euler", "normal", 1],
             "inputs": [{"name": "positive", "type": "CONDITIONING", "link": 4},
                        {"name": "negative", "type": "CONDITIONING", "link": 6},
                        {"name": "latent_image", "type": "LATENT", "link": 2}]},
            {"id": 5, "type": "EmptyLatentImage", "mode": 0, "widgets_values": [512, 512, 1], "inputs": []},
            {"id": 6, "type": "CLIPTextEncode", "mode": 0, "widgets_values": ["a red fox"],
             "inputs": [{"name": "text", "type": "STRING", "link": 10, "widget": {"name": "text"}}]},
            {"id": 7, "type": "CLIPTextEncode", "mode": 0, "widgets_values": ["blurry"], "inputs": []},
            {"id": 8, "type": "VAEDecode", "mode": 0, "inputs": [{"name": "samples", "type": "LATENT", "link": 7}]},
            {"id": 9, "type": "SaveImage", "mode": 0, "widgets_values": ["ComfyUI"],
             "inputs": [{"name": "images", "type": "IMAGE", "link": 9}]},
            {"id": 12, "type": "ControlNetApply", "mode": 4, "widgets_values": [1.0],
             "inputs": [{"name": "image", "type": "IMAGE", "link": None},
                        {"name": "conditioning", "type": "CONDITIONING", "link": 5}]},
            {"id": 13, "type": "PrimitiveNode", "mode": 0, "widgets_values": ["a fox from a primitive", "fixed"]},
        ],
        "links": [
            [2, 5, 0, 3, 3, "LATENT"], [4, 12, 0, 3, 1, "CONDITIONING"], [5, 6, 0, 12, 0, "CONDITIONING"],
            [6, 7, 0, 3, 2, "CONDITIONING"], [7, 3, 0, 8, 0, "LATENT"], [9, 8, 0, 9, 0, "IMAGE"],
            [10, 13, 0, 6, 1, "STRING"], [11, 14, 0, 1, 0, "IMAGE"], [12, 7, 0, 14, 0, "CONDITIONING"],
        ],
    }  # fmt: skip


def test_a_workflow_without_the_api_graph(tmp_path: Path) -> None:
    found = prompt_from_image(save_png(tmp_path / "a.png", workflow=workflow()))
    assert found == ("a fox from a primitive", "blurry", 42, "ComfyUI metadata")


def test_a_graph_that_leads_nowhere_falls_back_on_the_workflow(tmp_path: Path) -> None:
    found = prompt_from_image(save_png(tmp_path / "a.png", prompt={"1": node("LoadImage")}, workflow=workflow()))
    assert found is not None
    assert found.prompt == "a fox from a primitive"


def test_circles_end() -> None:
    graph = basic(["10", 0], **{"10": node("Reroute", **{"": ["11", 0]}), "11": node("Reroute", **{"": ["10", 0]})})
    assert prompt_of_graph(graph) is None
    graph["3"]["inputs"]["positive"] = ["20", 0]
    graph["20"] = node("ConditioningCombine", conditioning_1=["20", 0], conditioning_2=["21", 0])
    graph["21"] = node("ConditioningConcat", conditioning_to=["20", 0], conditioning_from=["7", 0])
    assert prompt_of_graph(graph) == ("blurry", "blurry", 42)


def test_broken_metadata_never_raise(tmp_path: Path) -> None:
    """Whatever stands in the JSON: every value of both formats is replaced by something else, many times."""
    rng = random.Random(0)
    odd = [None, 3, "x", [], {}, [[]], ["6", 0], ["6", "0"], [None, 0], [["a"], 0], True, {"link": []}, 1e400]

    def spoil(value: Any) -> Any:
        if rng.random() < 0.06:
            return rng.choice(odd)
        if isinstance(value, dict):
            return {k: spoil(v) for k, v in value.items()}
        return [spoil(v) for v in value] if isinstance(value, list) else value

    for _ in range(400):
        for graph in (spoil(basic(["10", 0], **{"10": node("X", text_a="a", text_b=["6", 0])})), workflow()):
            if isinstance(graph, dict):
                prompt_of_graph(graph, "a.png")
                prompt_of_graph(graph_of_workflow(spoil_dict(graph, spoil)), "a.png")
    for text in ("{", "[]", "null", "[" * 5000):
        assert prompt_from_image(save_png(tmp_path / "a.png", prompt=text, workflow=text)) is None


def spoil_dict(value: dict[str, Any], spoil: Any) -> dict[str, Any]:
    return {k: spoil(v) for k, v in value.items()}


def test_images_without_a_prompt(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("no image")
    for name in ("plain.png", "text.png", "missing.png"):
        assert prompt_from_image(tmp_path / name) is None
