"""LoRA files: the tensors and header of the kohya and diffusers layouts, written and read without a model.

One class stands for one adapted layer of any kind: LoRA (rank-stabilised LoRA is LoRA with another alpha), DoRA, LoHa
and LoKr. Its tensors have the names of kohya and LyCORIS, which are those that ComfyUI reads.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from .components import TEXT_ENCODERS, part_of
from .errors import ExportError
from .lora_keys import KOHYA_PREFIXES, LYCORIS, some

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from torch import Tensor

Layout = Literal["kohya", "diffusers"]
Precision = Literal["fp32", "fp16", "bf16"]

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ADAPTER_METADATA = "lora_adapter_metadata"  # diffusers reads the adapter's configuration from this header entry
DIFFUSERS = "unet."
DORA_METADATA = "mapo.dora_scale"  # says how the lengths of a kohya file are meant
COMFYUI_LENGTHS = "comfyui"
_NAMES = {
    "kohya": {"lora_down": "lora_down.weight", "lora_up": "lora_up.weight", "dora_scale": "dora_scale"},
    "diffusers": {"lora_down": "lora_A.weight", "lora_up": "lora_B.weight", "dora_scale": "lora_magnitude_vector"},
}
_REQUIRED = {
    "lora": {"lora_down", "lora_up"},
    "dora": {"lora_down", "lora_up", "dora_scale"},
    "loha": {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
}
_LOKR = ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"}), ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"})


@dataclass(frozen=True)
class LoraModule:
    """One adapted layer.

    Attributes:
        name: of the layer: its full name (`components.full_name`), or its name in a file.
        weights: LoRA, whose weight changes by alpha / rank * up @ down: `lora_down` [rank, in] or, for a convolution,
            [rank, in, k, k], and `lora_up` [out, rank] or [out, rank, 1, 1]; DoRA also `dora_scale`, the length of each
            output [out]. LoHa: `hada_w1_a` [out, rank], `hada_w1_b` [rank, in k k], `hada_w2_a`, `hada_w2_b`. LoKr:
            `lokr_w1`, or `lokr_w1_a` and `lokr_w1_b`, and the same with `lokr_w2`.
        alpha: true scale; rank-stabilised LoRA has alpha * sqrt(rank) here.
        base: the layer's own weight in float32, which DoRA's lengths refer to; None where no model is at hand.
    """

    name: str
    weights: dict[str, Tensor]
    alpha: float
    base: Callable[[], Tensor] | None = None

    @property
    def kind(self) -> str:
        """ "lora", "dora", "loha" or "lokr"."""
        return kind_of(self.weights)

    @property
    def rank(self) -> int:
        """Width of the update; 1 for a LoKr that is not decomposed, which has no scale of its own."""
        return rank_of({name: tuple(tensor.shape) for name, tensor in self.weights.items()})

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the stored weights."""
        return next(t.dtype for n, t in self.weights.items() if n != "dora_scale")


def kind_of(names: Iterable[str]) -> str:
    """The kind of an adapter by the names of its tensors."""
    names = set(names)
    if "dora_scale" in names:
        return "dora"
    return "loha" if "hada_w1_a" in names else "lokr" if any(n.startswith("lokr") for n in names) else "lora"


