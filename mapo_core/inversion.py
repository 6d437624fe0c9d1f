"""x_t from x_0 by inversion: the network leads each image up to its noise level, without gradient.

DDIM inversion as in DDIM-InPO (Lu et al., arXiv 2503.18454), and with `renoise` as in SmPO-Diffusion (Lu et al., arXiv
2506.02698). Every sample stops at its own level, so that a batch is as right as its samples one by one; the authors'
code takes the first sample's timestep for all.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from .batch import predict_rows
from .noising import inversion_levels, target_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from .batch import PairBatch
    from .families.base import DiffusionModel, Family
    from .methods import Inversion


def passes_of(model: DiffusionModel, batch: PairBatch, inversion: Inversion) -> int:
    """How many forward passes the inversion of a batch takes: those of its most noised sample."""
    levels = inversion_levels(inversion.steps, model.noise_scheduler.config.num_train_timesteps)
    return (1 + max(levels.index(t) for t in batch.levels)) * (2 if inversion.renoise else 1)


@torch.no_grad()
def invert_batch(
    model: DiffusionModel, family: Family, batch: PairBatch, inversion: Inversion, passes: int = 0
) -> PairBatch:
    """The batch with x_t and target by inversion with the network as it is, adapter included, its dropout off.

    Args:
        model: with the adapter.
        family: of the model.
        batch: its timesteps are levels of the inversion.
        inversion: of the method.
        passes: go through at least so many forward passes, because another process needs them.
    """
    scheduler = model.noise_scheduler
    levels = inversion_levels(inversion.steps, scheduler.config.num_train_timesteps)

    def predict(latents: Tensor, timestep: int, rows: Tensor) -> Tensor:
        timesteps = torch.full((len(rows),), timestep, device=latents.device)
        return predict_rows(model, family, batch, rows, latents=latents, timesteps=timesteps)

    was_training = model.unet.training
    model.unet.eval()
    alphas = scheduler.alphas_cumprod.float().to(batch.latents.device)
    noisy = invert(
        predict,
        batch.latents,
        [levels.index(t) for t in batch.levels],
        batch.inversion_noise,
        alphas,
        levels,
        inversion,
        v_prediction=scheduler.config.prediction_type == "v_prediction",
    )
    for _ in range(passes - passes_of(model, batch, inversion)):
        predict(batch.latents[:1], levels[0], torch.zeros(1, dtype=torch.int64, device=batch.latents.device))
    model.unet.train(was_training)
    alpha = alphas[batch.timesteps].view(-1, 1, 1, 1)
    noise = (noisy - alpha.sqrt() * batch.latents) / (1 - alpha).sqrt()
    return replace(batch, noisy=noisy, target=target_of(scheduler, batch.latents, noise, batch.timesteps))


def invert(
    predict: Callable[[Tensor, int, Tensor], Tensor],
    latents: Tensor,
    stops: Sequence[int],
    fresh_noise: Tensor | None,
    alphas_cumprod: Tensor,
    levels: Sequence[int],
    inversion: Inversion,
    *,
    v_prediction: bool = False,
) -> Tensor:
    """Lead every sample from x_0 to its own level.

    A step from noise level a (alpha_a = 1 at x_0) to b, in terms of the prediction of epsilon:

        x_b = sqrt(alpha_b) (x_a - sqrt(1 - alpha_a) eps) / sqrt(alpha_a) + sqrt(1 - alpha_b) eps,  eps = eps(x_a, t_b)

    With `renoise`, eps is the mean of eps(x_a, t_b) and eps(x_b, t_b). With `eta`, each step adds eta times DDIM's
    standard deviation sqrt((1 - alpha_a) / (1 - alpha_b) (1 - alpha_b / alpha_a)) of fresh noise.

    Args:
        predict: the network's output for latents [R, 4, h, w], a timestep, and the rows of the batch that they are.
        latents: x_0, [B, 4, h, w] float32.
        stops: for each sample the index of its level, 0 to steps - 1.
        fresh_noise: [B, steps, 4, h, w]; None where eta is 0.
        alphas_cumprod: of the noise schedule, [T].
        levels: the timestep of each level.
        inversion: of the method.
        v_prediction: whether the network predicts v instead of epsilon.
    """
    x = latents.clone()
    before = torch.ones((), device=x.device)  # alpha_a
    for k, timestep in enumerate(levels):
        on_the_way = [i for i, stop in enumerate(stops) if stop >= k]
        if not on_the_way:
            break
        rows = torch.tensor(on_the_way, device=x.device)
        after, here = alphas_cumprod[timestep], x[rows]
        eps = epsilon(predict(here, timestep, rows).float(), here, before, v_prediction)
        there = moved(here, eps, before, after)
        if inversion.renoise:
            again = epsilon(predict(there, timestep, rows).float(), there, after, v_prediction)
            there = moved(here, (eps + again) / 2, before, after)
        if fresh_noise is not None:
            deviation = ((1 - before) / (1 - after) * (1 - after / before)).sqrt()
            there = there + inversion.eta * deviation * fresh_noise[rows, k]
        x[rows] = there
        before = after
    return x


def moved(x: Tensor, eps: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """The DDIM step between two noise levels, given as alphas_cumprod."""
    return after.sqrt() * (x - (1 - before).sqrt() * eps) / before.sqrt() + (1 - after).sqrt() * eps


def epsilon(output: Tensor, x: Tensor, alpha: Tensor, v_prediction: bool) -> Tensor:
    """The network's output as a prediction of epsilon, for latents of the noise level alpha."""
    return alpha.sqrt() * output + (1 - alpha).sqrt() * x if v_prediction else output
