"""Writes what ComfyUI shows of the nodes: the texts in locales/en/nodeDefs.json and the tables of the help pages.

.venv/bin/python scripts/node_docs.py

A help page is written by hand above its mark; a new node gets a page with its description to begin with.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LOCALE = ROOT / "locales" / "en" / "nodeDefs.json"
PAGES = ROOT / "web" / "comfyui" / "docs"
START = "<!-- Written by scripts/node_docs.py from the node's schema; edit what stands above. -->"

# Names of inputs where the id with spaces would not do; with its node where it means something else elsewhere.
NAMES = {
    "MaPOCheckpointSettings.every_steps": "save every (steps)",
    "MaPOExportSettings.precision": "precision of the file",
    "MaPOValidationSettings.every_steps": "measure every (steps)",
    "MaPOValidationSettings.sample_every_steps": "draw every (steps)",
    "MaPOValidationSettings.seed": "seed of the pictures",
    "betas": "Adam's betas",
    "bucket": "aspect ratio buckets",
    "cfg": "guidance (CFG)",
    "check_resolution": "resolution to check for",
    "clip": "CLIP",
    "clip_skip": "CLIP skip",
    "eps": "Adam's epsilon",
    "flip": "mirror at random",
    "held_out": "held-out share",
    "keep": "checkpoints to keep",
    "match": "match by",
    "max_aspect": "longest aspect ratio",
    "max_grad_norm": "clip gradients at",
    "max_nonfinite_steps": "stop after non-finite steps",
    "num_inference_steps": "sampling steps",
    "guidance_scale": "guidance (CFG)",
    "per_image": "rejected per chosen image",
    "if_stopped": "if it was stopped",
    "run_name": "run by name",
    "set_name": "name of the set",
    "vae": "VAE",
    "zero_terminal_snr": "zero terminal SNR",
}


def main() -> None:
    """Write the locale file and every help page."""
    from scripts.comfy_stand_in import schemas

    infos = schemas()
    LOCALE.parent.mkdir(parents=True, exist_ok=True)
    LOCALE.write_text(locale_text(infos), encoding="utf-8", newline="\n")
    PAGES.mkdir(parents=True, exist_ok=True)
    for node_id, info in infos.items():
        page = PAGES / f"{node_id}.md"
        before = page.read_text(encoding="utf-8") if page.exists() else f"# {info['display_name']}\n"
        page.write_text(page_text(before, info), encoding="utf-8", newline="\n")
    print(f"wrote {LOCALE} and {len(infos)} pages in {PAGES}")


def locale_text(infos: dict[str, dict[str, Any]]) -> str:
    """The texts of all nodes as ComfyUI reads them."""
    return json.dumps({name: texts(info) for name, info in infos.items()}, indent=2, ensure_ascii=False) + "\n"


def texts(info: dict[str, Any]) -> dict[str, Any]:
    """The texts of one node."""
    return {
        "display_name": info["display_name"],
        "description": info["description"],
        "inputs": {
            name: {"name": title(info["name"], name), "tooltip": spec[1]["tooltip"]}
            for name, spec in inputs(info).items()
        },
        "outputs": {str(i): {"name": name} for i, name in enumerate(info["output_name"])},
    }


def inputs(info: dict[str, Any]) -> dict[str, list[Any]]:
    """All inputs, the required ones first, as the node shows them."""
    return {**info["input"]["required"], **info["input"].get("optional", {})}


def title(node_id: str, name: str) -> str:
    """What a person reads for an input's id."""
    for known in (f"{node_id}.{name}", name):
        if known in NAMES:
            return NAMES[known]
    for start, words in (("drop_", "drop: "), ("targets_", "LoRA on: ")):
        if name.startswith(start):
            return words + name.removeprefix(start).replace("_", " ")
    return name.replace("_", " ")


def page_text(page: str, info: dict[str, Any]) -> str:
    """A help page with its tables made anew."""
    opening = page.split(START)[0].strip()
    if opening == f"# {info['display_name']}":
        opening += f"\n\n{info['description']}"
    optional = info["input"].get("optional", {})
    rows = [
        f"- **{title(info['name'], name)}** ({values(spec, name in optional)}): {spec[1]['tooltip']}"
        for name, spec in inputs(info).items()
    ]
    parts = [f"{opening}\n\n{START}\n"]
    if rows:
        parts.append("## Inputs\n\n" + "\n".join(rows) + "\n")
    outputs = [f"- **{name}** ({kind(type_)})" for name, type_ in zip(info["output_name"], info["output"], strict=True)]
    parts.append("## Outputs\n\n" + "\n".join(outputs) + "\n")
    return "\n".join(parts)


def values(spec: list[Any], optional: bool) -> str:
    """What an input takes, in words."""
    type_, options = spec
    default = options.get("default")
    if type_ == "COMBO":
        listed = options["options"]
        own = name_of_list(listed)
        return own or ", ".join(f"{o} (default)" if o == default else str(o) for o in listed)
    if type_ == "BOOLEAN":
        return f"on or off; default {'on' if default else 'off'}"
    if type_ in ("INT", "FLOAT"):
        words = "whole number" if type_ == "INT" else "number"
        low, high = options["min"], options["max"]
        return f"{words}, {number(low)} to {number(high)}; default {number(default)}"
    if type_ == "STRING":
        words = "lines of text" if options.get("multiline") else "text"
        return f"{words}; default {default}" if default else words
    return f"{kind(type_)}, optional" if optional else kind(type_)


def name_of_list(listed: list[str]) -> str | None:
    """What a list holds that depends on the machine."""
    if "newest" in listed:
        return "newest (default), or one of your runs"
    if "demo (built in)" in listed:
        first = f"{listed[0]} (default)" if listed[0] != "demo (built in)" else ""
        return ", ".join(filter(None, [first, "demo (built in)", "or one of your checkpoints"]))
    return None


def kind(type_: str) -> str:
    """A type of links in words."""
    ours = {"MAPO_PAIRS": "pairs", "MAPO_SETTINGS": "settings", "MAPO_RUN": "run", "*": "LoRA name"}
    return ours.get(type_, type_)


def number(value: float) -> str:
    """A number as a person writes it."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e6:
        return str(int(value))
    if isinstance(value, int) and value == 2**53 - 1:
        return "2^53 - 1"
    return f"{value:g}" if isinstance(value, float) else str(value)


def cell(text: str) -> str:
    """Text that does not end its table cell."""
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
