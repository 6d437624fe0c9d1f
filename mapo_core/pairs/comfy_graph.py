"""The prompt in a ComfyUI graph: from the node that saves the image back to the texts that made it.

A graph is ComfyUI's API format, {node id: {"class_type": ..., "inputs": {name: value or [node id, output]}}}; the
format of the user interface (`workflow`) is first brought to that form.
"""

from __future__ import annotations

import re
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

Graph = dict[str, dict[str, Any]]
Link = tuple[str, int]  # (node id, output)

# Inputs that hold the text of an encoder, by preference. Encoders with several (SDXL, SD3) get all of one group.
_TEXT_INPUTS = (
    ("text",),
    ("populated_text",),
    ("t5xxl",),
    ("text_g", "text_l"),
    ("clip_g", "clip_l"),
    ("prompt",),
    ("user_prompt",),
)
_STRING_INPUTS = ("value", "string", "text", "prompt", "populated_text", "Text", "String", "positive")
_STRING_PARTS = re.compile(r"(text|string|str|prompt)_?([a-z]|\d+)", re.IGNORECASE)
_NOT_CONDITIONING = re.compile(
    r"(model|clip|vae|image|pixels|mask|control_?net|latent|style|seed|noise)", re.IGNORECASE
)
_PASSIVE, _BYPASSED = 2, 4  # node modes of the user interface
_SEED_CONTROL = ("fixed", "increment", "decrement", "randomize")
# Names of positional widget values, for saved workflows of older front ends, which do not name them.
_WIDGETS = {
    "CLIPTextEncode": ("text",),
    "CLIPTextEncodeSDXL": ("width", "height", "crop_w", "crop_h", "target_width", "target_height", "text_g", "text_l"),
    "KSampler": ("seed", "steps", "cfg", "sampler_name", "scheduler", "denoise"),
    "KSamplerAdvanced": ("add_noise", "noise_seed", "steps", "cfg"),
    "SamplerCustom": ("add_noise", "noise_seed", "cfg"),
    "RandomNoise": ("noise_seed",),
    "SaveImage": ("filename_prefix",),
}


class GraphPrompt(NamedTuple):
    """Texts as they stand in the graph."""

    positive: str
    negative: str
    seed: int | None


def prompt_of_graph(graph: dict[str, Any], file_name: str = "") -> GraphPrompt | None:
    """Prompt and seed of the image that a graph saved; None where they cannot be found.

    Args:
        graph: API format.
        file_name: of the image; where several nodes save, the one with this file name prefix is meant.
    """
    nodes: Graph = {str(k): v for k, v in graph.items() if isinstance(v, dict) and isinstance(v.get("inputs"), dict)}
    for sampler in _samplers(nodes, file_name):
        positive = _prompt_of_sampler(nodes, sampler, "positive")
        if positive:
            return GraphPrompt(positive, _prompt_of_sampler(nodes, sampler, "negative"), _seed(nodes, sampler))
    return None


def graph_of_workflow(workflow: dict[str, Any]) -> Graph:
    """The user interface's format in API format, as far as prompts go; subgraphs are not opened."""
    nodes = {n["id"]: n for n in _dicts(workflow.get("nodes")) if isinstance(n.get("id"), int | str)}
    listed = workflow.get("links")
    entries = [e for e in listed if isinstance(e, list) and len(e) >= 5] if isinstance(listed, list) else []
    links = {e[0]: e for e in entries if all(isinstance(part, int | str) for part in e[:5])}
    graph: Graph = {}
    for key, node in nodes.items():
        if node.get("mode") in (_PASSIVE, _BYPASSED):
            continue
        inputs = _widget_values(node)
        for entry in _linked_inputs(node):
            if origin := _origin(nodes, links, entry["link"]):
                inputs[str(entry.get("name"))] = list(origin)
        graph[str(key)] = {"class_type": str(node.get("type")), "inputs": inputs}
    return graph


