"""The gradients of one step: forward and backward of its batches, and nothing else."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch

from .batch import (
    PairBatch,
    assemble,
    fixed_errors,
    mean_squares,
    mean_squares_gradient,
    named_errors,
    residuals,
)
from .data_order import Draw, batches
from .inversion import invert_batch, passes_of
from .methods import safeguard_factor
from .noising import draw_randomness, seed_of, snr_weights
from .processes import largest
from .replay import RandomState

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from .session import Session

Shown = tuple[PairBatch, PairBatch | None]  # the pairs, and a class image for each

TRAINED = ("chosen_mse", "rejected_mse", "class_mse")  # errors through which a loss reaches the adapter


def accumulate(session: Session, group: list[Draw], buckets: list[tuple[int, int]]) -> dict[str, Tensor]:
    """Add the gradients of this process's share of a group; sums over its pairs of the loss and of every metric.

    Nothing but the gradients changes, and the same randomness is drawn every time: after an error, set the gradients
    to zero and call it again.
    """
    config, accelerator = session.config, session.accelerator
    torch.manual_seed(seed_of(config.seed, "step", session.step, accelerator.process_index))  # adapter dropout
    share = len(group) // accelerator.num_processes
    own = shares(group, accelerator.num_processes)[accelerator.process_index]
    sums: dict[str, Tensor] = {}
    parts = batches(own, buckets, config.training.train_batch_size)
    shown: Shown | None = None
    for shown in assembled(session, parts):
        for name, total in backward_shown(session, shown, share).items():
            sums[name] = sums[name] + total if name in sums else total
    if session.shared is not None and shown is not None:
        every = shares(group, accelerator.num_processes)
        most = max(len(batches(one, buckets, config.training.train_batch_size)) for one in every)
        keep_company(session, shown, share, most - len(parts))
    return sums


def keep_company(session: Session, shown: Shown, share: int, times: int) -> None:
    """Show a batch again that does not count, where another process has more batches and needs our part of the base."""
    gradients = [p.grad for p in session.parameters]
    for _ in range(times):
        for parameter in session.parameters:
            parameter.grad = None
        backward_shown(session, shown, share)
    for parameter, gradient in zip(session.parameters, gradients, strict=True):
        parameter.grad = gradient


def shares(group: list[Draw], processes: int) -> list[list[Draw]]:
    """The pairs of a step by process: every pair once, as many for each."""
    share = len(group) // processes
    return [group[k * share : (k + 1) * share] for k in range(processes)]


def assembled(session: Session, parts: list[list[Draw]]) -> Iterator[Shown]:
    """The batches of a step in order; with memory.prefetch each is read while the device works on the one before."""
    wanted = session.config.memory.prefetch
    if wanted is None:
        wanted = session.accelerator.device.type == "cuda"
    if not wanted or len(parts) < 2:
        for draws in parts:
            yield read_batch(session, draws)
        return
    with ThreadPoolExecutor(1, thread_name_prefix="mapo-prefetch") as pool:
        coming = pool.submit(read_batch, session, parts[0])
        for draws in parts[1:]:
            ready = coming.result()
            coming = pool.submit(read_batch, session, draws)
            yield ready
        yield coming.result()


def read_batch(session: Session, draws: list[Draw]) -> Shown:
    """The pairs of one batch with their noise, on the device, and their class images where the method shows some."""
    config = session.config
    indices = [session.train_indices[d.index] for d in draws]
    randomness = [
        draw_randomness(
            config.seed,
            d.epoch,
            i,
            session.pairs.latent_shape(i),
            num_train_timesteps=session.model.noise_scheduler.config.num_train_timesteps,
            flip=config.data.flip,
            caption_dropout=config.data.caption_dropout,
            inversion=session.loss.inversion,
            settings=config.loss,
        )
        for d, i in zip(draws, indices, strict=True)
    ]
    needs = session.loss.needs
    paired = any(name.startswith("rejected") for name in needs)
    batch = assemble(session.pairs, indices, randomness, session.model, session.family, paired=paired)
    class_batch = assemble_class(session, draws, indices) if session.class_images else None
    return batch, class_batch


def backward_batch(session: Session, draws: list[Draw], share: int) -> dict[str, Tensor]:
    """Forward and backward of one batch; sums over its pairs of the loss and of every metric, on the device."""
    return backward_shown(session, read_batch(session, draws), share)


def backward_shown(session: Session, shown: Shown, share: int) -> dict[str, Tensor]:
    """`backward_batch` of a batch that has been read."""
    batch, class_batch = shown
    if session.loss.inversion is not None:
        # A context of its own: autocast keeps the copies of the weights that it makes, and older versions of torch
        # hand those made here, which have no gradient, to the forward pass below.
        passes = 0
        if session.shared is not None:
            passes = largest(session.accelerator, passes_of(session.model, batch, session.loss.inversion))
        with session.step_autocast():
            batch = invert_batch(session.model, session.family, batch, session.loss.inversion, passes)
    split = session.split_pairs and (batch.paired or class_batch is not None)
    found = (split_backward if split else joint_backward)(session, batch, class_batch, share)
    if session.loss.inversion is None:  # the guard knows the errors of Gaussian noise
        timesteps = session.model.noise_scheduler.config.num_train_timesteps
        found |= session.guard.excess(found, batch, timesteps)
    return {name: value.detach().sum() for name, value in found.items()}


# --- the two forms ---------------------------------------------------------------------------------------------------


def joint_backward(session: Session, batch: PairBatch, class_batch: PairBatch | None, share: int) -> dict[str, Tensor]:
    """Both images of each pair in one forward pass; loss and metrics per pair, [B] each."""
    model, family = session.model, session.family
    with session.step_autocast():
        errors = fixed_errors(model, family, batch, session.loss.needs)
        residual = residuals(model, family, batch)  # [B or 2B, 4, h, w]
        errors |= named_errors(mean_squares(batch, residual), batch)
        if class_batch is not None:
            errors["class_mse"] = mean_squares(class_batch, residuals(model, family, class_batch))
    chosen, rejected = residual.detach().split(len(batch.weights)) if batch.paired else (residual.detach(), None)
    pulls, found = pulls_of(session, errors, batch, class_batch, share, chosen, rejected)
    total = torch.stack([(errors[name] * pull).sum() for name, pull in pulls.items()]).sum()
    session.accelerator.backward(total)
    return found


def split_backward(session: Session, batch: PairBatch, class_batch: PairBatch | None, share: int) -> dict[str, Tensor]:
    """The same gradients with the activations of one image at a time, for one more forward pass of the chosen image.

    The loss depends on the images through their errors K alone. So: K_w without gradient; the other image, rejected or
    of the class, with gradient, and backward with dL/dK of it; the chosen image again, with the same random numbers,
    and backward with dL/dK_w.
    """
    model, family, backward = session.model, session.family, session.accelerator.backward
    # A context of autocast for each pass: it keeps the copies of the weights that it makes, and those made without
    # gradient must not be handed to a pass that needs one.
    with session.step_autocast():
        errors = fixed_errors(model, family, batch, session.loss.needs, apart=True)
    state = RandomState.of(session.accelerator.device)
    rows = batch.chosen_rows
    with session.step_autocast(), torch.no_grad():
        chosen = residuals(model, family, batch, rows)
    errors["chosen_mse"] = mean_squares(batch, chosen, rows)
    name, other, other_rows = "rejected_mse", batch, batch.rejected_rows
    if class_batch is not None:
        name, other, other_rows = "class_mse", class_batch, class_batch.chosen_rows
    with session.step_autocast():
        residual = residuals(model, family, other, other_rows)
        errors[name] = mean_squares(other, residual, other_rows)
    rejected = residual.detach() if class_batch is None else None
    pulls, found = pulls_of(session, errors, batch, class_batch, share, chosen, rejected)
    backward((errors[name] * pulls[name]).sum())
    del errors, residual  # the graph of the other image, before the chosen one's is built
    with state.replayed():
        with session.step_autocast():
            mse = mean_squares(batch, residuals(model, family, batch, rows), rows)
        backward((mse * pulls["chosen_mse"]).sum())
    return found


def pulls_of(
    session: Session,
    errors: dict[str, Tensor],
    batch: PairBatch,
    class_batch: PairBatch | None,
    share: int,
    chosen: Tensor,
    rejected: Tensor | None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """dL/dK of every error that is trained, with all weights; and what is reported of the batch, [B] each.

    Args:
        session: with the method's loss.
        errors: what it needs, [B] each.
        batch: the pairs.
        class_batch: the class images, if there are some.
        share: pairs of this process in the step, over which the loss is averaged.
        chosen, rejected: their residuals [B, 4, h, w], without gradient.
    """
    loss = session.loss
    trained = [name for name in TRAINED if name in errors]
    leaves = {name: errors[name].detach().requires_grad_() for name in trained}
    weights = {"sft_weight": level_weights(session, batch)}
    if class_batch is not None:
        weights["class_weight"] = level_weights(session, class_batch)
    given = {name: weight for name, weight in weights.items() if weight is not None}
    losses, metrics = loss(**(errors | leaves), **given)  # [B]
    losses = losses * batch.weights
    pulls = dict(zip(trained, torch.autograd.grad(losses.sum() / share, list(leaves.values())), strict=True))
    found = {"loss": losses, **{k: v for k, v in errors.items() if k.endswith("_mse")}, **metrics}
    if loss.safeguard_mu is not None and rejected is not None:
        factor = safeguard_factor(
            mean_squares_gradient(batch, chosen, batch.chosen_rows),
            mean_squares_gradient(batch, rejected, batch.rejected_rows),
            pulls["chosen_mse"],
            pulls["rejected_mse"],
            loss.safeguard_mu,
        )
        pulls["rejected_mse"] = pulls["rejected_mse"] * factor
        found["safeguard/lambda"] = factor
    return pulls, {name: value.detach() for name, value in found.items()}


def level_weights(session: Session, batch: PairBatch) -> Tensor | None:
    """Weights of the chosen images' errors by noise level, [B]; None where all weigh the same."""
    settings, scheduler = session.config.loss, session.model.noise_scheduler
    if settings.snr_weighting == "none":
        return None
    return snr_weights(
        scheduler.alphas_cumprod.cpu(),
        torch.tensor(batch.levels[: len(batch.weights)]),
        settings.snr_weighting,
        settings.min_snr_gamma,
        scheduler.config.prediction_type == "v_prediction",
    ).to(batch.weights.device, non_blocking=True)


# --- class images ----------------------------------------------------------------------------------------------------


def assemble_class(session: Session, draws: list[Draw], indices: list[int]) -> PairBatch:
    """A class image for each pair, which one and with which noise drawn from (seed, epoch, pair) like all else."""
    config, images = session.config, session.class_images
    assert images is not None
    chosen = [
        seed_of(config.seed, "class image", d.epoch, i) % len(images.entries)
        for d, i in zip(draws, indices, strict=True)
    ]
    randomness = [
        draw_randomness(
            config.seed,
            d.epoch,
            i,
            images.latent_shape(n),
            num_train_timesteps=session.model.noise_scheduler.config.num_train_timesteps,
            flip=config.data.flip,
            settings=config.loss,
            stream="class",
        )
        for d, i, n in zip(draws, indices, chosen, strict=True)
    ]
    return assemble(images, chosen, randomness, session.model, session.family, paired=False)
