"""Frozen weights in another form than they are used in: fewer bits, and away from the device.

A layer whose weight is stored turns it back for the forward pass and once more for the backward pass, and keeps nothing
in between, so what is resident does not depend on gradient checkpointing. Nothing here is trained: only the gradient
with respect to the layer's input is computed. The class of a layer is changed in place, so peft's wrappers around it,
put there before or after, do not notice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv2d_input

from .errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .offload import Block

Form = Literal["full", "int8", "nf4", "fp8"]
NF4_BLOCK = 64  # weights that share one scale, as in the QLoRA paper (Dettmers et al. 2023, section 3)
_FP8_LARGEST = 448.0  # of float8_e4m3fn
_INSIDE = ("down_blocks", "mid_block", "up_blocks")  # the layers around them are few, small and sensitive
_UNITS = ("BasicTransformerBlock", "ResnetBlock2D")  # what is brought to the device as one


@dataclass(frozen=True)
class StoredWeight:
    """A weight in the form it is kept in.

    Attributes:
        form: how it is kept.
        tensors: "full": the weight. "int8" and "fp8": values and one float32 scale per output. "nf4": packed values and
            one float32 scale per 64 weights.
        shape, dtype: of the weight when it is used.
    """

    form: Form
    tensors: tuple[Tensor, ...]
    shape: torch.Size
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return sum(t.nbytes for t in self.tensors)

    def moved(self, tensors: tuple[Tensor, ...]) -> StoredWeight:
        """The same with its tensors elsewhere."""
        return StoredWeight(self.form, tensors, self.shape, self.dtype)

    def unpack(self) -> Tensor:
        """The weight as it is used, on the device of its tensors."""
        if self.form == "full":
            return self.tensors[0]
        values, scale = self.tensors
        if self.form == "nf4":
            from bitsandbytes.functional import QuantState, dequantize_4bit

            state = QuantState(scale, shape=self.shape, blocksize=NF4_BLOCK, quant_type="nf4", dtype=self.dtype)
            return dequantize_4bit(values, state)
        return (values.float() * scale.view(-1, *[1] * (len(self.shape) - 1))).to(self.dtype)


def store_weight(weight: Tensor, form: Form) -> StoredWeight:
    """Put a weight [out, in, ...] into a form, on the device where it is.

    Raises:
        ConfigError: this form cannot be made here.
    """
    weight = weight.detach()
    tensors: tuple[Tensor, ...] = (weight,)
    if form == "fp8":
        scale = weight.flatten(1).float().abs().amax(1).clamp_min(1e-12) / _FP8_LARGEST
        scaled = weight.float() / scale.view(-1, *[1] * (weight.ndim - 1))
        tensors = (scaled.to(torch.float8_e4m3fn), scale)
    elif form in ("int8", "nf4"):
        functions = _bitsandbytes(form)
        if form == "nf4":
            values, state = functions.quantize_4bit(weight.contiguous(), blocksize=NF4_BLOCK, quant_type="nf4")
            tensors = (values, state.absmax)
        else:
            values, largest, _ = functions.int8_vectorwise_quant(weight.half())
            tensors = (values, largest.float() / 127)
    return StoredWeight(form, tensors, weight.shape, weight.dtype)


def _bitsandbytes(form: str) -> Any:
    try:
        from bitsandbytes import functional as functions
    except Exception as error:  # it fails in many ways where its native library does not fit
        raise ConfigError(
            f"memory.base_precision {form} needs bitsandbytes, which does not load here ({error}). Install it "
            "(pip install bitsandbytes), or set memory.base_precision to fp8 or full."
        ) from error
    return functions


class _Frozen:
    """What a layer with a stored weight has beside its bias."""

    stored: StoredWeight | None  # None while a block keeps it
    block: Block | None
    place: int  # in the block

    @property
    def weight(self) -> Tensor:
        """The weight as it is used; made anew at every access."""
        stored = self.stored
        if stored is None:
            assert self.block is not None
            stored = self.block.weights()[self.place]
        return stored.unpack()


class StoredLinear(_Frozen, nn.Linear):  # pyright: ignore[reportIncompatibleVariableOverride]
    """A frozen linear layer with a stored weight."""

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Linear`."""
        return _Linear.apply(input, self, self.bias)