def _linked_inputs(node: dict[str, Any]) -> list[dict[str, Any]]:
    return [e for e in _dicts(node.get("inputs")) if isinstance(e.get("link"), int | str)]


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _origin(nodes: dict[Any, Any], links: dict[Any, list[Any]], link: Any) -> Link | None:
    """Where a link comes from; a bypassed node passes on its first input of the same type."""
    for _ in range(len(links) + 1):
        entry = links.get(link)
        node = nodes.get(entry[1]) if entry else None
        if entry is None or node is None or node.get("mode") == _PASSIVE:
            return None
        if node.get("mode") != _BYPASSED:
            return (str(entry[1]), entry[2]) if isinstance(entry[2], int) else None
        kind = entry[5] if len(entry) > 5 else None
        link = next((e["link"] for e in _linked_inputs(node) if e.get("type") == kind), None)
    return None


def _widget_values(node: dict[str, Any]) -> dict[str, Any]:
    values = node.get("widgets_values")
    if isinstance(values, dict):
        return dict(values)
    if not isinstance(values, list):
        return {}
    named = [e["widget"].get("name") for e in _dicts(node.get("inputs")) if isinstance(e.get("widget"), dict)]
    names = _WIDGETS.get(str(node.get("type"))) or named
    if len(names) == 0:
        text = next((v for v in values if isinstance(v, str)), None)
        return {} if text is None else {"text": text}
    settings: dict[str, Any] = {}
    left = deque(values)
    for name in names:
        if not left:
            break
        settings[str(name)] = left.popleft()
        if name in ("seed", "noise_seed") and left and left[0] in _SEED_CONTROL:
            left.popleft()
    return settings


def _link(value: Any) -> Link | None:
    if isinstance(value, list) and len(value) == 2 and isinstance(value[1], int):
        return str(value[0]), value[1]
    return None


def _links(node: dict[str, Any]) -> Iterator[tuple[str, Link]]:
    for name, value in node["inputs"].items():
        if link := _link(value):
            yield name, link


def _upstream(nodes: Graph, start: str) -> list[str]:
    """Nodes that `start` depends on, nearest first, itself included."""
    order, waiting = [start], deque([start])
    while waiting:
        for _, (key, _) in _links(nodes[waiting.popleft()]):
            if key in nodes and key not in order:
                order.append(key)
                waiting.append(key)
    return order


def _samplers(nodes: Graph, file_name: str) -> Iterator[str]:
    """Samplers, the likeliest to have made the image first.

    That is the nearest one before the saving node that works on latents; then one that works on images (upscalers and
    detailers carry prompts of their own), then a loader node that holds the prompt itself.
    """
    for save in _saving_nodes(nodes, file_name):
        before = _upstream(nodes, save)
        yield from (k for k in before if _samples(nodes[k]) and "image" not in nodes[k]["inputs"])
        yield from (k for k in before if _samples(nodes[k]) and "image" in nodes[k]["inputs"])
        yield from (k for k in before if isinstance(nodes[k]["inputs"].get("positive"), str))


def _samples(node: dict[str, Any]) -> bool:
    inputs = node["inputs"]
    if _link(inputs.get("guider")):
        return True
    return bool(_link(inputs.get("positive"))) and any(k in inputs for k in ("seed", "noise_seed", "latent_image"))


def _saving_nodes(nodes: Graph, file_name: str) -> list[str]:
    def rank(key: str) -> tuple[bool, bool, bool]:
        node = nodes[key]
        prefix = node["inputs"].get("filename_prefix")
        stem = re.split(r"[\\/]", prefix)[-1] if isinstance(prefix, str) else ""
        written = bool(stem) and file_name.startswith(stem)
        kind = str(node.get("class_type"))
        return not written, "save" not in kind.lower(), kind != "SaveImage"

    used = {link[0] for node in nodes.values() for _, link in _links(node)}
    ends = [k for k in nodes if k not in used or "save" in str(nodes[k].get("class_type")).lower()]
    return sorted(ends, key=rank)


