"""A LoRA's linear layers in one function: the update is added inside the matrix product.

peft computes `base(x) + B(A(x)) * scale` as separate steps: it copies x to the LoRA's float32 and, under autocast,
back again, once for each layer that reads the same x; it makes the update, the scaled update and the sum as tensors of
their own; and autograd adds the two gradients of x in one more. Here the products accumulate into one another, and of
x only the tensor that was there anyway is kept for the backward pass. The mathematics is peft's.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional


def fuse_lora(module: nn.Module) -> int:
    """Let every LoRA on a linear layer compute this way; returns how many there are.

    The layers stay peft's in every other respect: names, weights, adapters, switches. What is not plain (DoRA, dropout
    while training, several active adapters) is computed by peft as before. Where the base layer is not a plain one,
    because its weights are packed or come and go, it computes by itself and only the update is ours.
    """
    layers = [m for m in module.modules() if type(m) is Linear and isinstance(m.base_layer, nn.Linear)]
    for layer in layers:
        layer.__class__ = FusedLinear
    return len(layers)


def fully_fused(module: nn.Module) -> bool:
    """Whether every adapter in it computes this way, so that nothing in it needs autocast to mix precisions."""
    layers = [m for m in module.modules() if isinstance(m, BaseTunerLayer)]
    return all(
        isinstance(m, FusedLinear) and all(isinstance(d, nn.Identity) for d in m.lora_dropout.values()) for m in layers
    )


class FusedLinear(Linear):
    """peft's LoRA layer, faster where it is plain."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output for x [..., in] plus the adapter's update, [..., out]."""
        adapter = self._plain_adapter()
        if adapter is None or args or kwargs:
            return super().forward(x, *args, **kwargs)
        base: Any = self.base_layer
        down, up, scale = self.lora_A[adapter].weight, self.lora_B[adapter].weight, self.scaling[adapter]
        device = x.device.type
        if type(base) is not nn.Linear or _is_wrapped(base):
            output = base(x)
            with torch.autocast(device, enabled=False):
                parts = (part.to(output.dtype) for part in (x, down, up))
                return _LoraUpdate.apply(output, *parts, scale)  # pyright: ignore[reportReturnType]
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else base.weight.dtype
        with torch.autocast(device, enabled=False):
            x, bias = x.to(dtype), None if base.bias is None else base.bias.to(dtype)
            weights = base.weight.to(dtype), bias, down.to(dtype), up.to(dtype)
            return _LoraLinear.apply(x, *weights, scale)  # pyright: ignore[reportReturnType]

    def _plain_adapter(self) -> str | None:
        """The name of the only active adapter, if there is nothing special about it."""
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return None
        (adapter,) = self.active_adapters
        if adapter not in self.lora_A or adapter in self.lora_variant or self.lora_bias.get(adapter):
            return None
        dropout = self.lora_dropout[adapter]
        return adapter if isinstance(dropout, nn.Identity) or not self.training else None


def _is_wrapped(layer: nn.Module) -> bool:
    """Whether something happens around the layer's forward pass: offloading, casting of stored weights."""
    return bool("forward" in layer.__dict__ or layer._forward_hooks or layer._forward_pre_hooks)


class _LoraLinear(torch.autograd.Function):
    """y = x W' + b + s (x A') B' for x [..., in], W [out, in], A [rank, in], B [out, rank]; W and b are frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # [N, in]
        small = rows @ down.t()  # [N, rank]
        output = functional.linear(rows, weight, bias).addmm_(small, up.t(), alpha=scale)
        ctx.save_for_backward(x, small, weight, down, up)
        ctx.scale = scale
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, small, weight, down, up = ctx.saved_tensors
        gradient = gradients[0].reshape(-1, gradients[0].shape[-1])  # [N, out]
        small_gradient = (gradient @ up).mul_(ctx.scale)  # [N, rank]
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = (gradient @ weight).addmm_(small_gradient, down).view(x.shape)
        to_down = small_gradient.t() @ x.reshape(-1, x.shape[-1])
        to_up = (gradient.t() @ small).mul_(ctx.scale)
        return to_x, None, None, to_down, to_up, None


class _LoraUpdate(torch.autograd.Function):
    """y = z + s (x A') B' for z [..., out], x [..., in], A [rank, in], B [out, rank]."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
        small = x.reshape(-1, x.shape[-1]) @ down.t()  # [N, rank]
        ctx.save_for_backward(x, small, down, up)
        ctx.scale = scale
        return output.reshape(-1, output.shape[-1]).addmm(small, up.t(), alpha=scale).view(output.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, small, down, up = ctx.saved_tensors
        gradient = gradients[0].reshape(-1, gradients[0].shape[-1])  # [N, out]
        small_gradient = (gradient @ up).mul_(ctx.scale)  # [N, rank]
        to_x = (small_gradient @ down).view(x.shape) if ctx.needs_input_grad[1] else None
        to_down = small_gradient.t() @ x.reshape(-1, x.shape[-1])
        to_up = (gradient.t() @ small).mul_(ctx.scale)
        return gradients[0], to_x, to_down, to_up, None