class StoredConv2d(_Frozen, nn.Conv2d):  # pyright: ignore[reportIncompatibleVariableOverride]
    """A frozen convolution with a stored weight."""

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Conv2d` with zeros around the image."""
        return _Conv2d.apply(input, self, self.bias)


class _Linear(torch.autograd.Function):
    """y = x W' + b, with W made again for dL/dx = dL/dy W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: StoredLinear, bias: Tensor | None) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return functional.linear(x, layer.weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        weight = ctx.layer.weight
        return grads[0].to(weight.dtype).matmul(weight).to(ctx.dtype), None, None


class _Conv2d(torch.autograd.Function):
    """y = W * x + b, with W made again for dL/dx."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: StoredConv2d, bias: Tensor | None) -> Tensor:
        ctx.layer, ctx.dtype, ctx.size = layer, x.dtype, x.shape
        return functional.conv2d(
            x, layer.weight, bias, layer.stride, _numbers(layer.padding), layer.dilation, layer.groups
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        layer, weight = ctx.layer, ctx.layer.weight
        gradient = conv2d_input(
            ctx.size, weight, grads[0].to(weight.dtype), layer.stride, layer.padding, layer.dilation, layer.groups
        )
        return gradient.to(ctx.dtype), None, None


def _numbers(padding: str | tuple[int, ...]) -> tuple[int, ...]:
    assert not isinstance(padding, str)  # `storable_layers` leaves those out
    return padding


def storable_layers(unet: nn.Module) -> dict[str, nn.Module]:
    """The frozen linear layers and convolutions inside the denoiser's blocks, by their names without peft's."""
    adapters = set(_adapter_parts(unet))
    found: dict[str, nn.Module] = {}
    for name, layer in unet.named_modules():
        if name.split(".")[0] not in _INSIDE or name in adapters:
            continue
        plain = type(layer) is nn.Linear or (
            type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        )
        if isinstance(layer, StoredLinear | StoredConv2d) or (plain and not _trained(layer)):
            found[name.replace(".base_layer", "")] = layer
    return found


def _trained(layer: nn.Module) -> bool:
    return any(p.requires_grad for p in layer.parameters())


def _adapter_parts(unet: nn.Module) -> Iterator[str]:
    """Names of what peft has added, frozen or not."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in unet.named_modules():
        if isinstance(layer, BaseTunerLayer):
            inside: nn.Module = layer  # pyright: ignore[reportAssignmentType]
            for inner, _ in inside.named_modules():
                if inner and inner.split(".")[0] != "base_layer":
                    yield f"{name}.{inner}"


def keep_as(layer: nn.Module, stored: StoredWeight, block: Block | None = None) -> None:
    """Let a linear layer or convolution keep its weight as `stored`, or as part of a block that comes and goes."""
    if type(layer) in (nn.Linear, nn.Conv2d):
        del layer._parameters["weight"]
        new: Any = StoredLinear if type(layer) is nn.Linear else StoredConv2d
        layer.__class__ = new
    assert isinstance(layer, StoredLinear | StoredConv2d)
    layer.block = block
    layer.stored = None if block is not None else stored
    layer.place = 0 if block is None else block.add(stored)


def form_of(layer: nn.Module, precision: Form) -> Form:
    """The form of a layer's weight at a `memory.base_precision`: convolutions are not kept in int8 or nf4."""
    return "full" if precision in ("int8", "nf4") and isinstance(layer, nn.Conv2d) else precision


def blocks_of(unet: nn.Module) -> list[nn.Module]:
    """The blocks that are brought to the device as one; most of the denoiser's weights are in them."""
    return [module for module in unet.modules() if type(module).__name__ in _UNITS]


def unit_of(unet: nn.Module, name: str) -> str:
    """The name of the block that a layer is brought to the device with."""
    parts = name.split(".")
    for length in range(1, len(parts)):
        prefix = ".".join(parts[:length])
        if type(unet.get_submodule(prefix)).__name__ in _UNITS:
            return prefix
    return name
