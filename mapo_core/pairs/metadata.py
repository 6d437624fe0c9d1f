"""The prompt an image was made with, as ComfyUI and A1111 write it into the file."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import PairsError
from .comfy_graph import graph_of_workflow, prompt_of_graph
from .images import open_header, read_exif

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image

_EXIF_IFD, _USER_COMMENT = 0x8769, 0x9286
_MAKE, _MODEL = 0x010F, 0x0110  # where ComfyUI puts workflow and prompt into WebP files
_NETWORKS = re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>")


class ImagePrompt(NamedTuple):
    """What an image says about its making.

    Attributes:
        prompt: the positive prompt, white space collapsed.
        negative: the negative prompt, if it is known and not empty.
        seed: the sampler's seed, if it is known.
        source: where it was found, for example "ComfyUI metadata".
    """

    prompt: str
    negative: str | None
    seed: int | None
    source: str


def prompt_from_image(path: Path) -> ImagePrompt | None:
    """Prompt, negative prompt and seed from the image's own metadata; None where there is no prompt.

    Read are A1111's text (PNG `parameters`; EXIF UserComment in JPEG, WebP and AVIF) and ComfyUI's graph (PNG `prompt`
    or `workflow`; EXIF Model and Make in WebP). A1111's text goes first: ComfyUI nodes that write it too put the final
    text there. `<lora:...>` tags are not part of the prompt.
    """
    try:
        with open_header(path) as image:
            fields = _text_fields(image)
    except PairsError:
        return None  # an unreadable file has no prompt either; that it is unreadable is for the linter to say
    return _from_a1111(fields) or _from_comfy(fields, path.name)


def parse_parameters(text: str) -> ImagePrompt | None:
    """A1111's infotext: the prompt, then "Negative prompt: ...", then "Steps: 20, ..., Seed: 1, ..."."""
    lines = text.replace("\r\n", "\n").split("\n")
    settings = next((i for i, line in enumerate(lines) if re.match(r"\s*Steps: \d+(,|$)", line)), len(lines))
    negative = next((i for i in range(settings) if lines[i].lstrip().startswith("Negative prompt:")), settings)
    prompt = collapse(_NETWORKS.sub("", "\n".join(lines[:negative])))
    if not prompt:
        return None
    unwanted = collapse("\n".join(lines[negative:settings]).lstrip().removeprefix("Negative prompt:"))
    seed = re.search(r"\bSeed: (\d+)", "\n".join(lines[settings:]))
    return ImagePrompt(prompt, unwanted or None, int(seed[1]) if seed else None, "A1111 metadata")


def collapse(text: str) -> str:
    """White space runs as one space; tokenizers see no difference."""
    return " ".join(text.split())


def _from_a1111(fields: dict[str, str]) -> ImagePrompt | None:
    parameters = fields.get("parameters", "")
    if parameters and not parameters.lstrip().startswith("{"):
        return parse_parameters(parameters)
    comment = fields.get("comment", "")
    # Cameras and phones write comments too ("Screenshot"): only A1111's own marks make it a prompt.
    return parse_parameters(comment) if re.search(r"^\s*(Steps: \d|Negative prompt:)", comment, re.MULTILINE) else None


def _from_comfy(fields: dict[str, str], file_name: str) -> ImagePrompt | None:
    for field in ("prompt", "workflow"):
        graph = _json_object(fields.get(field, ""))
        if field == "workflow":
            graph = graph_of_workflow(graph)
        found = prompt_of_graph(graph, file_name)
        if found and collapse(found.positive):
            negative = collapse(found.negative) or None
            return ImagePrompt(collapse(found.positive), negative, found.seed, "ComfyUI metadata")
    return None


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _text_fields(image: Image.Image) -> dict[str, str]:
    """`parameters`, `prompt`, `workflow` and `comment`, where the image has them."""
    fields = {k: v for k in ("parameters", "prompt", "workflow") if isinstance(v := image.info.get(k), str)}
    exif = read_exif(image)
    comment = exif.get_ifd(_EXIF_IFD).get(_USER_COMMENT)
    if isinstance(comment, bytes):
        fields["comment"] = decode_user_comment(comment)
    elif isinstance(comment, str):
        fields["comment"] = comment
    for tag in (_MAKE, _MODEL):
        name, _, value = str(exif.get(tag, "")).partition(":")
        if name in ("prompt", "workflow"):
            fields.setdefault(name, value.rstrip("\0"))
    return fields


def decode_user_comment(value: bytes) -> str:
    """EXIF UserComment: eight bytes that name the encoding, then the text.

    The standard leaves the byte order of "UNICODE" open; A1111 (by piexif) writes big endian, others little. The right
    one is that in which most characters are ASCII, for the names of the settings are.
    """
    code, text = value[:8], value[8:]
    if code.startswith(b"UNICODE"):
        texts = [text.decode(encoding, errors="replace") for encoding in ("utf-16-be", "utf-16-le")]
        return max(texts, key=lambda t: sum(c.isascii() for c in t)).strip("\0\ufeff")
    if code.startswith((b"ASCII", b"\0\0\0\0")):
        return text.decode("utf-8", errors="replace").strip("\0")
    return value.decode("utf-8", errors="replace").strip("\0")
