"""LoRA files: the tensors and header of the kohya and diffusers layouts, written and read without a model."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from .errors import ExportError
from .lora_keys import KOHYA, some

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from torch import Tensor

Layout = Literal["kohya", "diffusers"]
Precision = Literal["fp32", "fp16", "bf16"]

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ADAPTER_METADATA = "lora_adapter_metadata"  # diffusers reads the adapter's configuration from this header entry
DIFFUSERS = "unet."
_SUFFIXES = {"kohya": (".lora_down.weight", ".lora_up.weight"), "diffusers": (".lora_A.weight", ".lora_B.weight")}


@dataclass(frozen=True)
class LoraModule:
    """One adapted layer, whose weight changes by alpha / rank * up @ down.

    Attributes:
        name: of the layer: its path in the UNet, or its name in a file.
        down: [rank, in] or, for a convolution, [rank, in, k, k].
        up: [out, rank] or [out, rank, 1, 1].
        alpha: true scale; rank-stabilised LoRA has alpha * sqrt(rank) here.
    """

    name: str
    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """Width of the update."""
        return self.down.shape[0]


@dataclass(frozen=True)
class LoraFile:
    """What a LoRA file says about itself.

    Attributes:
        path: of the file.
        layout: "kohya" or "diffusers".
        precision: of the stored weights.
        ranks: width per layer, under the file's names without prefix and suffix of the layout's keys.
        alphas: scale per layer.
        metadata: the header's entries.
    """

    path: Path
    layout: Layout
    precision: str
    ranks: dict[str, int]
    alphas: dict[str, float]
    metadata: dict[str, str]

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the adapted layers."""
        return tuple(self.ranks)


def stored_form(module: LoraModule, alpha: float, dtype: torch.dtype) -> LoraModule:
    """The weights as a file keeps them that gives this layer the scale `alpha`; the product stays the same."""
    up = module.up if alpha == module.alpha else module.up * (module.alpha / alpha)
    return LoraModule(module.name, module.down.to(dtype), up.to(dtype), alpha)


def common_alpha(modules: Iterable[LoraModule]) -> float:
    """The scale that most layers have."""
    return Counter(m.alpha for m in modules).most_common(1)[0][0]


def kohya_tensors(
    modules: Iterable[LoraModule], precision: Precision, kohya_prefix: Callable[[str], str]
) -> dict[str, Tensor]:
    """Keys and tensors of the kohya layout.

    All layers get one alpha, in float32: diffusers 0.42 drops the alpha of an attention layer that differs from the
    others', without a word. Where a layer's own alpha differs, the factor goes into its up weights.
    """
    modules = list(modules)
    alpha = common_alpha(modules)
    tensors: dict[str, Tensor] = {}
    for module in (stored_form(m, alpha, DTYPES[precision]) for m in modules):
        prefix = kohya_prefix(module.name)
        tensors[f"{prefix}.lora_down.weight"] = module.down.contiguous()
        tensors[f"{prefix}.lora_up.weight"] = module.up.contiguous()
        tensors[f"{prefix}.alpha"] = torch.tensor(alpha)
    return tensors


def diffusers_tensors(modules: Iterable[LoraModule], precision: Precision) -> dict[str, Tensor]:
    """Keys and tensors of the diffusers layout; the scales are in `adapter_metadata`."""
    tensors: dict[str, Tensor] = {}
    for module in (stored_form(m, m.alpha, DTYPES[precision]) for m in modules):
        tensors[f"{DIFFUSERS}{module.name}.lora_A.weight"] = module.down.contiguous()
        tensors[f"{DIFFUSERS}{module.name}.lora_B.weight"] = module.up.contiguous()
    return tensors


def adapter_metadata(modules: Iterable[LoraModule]) -> str:
    """The arguments of peft's LoraConfig that rebuild this adapter, as diffusers reads them from the header.

    Only what the weights need: a newer or older peft refuses arguments that it does not know.
    """
    modules = list(modules)
    alpha = common_alpha(modules)
    rank = Counter(m.rank for m in modules).most_common(1)[0][0]
    config = {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{m.name}": m.rank for m in modules if m.rank != rank},
        "alpha_pattern": {f"^{m.name}": m.alpha for m in modules if m.alpha != alpha},
        "target_modules": sorted(m.name for m in modules),
    }
    return json.dumps({DIFFUSERS + k: v for k, v in config.items()}, sort_keys=True)


