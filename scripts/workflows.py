"""Writes the example workflows, workflows/*.json, from the schemas of the nodes, so that every widget has its place.

.venv/bin/python scripts/workflows.py
"""

from __future__ import annotations

import itertools
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "workflows"

SDXL, SD15 = "sd_xl_base_1.0.safetensors", "v1-5-pruned-emaonly-fp16.safetensors"
DEMO = "demo (built in)"


# --- ComfyUI's own nodes, as far as the workflows use them -----------------------------------------------------------


def _node(outputs: str, **inputs: Any) -> dict[str, Any]:
    """A schema like that of /object_info; an input is a type of links, or a pair of widget type and default."""
    required = {
        name: [spec, {}] if isinstance(spec, str) else [spec[0], {"default": spec[1]}] for name, spec in inputs.items()
    }
    return {"input": {"required": required}, "output": outputs.split(), "output_name": outputs.split()}


STOCK = {
    "CheckpointLoaderSimple": _node("MODEL CLIP VAE", ckpt_name=("COMBO", "")),
    "LoraLoader": _node(
        "MODEL CLIP",
        model="MODEL",
        clip="CLIP",
        lora_name=("COMBO", ""),
        strength_model=("FLOAT", 1.0),
        strength_clip=("FLOAT", 1.0),
    ),
    "CLIPTextEncode": _node("CONDITIONING", text=("STRING", ""), clip="CLIP"),
    "EmptyLatentImage": _node("LATENT", width=("INT", 512), height=("INT", 512), batch_size=("INT", 1)),
    "KSampler": _node(
        "LATENT",
        model="MODEL",
        seed=("INT", 0),
        steps=("INT", 20),
        cfg=("FLOAT", 8.0),
        sampler_name=("COMBO", "euler"),
        scheduler=("COMBO", "normal"),
        positive="CONDITIONING",
        negative="CONDITIONING",
        latent_image="LATENT",
        denoise=("FLOAT", 1.0),
    ),
    "VAEDecode": _node("IMAGE", samples="LATENT", vae="VAE"),
    "PreviewImage": _node("", images="IMAGE"),
}
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
# The page adds a widget after these, which says whether the value changes by itself.
CONTROLLED = {("KSampler", "seed"): "fixed"}


# --- drawing up a workflow -------------------------------------------------------------------------------------------


@dataclass
class Link:
    """An output of a node, to be linked."""

    node: Node
    output: str


@dataclass
class Node:
    """A node: its widgets' values, and the links to its inputs.

    Attributes:
        type: node id.
        given: input -> value, or the output that is linked to it.
        height: of the node, pixels; 0 lets it be what the widgets need.
        title: in place of the node's name.
    """

    type: str
    given: dict[str, Any] = field(default_factory=dict)
    height: int = 0
    title: str = ""
    id: int = 0

    def out(self, output: str) -> Link:
        """One of its outputs."""
        return Link(self, output)


@dataclass
class Column:
    """Nodes below each other, in a frame with a title."""

    title: str
    nodes: list[Node]
    width: int = 340


def note(text: str, height: int = 420) -> Node:
    """A note on the canvas; the page would show the line ends of a paragraph."""
    unwrapped = re.sub(r"(?<!\n)\n(?!\n|#|\d\. |\*\*)", " ", text)
    return Node("MarkdownNote", {"text": unwrapped}, height, title="Read me")


GAP, FRAME, TITLE = 40, 20, 34  # between nodes; from a frame to what it holds; height of a node's title


