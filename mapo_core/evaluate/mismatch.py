"""Reference mismatch: how far the chosen images are from what the base model draws, and a first beta for MaPO.

Hong et al. (arXiv 2406.06424) report that the best beta grows with the mismatch between base model and preference data
but give no way to measure it. The measure here and the line from it to a beta are ours, a heuristic and not a fit:

    s    = mean cosine(generated_i, chosen_i)
    s_hi = mean cosine of two pictures of one prompt, other seeds
    s_lo = mean cosine(generated_i, generated_j), different prompts
    u    = clip((s_hi - s) / (s_hi - s_lo), 0, 1)
    log2 beta = 3 + 7 u, snapped in log2 to a published value
"""

from __future__ import annotations

import hashlib
import math
import random
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..drawing import Drawer, Drawing, model_identity, native_resolution
from ..errors import PairsError
from .statistics import Interval, percentiles, resample_counts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from PIL import Image

    from ..buckets import Size
    from ..config import TrainConfig
    from ..pairs import PreferencePair
    from .embedding import Embedder

BETAS = (8, 32, 64, 128, 1024)  # the best ones of the paper's Table 4
SFT_FROM = 128
MIN_SPREAD = 0.05  # of s_hi - s_lo; below it the embedding does not tell this model's pictures apart
HEURISTIC = (
    "A heuristic, not a fit: a straight line in log2 from 8 to 1024, the ends of the range published for SDXL. On our "
    "own small model the best beta did not grow with the mismatch (docs/benchmarks/reference_mismatch.md). Try all "
    "three."
)


@dataclass(frozen=True)
class Mismatch:
    """What was measured, and the beta that follows from it.

    Attributes:
        similarity: s, of generated and chosen images of a prompt.
        same_prompt: s_hi, of two generated images of a prompt.
        different_prompts: s_lo, of generated images of different prompts; None if there is one prompt only.
        mismatch: u, 0 (the base model draws such images already) to 1; None where it is not measurable.
        reason: why it is not measurable; empty where it is.
        beta: suggested first value; None where u is.
        beta_range: what the ends of u's interval would suggest.
        betas: three values to try, the suggested one among them; empty where there is none.
        close_to_sft: the suggested beta is so large that MaPO is nearly plain fine-tuning.
        note: what the suggestion is worth; to be shown wherever it is.
        prompts: different prompts measured.
        embedder, model, seed, num_inference_steps, guidance_scale: how it was measured.
    """

    similarity: Interval
    same_prompt: Interval
    different_prompts: Interval | None
    mismatch: Interval | None
    reason: str
    beta: int | None
    beta_range: tuple[int, int] | None
    betas: tuple[int, ...]
    close_to_sft: bool
    note: str
    prompts: int
    embedder: str
    model: str
    seed: int
    num_inference_steps: int
    guidance_scale: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def render(self) -> str:
        """For people, as lines."""
        lines = [
            f"Reference mismatch of {self.model}, {self.prompts} prompts, {self.embedder}; 95 % bootstrap intervals",
            f"  generated and chosen, same prompt     {self.similarity}",
            f"  generated twice, same prompt          {self.same_prompt}",
        ]
        if self.different_prompts is not None:
            lines.append(f"  generated, different prompts          {self.different_prompts}")
        if self.mismatch is None or self.beta is None or self.beta_range is None:
            return "\n".join([*lines, f"Not measurable here: {self.reason}"])
        lines.append(f"  mismatch (0 none, 1 unrelated)        {self.mismatch}")
        low, high = self.beta_range
        spread = f" (the interval allows {low} to {high})" if low != high else ""
        lines.append(f"First beta for MaPO's paper form: {self.beta}{spread}; try {', '.join(map(str, self.betas))}.")
        if self.close_to_sft:
            lines.append(f"From {SFT_FROM} up MaPO is close to SFT: compare with --method.type sft.")
        return "\n".join([*lines, self.note])


@dataclass(frozen=True)
class MismatchPictures:
    """The images behind a measurement, one of each per prompt.

    Attributes:
        prompts: different prompts.
        chosen: image files of the pair set.
        generated: the base model's pictures, with two seeds each.
        sizes: (width, height) at which all three are compared, pixels.
    """

    prompts: tuple[str, ...]
    chosen: tuple[Path, ...]
    generated: tuple[tuple[Path, Path], ...]
    sizes: tuple[Size, ...]


