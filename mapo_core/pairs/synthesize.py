"""Pairs made by the model itself from prompts with two prefixes, one for what is wanted and one for what is not.

The way of Pick-Safety, Pick-Cartoon and Pick-Culture in the MaPO paper (arXiv 2406.06424): the same prompt is drawn
with both prefixes and, by default, with the same noise. Training then sees the prompt without a prefix, so that the
model learns to draw the one without being asked and no longer the other. A judge may leave out pairs that came out
wrong.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..drawing import Drawer, Drawing, model_identity, native_resolution
from ..errors import PairsError
from .captions import compose_prompt
from .findings import Finding
from .generate import GenerationSettings, drawing_key, make_folder, record_drawing
from .pair import PairSet, PreferencePair

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..buckets import Size
    from ..config import TrainConfig
    from ..evaluate import Scorer

SCORES = "scores.jsonl"
PLACE = "{prompt}"
_JUDGED_AT_ONCE = 16


@dataclass(frozen=True)
class SynthesisSettings:
    """How the two sides are drawn, and which pairs are kept.

    Attributes:
        chosen_prefix: text before the prompt of the chosen image; where it has "{prompt}", the prompt goes there.
        rejected_prefix: likewise of the rejected one; the two must differ.
        per_prompt: pairs for each prompt, each with a seed of its own.
        same_noise: draw both sides from the same noise, so that they differ by the prefix alone; False gives each its
            own.
        num_inference_steps: sampling steps.
        guidance_scale: classifier-free guidance.
        seed: from which each pair's own seed is derived.
        min_margin: how much better the judge must find the chosen image, both judged with the chosen side's prompt; a
            larger one keeps fewer and clearer pairs.
    """

    chosen_prefix: str
    rejected_prefix: str
    per_prompt: int = 1
    same_noise: bool = True
    num_inference_steps: int = 25
    guidance_scale: float = 5.0
    seed: int = 0
    min_margin: float = 0.0


@dataclass(frozen=True)
class _Job:
    prompt: str
    chosen: Drawing
    rejected: Drawing


def synthesize_pairs(
    config: TrainConfig,
    prompts: Sequence[str],
    folder: Path,
    settings: SynthesisSettings,
    *,
    load_judge: Callable[[], Scorer] | None = None,
    judge_name: str = "",
    progress: Callable[[int, int], None] = lambda done, total: None,
    phase: Callable[[str], None] = lambda name: None,
) -> PairSet:
    """Draw both sides of every prompt, let the judge leave out what is not better, and return the pairs.

    Args:
        config: model, resolution, device and precision are taken from it.
        prompts: without a prefix, as they are trained.
        folder: where images, `generated.jsonl` and, with a judge, `scores.jsonl` are kept; what is there is not made
            again.
        settings: prefixes, seeds, threshold.
        load_judge: makes a scorer once the drawing is done and its model has left the device; None keeps every pair.
        judge_name: of the judge; scores of other judges in the folder are not used.
        progress: called with images (then pairs judged) done and in all.
        phase: called with what is being done.

    Returns:
        The pairs in the order of the prompts, with the judge's scores, and a finding about those left out.

    Raises:
        PairsError: no prompts, equal prefixes, or no pair is left.
        ModelError: the model cannot be loaded.
    """
    if not prompts:
        raise PairsError("There is no prompt to make pairs from. Give a file with one prompt per line.")
    if with_prefix("x", settings.chosen_prefix) == with_prefix("x", settings.rejected_prefix):
        raise PairsError("Chosen and rejected prefix are the same, so the two images would be, too. Change one.")
    make_folder(folder)
    jobs = _jobs(config, prompts, folder, settings)
    phase("drawing pairs")
    with Drawer(config, settings.num_inference_steps, settings.guidance_scale) as drawer:
        drawings = [d for job in jobs for d in (job.chosen, job.rejected)]
        drawer.draw(drawings, progress, lambda drawing: record_drawing(folder, drawing, drawer))
    made_by = f"made by {Path(config.model.path).name}"
    if load_judge is None:
        pairs = [_pair(job, made_by) for job in jobs]
        return PairSet(pairs, [], {"synthesized": len(pairs)})
    phase("judging pairs")
    scores = _judge(jobs, folder, load_judge, judge_name, progress)
    pairs, left_out, unjudged = [], 0, 0
    for job in jobs:
        chosen, rejected = scores[job]
        if not (math.isfinite(chosen) and math.isfinite(rejected)):
            unjudged += 1
        elif chosen > rejected and chosen - rejected >= settings.min_margin:
            pairs.append(_pair(job, made_by, chosen, rejected))
        else:
            left_out += 1
    findings = _findings(left_out, unjudged, len(jobs), judge_name, settings.min_margin)
    if not pairs:
        problems = [finding.message for finding in findings]
        raise PairsError(f"No pair is left. {' '.join(problems)} Lower the margin, or change the prefixes.", problems)
    return PairSet(pairs, findings, {"synthesized": len(pairs), "left out": left_out, "not judged": unjudged})


def with_prefix(prompt: str, prefix: str) -> str:
    """The prompt behind a prefix, or in the place that the prefix has for it."""
    return prefix.replace(PLACE, prompt) if PLACE in prefix else compose_prompt(prompt, prefix=prefix)


def _jobs(config: TrainConfig, prompts: Sequence[str], folder: Path, settings: SynthesisSettings) -> list[_Job]:
    from ..noising import seed_of

    side = config.data.resolution or native_resolution(config)
    size: Size = (config.validation.width or side, config.validation.height or side)
    sampling = GenerationSettings(settings.num_inference_steps, settings.guidance_scale)
    identity = model_identity(config.model)

    def drawing(prompt: str, role: str, prefix: str, n: int) -> Drawing:
        parts = (settings.seed, "synthesize", prompt, n) + (() if settings.same_noise else (role,))
        seed = seed_of(*parts) % 2**32
        text = with_prefix(prompt, prefix)
        return Drawing(text, seed, size, folder / f"{role}-{drawing_key(text, seed, size, sampling, identity)}.png")

    return [
        _Job(
            prompt,
            drawing(prompt, "chosen", settings.chosen_prefix, n),
            drawing(prompt, "rejected", settings.rejected_prefix, n),
        )
        for prompt in dict.fromkeys(prompts)
        for n in range(settings.per_prompt)
    ]


def _judge(
    jobs: Sequence[_Job],
    folder: Path,
    load_judge: Callable[[], Scorer],
    judge_name: str,
    progress: Callable[[int, int], None],
) -> dict[_Job, tuple[float, float]]:
    """Scores of chosen and rejected image, both for the prompt of the chosen side; each pair is judged once."""
    from PIL import Image

    path = folder / SCORES
    known: dict[tuple[str, str], tuple[float, float]] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
                if record["judge"] == judge_name:
                    values = [float("nan") if record[k] is None else record[k] for k in ("score", "rejected_score")]
                    known[record["chosen"], record["rejected"]] = (values[0], values[1])
            except (ValueError, KeyError):
                continue  # the line that an interruption cut
    waiting = [job for job in jobs if _files(job) not in known]
    progress(len(jobs) - len(waiting), len(jobs))
    judge = load_judge() if waiting else None
    for start in range(0, len(waiting), _JUDGED_AT_ONCE):
        part = waiting[start : start + _JUDGED_AT_ONCE]
        assert judge is not None
        images = [Image.open(d.path).convert("RGB") for job in part for d in (job.chosen, job.rejected)]
        values = judge.score(images, [job.chosen.prompt for job in part for _ in (0, 1)])
        with path.open("a", encoding="utf-8") as file:
            for job, chosen, rejected in zip(part, values[0::2], values[1::2], strict=True):
                known[_files(job)] = (chosen, rejected)
                record = {"chosen": job.chosen.path.name, "rejected": job.rejected.path.name, "judge": judge_name}
                scored = {
                    k: v if math.isfinite(v) else None for k, v in (("score", chosen), ("rejected_score", rejected))
                }
                file.write(json.dumps(record | scored) + "\n")
        progress(len(jobs) - len(waiting) + start + len(part), len(jobs))
    return {job: known[_files(job)] for job in jobs}


def _files(job: _Job) -> tuple[str, str]:
    return job.chosen.path.name, job.rejected.path.name


def _pair(job: _Job, made_by: str, chosen: float | None = None, rejected: float | None = None) -> PreferencePair:
    return PreferencePair(
        prompt=job.prompt,
        chosen=job.chosen.path,
        rejected=job.rejected.path,
        chosen_score=chosen,
        rejected_score=rejected,
        source=f"{made_by}; chosen from {job.chosen.prompt!r}, rejected from {job.rejected.prompt!r}, seed "
        f"{job.chosen.seed}",
    )


def _findings(left_out: int, unjudged: int, total: int, judge: str, margin: float) -> list[Finding]:
    found: list[Finding] = []
    if left_out:
        by = f"by {margin:g}" if margin else ""
        text = f"{left_out} of {total} pairs were left out: {judge} does not find the chosen image better {by}".strip()
        found.append(Finding("note", "judged", f"{text}."))
    if unjudged:
        found.append(Finding("warning", "not-judged", f"{unjudged} of {total} pairs: {judge} gave no verdict."))
    return found
