"""The frozen denoiser in shares: each process keeps a part of every block and fetches the rest when the block computes.

torch's `fully_shard` (FSDP2) does it. The LoRA is not shared: every process has all of it, and its gradients are
averaged as without shares. What follows from it is that every forward and backward pass is a matter of all processes:
each must go through as many as the others, in the same order. A training step sees to that itself (`backward.py`). What
the main process does by itself (measures, pictures, the proof of an export) it does in `main_work`, in which the others
go through an empty pass for each of its own.
"""

from __future__ import annotations

import logging
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .errors import ConfigError
from .frozen import StoredConv2d, StoredLinear, blocks_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from accelerate import Accelerator
    from torch import Tensor

    from .config import TrainConfig
    from .memory_plan import Plan
    from .session import Session

logger = logging.getLogger(__name__)

_DONE, _PASS, _WEIGHT = 0, 1, 2  # what the main process tells the others; 2 + k: the weight of layer k


class SharedBase:
    """A denoiser whose frozen weights are shared among the processes.

    Attributes:
        unet: the denoiser.
        whole_bytes: of all frozen weights.
        held_bytes: what of them this process keeps.
    """

    def __init__(self, unet: nn.Module, device: torch.device, main: bool, empty_pass: Callable[[], object]) -> None:
        """Share the frozen weights; all processes call it at the same time.

        Args:
            unet: with its adapter, on the CPU or on the device.
            device: where it computes.
            main: whether this is the main process.
            empty_pass: one forward pass without gradient, on anything.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self.unet, self._device, self._main, self._empty_pass = unet, device, main, empty_pass
        self._leads = False
        own = _adapter_parameters(unet)
        self.whole_bytes = sum(p.nbytes for p in unet.parameters() if p not in own)
        mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
        # The root, too, gives its weights back after each pass: then nothing is ever whole between two of them, in
        # any process, and whoever reads weights there finds the same everywhere.
        for module in (*blocks_of(unet), unet):
            fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=own)
        for parameter in own:
            parameter.data = parameter.data.to(device)
        self._layers = [m for m in unet.modules() if is_shared(m._parameters.get("weight"))]
        self._numbers = {id(layer): number for number, layer in enumerate(self._layers)}
        for layer in self._layers:
            layer.whole_weight = lambda layer=layer: self._whole_weight(layer)  # pyright: ignore
        self.held_bytes = sum(p.to_local().nbytes for p in unet.parameters() if is_shared(p))  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        unet.register_forward_pre_hook(self._announce, prepend=True)

    # --- what the main process does by itself ------------------------------------------------------------------------

    @contextmanager
    def led(self) -> Iterator[None]:
        """Work of the main process alone; an error in it ends the run, because nobody knows how far a pass was."""
        outermost, self._leads = not self._leads, True
        try:
            yield
        finally:
            if outermost:
                self._leads = False
        if outermost:
            self._tell(_DONE)

    def follow(self) -> None:
        """In another process: take part in whatever the main one does in `led`."""
        while (told := self._hear()) != _DONE:
            if told == _PASS:
                self._empty_pass()
            else:
                _gather(self._layers[told - _WEIGHT])

    def _announce(self, *_: object) -> None:
        if self._leads:
            self._tell(_PASS)

    def _whole_weight(self, layer: nn.Module) -> Tensor:
        """A layer's weight, whole; the main process asks for it in `led`, or all do together."""
        if self._leads:
            self._tell(_WEIGHT + self._numbers[id(layer)])
        return _gather(layer)

    def _tell(self, what: int) -> None:
        torch.distributed.broadcast(torch.tensor([what], device=self._device), 0)

    def _hear(self) -> int:
        heard = torch.zeros(1, dtype=torch.int64, device=self._device)
        torch.distributed.broadcast(heard, 0)
        return int(heard.item())


@contextmanager
def main_work(session: Session) -> Iterator[bool]:
    """Work of the main process alone, in which the base may be used; all processes come here. Whether this is it."""
    main, shared = session.accelerator.is_main_process, session.shared
    if shared is None:
        yield main
    elif main:
        with shared.led():
            yield True
    else:
        shared.follow()
        yield False


