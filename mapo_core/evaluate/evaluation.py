"""All measures of a run's LoRA: held-out pairs, win rates, drift and diversity, into the run folder."""

from __future__ import annotations

import gc
import hashlib
import json
import random
import time
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from ..adapter import encode_prompts
from ..buckets import fit
from ..cache import encode_pairs
from ..data_order import divide_pairs
from ..devices import choose_precision
from ..errors import MissingWeightsError
from ..noising import seed_of
from ..pairs import image_size, open_pairs, prepare_image
from ..pairs.views import pairs_at, sample_places
from ..reopen import TrainedModel, open_trained
from ..runs import mapo_home, nulls_for_nonfinite, write_atomic
from ..sampling import contact_sheet, sample_images, save_image
from .diversity import Diversity, diversity_of
from .drift import Drift, measure_drift
from .embedding import load_embedder
from .held_out import held_out_errors
from .outside import outside_prompts
from .report import HeldOutComparison, RunEvaluation, ScorerComparison, compare_scores
from .scorers import AUTO, ScorerOptions, choose_scorers, load_scorer
from .statistics import mean_interval

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..pairs import PreferencePair
    from ..runs import RunDir

_DRIFT_DRAWS = 4
_REFERENCES = 64  # chosen images that scorers compare with
_COLUMNS = 8  # of the sheet
_CHUNK = 32  # pictures drawn between two looks at what is saved


@dataclass(frozen=True)
class EvaluationSettings:
    """What is measured, and on what.

    Attributes:
        scorers: names, or "auto" for those whose weights are here.
        prompts: of the pictures; empty: those of the held-out pairs, or where there are none the outside ones.
        outside: prompts for the drift; empty: a built-in list.
        count: at most so many prompts.
        seeds: pictures per prompt; diversity needs two.
        embedder: of the diversity.
        step: which checkpoint; None for the newest.
        options: devices and weights of the scorers.
    """

    scorers: tuple[str, ...] = (AUTO,)
    prompts: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()
    count: int = 32
    seeds: int = 2
    embedder: str = AUTO
    step: int | None = None
    options: ScorerOptions = field(default_factory=ScorerOptions)


def evaluate_run(
    run: RunDir,
    settings: EvaluationSettings | None = None,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
    phase: Callable[[str], None] = lambda name: None,
) -> RunEvaluation:
    """Measure a checkpoint and write `evaluation/step_*/report.json`, `report.txt`, `sheet.png` and the pictures.

    Pictures that an earlier call drew are not drawn again, so an interrupted evaluation goes on.

    Args:
        run: the run folder.
        settings: what to measure.
        progress: called with what is done and what there is to do, anew in each phase.
        phase: called with what is being done.

    Raises:
        RunError: there is no such checkpoint.
        MissingWeightsError: a scorer that was asked for lacks its weights; said before anything is drawn.
        ConfigError: a scorer or embedder does not exist.
    """
    settings = settings or EvaluationSettings()
    started = time.monotonic()
    pairs = open_pairs(run.pairs)
    from ..config import load_config

    config = load_config(run.config)
    model_path = config.model.path
    options = (
        replace(settings.options, device=config.training.device)
        if settings.options.device == AUTO
        else settings.options
    )
    names, not_measured = choose_scorers(settings.scorers, model_path, options)
    if not names and not not_measured:
        not_measured = {"scores": "no scorer was asked for"}
    phase("loading the model")
    trained = open_trained(run, settings.step)
    _, held = divide_pairs(pairs, config.data.held_out, config.seed)
    comparison = _held_out(trained, pairs, held, progress, phase)
    if comparison is None:
        not_measured["held-out pairs"] = "the run held none out (data.held_out)"
    outside = outside_prompts(model_path, (p.prompt for p in pairs), settings.outside)[: settings.count]
    prompts, prompts_from = _prompts(settings, pairs, held, outside)
    board = Board(trained, run.evaluation / f"step_{trained.step:08d}")
    seeds = list(range(settings.seeds))
    phase("drawing with the base model")
    base = board.draw(prompts, seeds, True, progress)
    phase("drawing with the LoRA")
    lora = board.draw(prompts, seeds, False, progress)
    drift = _drift(board, outside, progress, phase)
    if drift is None:
        not_measured["drift"] = "every prompt given for it is in the training set"
    width, height, folder = board.width, board.height, board.folder
    step, method = trained.step, config.method.type
    del trained, board  # the scorers need the room
    _free()
    repeated = [p for p in prompts for _ in seeds]
    references = _references(pairs, held, config.seed, (width, height))
    scores = _scores(
        names, replace(options, references=references), base, lora, repeated, not_measured, progress, phase
    )
    diversity = _diversity(settings, model_path, options, base, lora, not_measured, phase)
    sheet = folder / "sheet.png"
    save_image(_sheet(prompts, settings.seeds, base, lora), sheet)
    found = RunEvaluation(
        run=run.name,
        step=step,
        model=model_path,
        method=method,
        held_out=comparison,
        scores=tuple(scores),
        drift=drift,
        diversity=diversity,
        not_measured=not_measured,
        prompts=tuple(prompts),
        prompts_from=prompts_from,
        seeds=settings.seeds,
        num_inference_steps=config.validation.num_inference_steps,
        guidance_scale=config.validation.guidance_scale,
        width=width,
        height=height,
        sheet=str(sheet.relative_to(run.path)),
        seconds=round(time.monotonic() - started, 1),
    )
    write_atomic(folder / "report.txt", found.render() + "\n")
    text = json.dumps(nulls_for_nonfinite(found.as_dict()), indent=2, ensure_ascii=False) + "\n"
    write_atomic(folder / "report.json", text)  # last: where it is, everything is
    return found


