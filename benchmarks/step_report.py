"""The page of the step benchmark, out of whatever results there are."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mapo_core import build_config
from mapo_core.memory_plan import (
    GIB,
    PRESETS,
    Plan,
    budget_of,
    first_plan,
    next_rung,
    room_for,
)

HEAD = """# One training step

The engine's own step against the published recipe (VAE in float32 and both text encoders at every step, one joint
forward pass, 8-bit Adam, LoRA of rank 8, gradient checkpointing), SFT and Diffusion-DPO, with random weights.
`benchmarks/train_step.py` and its neighbours say exactly how; this page is written by `--report`.

"engine" keeps encoded images and prompts. The recipe computes activations twice (gradient checkpointing), as published;
the engine's rows say when it does. "All settings left alone" is what everybody gets: the engine's memory plan leaves
gradient checkpointing out where a step is predicted to fit without it, and puts it in where not. The goals are held
against that row where it was measured, else against the one without checkpointing.

All arms run in one process by turns; a ratio is the median over the rounds, with a bootstrap interval of 95 per cent.
"Share of the matmul rate" is what a pair needs in operations, none counted twice, per second, against the rate of large
square products of the same precision, measured in the same process.
"""

LEFT_ALONE = "engine, all settings left alone, against the recipe as published"

GOALS = (  # (goal, device, bound, whether to stay below it, name of the ratio)
    (
        "2.0 times the recipe's pairs per second, SDXL 1024 px",
        "cuda",
        2.0,
        False,
        "engine against the recipe as published",
    ),
    ("1.5 times the recipe's pairs per second on the CPU", "cpu", 1.5, False, "engine against the recipe as published"),
    (
        "MaPO at most 0.80 of our Diffusion-DPO's time",
        None,
        0.80,
        True,
        "MaPO's time as a share of Diffusion-DPO's, engine",
    ),
    ("split pairs at most 1.10 times SFT's peak memory", None, 1.10, True, "memory: split pairs against SFT"),
    ("a pair of SDXL 1024 px in at most 8 GB", "cuda", 8.0, True, "memory: least, GB"),
    ("a pair of SDXL 1024 px in at most 6 GB with nf4", "cuda", 6.0, True, "memory: nf4, GB"),
    ("0.35 of the bfloat16 matmul rate", "cuda", 0.35, False, "share of the matmul rate"),
)


def write_report(folder: Path, arms: dict[str, Any], ratios: dict[str, Any]) -> None:
    """train_step.md from the train_step_*.json beside it."""
    results = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("train_step_*_*.json"))]
    predicted = folder / "train_step_predicted.json"
    parts = [HEAD]
    for result in results:
        parts += section(result, arms, ratios)
    if predicted.exists():
        parts += prediction(json.loads(predicted.read_text(encoding="utf-8")))
    parts += goals(results, json.loads(predicted.read_text(encoding="utf-8")) if predicted.exists() else None)
    (folder / "train_step.md").write_text("\n".join(parts).rstrip() + "\n", encoding="utf-8")


def section(result: dict[str, Any], arms: dict[str, Any], ratios: dict[str, Any]) -> list[str]:
    """Everything about one run of the benchmark."""
    pairs = "a pair" if result["batch"] == 1 else f"{result['batch']} pairs"
    clock = {"wall": "", "process": ", times are the process's own"}[result["clock"]]
    lines = [
        f"## {result['size']}, {result['machine']}",
        "",
        f"    {result['command']}",
        "",
        f"{result['date']}, {pairs} a step at {result['resolution']} px, {result['precision']}{clock}; large products: "
        f"{result['matmul_per_s'] / 1e12:.3g} TFLOP/s.",
        *proportions(result),
        "",
        "| arm | s a step | pairs/s | share of the matmul rate | peak of a step beyond the weights, GB "
        "| peak in all, GB | largest batch |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in result["arms"].items():
        lines.append(arm_row(arms[name].title, found))
    lines += ["", "| ratio of times | median | 95 % |", "|---|---|---|"]
    for name in ratios:
        if name in result["ratios"]:
            r = result["ratios"][name]
            lines.append(f"| {name} | {r['median']:.2f} | {r['low']:.2f}-{r['high']:.2f} |")
    return [*lines, ""]


def arm_row(title: str, found: dict[str, Any]) -> str:
    """One arm's figures; a dash where one was not measured."""
    memory = found.get("memory") or {}
    cells = [
        number(found.get("median_s"), "{:.3g}"),
        number(found.get("pairs_per_s"), "{:.3g}"),
        number(found.get("share_of_matmul"), "{:.2f}"),
        number(memory.get("peak_live_bytes"), "{:.2f}", 1e9),
        number(memory.get("peak_step_bytes"), "{:.2f}", 1e9),
        number(found.get("largest_batch"), "{}"),
    ]
    return f"| {title} | {' | '.join(cells)} |"