def measure_mismatch(
    config: TrainConfig,
    pairs: Sequence[PreferencePair],
    embedder: Embedder,
    *,
    count: int = 48,
    num_inference_steps: int = 25,
    guidance_scale: float = 5.0,
    folder: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    phase: Callable[[str], None] = lambda name: None,
) -> tuple[Mismatch, MismatchPictures]:
    """Draw some of the prompts with the base model, compare with the chosen images, suggest a beta.

    Args:
        config: model, resolution, buckets, seed, device and precision are taken from it.
        pairs: the set; rejected images are not looked at.
        embedder: what "similar" means.
        count: prompts to draw, each twice; more narrow the interval.
        num_inference_steps, guidance_scale: of the pictures.
        folder: where pictures are kept, so that an interrupted measurement goes on; None: below `MAPO_HOME`.
        progress: called with images done and images in all, drawing and embedding together.
        phase: called with what is being done.

    Raises:
        PairsError: the set is empty or an image cannot be read.
        ModelError: the model cannot be loaded.
    """
    plan = plan_pictures(config, pairs, count, num_inference_steps, guidance_scale, folder)
    n = len(plan.prompts)
    total = 5 * n
    flat = [path for two in plan.generated for path in two]
    drawings = [
        Drawing(prompt, _seed(config, prompt, k), size, two[k])
        for prompt, size, two in zip(plan.prompts, plan.sizes, plan.generated, strict=True)
        for k in (0, 1)
    ]
    phase("drawing with the base model")
    with Drawer(config, num_inference_steps, guidance_scale) as drawer:
        drawer.draw(drawings, lambda done, _: progress(done, total))
    from .embedding import embed_files

    phase("comparing pictures")
    twice = [size for size in plan.sizes for _ in (0, 1)]
    drawn = embed_files(embedder, flat, twice, lambda done, _: progress(2 * n + done, total)).numpy()
    chosen = embed_files(embedder, plan.chosen, plan.sizes, lambda done, _: progress(4 * n + done, total)).numpy()
    found = mismatch_of(
        chosen,
        drawn[0::2],
        drawn[1::2],
        embedder=embedder.title,
        model=config.model.path,
        seed=config.seed,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
    )
    return found, plan


def mismatch_of(
    chosen: np.ndarray,
    generated: np.ndarray,
    again: np.ndarray,
    *,
    embedder: str,
    model: str,
    seed: int,
    num_inference_steps: int,
    guidance_scale: float,
) -> Mismatch:
    """The measure itself, on unit vectors.

    Args:
        chosen: of one chosen image per prompt, [N, D].
        generated: of a generated image per prompt, [N, D].
        again: likewise with another seed, [N, D].
        embedder, model, num_inference_steps, guidance_scale: noted in the result.
        seed: of the bootstrap; noted, too.
    """
    s = ((chosen * generated).sum(axis=1) + (chosen * again).sum(axis=1)) / 2  # [N]
    hi = (generated * again).sum(axis=1)  # [N]
    between = generated @ generated.T  # [N, N]
    np.fill_diagonal(between, 0)
    n = len(s)
    weights = resample_counts(n, seed).astype(np.float64)  # [R, N]
    s_b, hi_b = weights @ s / n, weights @ hi / n
    common: dict[str, Any] = {
        "similarity": Interval(float(s.mean()), *percentiles(s_b)),
        "same_prompt": Interval(float(hi.mean()), *percentiles(hi_b)),
        "note": HEURISTIC,
        "prompts": n,
        "embedder": embedder,
        "model": model,
        "seed": seed,
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
    }
    nothing = {"mismatch": None, "beta": None, "beta_range": None, "betas": (), "close_to_sft": False}
    if n < 2:
        reason = "all pairs have the same prompt, so there is nothing to tell pictures of different prompts by."
        return Mismatch(different_prompts=None, reason=reason, **common, **nothing)
    lo = float(between.sum() / (n * n - n))
    others = n * n - (weights**2).sum(axis=1)  # resampled (i, j) of different prompts
    usable = others > 0
    lo_b = np.einsum("ri,ij,rj->r", weights, between, weights, optimize=True)[usable] / others[usable]
    common["different_prompts"] = Interval(lo, *percentiles(lo_b))
    spread = common["same_prompt"].value - lo
    if spread < MIN_SPREAD:
        reason = (
            f"two pictures of one prompt are as alike as pictures of different prompts (difference {spread:.3f}, "
            f"needed {MIN_SPREAD}). Take prompts that differ more, or another embedder."
        )
        return Mismatch(reason=reason, **common, **nothing)
    spreads = np.maximum(hi_b[usable] - lo_b, 1e-9)
    u_b = np.clip((hi_b[usable] - s_b[usable]) / spreads, 0, 1)
    u = Interval(
        min(1.0, max(0.0, (common["same_prompt"].value - common["similarity"].value) / spread)), *percentiles(u_b)
    )
    beta = suggested_beta(u.value)
    return Mismatch(
        mismatch=u,
        reason="",
        beta=beta,
        beta_range=(suggested_beta(u.low), suggested_beta(u.high)),
        betas=betas_to_try(beta),
        close_to_sft=beta >= SFT_FROM,
        **common,
    )


