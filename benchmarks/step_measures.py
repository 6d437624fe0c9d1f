"""What a step costs: operations counted on the meta device, the device's matrix-multiply rate, memory, intervals."""

from __future__ import annotations

import random
import statistics
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from step_models import SIZES, build_part, part_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

LORA_LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out"]


@dataclass(frozen=True)
class Operations:
    """Floating-point operations (two per multiply-add) for one image or prompt.

    Attributes:
        unet_forward: of the UNet with a LoRA of rank 8 on the attention layers.
        unet_backward: down to the LoRA.
        vae: encoding one picture.
        text: encoding one prompt with both encoders.
    """

    unet_forward: int
    unet_backward: int
    vae: int
    text: int

    def as_dict(self) -> dict[str, int]:
        """By name."""
        return asdict(self)


def count_operations(size: str) -> Operations:
    """Run the size's model on the meta device, which computes nothing and needs no memory."""
    from peft import LoraConfig

    resolution = SIZES[size].resolution
    meta = torch.device("meta")
    with meta:
        unet, vae = build_part(size, "unet"), build_part(size, "vae")
        encoders = [build_part(size, part) for part in ("text_encoder", "text_encoder_2")]
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=8, target_modules=LORA_LAYERS, init_lora_weights="gaussian"))
    config = part_config(size, "unet")
    side = resolution // 2 ** (len(part_config(size, "vae")["block_out_channels"]) - 1)
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    conditions = {"text_embeds": torch.zeros(1, pooled, device=meta), "time_ids": torch.zeros(1, 6, device=meta)}
    states = torch.zeros(1, 77, config["cross_attention_dim"], device=meta)
    noisy, timesteps = torch.zeros(1, 4, side, side, device=meta), torch.zeros(1, dtype=torch.long, device=meta)
    with FlopCounterMode(display=False) as counter:
        output = unet(noisy, timesteps, states, added_cond_kwargs=conditions, return_dict=False)[0]
        forward = counter.get_total_flops()
        output.pow(2).mean().backward()
        backward = counter.get_total_flops() - forward
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        vae.encode(torch.zeros(1, 3, resolution, resolution, device=meta))
        picture = counter.get_total_flops()
        for encoder in encoders:
            encoder(torch.zeros(1, 77, dtype=torch.long, device=meta), output_hidden_states=True)
    return Operations(forward, backward, picture, counter.get_total_flops() - picture)


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """The best of several large square products, operations per second."""
    n = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    clock = time.process_time if own_time(device) else time.perf_counter
    best, until = 0.0, time.perf_counter() + seconds
    torch.mm(a, b)
    while True:
        synchronize(device)
        start = clock()
        torch.mm(a, b)
        synchronize(device)
        best = max(best, 2 * n**3 / (clock() - start))
        if time.perf_counter() > until:
            return best


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class LiveTensors(TorchDispatchMode):
    """Inside, counts the bytes of the tensors that torch makes and that are still alive.

    What torch.cuda.max_memory_allocated counts, for the CPU: without what kernels take for themselves, and without
    what was there before.

    Attributes:
        bytes, peak: now, and at most so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._known: dict[int, tuple[weakref.ref[Any], int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in before:
                    self._track(storage)
        return result

    def _track(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._known:
            return
        size = storage.nbytes()

        def freed(_: Any) -> None:
            self.bytes -= self._known.pop(key)[1]

        self._known[key] = (weakref.ref(storage, freed), size)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)


def process_peak_bytes() -> int | None:
    """The largest resident size of this process since the last `reset_process_peak`; None where it is not told."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    lines = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
    return int(lines[0].split()[1]) * 1024 if lines else None


def reset_process_peak() -> None:
    """Count from now on (Linux)."""
    file = Path("/proc/self/clear_refs")
    if file.exists():
        file.write_text("5")


def alternate(arms: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every arm in every round: A B C A B C ..., after one round that does not count.

    On the CPU with one thread these are seconds of this process, without what other programs take in between.
    """
    clock = time.process_time if own_time(device) else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        for name, step in arms.items():
            synchronize(device)
            start = clock()
            step()
            synchronize(device)
            if number:
                times[name].append(clock() - start)
    return times


def own_time(device: torch.device) -> bool:
    """Whether the process's own time is that of the arithmetic: with several threads it would count their waiting."""
    return device.type == "cpu" and torch.get_num_threads() == 1


def ratio(numerator: Sequence[float], denominator: Sequence[float], draws: int = 2000) -> dict[str, float]:
    """Median over the rounds of the ratio of two arms, with a bootstrap interval of 95 per cent."""
    ratios = [a / b for a, b in zip(numerator, denominator, strict=True)]
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(ratios, k=len(ratios))) for _ in range(draws))
    return {
        "median": statistics.median(ratios),
        "low": medians[int(0.025 * draws)],
        "high": medians[int(0.975 * draws) - 1],
    }