class Board:
    """Draws with a trained model, with and without its LoRA, into files that are used again.

    Args:
        trained: the model.
        folder: of the evaluation; pictures go to `pictures/` in it.
    """

    def __init__(self, trained: TrainedModel, folder: Path) -> None:
        settings = trained.config.validation
        side = trained.config.data.resolution or trained.model.resolution
        self.trained = trained
        self.folder = folder
        self.width, self.height = settings.width or side, settings.height or side

    def draw(
        self, prompts: Sequence[str], seeds: Sequence[int], base: bool, progress: Callable[[int, int], None]
    ) -> list[Image.Image]:
        """Every prompt with every seed, the seeds of a prompt after one another."""
        model, family, settings = self.trained.model, self.trained.family, self.trained.config.validation
        wanted = [(p, _seed(self.trained, p, k)) for p in prompts for k in seeds]
        paths = [self._path(p, seed, base) for p, seed in wanted]
        missing = [i for i, path in enumerate(paths) if not path.exists()]
        progress(len(paths) - len(missing), len(paths))
        texts = list(dict.fromkeys(wanted[i][0] for i in missing))
        encoded = encode_prompts(model, family, [*texts, settings.negative_prompt], base=base)
        embeds, negative = dict(zip(texts, encoded[:-1], strict=True)), encoded[-1]
        for start in range(0, len(missing), _CHUNK):
            part = missing[start : start + _CHUNK]
            already = len(paths) - len(missing) + start
            pictures = sample_images(
                model,
                family,
                [embeds[wanted[i][0]] for i in part],
                negative,
                [wanted[i][1] for i in part],
                width=self.width,
                height=self.height,
                num_inference_steps=settings.num_inference_steps,
                guidance_scale=settings.guidance_scale,
                base=base,
                autocast=lambda: autocast(self.trained),
                progress=lambda done, _, already=already: progress(already + done, len(paths)),
            )
            for i, picture in zip(part, pictures, strict=True):
                save_image(picture, paths[i])
        return [Image.open(path).convert("RGB") for path in paths]

    def _path(self, prompt: str, seed: int, base: bool) -> Path:
        settings = self.trained.config.validation
        parts = [prompt, settings.negative_prompt, seed, self.width, self.height]
        text = json.dumps([*parts, settings.num_inference_steps, settings.guidance_scale])
        name = hashlib.sha256(text.encode()).hexdigest()[:24]
        return self.folder / "pictures" / ("base" if base else "lora") / f"{name}.png"


def autocast(trained: TrainedModel) -> Any:
    """The precision of the arithmetic, as in training."""
    device = trained.model.device
    precision = choose_precision(trained.config.training.precision, device)
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)


def _seed(trained: TrainedModel, prompt: str, k: int) -> int:
    return seed_of(trained.config.seed, "evaluate", prompt, k) % 2**32


def _prompts(
    settings: EvaluationSettings, pairs: Sequence[PreferencePair], held: Sequence[int], outside: list[str]
) -> tuple[list[str], str]:
    if settings.prompts:
        return list(dict.fromkeys(settings.prompts))[: settings.count], "given"
    if held:
        return list(dict.fromkeys(pairs[i].prompt for i in held))[: settings.count], "of the held-out pairs"
    return outside or list(dict.fromkeys(p.prompt for p in pairs))[: settings.count], "outside the training set"