def drawn(columns: list[Column], infos: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The workflow as the page saves it: columns from left to right, each with its frame."""
    nodes = [node for column in columns for node in column.nodes]
    for number, node in enumerate(nodes, start=1):
        node.id = number
    links = _links(nodes, infos)
    saved, frames = [], []
    x = 0
    for column in columns:
        y = 0
        for node in column.nodes:
            height = node.height or _height(node, infos)
            saved.append(_saved(node, [x, y], [column.width, height], links, infos))
            y += height + TITLE + GAP
        if column.title:
            bounds = [
                x - FRAME,
                -TITLE - FRAME - 40,
                column.width + 2 * FRAME,
                y - GAP - TITLE + TITLE + 40 + 2 * FRAME,
            ]
            frames.append({"id": len(frames) + 1, "title": column.title, "bounding": bounds, "color": "#3f789e"})
        x += column.width + 2 * FRAME + GAP
    return {
        "last_node_id": len(nodes),
        "last_link_id": len(links),
        "nodes": saved,
        "links": links,
        "groups": [{**frame, "font_size": 24, "flags": {}} for frame in frames],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def specs(node_type: str, infos: dict[str, dict[str, Any]]) -> dict[str, list[Any]]:
    """The inputs of a node, in order."""
    if node_type == "MarkdownNote":
        return {}
    inputs = infos[node_type]["input"]
    return {**inputs["required"], **inputs.get("optional", {})}


def widget_values(node: Node, infos: dict[str, dict[str, Any]]) -> list[Any]:
    """What stands in the widgets, in their order; a linked one keeps its default."""
    if node.type == "MarkdownNote":
        return [node.given["text"]]
    values = []
    for name, (type_, options) in specs(node.type, infos).items():
        if type_ in WIDGETS:
            given = node.given.get(name, options.get("default", ""))
            values.append(options.get("default", "") if isinstance(given, Link) else given)
            if control := CONTROLLED.get((node.type, name)):
                values.append(control)
    return values


def _links(nodes: list[Node], infos: dict[str, dict[str, Any]]) -> list[list[Any]]:
    links = []
    for node in nodes:
        known = specs(node.type, infos)
        for slot, name in enumerate(known):
            given = node.given.get(name)
            if isinstance(given, Link):
                info = infos[given.node.type]
                source = info["output_name"].index(given.output)
                links.append([len(links) + 1, given.node.id, source, node.id, slot, info["output"][source]])
        unknown = set(node.given) - set(known) - {"text"}
        if unknown:
            raise KeyError(f"{node.type} has no {', '.join(sorted(unknown))}")
    return links


def _saved(
    node: Node, place: list[int], size: list[int], links: list[list[Any]], infos: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    inputs = [
        {
            "name": name,
            "type": type_,
            "link": next((link[0] for link in links if link[3:5] == [node.id, slot]), None),
            **({"widget": {"name": name}} if type_ in WIDGETS else {}),
            **({"shape": 7} if name in infos[node.type]["input"].get("optional", {}) else {}),
        }
        for slot, (name, (type_, _)) in enumerate(specs(node.type, infos).items())
    ]
    info = infos.get(node.type, {"output": [], "output_name": []})
    outputs = [
        {"name": name, "type": type_, "links": [link[0] for link in links if link[1:3] == [node.id, slot]] or None}
        for slot, (name, type_) in enumerate(zip(info["output_name"], info["output"], strict=True))
    ]
    looks = {"color": "#432", "bgcolor": "#653"} if node.type == "MarkdownNote" else {}
    return {
        "id": node.id,
        "type": node.type,
        "pos": place,
        "size": size,
        "flags": {},
        "order": node.id - 1,
        "mode": 0,
        "inputs": inputs,
        "outputs": outputs,
        **({"title": node.title} if node.title else {}),
        "properties": {} if node.type == "MarkdownNote" else {"Node name for S&R": node.type},
        "widgets_values": widget_values(node, infos),
        **looks,
    }


def _height(node: Node, infos: dict[str, dict[str, Any]]) -> int:
    """What the page needs for slots and widgets; generous, because the newer page draws them larger."""
    inputs = specs(node.type, infos)
    sockets = sum(type_ not in WIDGETS for type_, _ in inputs.values())
    lines = sum(
        bool(o.get("multiline")) or (node.type, n) == ("CLIPTextEncode", "text") for n, (_, o) in inputs.items()
    )
    widgets = len(inputs) - sockets + sum(1 for kind, _ in CONTROLLED if kind == node.type)
    return 24 * max(sockets, len(infos[node.type]["output"])) + 32 * widgets + 80 * lines + 20


# --- pieces that several workflows have ------------------------------------------------------------------------------


def training(values: dict[str, Any], memory: dict[str, Any], *more: Node) -> list[Node]:
    """Settings nodes, chained; the last one holds all."""
    nodes = [Node("MaPOTrainingSettings", values), Node("MaPOMemorySettings", memory), *more]
    for before, after in itertools.pairwise(nodes):
        after.given["settings"] = before.out("settings")
    return nodes


def train(checkpoint: str, name: str, pairs: Link, settings: Link) -> Node:
    """The trainer, with room for its curves and pictures."""
    given = {"checkpoint": checkpoint, "name": name, "pairs": pairs, "settings": settings}
    return Node("MaPOTrainLoRA", given, height=860)


def sheet_of(compare: Node) -> Node:
    """The comparison, large."""
    return Node("PreviewImage", {"images": compare.out("sheet")}, height=440, title="Comparison")


def with_and_without(
    checkpoint: str, lora: Node, prompt: str, side: int, cfg: float, labels: tuple[str, str]
) -> list[Column]:
    """Two pictures of one seed: by the model as it is, and by the model with a LoRA; the loader comes as it is."""
    loader = Node("CheckpointLoaderSimple", {"ckpt_name": checkpoint})
    lora.given |= {"model": loader.out("MODEL"), "clip": loader.out("CLIP")}
    positive = Node("CLIPTextEncode", {"clip": loader.out("CLIP"), "text": prompt}, title="Prompt")
    negative = Node("CLIPTextEncode", {"clip": loader.out("CLIP"), "text": ""}, title="Negative prompt")
    latent = Node("EmptyLatentImage", {"width": side, "height": side})
    samplers, pictures = [], []
    for model, label in zip((loader.out("MODEL"), lora.out("MODEL")), labels, strict=True):
        sampler = Node(
            "KSampler",
            {
                "model": model,
                "positive": positive.out("CONDITIONING"),
                "negative": negative.out("CONDITIONING"),
                "latent_image": latent.out("LATENT"),
                "seed": 1,
                "steps": 25,
                "cfg": cfg,
            },
            title=label,
        )
        decode = Node("VAEDecode", {"samples": sampler.out("LATENT"), "vae": loader.out("VAE")})
        samplers += [sampler, decode]
        pictures.append(Node("PreviewImage", {"images": decode.out("IMAGE")}, height=420, title=label))
    return [
        Column("4 Use the LoRA", [loader, lora, positive, negative, latent], 320),
        Column("Same seed, without and with it", samplers, 300),
        Column("Pictures", pictures, 420),
    ]


RECIPES = """**Recipes.** The authors of MaPO publish for SDXL: rank 8, learning rate 1e-5, 16 pairs a step, 2000 steps.
For styles, people who train LoRAs commonly use rank 16, a learning rate of 1e-4 and 1500 to 3000 images shown.
Published and common, but **not measured by us** on full-size models; look at the pictures and the held-out accuracy."""


# --- the workflows ---------------------------------------------------------------------------------------------------


def demo() -> list[Column]:
    """The built-in model, on any machine."""
    model = Node("MaPODemoModel", {"style": "cartoon", "steps": 400}, height=560)
    trainer = train(DEMO, "demo style", model.out("pairs"), model.out("settings"))
    prompts = (
        "a red star on the left, blue background\na big orange tree, purple background\n"
        "a pink house above a green heart, yellow background"
    )
    compare = Node(
        "MaPOCompare",
        {"run": trainer.out("run"), "strengths": "0.5, 1.0", "checkpoints": "best", "prompts": prompts},
        height=860,
    )
    report = Node("MaPORunReport", {"run": trainer.out("run")}, height=860)
    read_me = note(
        """# Demo: a style LoRA in minutes

**Press Run.** Nothing is downloaded and no GPU is needed: a small model (64 x 64 pixels) comes with the pack.

1. *Demo Model* draws 160 pairs: a cartoon picture (chosen) and the plain picture of the same prompt (rejected).
2. *Train LoRA* trains 400 steps and shows its curves. **Cancel** keeps what is there; Run goes on from it.
3. *Compare* draws the same prompts and seeds without and with the LoRA; *Run Report* sums up.

What to see: the **margin** rises, and the lower rows of the sheet have dark outlines.

Run again: nothing is trained twice. Change the style or the steps, and it is another training.

The LoRA lies in your loras folder under **mapo/**. It fits the built-in model only.
Next: the template *2 Style LoRA from one folder*.""",
        560,
    )
    return [
        Column("1 Pairs and settings", [read_me, model], 420),
        Column("2 Train", [trainer], 420),
        Column("3 Compare", [compare], 460),
        Column("4 Report", [report], 460),
    ]


def style() -> list[Column]:
    """SDXL, from one folder."""
    settings = training(
        {"rank": 16, "learning_rate": 1e-4, "steps": 500},
        {"train_batch_size": 1, "gradient_accumulation_steps": 4},
        Node("MaPOExportSettings", {"trigger": "mystyle"}),
    )
    pairs = Node(
        "MaPOGenerateRejected",
        {
            "chosen": "my_style",
            "checkpoint": SDXL,
            "trigger": "mystyle",
            "settings": settings[-1].out("settings"),
        },
        height=720,
    )
    trainer = train(SDXL, "my style", pairs.out("pairs"), settings[-1].out("settings"))
    lora = Node("LoraLoader", {"lora_name": trainer.out("lora name")}, title="Load LoRA (the one just trained)")
    read_me = note(
        f"""# Style LoRA from one folder (SDXL)

1. Put 15 to 50 pictures of the style into the folder **input/my_style** of ComfyUI. Beside each, a **.txt** file of the
same name says **what** is on it, without naming the style.
2. Choose your SDXL checkpoint in **three** nodes: *Generate Rejected*, *Train LoRA*, *Load Checkpoint*.
3. Press Run. The base model first draws a rejected picture for each of yours, then the training begins, then two
pictures of one seed show the difference.

**mystyle** is the trigger word; write it into your prompts.

{RECIPES}

Here: rank 16, learning rate 1e-4, 500 steps of 4 pairs. Too weak: more steps. Pictures fall apart: a smaller learning
rate, or a lower strength in *Load LoRA*.""",
        720,
    )
    return [
        Column("", [read_me], 420),
        Column("1 Settings", settings, 340),
        Column("2 Rejected pictures", [pairs], 400),
        Column("3 Train", [trainer], 420),
        *with_and_without(
            SDXL, lora, "mystyle, a lighthouse on a cliff, evening", 1024, 6.0, ("Without the LoRA", "With the LoRA")
        ),
    ]


def folders() -> list[Column]:
    """SDXL, from two folders."""
    pairs = Node("MaPOPairsFromFolders", {"chosen": "good", "rejected": "bad"}, height=640)
    kept = Node("MaPOFilterPairs", {"pairs": pairs.out("pairs")}, height=760)
    settings = training({}, {})
    trainer = train(SDXL, "my preference", kept.out("pairs"), settings[-1].out("settings"))
    compare = Node("MaPOCompare", {"run": trainer.out("run"), "strengths": "0.5, 1.0"}, height=460)
    report = Node("MaPORunReport", {"run": trainer.out("run")}, height=900)
    read_me = note(
        f"""# Chosen and rejected folders (SDXL)

For pictures that come in twos: one you want more of, one you want less of, **of the same prompt**.

1. Put the good ones into **input/good** and the bad ones into **input/bad**, a pair under the same file name. Prompts
come from a **.txt** file beside the good picture, or from what ComfyUI wrote into it.
2. Choose your SDXL checkpoint in *Train LoRA*.
3. Press Run. *Filter Pairs* drops what is there twice; read its report before a long training.
4. *Compare* draws the validation prompts without and with the LoRA at two strengths.

{RECIPES}

Here: the published recipe, which is what the nodes begin with. A few hundred pairs are a sensible beginning.""",
        660,
    )
    return [
        Column("", [read_me], 420),
        Column("1 Pairs", [pairs, kept], 380),
        Column("2 Settings", settings, 340),
        Column("3 Train", [trainer], 420),
        Column("4 Compare", [compare, sheet_of(compare)], 460),
        Column("5 Report", [report], 460),
    ]


def low_memory() -> list[Column]:
    """SDXL, with the settings that need least."""
    settings = training(
        {"rank": 8, "learning_rate": 1e-4, "steps": 500, "resolution": 768},
        {
            "train_batch_size": 1,
            "gradient_accumulation_steps": 4,
            "gradient_checkpointing": "on",
            "optimizer": "adamw8bit",
            "cache_precision": "bf16",
        },
        Node("MaPOValidationSettings", {"sample_every_steps": 0, "width": 768, "height": 768}),
    )
    pairs = Node(
        "MaPOGenerateRejected",
        {"chosen": "my_style", "checkpoint": SDXL, "trigger": "mystyle", "settings": settings[-1].out("settings")},
        height=720,
    )
    trainer = train(SDXL, "my style", pairs.out("pairs"), settings[-1].out("settings"))
    report = Node("MaPORunReport", {"run": trainer.out("run")}, height=900)
    read_me = note(
        """# Low memory: towards 8 GB (SDXL)

The settings that need the least memory: one pair at a time, gradient checkpointing, an optimizer state of 8 bits, rank
8 on the attention layers, pictures of 768 pixels, and no validation pictures before the end.

**We have not measured** how much that needs on your card. If it ends for lack of memory:

1. Close what else uses the GPU (browser, games, other ComfyUIs).
2. *resolution* 640, then 512, in *Training Settings*.
3. Take SD 1.5: the template *5 SD 1.5*.

The report says how much memory the training used at most.

Pictures: a folder **input/my_style** with **.txt** files, as in the template *2 Style LoRA from one folder*. Choose
your SDXL checkpoint in *Generate Rejected* and in *Train LoRA*.

The 4 pairs of a step are shown one after the other, so more of them cost time, not memory.""",
        620,
    )
    return [
        Column("", [read_me], 420),
        Column("1 Settings that save memory", settings, 340),
        Column("2 Rejected pictures", [pairs], 400),
        Column("3 Train", [trainer], 420),
        Column("4 Report", [report], 460),
    ]


def sd15() -> list[Column]:
    """SD 1.5, from one folder."""
    settings = training(
        {"rank": 16, "learning_rate": 1e-4, "steps": 500, "resolution": 512},
        {"train_batch_size": 2, "gradient_accumulation_steps": 2},
    )
    pairs = Node(
        "MaPOGenerateRejected",
        {
            "chosen": "my_style",
            "checkpoint": SD15,
            "trigger": "mystyle",
            "cfg": 7.0,
            "settings": settings[-1].out("settings"),
        },
        height=720,
    )
    trainer = train(SD15, "my style sd15", pairs.out("pairs"), settings[-1].out("settings"))
    lora = Node("LoraLoader", {"lora_name": trainer.out("lora name")}, title="Load LoRA (the one just trained)")
    read_me = note(
        f"""# Style LoRA for SD 1.5

As the template for SDXL, for the smaller model: 512 pixels, two pairs at a time.

1. Pictures of the style into **input/my_style**, each with a **.txt** file that says what is on it.
2. Choose your SD 1.5 checkpoint in **three** nodes: *Generate Rejected*, *Train LoRA*, *Load Checkpoint*.
3. Press Run.

{RECIPES}

Here: rank 16, learning rate 1e-4, 500 steps of 4 pairs.""",
        520,
    )
    return [
        Column("", [read_me], 420),
        Column("1 Settings", settings, 340),
        Column("2 Rejected pictures", [pairs], 400),
        Column("3 Train", [trainer], 420),
        *with_and_without(
            SD15, lora, "mystyle, a lighthouse on a cliff, evening", 512, 7.0, ("Without the LoRA", "With the LoRA")
        ),
    ]


def checkpoints() -> list[Column]:
    """SDXL: go on after a stop, and choose among the states that were kept."""
    settings = training(
        {},
        {},
        Node("MaPOValidationSettings", {"every_steps": 250}),
        Node("MaPOCheckpointSettings", {"every_steps": 250, "keep": 8}),
    )
    pairs = Node("MaPOPairsFromFolders", {"chosen": "good", "rejected": "bad"}, height=640)
    trainer = train(SDXL, "my preference", pairs.out("pairs"), settings[-1].out("settings"))
    compare = Node(
        "MaPOCompare",
        {"run": trainer.out("run"), "strengths": "0.5, 0.75, 1.0", "checkpoints": "best, last"},
        height=460,
    )
    report = Node("MaPORunReport", {"run": trainer.out("run")}, height=900)
    columns = two_checkpoints(trainer)
    read_me = note(
        """# Continue, and compare checkpoints

A long training is stopped and taken up again, and the best of its states is not always the last.

1. **input/good** and **input/bad** as in template 3; your SDXL checkpoint in *Train LoRA* and in *Load Checkpoint*.
2. Press Run. **Cancel** whenever you like: the state is saved after the current step. **Run again**, with *if it
was stopped* at "go on", goes on from there. (More steps, or another setting, are another training.)
3. Every 250 steps a state is saved and the held-out pairs are measured; all eight are kept.
4. *Compare* shows best and last at three strengths; below, the same seed with either in ComfyUI's own sampler. Any kept
step can stand in place of **best** and **last**, for example **500**.

To look at an older training: take the link off *run* and choose one by name.

Defaults are the published recipe for SDXL, not measured by us.""",
        560,
    )
    return [
        Column("", [read_me], 420),
        Column("1 Pairs", [pairs], 380),
        Column("2 Settings", settings, 340),
        Column("3 Train, or continue", [trainer], 420),
        Column("4 Compare checkpoints", [compare, sheet_of(compare)], 460),
        Column("5 Report", [report], 460),
        *columns,
    ]


def two_checkpoints(trainer: Node) -> list[Column]:
    """The best and the last state, in ComfyUI's own sampler, same seed."""
    loader = Node("CheckpointLoaderSimple", {"ckpt_name": SDXL})
    positive = Node("CLIPTextEncode", {"clip": loader.out("CLIP"), "text": "a lighthouse on a cliff"}, title="Prompt")
    negative = Node("CLIPTextEncode", {"clip": loader.out("CLIP"), "text": ""}, title="Negative prompt")
    latent = Node("EmptyLatentImage", {"width": 1024, "height": 1024})
    loras, samplers, pictures = [], [], []
    for which in ("best", "last"):
        lora = Node(
            "MaPOLoadLoRA",
            {
                "model": loader.out("MODEL"),
                "clip": loader.out("CLIP"),
                "run": trainer.out("run"),
                "checkpoint": which,
            },
            title=f"Load MaPO LoRA: {which}",
        )
        sampler = Node(
            "KSampler",
            {
                "model": lora.out("model"),
                "positive": positive.out("CONDITIONING"),
                "negative": negative.out("CONDITIONING"),
                "latent_image": latent.out("LATENT"),
                "seed": 1,
                "steps": 25,
                "cfg": 6.0,
            },
            title=f"Sample: {which}",
        )
        decode = Node("VAEDecode", {"samples": sampler.out("LATENT"), "vae": loader.out("VAE")})
        loras.append(lora)
        samplers += [sampler, decode]
        pictures.append(Node("PreviewImage", {"images": decode.out("IMAGE")}, 420, title=which))
    return [
        Column("6 Best and last", [loader, positive, negative, latent, *loras], 340),
        Column("Same seed", samplers, 300),
        Column("Pictures", pictures, 420),
    ]


WORKFLOWS = {
    "1 Demo": demo,
    "2 Style LoRA from one folder (SDXL)": style,
    "3 Chosen and rejected folders (SDXL)": folders,
    "4 Low memory 8 GB (SDXL)": low_memory,
    "5 SD 1.5": sd15,
    "6 Continue and compare checkpoints": checkpoints,
}


def workflow_texts() -> dict[str, str]:
    """File name without its ending -> JSON."""
    from scripts.comfy_stand_in import schemas

    infos = {**STOCK, **schemas()}
    return {
        name: json.dumps(drawn(columns(), infos), indent=1, ensure_ascii=False) + "\n"
        for name, columns in WORKFLOWS.items()
    }


def main() -> None:
    """Write them all."""
    FOLDER.mkdir(exist_ok=True)
    for name, text in workflow_texts().items():
        (FOLDER / f"{name}.json").write_text(text, encoding="utf-8", newline="\n")
    print(f"wrote {len(WORKFLOWS)} workflows to {FOLDER}")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
