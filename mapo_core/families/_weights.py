"""Fill modules from safetensors files: tensor by tensor, and nothing missing, left over or of another shape."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from accelerate import init_empty_weights
from safetensors import safe_open

from ..errors import ModelError
from ._keys import SPARE, Naming, Piece

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import torch
    from torch import Tensor, nn

log = logging.getLogger(__name__)


class Weights:
    """The tensors of one or several safetensors files, under a common prefix that the names here do not have."""

    def __init__(self, paths: Sequence[Path], prefix: str = "") -> None:
        self.where = str(paths[0] if len(paths) == 1 else paths[0].parent)
        self._files: dict[str, Any] = {}
        for path in paths:
            file = safe_open(path, framework="pt")
            self._files |= {k.removeprefix(prefix): file for k in file.keys() if k.startswith(prefix)}  # noqa: SIM118
        self._prefix = prefix

    @property
    def names(self) -> set[str]:
        """All of them."""
        return set(self._files)

    def full_name(self, name: str) -> str:
        """As it is in the file."""
        return self._prefix + name

    def read(self, piece: Piece) -> Tensor:
        """The tensor or the part of it."""
        tensor: Tensor = self._files[piece.key].get_tensor(self.full_name(piece.key))
        if piece.third is not None:
            tensor = tensor.chunk(3)[piece.third]
        return tensor.T if piece.transposed else tensor


def build(
    make: Callable[[], nn.Module],
    weights: Weights,
    naming: Naming,
    what: str,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> Any:
    """A frozen module with its weights, in evaluation mode.

    Args:
        make: builds the module; called without allocating memory for its parameters.
        weights: where they are.
        naming: how they are named there.
        what: for messages, for example "the UNet of Stable Diffusion XL".
        dtype: of the result.
        device: of the result.

    Raises:
        ModelError: a parameter is missing or has another shape, or the file has more than the module.
    """
    with init_empty_weights(include_buffers=False):
        module = make()
    expected = module.state_dict()
    pieces = naming(expected, weights.names)
    _check_names(pieces, weights, what)
    state: dict[str, Tensor] = {}
    for name, like in expected.items():
        tensor = _reshaped(weights.read(pieces[name]), like, name, weights, what)
        state[name] = tensor.to(device, dtype, copy=True).contiguous()
    module.load_state_dict(state, strict=True, assign=True)
    module.to(device)  # buffers that are computed, not stored
    unfilled = [n for n, t in [*module.named_parameters(), *module.named_buffers()] if t.is_meta]
    if unfilled:
        raise ModelError(f"{weights.where}: {what} was not filled completely ({_some(unfilled)}). Please report this.")
    return module.requires_grad_(False).eval()


def _check_names(pieces: dict[str, Piece], weights: Weights, what: str) -> None:
    available = weights.names
    wanted = {p.key for p in pieces.values()}
    missing = sorted(weights.full_name(k) for k in wanted - available)
    extra = sorted(weights.full_name(k) for k in available - wanted if not SPARE.match(k))
    if missing and len(missing) == len(wanted):
        raise ModelError(f"{weights.where} does not contain {what}. Choose a complete checkpoint.")
    if missing:
        raise ModelError(
            f"{weights.where}: {what} lacks {len(missing)} of {len(wanted)} tensors, for example {_some(missing)}. "
            "It is damaged, or a pruned variant; choose a complete checkpoint."
        )
    if extra:
        raise ModelError(
            f"{weights.where}: {what} has {len(extra)} tensors that it should not have, for example {_some(extra)}. "
            "It is another architecture or carries an addition; choose the plain checkpoint."
        )


def _reshaped(tensor: Tensor, like: Tensor, name: str, weights: Weights, what: str) -> Tensor:
    """1x1 convolutions and linear layers are stored as either, depending on who saved them."""
    if tensor.shape == like.shape:
        return tensor
    if tensor.numel() == like.numel() and tensor.squeeze().shape == like.squeeze().shape:
        return tensor.reshape(like.shape)
    raise ModelError(
        f"{weights.where}: {name} has the shape {list(tensor.shape)}, but {what} has {list(like.shape)}. It is another "
        "architecture; choose a plain checkpoint."
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3])