def _held_out(
    trained: TrainedModel,
    pairs: Sequence[PreferencePair],
    held: Sequence[int],
    progress: Callable[[int, int], None],
    phase: Callable[[str], None],
) -> HeldOutComparison | None:
    """The run's own held-out pairs, with the noise that the run measured them with."""
    if not held:
        return None
    phase("encoding the pairs")
    config = trained.config
    encoded, _ = encode_pairs(
        trained.model,
        trained.family,
        pairs,
        config,
        mapo_home() / "cache",
        progress=lambda what, done, total: progress(done, total),
    )

    def measure(base: bool) -> Any:
        phase("measuring held-out pairs" + (" without the LoRA" if base else ""))
        with autocast(trained):
            return held_out_errors(
                trained.model,
                trained.family,
                encoded,
                held,
                draws=config.validation.draws,
                seed=config.seed,
                batch_size=config.training.train_batch_size,
                base=base,
                progress=progress,
            )

    before, after = measure(True), measure(False)

    def interval(values: list[float]) -> Any:
        return mean_interval(values, after.pairs, config.seed)

    gain = [a - b for a, b in zip(after.correct, before.correct, strict=True)]
    margins = [
        (al - ac) - (bl - bc)
        for ac, al, bc, bl in zip(after.chosen, after.rejected, before.chosen, before.rejected, strict=True)
    ]
    return HeldOutComparison(
        base=before.summary(),
        lora=after.summary(),
        accuracy_base=interval(before.correct),
        accuracy=interval(after.correct),
        accuracy_gain=interval(gain),
        margin_gain=interval(margins),
    )


def _drift(
    board: Board, prompts: list[str], progress: Callable[[int, int], None], phase: Callable[[str], None]
) -> Drift | None:
    if not prompts:
        return None
    trained = board.trained
    phase("drawing other prompts")
    pictures = board.draw(prompts, [0], True, progress)
    phase("measuring drift")
    with autocast(trained):
        return measure_drift(
            trained.model,
            trained.family,
            pictures,
            encode_prompts(trained.model, trained.family, prompts, base=False),
            encode_prompts(trained.model, trained.family, prompts, base=True),
            draws=_DRIFT_DRAWS,
            seed=trained.config.seed,
            progress=progress,
        )


def _references(
    pairs: Sequence[PreferencePair], held: Sequence[int], seed: int, size: tuple[int, int]
) -> list[Image.Image]:
    """Chosen images that the LoRA was trained on, at the size of the pictures."""
    kept, drawn = set(held), sample_places(len(pairs), f"{seed}/references")
    paths = sorted({p.chosen for i, p in pairs_at(pairs, drawn) if i not in kept})
    some = random.Random(f"{seed}/references").sample(paths, min(_REFERENCES, len(paths)))
    return [Image.fromarray(prepare_image(path, fit(image_size(path), size), size)) for path in some]


def _scores(
    names: Sequence[str],
    options: ScorerOptions,
    base: list[Image.Image],
    lora: list[Image.Image],
    prompts: list[str],
    not_measured: dict[str, str],
    progress: Callable[[int, int], None],
    phase: Callable[[str], None],
) -> list[ScorerComparison]:
    """One scorer after the other, so that only one is in memory."""
    found: list[ScorerComparison] = []
    for name in names:
        phase(f"scoring with {name}")
        progress(0, 2 * len(prompts))
        scorer = load_scorer(name, options)
        values: list[float] = []
        both, texts = [*base, *lora], [*prompts, *prompts]
        for start in range(0, len(both), _CHUNK):
            values += scorer.score(both[start : start + _CHUNK], texts[start : start + _CHUNK])
            progress(len(values), len(both))
        compared = compare_scores(name, scorer.title, values[: len(base)], values[len(base) :], prompts)
        if compared is None:
            not_measured[name] = "the scorer could judge none of the pictures"
        else:
            found.append(compared)
        del scorer
        _free()
    return found


def _diversity(
    settings: EvaluationSettings,
    model: str,
    options: ScorerOptions,
    base: list[Image.Image],
    lora: list[Image.Image],
    not_measured: dict[str, str],
    phase: Callable[[str], None],
) -> Diversity | None:
    if settings.seeds < 2:
        not_measured["diversity"] = "it needs at least two seeds per prompt"
        return None
    phase("comparing seeds")
    try:
        embedder = load_embedder(
            settings.embedder,
            model,
            folder=options.folders.get("dinov2"),
            device=options.device,
            download=options.download,
        )
    except MissingWeightsError as error:
        if settings.embedder != AUTO:
            raise
        not_measured["diversity"] = str(error)
        return None
    return diversity_of(embedder.embed(base), embedder.embed(lora), settings.seeds, embedder.title)


def _sheet(prompts: list[str], seeds: int, base: list[Image.Image], lora: list[Image.Image]) -> Image.Image:
    shown = prompts[:: max(1, len(prompts) // _COLUMNS)][:_COLUMNS]
    places = [prompts.index(p) * seeds for p in shown]
    return contact_sheet([[base[i] for i in places], [lora[i] for i in places]], ["base", "with LoRA"], shown, 192)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