def suggested_beta(mismatch: float) -> int:
    """log2 beta = 3 + 7 u, snapped in log2 to a published value."""
    return min(BETAS, key=lambda beta: abs(math.log2(beta) - (3 + 7 * mismatch)))


def betas_to_try(beta: int) -> tuple[int, ...]:
    """Three neighbouring published values with `beta` among them, in the middle where it has two neighbours."""
    start = min(max(BETAS.index(beta) - 1, 0), len(BETAS) - 3)
    return BETAS[start : start + 3]


def plan_pictures(
    config: TrainConfig,
    pairs: Sequence[PreferencePair],
    count: int,
    num_inference_steps: int,
    guidance_scale: float,
    folder: Path | None = None,
) -> MismatchPictures:
    """Which prompts are drawn, at which size, into which files; one chosen image for each.

    Raises:
        PairsError: there is no pair, or a chosen image cannot be read.
    """
    from ..buckets import nearest_bucket
    from ..cache import pair_buckets
    from ..pairs import image_size
    from ..pairs.views import pairs_at, sample_places
    from ..runs import mapo_home

    first: dict[str, Path] = {}
    for _, pair in pairs_at(pairs, sample_places(len(pairs), f"{config.seed}/mismatch")):
        first.setdefault(pair.prompt, pair.chosen)
    if not first:
        raise PairsError("There is no pair to measure the mismatch on. Build a pair set first: mapo pairs --help.")
    prompts = sorted(random.Random(f"{config.seed}/mismatch").sample(sorted(first), min(count, len(first))))
    sizes = pair_buckets(config, native_resolution(config))
    fitting = tuple(nearest_bucket(image_size(first[p]), sizes) for p in prompts)
    settings = f"{model_identity(config.model)}/{num_inference_steps}/{guidance_scale}"
    home = folder or mapo_home() / "mismatch" / hashlib.sha256(settings.encode()).hexdigest()[:16]

    def file(prompt: str, size: Size, k: int) -> Path:
        text = f"{prompt}/{size}/{_seed(config, prompt, k)}"
        return home / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.png"

    return MismatchPictures(
        prompts=tuple(prompts),
        chosen=tuple(first[p] for p in prompts),
        generated=tuple((file(p, z, 0), file(p, z, 1)) for p, z in zip(prompts, fitting, strict=True)),
        sizes=fitting,
    )


def mismatch_sheet(pictures: MismatchPictures, columns: int = 8) -> Image.Image:
    """Chosen images above what the base model makes of their prompts."""
    from PIL import Image as PILImage

    from ..buckets import fit
    from ..pairs import image_size, prepare_image
    from ..sampling import contact_sheet

    shown = range(min(columns, len(pictures.prompts)))
    box = pictures.sizes[0]

    def picture(path: Path) -> PILImage.Image:
        return PILImage.fromarray(prepare_image(path, fit(image_size(path), box), box))

    rows = [
        [picture(pictures.chosen[i]) for i in shown],
        [picture(pictures.generated[i][0]) for i in shown],
        [picture(pictures.generated[i][1]) for i in shown],
    ]
    return contact_sheet(rows, ["chosen", "base, a seed", "base, another"], [pictures.prompts[i] for i in shown], 160)


def _seed(config: TrainConfig, prompt: str, k: int) -> int:
    from ..noising import seed_of

    return seed_of(config.seed, "mismatch", prompt, k) % 2**32