def is_shared(weight: Any) -> bool:
    """Whether a tensor is one process's part of a weight."""
    return hasattr(weight, "full_tensor")  # a DTensor, whose import takes a second


def _gather(layer: nn.Module) -> Tensor:
    weight: Any = layer.weight
    return weight.full_tensor() if is_shared(weight) else weight


def _adapter_parameters(unet: nn.Module) -> set[nn.Parameter]:
    """Everything that adapters have brought, trained or not."""
    found: set[nn.Parameter] = set()
    for layer in unet.modules():
        if isinstance(layer, BaseTunerLayer):
            found |= set(layer.parameters()) - set(layer.get_base_layer().parameters())
    return found


# --- whether a run's base is shared ----------------------------------------------------------------------------------


def take_from_accelerate() -> bool:
    """Whether `accelerate launch` was given an FSDP configuration; it is then taken out of this process's environment.

    What we make of it is `SharedBase`. Left there, accelerate would want to wrap the model itself, and transformers
    would load empty weights in all processes but the first.

    Raises:
        ConfigError: it asks for something that there is not.
    """
    if os.environ.pop("ACCELERATE_USE_FSDP", "").lower() != "true":
        return False
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    asked = {name: os.environ.get(f"FSDP_{name}", "").lower() for name in _FSDP}
    for name, (wanted, advice) in _FSDP.items():
        if asked[name] != wanted:
            raise ConfigError(
                f"The accelerate configuration says fsdp_{name.lower()}: {asked[name] or 'nothing'}. {advice}, as in "
                "docs/accelerate/fsdp.yaml."
            )
    return True


_FSDP = {
    "VERSION": ("2", "The frozen model is shared by FSDP2: set it to 2"),
    "RESHARD_AFTER_FORWARD": ("true", "Without, every process would keep the whole model: set it to true"),
    "OFFLOAD_PARAMS": ("false", "A shared model is not offloaded as well: set it to false"),
    "ACTIVATION_CHECKPOINTING": ("false", "training.gradient_checkpointing decides that: set it to false"),
}


def with_shared_base(config: TrainConfig, accelerator: Accelerator, from_accelerate: bool) -> TrainConfig:
    """The settings with what a shared base allows in place of "auto"; as they are where the base is not shared.

    Raises:
        ConfigError: they ask for something that a shared base cannot do.
    """
    if accelerator.num_processes == 1 or not (config.memory.shard_base or from_accelerate):
        return config.model_copy(update={"memory": config.memory.model_copy(update={"shard_base": False})})
    memory = config.memory
    asked = {
        f'memory.base_precision "{memory.base_precision}"': memory.base_precision not in ("auto", "full"),
        'memory.offload "on"': memory.offload == "on",
        "memory.compile": memory.compile,
        "memory.channels_last": memory.channels_last,
        'adapter.type "dora", whose lengths are those of whole weights': config.adapter.type == "dora",
        'method.type "dreambooth", whose class images the whole model draws first': config.method.type == "dreambooth",
    }
    odd = [what for what, is_asked in asked.items() if is_asked]
    if odd:
        raise ConfigError(
            f"A model that is shared among the processes (memory.shard_base, or FSDP) cannot go with {odd[0]}. Set one "
            "or the other back; with several processes and a whole model in each, all of them work."
        )
    fixed = {"shard_base": True, "base_precision": "full", "offload": "off"}
    return config.model_copy(update={"memory": memory.model_copy(update=fixed)})


def require_plain(unet: nn.Module, plan: Plan) -> None:
    """Refuse a base that is not made of plain weights.

    Raises:
        ConfigError: it was loaded in fewer bits, or the run was begun with it in fewer bits or partly away.
    """
    if plan.base_precision != "full" or plan.offload_share:
        raise ConfigError(
            f"This run was begun with its model in {plan.base_precision} and {plan.offload_share:.0%} of it offloaded, "
            "without shares. Resume it with one process or docs/accelerate/ddp.yaml, or start a new one."
        )
    packed = [m for m in unet.modules() if isinstance(m, StoredLinear | StoredConv2d)]
    if packed or not all(p.is_floating_point() for p in unet.parameters()):
        raise ConfigError(
            "memory.shard_base needs the model in full precision; this one has packed weights. Give model.path another "
            "file, or switch memory.shard_base off."
        )