def rank_of(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The number by which ComfyUI divides alpha."""
    for name in ("lora_down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
        if name in shapes:
            return int(shapes[name][0])
    return 1


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
        kind: "lora", "dora", "loha" or "lokr".
        tensors: names of each layer's tensors, as `LoraModule` has them.
    """

    path: Path
    layout: Layout
    precision: str
    ranks: dict[str, int]
    alphas: dict[str, float]
    metadata: dict[str, str]
    kind: str
    tensors: dict[str, tuple[str, ...]]

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the adapted layers."""
        return tuple(self.ranks)


def stored_form(module: LoraModule, alpha: float, dtype: torch.dtype) -> LoraModule:
    """The weights as a file keeps them that gives this layer the scale `alpha`; the update stays the same."""
    weights = dict(module.weights)
    whole = {"lokr_w1", "lokr_w2"} <= weights.keys()  # ComfyUI knows no scale for it
    factor = module.alpha / module.rank if whole else module.alpha / alpha
    if factor != 1:
        part = next(n for n in ("lora_up", "hada_w1_a", "lokr_w1", "lokr_w1_a") if n in weights)
        weights[part] = weights[part] * factor
    stored = {n: t if n == "dora_scale" else t.to(dtype) for n, t in weights.items()}
    return LoraModule(module.name, stored, 1.0 if whole else alpha, module.base)


def common_alpha(modules: Iterable[LoraModule]) -> float:
    """The scale that most layers have."""
    return Counter(m.alpha for m in modules).most_common(1)[0][0]


def kohya_tensors(
    modules: Iterable[LoraModule], precision: Precision, kohya_prefix: Callable[[str], str]
) -> dict[str, Tensor]:
    """Keys and tensors of the kohya layout, which is that of LyCORIS for its kinds.

    All LoRA layers get one alpha, in float32: diffusers 0.42 drops the alpha of an attention layer that differs from
    the others', without a word. Where a layer's own alpha differs, the factor goes into its up weights. A part of the
    model has its own common alpha.
    """
    modules = list(modules)
    tensors: dict[str, Tensor] = {}
    for part in dict.fromkeys(part_of(m.name) for m in modules):
        own = [m for m in modules if part_of(m.name) == part]
        alpha = common_alpha(own)
        for module in own:
            stored = stored_form(module, alpha if module.kind == "lora" else module.alpha, DTYPES[precision])
            if stored.kind == "dora":
                stored = with_comfyui_lengths(stored)
            prefix = kohya_prefix(module.name)
            for name, tensor in stored.weights.items():
                tensors[f"{prefix}.{_NAMES['kohya'].get(name, name)}"] = tensor.contiguous()
            tensors[f"{prefix}.alpha"] = torch.tensor(stored.alpha)
    return tensors


def with_comfyui_lengths(module: LoraModule, back: bool = False) -> LoraModule:
    """DoRA's lengths as ComfyUI's arithmetic needs them, [out, 1] or [out, 1, 1, 1], or `back` to plain ones, [out].

    ComfyUI (0.3.64 and 0.33.0, comfy/weight_adapter/base.py, weight_decompose) divides a length per output by the norm
    of the base weight, DoRA by that of the changed one. The quotient of the two norms makes up for it.
    """
    assert module.base is not None
    base = module.base()
    rows = base.flatten(1)
    changed = (base + lora_update(module, base.device).reshape(base.shape)).flatten(1)
    quotient = ((rows.norm(dim=1) + torch.finfo(torch.float32).eps) / changed.norm(dim=1)).cpu()
    lengths = module.weights["dora_scale"].float().flatten()
    shaped = lengths / quotient if back else (lengths * quotient).reshape(-1, *[1] * (base.ndim - 1))
    return replace(module, weights={**module.weights, "dora_scale": shaped})


def lora_update(module: LoraModule, device: torch.device | str = "cpu") -> Tensor:
    """alpha / rank * up @ down, [out, in k k] float32."""
    down, up = (module.weights[n].to(device, torch.float32).flatten(1) for n in ("lora_down", "lora_up"))
    return module.alpha / module.rank * up @ down


def diffusers_tensors(modules: Iterable[LoraModule], precision: Precision) -> dict[str, Tensor]:
    """Keys and tensors of the diffusers layout; the scales are in `adapter_metadata`."""
    tensors: dict[str, Tensor] = {}
    for module in (stored_form(m, m.alpha, DTYPES[precision]) for m in modules):
        weights = dict(module.weights)
        if "dora_scale" in weights and weights["lora_down"].ndim == 4:
            weights["dora_scale"] = weights["dora_scale"].reshape(1, -1, 1, 1)  # as peft keeps them
        for name, tensor in weights.items():
            tensors[f"{diffusers_name(module.name)}.{_NAMES['diffusers'][name]}"] = tensor.contiguous()
    return tensors


def diffusers_name(name: str) -> str:
    """A layer's name in the diffusers layout, from its full name."""
    return name if part_of(name) in TEXT_ENCODERS else DIFFUSERS + name


def expected_keys(module: LoraModule, layout: Layout, kohya_prefix: Callable[[str], str]) -> set[str]:
    """The keys of one layer in a file."""
    prefix = kohya_prefix(module.name) if layout == "kohya" else diffusers_name(module.name)
    keys = {f"{prefix}.{_NAMES[layout].get(name, name)}" for name in module.weights}
    return keys | ({f"{prefix}.alpha"} if layout == "kohya" else set())


def adapter_metadata(modules: Iterable[LoraModule]) -> str:
    """The arguments of peft's LoraConfig that rebuild this adapter, as diffusers reads them from the header.

    Only what the weights need: a newer or older peft refuses arguments that it does not know.
    """
    modules = list(modules)
    entries: dict[str, Any] = {}
    for part in dict.fromkeys(part_of(m.name) for m in modules):
        own = {_metadata_name(m.name): m for m in modules if part_of(m.name) == part}
        start = "^" if part not in TEXT_ENCODERS else ""
        alpha = common_alpha(own.values())
        rank = Counter(m.rank for m in own.values()).most_common(1)[0][0]
        config: dict[str, Any] = {
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": {f"{start}{n}": m.rank for n, m in own.items() if m.rank != rank},
            "alpha_pattern": {f"{start}{n}": m.alpha for n, m in own.items() if m.alpha != alpha},
            "target_modules": sorted(own),
        }
        if any(m.kind == "dora" for m in own.values()):
            config["use_dora"] = True
        entries |= {f"{part}.{k}": v for k, v in config.items()}
    return json.dumps(entries, sort_keys=True)


def _metadata_name(name: str) -> str:
    """A layer as peft finds it in a text encoder with the level `text_model` and in one without."""
    part = part_of(name)
    return name.removeprefix(f"{part}.text_model.") if part in TEXT_ENCODERS else name


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
        ExportError: the file is missing, damaged, or not a LoRA in one of the two layouts.
    """
    with _opened(path) as file:
        metadata: dict[str, str] = file.metadata() or {}
        keys = list(file.keys())
        layout = _layout(path, keys)
        tensors = _tensors(path, keys, layout)
        slices = {n: {t: file.get_slice(_key(layout, n, t)) for t in names} for n, names in tensors.items()}
        ranks = {n: rank_of({t: tuple(s.get_shape()) for t, s in own.items()}) for n, own in slices.items()}
        stored = {f"{n}.alpha": float(file.get_tensor(f"{n}.alpha")) for n in tensors if f"{n}.alpha" in keys}
        first = next(iter(slices.values()))
        kind_of_number = next(s for t, s in first.items() if t != "dora_scale").get_dtype()
    precision = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}.get(kind_of_number, "other")
    if layout == "kohya":
        alphas = {n: stored.get(f"{n}.alpha", float(rank)) for n, rank in ranks.items()}
    else:
        alphas = _diffusers_alphas(metadata, ranks)
    kinds = {kind_of(names) for names in tensors.values()}
    if len(kinds) > 1:
        raise ExportError(f"{path} mixes {' and '.join(sorted(kinds))} layers, which no program here writes.")
    return LoraFile(path, layout, precision, ranks, alphas, metadata, kinds.pop(), tensors)


def read_modules(file: LoraFile) -> dict[str, LoraModule]:
    """The weights of a file, as stored, on the CPU; copied, so that the file can be replaced meanwhile."""
    modules: dict[str, LoraModule] = {}
    with _opened(file.path) as source:
        for name, alpha in file.alphas.items():
            weights = {t: source.get_tensor(_key(file.layout, name, t)).clone() for t in file.tensors[name]}
            if file.layout == "diffusers" and "dora_scale" in weights:
                weights["dora_scale"] = weights["dora_scale"].flatten()
            modules[name] = LoraModule(name, weights, alpha)
    return modules


def file_keys(path: Path) -> set[str]:
    """Every key of a safetensors file.

    Raises:
        ExportError: the file is missing or damaged.
    """
    with _opened(path) as file:
        return set(file.keys())


_TITLES = {"lora": "", "dora": "DoRA, ", "loha": "LoHa, ", "lokr": "LoKr, "}


def lora_info(file: LoraFile) -> str:
    """A few lines for a person: layers, rank, scale, training and metadata of a LoRA file."""
    ranks, alphas = sorted(set(file.ranks.values())), sorted(set(file.alphas.values()))
    lines = [
        f"{file.path.name}: {_TITLES[file.kind]}{file.layout} layout, {file.precision}, {len(file.modules)} layers",
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
    if keys and all(k.startswith(KOHYA_PREFIXES) for k in keys):
        return "kohya"
    if keys and all(k.startswith((DIFFUSERS, *(f"{t}." for t in TEXT_ENCODERS))) for k in keys):
        return "diffusers"
    raise ExportError(
        f"{path} is not a LoRA of a UNet as this program writes it: expected keys {KOHYA_PREFIXES[0]}... or "
        f"{DIFFUSERS}..., found {some(keys, 3) or 'none'}. Give a file that `mapo export` wrote."
    )


def _key(layout: Layout, name: str, tensor: str) -> str:
    """The key of a layer's tensor."""
    if layout == "kohya":
        return f"{name}.{_NAMES['kohya'].get(tensor, tensor)}"
    return f"{diffusers_name(name)}.{_NAMES['diffusers'][tensor]}"


def _tensors(path: Path, keys: list[str], layout: Layout) -> dict[str, tuple[str, ...]]:
    """Layers of a file and what they consist of; each must be complete, and no key may be left over."""
    known = {v: k for k, v in _NAMES[layout].items()} | ({n: n for n in LYCORIS} if layout == "kohya" else {})
    found: dict[str, list[str]] = {}
    odd: set[str] = set()
    for key in sorted(keys):
        suffix = next((s for s in known if key.endswith(f".{s}")), None)
        if suffix is not None:
            name = key.removesuffix(f".{suffix}")
            found.setdefault(name.removeprefix(DIFFUSERS) if layout == "diffusers" else name, []).append(known[suffix])
        elif not (layout == "kohya" and key.endswith(".alpha")):
            odd.add(key)
    odd |= {k for k in keys if k.endswith(".alpha") and k.removesuffix(".alpha") not in found}
    for name, tensors in found.items():
        odd |= {_key(layout, name, t) for t in _lacking(set(tensors))}
    if odd or not found:
        raise ExportError(f"{path}: incomplete or unknown: {some(odd)}. Export the run again: mapo export RUN.")
    return {name: tuple(tensors) for name, tensors in found.items()}


def _lacking(tensors: set[str]) -> set[str]:
    """What a layer lacks, or has without it being used."""
    kind = kind_of(tensors)
    if kind != "lokr":
        return _REQUIRED[kind] ^ tensors
    faults: set[str] = set()
    for whole, halves in _LOKR:
        own = {t for t in tensors if t.startswith(next(iter(whole)))}
        if own not in (whole, halves):
            faults |= own ^ halves
    return faults


def _diffusers_alphas(metadata: dict[str, str], ranks: dict[str, int]) -> dict[str, float]:
    """As diffusers takes them from the header; without it every scale is 1."""
    if ADAPTER_METADATA not in metadata:
        return {n: float(rank) for n, rank in ranks.items()}
    config = json.loads(metadata[ADAPTER_METADATA])
    alphas: dict[str, float] = {}
    for name in ranks:
        part = part_of(name)
        pattern = config.get(f"{part}.alpha_pattern", {})
        start = "^" if part not in TEXT_ENCODERS else ""
        alphas[name] = float(pattern.get(start + _metadata_name(name), config[f"{part}.lora_alpha"]))
    return alphas