def _prompt_of_sampler(nodes: Graph, sampler: str, role: str) -> str:
    inputs = nodes[sampler]["inputs"]
    value = inputs.get(role)
    guider = _link(inputs.get("guider"))
    if guider and guider[0] in nodes:
        held = nodes[guider[0]]["inputs"]
        names = ("positive", "conditioning", "cond1") if role == "positive" else ("negative",)
        value = next((held[name] for name in names if name in held), None)
    if isinstance(value, str):
        return value
    link = _link(value)
    return ", ".join(_unique(_conditioning(nodes, link, role, set()))) if link else ""


def _conditioning(nodes: Graph, link: Link, role: str, seen: set[str]) -> list[str]:
    """The texts that a conditioning is made of, through combining, area, ControlNet and passing nodes."""
    key, output = link
    if key not in nodes or key in seen or nodes[key].get("class_type") == "ConditioningZeroOut":
        return []
    seen.add(key)
    inputs = nodes[key]["inputs"]
    if isinstance(inputs.get(role), str):  # loaders that encode both prompts
        return [inputs[role]]
    if "positive" in inputs and "negative" in inputs:  # ControlNet and its like: in and out in the same order
        passed = _link(inputs["positive" if output == 0 else "negative"])
        return _conditioning(nodes, passed, role, seen) if passed else []
    texts = _encoded(nodes, inputs)
    if texts:
        return texts
    linked = list(_links(nodes[key]))
    conditionings = [e for n, e in linked if n.startswith(("conditioning", "cond", "positive"))]
    follow = conditionings or [e for n, e in linked if not _NOT_CONDITIONING.match(n)]
    return [text for e in follow for text in _conditioning(nodes, e, role, seen)]


def _encoded(nodes: Graph, inputs: dict[str, Any]) -> list[str]:
    for names in _TEXT_INPUTS:
        texts = [_string(nodes, inputs[name], set()) for name in names if name in inputs]
        if any(text.strip() for text in texts):
            return _unique(texts)
    return []


def _string(nodes: Graph, value: Any, seen: set[str]) -> str:
    """A text, which may come from nodes that hold, join, switch or pass on strings; "" where it is not in the graph."""
    if isinstance(value, str):
        return value
    link = _link(value)
    if link is None or link[0] not in nodes or link[0] in seen:
        return ""
    seen = {*seen, link[0]}
    inputs = nodes[link[0]]["inputs"]
    for name in _STRING_INPUTS:
        if text := _string(nodes, inputs.get(name), seen):
            return text
    parts = [_string(nodes, inputs[name], seen) for name in sorted(inputs) if _STRING_PARTS.fullmatch(name)]
    if any(parts):
        separator = inputs.get("delimiter", inputs.get("separator", ", "))
        return (separator if isinstance(separator, str) else ", ").join(part for part in parts if part)
    passed = (_string(nodes, list(e), seen) for _, e in _links(nodes[link[0]]))
    return next((text for text in passed if text), "")


def _seed(nodes: Graph, sampler: str) -> int | None:
    """The seed of the noise; a sampler that adds none goes on from an earlier one's latents."""
    for key in _upstream(nodes, sampler):
        inputs = nodes[key]["inputs"]
        if not (_samples(nodes[key]) or key == sampler) or inputs.get("add_noise") in ("disable", False):
            continue
        noise = _link(inputs.get("noise"))
        if noise and noise[0] in nodes:
            inputs = nodes[noise[0]]["inputs"]
        for name in ("seed", "noise_seed"):
            seed = inputs.get(name)
            linked = _link(seed)
            if linked and linked[0] in nodes:
                held = nodes[linked[0]]["inputs"]
                seed = next((held[n] for n in ("seed", "value", "noise_seed", "int") if n in held), None)
            if isinstance(seed, int) and not isinstance(seed, bool):
                return seed
    return None


def _unique(texts: list[str]) -> list[str]:
    return list(dict.fromkeys(text.strip() for text in texts if text.strip()))