def serialise(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """The file's bytes, with the hashes of its tensors added to the header.

    `sshs_model_hash` and `sshs_legacy_hash` are computed as kohya's train_util.precalculate_safetensors_hashes does
    it: over a file whose header has the `ss_` entries only, so that editing a title does not change them.
    """
    training = {k: v for k, v in metadata.items() if k.startswith("ss_")}
    plain = save(tensors, training)
    model_hash = hashlib.sha256(plain[8 + int.from_bytes(plain[:8], "little") :]).hexdigest()
    legacy_hash = hashlib.sha256(plain[0x100000:0x110000]).hexdigest()[:8]
    hashes = {
        "sshs_model_hash": model_hash,
        "sshs_legacy_hash": legacy_hash,
        "modelspec.hash_sha256": f"0x{model_hash}",
    }
    return save(tensors, {"format": "pt", **metadata, **hashes})


def read_lora(path: Path) -> LoraFile:
    """Read names, ranks, scales and metadata of a LoRA file; the weights stay on disk.

    Raises:
        ExportError: the file is missing, damaged, or not a LoRA of a UNet in one of the two layouts.
    """
    with _opened(path) as file:
        metadata: dict[str, str] = file.metadata() or {}
        keys = list(file.keys())
        layout = _layout(path, keys)
        names = _names(path, keys, layout)
        down, _ = _SUFFIXES[layout]
        prefix = "" if layout == "kohya" else DIFFUSERS
        shapes = {n: file.get_slice(f"{prefix}{n}{down}") for n in names}
        ranks = {n: int(s.get_shape()[0]) for n, s in shapes.items()}
        stored = {f"{n}.alpha": float(file.get_tensor(f"{n}.alpha")) for n in names if f"{n}.alpha" in keys}
        precision = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}.get(shapes[names[0]].get_dtype(), "other")
    if layout == "kohya":
        alphas = {n: stored.get(f"{n}.alpha", float(rank)) for n, rank in ranks.items()}
    else:
        alphas = _diffusers_alphas(metadata, ranks)
    return LoraFile(path, layout, precision, ranks, alphas, metadata)


def read_modules(file: LoraFile) -> dict[str, LoraModule]:
    """The weights of a file, as stored, on the CPU; copied, so that the file can be replaced meanwhile."""
    down, up = _SUFFIXES[file.layout]
    prefix = "" if file.layout == "kohya" else DIFFUSERS
    modules: dict[str, LoraModule] = {}
    with _opened(file.path) as source:
        for name, alpha in file.alphas.items():
            weights = [source.get_tensor(f"{prefix}{name}{suffix}").clone() for suffix in (down, up)]
            modules[name] = LoraModule(name, weights[0], weights[1], alpha)
    return modules


def file_keys(path: Path) -> set[str]:
    """Every key of a safetensors file.

    Raises:
        ExportError: the file is missing or damaged.
    """
    with _opened(path) as file:
        return set(file.keys())


def lora_info(file: LoraFile) -> str:
    """A few lines for a person: layers, rank, scale, training and metadata of a LoRA file."""
    ranks, alphas = sorted(set(file.ranks.values())), sorted(set(file.alphas.values()))
    lines = [
        f"{file.path.name}: {file.layout} layout, {file.precision}, {len(file.modules)} layers",
        f"rank {', '.join(map(str, ranks))}   alpha {', '.join(f'{a:g}' for a in alphas)}",
    ]
    hidden = {ADAPTER_METADATA, "modelspec.thumbnail", "format"}
    lines += [f"{key}: {file.metadata[key]}" for key in sorted(file.metadata) if key not in hidden]
    if "modelspec.thumbnail" in file.metadata:
        lines.append("modelspec.thumbnail: yes")
    return "\n".join(lines)


def _opened(path: Path) -> Any:
    try:
        return safe_open(str(path), framework="pt")
    except (OSError, SafetensorError) as error:
        raise ExportError(f"Cannot read the LoRA {path}: {error}. Export the run again: mapo export RUN.") from error


def _layout(path: Path, keys: list[str]) -> Layout:
    if keys and all(k.startswith(KOHYA) for k in keys):
        return "kohya"
    if keys and all(k.startswith(DIFFUSERS) for k in keys):
        return "diffusers"
    raise ExportError(
        f"{path} is not a LoRA of a UNet as this program writes it: expected keys {KOHYA}... or {DIFFUSERS}..., found "
        f"{some(keys, 3) or 'none'}. Give a file that `mapo export` wrote."
    )


def _names(path: Path, keys: list[str], layout: Layout) -> list[str]:
    """Layers of a file; each must have its two tensors, and no key may be left over."""
    down, up = _SUFFIXES[layout]
    prefix = "" if layout == "kohya" else DIFFUSERS
    names = [k.removeprefix(prefix).removesuffix(down) for k in sorted(keys) if k.endswith(down)]
    expected = {f"{prefix}{n}{suffix}" for n in names for suffix in (down, up)}
    optional = {f"{n}.alpha" for n in names} if layout == "kohya" else set()
    odd = (set(keys) - expected - optional) | (expected - set(keys))
    if odd or not names:
        raise ExportError(f"{path}: incomplete or unknown: {some(odd)}. Export the run again: mapo export RUN.")
    return names


def _diffusers_alphas(metadata: dict[str, str], ranks: dict[str, int]) -> dict[str, float]:
    """As diffusers takes them from the header; without it every scale is 1."""
    if ADAPTER_METADATA not in metadata:
        return {n: float(rank) for n, rank in ranks.items()}
    config = json.loads(metadata[ADAPTER_METADATA])
    default, pattern = config[f"{DIFFUSERS}lora_alpha"], config.get(f"{DIFFUSERS}alpha_pattern", {})
    return {n: float(pattern.get(f"^{n}", default)) for n in ranks}