def number(value: float | None, form: str, unit: float = 1) -> str:
    """The value in the form, or a dash."""
    return "-" if value is None else form.format(value if unit == 1 else value / unit)


def proportions(result: dict[str, Any]) -> list[str]:
    """How the reduced model's parts stand to each other, beside the full one's."""
    if not result["operations"]:
        return []

    def shares(o: dict[str, int]) -> str:
        unit = o["unet_forward"]
        return (
            f"UNet backward {o['unet_backward'] / unit:.2f}, VAE {o['vae'] / unit:.2f}, text {o['text'] / unit:.3f} of "
            f"the UNet's forward pass of {unit / 1e12:.3g} TFLOP an image"
        )

    text = f"Operations: {shares(result['operations'])}."
    if result["operations_full"]:
        text += f" SDXL at 1024 px: {shares(result['operations_full'])}."
    return ["", text]


def prediction(found: dict[str, Any]) -> list[str]:
    """The memory of the full model, counted on tensors without content."""
    lines = [
        "## SDXL at 1024 px: memory, computed",
        "",
        f"    {found['command']}",
        "",
        found["note"],
        "",
        "| arm | weights, GB | peak of a step beyond the weights, GB | sum, GB |",
        "|---|---|---|---|",
    ]
    for row in found["arms"]:
        weights, live = row["weights_bytes"] / 1e9, row["peak_live_bytes"] / 1e9
        lines.append(f"| {row['title']} | {weights:.2f} | {live:.2f} | {weights + live:.2f} |")
    return [*lines, "", *cards(found["arms"]), ""]


def cards(rows: list[dict[str, Any]]) -> list[str]:
    """What the memory plan comes to on cards of every size, by the computed figures."""
    lines = [
        "What the memory plan comes to with these figures, MaPO with one pair at a time (8-bit Adam, LoRA of rank 16): "
        "with `memory.plan` auto on a card of that size, and with the size named, which starts with more savings. "
        '"May take" is what is left of the card after CUDA\'s context and a margin: 5%, or 15% where gradient '
        "checkpointing could still be added.",
        "",
        "| card | auto | needs, GiB | may take, GiB | size named | needs, GiB |",
        "|---|---|---|---|---|---|",
    ]
    for size in PRESETS:
        (auto, need, room), (named, named_need, _) = (outcome(rows, size, plan) for plan in ("auto", size))
        lines.append(f"| {size} | {words(auto)} | {need:.1f} | {room:.1f} | {words(named)} | {named_need:.1f} |")
    return lines


def outcome(rows: list[dict[str, Any]], size: str, setting: str) -> tuple[Plan, float, float]:
    """The plan that the ladder ends at on a card of `size` with memory.plan `setting`; what it needs and may take, GiB.

    As `memory.settle` does it, with computed figures in place of measured ones.
    """
    config = build_config(
        {"name": "card", "model": {"path": "x"}, "data": {"pairs": "x"}, "memory": {"plan": setting, "preflight": "on"}}
    )
    budget = budget_of(size, 2**60)
    plan = first_plan(config)
    plain = plan.model_copy(update={"gradient_checkpointing": False})
    if computed_bytes(rows, plain) <= room_for(plain, config) * budget:
        plan = plain
    while computed_bytes(rows, plan) > room_for(plan, config) * budget:
        following = next_rung(plan, config)
        assert following is not None, "not even with everything saved"
        plan = following[1]
    return plan, computed_bytes(rows, plan) / GIB, room_for(plan, config) * budget / GIB


