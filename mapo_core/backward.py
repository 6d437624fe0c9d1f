"""The gradients of one step: forward and backward of its batches, and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .batch import PairBatch, assemble, pair_errors
from .data_order import Draw, batches
from .inversion import invert_batch
from .noising import draw_randomness, seed_of

if TYPE_CHECKING:
    from torch import Tensor

    from .session import Session


def accumulate(session: Session, group: list[Draw], buckets: list[tuple[int, int]]) -> dict[str, Tensor]:
    """Add the gradients of this process's share of a group; sums over its pairs of the loss and of every metric.

    Nothing but the gradients changes, and the same randomness is drawn every time: after an error, set the gradients
    to zero and call it again.
    """
    config, accelerator = session.config, session.accelerator
    torch.manual_seed(seed_of(config.seed, "step", session.step, accelerator.process_index))  # adapter dropout
    share = len(group) // accelerator.num_processes
    own = group[accelerator.process_index * share : (accelerator.process_index + 1) * share]
    sums: dict[str, Tensor] = {}
    for draws in batches(own, buckets, config.training.train_batch_size):
        for name, total in backward_batch(session, draws, share).items():
            sums[name] = sums[name] + total if name in sums else total
    return sums


def backward_batch(session: Session, draws: list[Draw], share: int) -> dict[str, Tensor]:
    """Forward and backward of one batch; sums over its pairs of the loss and of every metric, on the device."""
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
        )
        for d, i in zip(draws, indices, strict=True)
    ]
    needs = session.loss.needs
    paired = any(name.startswith("rejected") for name in needs)
    batch = assemble(session.pairs, indices, randomness, session.model, session.family, paired=paired)
    class_batch = assemble_class(session, draws, indices) if session.class_images else None
    if session.loss.inversion is not None:
        # A context of its own: autocast keeps the copies of the weights that it makes, and older versions of torch
        # hand those made here, which have no gradient, to the forward pass below.
        with session.autocast():
            batch = invert_batch(session.model, session.family, batch, session.loss.inversion)
    with session.autocast():
        errors = pair_errors(session.model, session.family, batch, needs, class_batch)
    losses, metrics = session.loss(**errors)  # [B]
    session.accelerator.backward((losses * batch.weights).sum() / share)
    found = {"loss": losses * batch.weights, **{k: v for k, v in errors.items() if k.endswith("_mse")}, **metrics}
    return {name: value.detach().sum() for name, value in found.items()}


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
            stream="class",
        )
        for d, i, n in zip(draws, indices, chosen, strict=True)
    ]
    return assemble(images, chosen, randomness, session.model, session.family, paired=False)
