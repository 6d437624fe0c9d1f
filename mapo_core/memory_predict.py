"""What a step would take without gradient checkpointing, counted in a forward pass that keeps nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from .backward import read_batch
from .batch import residuals
from .memory_use import used_bytes
from .replay import RandomState
from .speed import set_checkpointing

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from .data_order import Draw
    from .session import Session

WORKING = 1.15  # what the backward pass has in hand beside what was kept for it, and what allocators lose


class KeptBytes:
    """Counts what autograd would keep of the passes inside a `with` block, and lets go of it at once.

    What is computed inside cannot be differentiated afterwards. A storage counts once, however many tensors share it.

    Args:
        own: tensors that are there anyway and do not count.

    Attributes:
        bytes: counted so far.
    """

    def __init__(self, own: Iterable[Tensor] = ()) -> None:
        self.bytes = 0
        # A weak reference keeps a storage's identity from being given to another one, and nothing of its content.
        self._seen = {ref.cdata: ref for ref in (StorageWeakRef(t.untyped_storage()) for t in own)}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def __enter__(self) -> KeptBytes:
        """Begin."""
        self._hooks.__enter__()
        return self

    def __exit__(self, *reason: object) -> None:
        """End."""
        self._hooks.__exit__(*reason)

    def _pack(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        ref = StorageWeakRef(storage)
        if ref.cdata not in self._seen:
            self._seen[ref.cdata] = ref
            self.bytes += storage.nbytes()

    def _unpack(self, _: None) -> NoReturn:
        raise RuntimeError("what a counting pass computes cannot be differentiated")


def plain_step_bytes(session: Session, draws: list[Draw]) -> int:
    """Memory of a step without gradient checkpointing, beside what the device holds of others; nothing changes.

    On CUDA of this process on the device, elsewhere of the process: what it has now, what a backward pass would find
    kept, and gradients and averages of the trained weights. It takes the time of one forward pass and the memory of
    drawing a picture.

    Args:
        session: with base and LoRA on the device.
        draws: the largest batch of a step.
    """
    model = session.model
    before = RandomState.of(session.accelerator.device)
    was_on = session.plan.gradient_checkpointing
    set_checkpointing(model, False)
    parts = [model.unet, *model.text_encoders]
    try:
        batch, class_batch = read_batch(session, draws)
        kept = KeptBytes(p for part in parts for p in part.parameters())
        with kept, session.step_autocast():
            if session.split_pairs and (batch.paired or class_batch is not None):
                residuals(model, session.family, batch, batch.chosen_rows)
            else:
                residuals(model, session.family, batch)
                if class_batch is not None:
                    residuals(model, session.family, class_batch)
    finally:
        before.restore()
        set_checkpointing(model, was_on)
    trained = sum(p.nbytes for p in session.parameters)
    return used_bytes(session.accelerator.device) + round(WORKING * kept.bytes) + 3 * trained