def computed_bytes(rows: list[dict[str, Any]], plan: Plan) -> float:
    """Weights and step of MaPO with a plan's savings; of a base in fewer bits the linear layers are smaller."""
    title = "MaPO" + ", split pairs" * plan.split_pairs + ", checkpointing" * plan.gradient_checkpointing
    row = next(r for r in rows if r["title"] == title)
    bits = {"full": 16, "int8": 8, "nf4": 4.5}[plan.base_precision]
    return row["weights_bytes"] - row["linear_bytes"] * (1 - bits / 16) + row["peak_live_bytes"]


def words(plan: Plan) -> str:
    """A plan's savings."""
    savings = [
        *(["gradient checkpointing"] if plan.gradient_checkpointing else []),
        *(["split pairs"] if plan.split_pairs else []),
        *([f"base in {plan.base_precision}"] if plan.base_precision != "full" else []),
    ]
    return ", ".join(savings) or "nothing saved"


def goals(results: list[dict[str, Any]], predicted: dict[str, Any] | None = None) -> list[str]:
    """What was aimed at, and what the results say."""
    lines = ["## Goals", "", "| goal | reached | where |", "|---|---|---|"]
    for text, device, bound, below, name in GOALS:
        found = [(r, value) for r in results if r["size"] != "tiny" and (value := measured(r, name)) is not None]
        found = [(r, v) for r, v in found if device is None or r["device"] == device]
        computed = computed_figure(predicted, name) if predicted else None
        if not found and computed is None:
            lines.append(f"| {text} | not measured | no GPU was at hand |")
        places = [(value, f"{r['size']}, {r['machine']}") for r, value in found]
        places += [] if computed is None else [(computed, "full size, computed, not measured")]
        for value, where in places:
            reached = value <= bound if below else value >= bound
            lines.append(f"| {text} | {value:.2f}: {'yes' if reached else '**no**'} | {where} |")
    return [*lines, ""]


def computed_figure(predicted: dict[str, Any], name: str) -> float | None:
    """A memory goal's figure from the computed memory of the full model."""
    rows = {row["title"]: row for row in predicted["arms"]}
    if name == "memory: split pairs against SFT":
        return rows["MaPO, split pairs"]["peak_live_bytes"] / rows["SFT"]["peak_live_bytes"]
    if name in {"memory: least, GB", "memory: nf4, GB"}:
        sums = [
            row["weights_bytes"] + row["peak_live_bytes"]
            for title, row in rows.items()
            if title.startswith("MaPO") and ("nf4" in title) == ("nf4" in name)
        ]
        return min(sums) / 1e9
    return None


def measured(result: dict[str, Any], name: str) -> float | None:
    """A goal's figure in one result."""
    arms = result["arms"]

    def memory(arm: str, kind: str) -> float | None:
        return ((arms.get(arm) or {}).get("memory") or {}).get(kind)

    if name == "memory: split pairs against SFT":
        split, sft = memory("mapo-split", "peak_live_bytes"), memory("sft", "peak_live_bytes")
        return split / sft if split and sft else None
    if name in {"memory: least, GB", "memory: nf4, GB"}:
        wanted = [a for a in arms if ("nf4" in a) == ("nf4" in name)]
        found = [m for a in wanted if (m := memory(a, "peak_step_bytes"))]
        return min(found) / 1e9 if found and result["size"] == "full" else None
    if name == "share of the matmul rate":
        return (arms.get("mapo") or {}).get("share_of_matmul")
    if name == "engine against the recipe as published" and LEFT_ALONE in result["ratios"]:
        name = LEFT_ALONE
    return statistics.mean([result["ratios"][name]["median"]]) if name in result["ratios"] else None
