"""From the live adapter to a `.safetensors` that other programs load, written only once it is proved to be right."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import TYPE_CHECKING

from .errors import ExportError
from .lora_adapter import beside, live_modules, load_lora
from .lora_check import Verification, verify_lora
from .lora_file import (
    ADAPTER_METADATA,
    COMFYUI_LENGTHS,
    DORA_METADATA,
    Layout,
    LoraFile,
    Precision,
    adapter_metadata,
    diffusers_tensors,
    kohya_tensors,
    lora_info,
    read_lora,
    serialise,
)
from .lora_keys import check_against_naming_rules, some
from .lora_metadata import lora_metadata
from .lora_resize import resize
from .runs import fault_point

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from .families.base import DiffusionModel, Family

__all__ = [
    "ExportReport",
    "LoraFile",
    "Verification",
    "check_against_naming_rules",
    "export_lora",
    "load_lora",
    "lora_info",
    "lora_metadata",
    "read_lora",
    "verify_lora",
]


_RESIZED = "mapo_resized"


@dataclass(frozen=True)
class ExportReport:
    """A written LoRA file. The differences are those of `Verification`; None where no proof was asked for.

    `kept_norm` is the share of the update's norm that is left where it was written at a smaller rank.
    """

    path: Path
    layout: Layout
    precision: Precision
    keys: int
    modules: int
    max_abs_difference: float | None
    relative_difference: float | None
    sha256: str
    bytes: int
    kept_norm: float = 1.0


def export_lora(
    model: DiffusionModel,
    family: Family,
    path: Path,
    *,
    layout: Layout = "kohya",
    precision: Precision = "fp16",
    metadata: dict[str, str] | None = None,
    adapter_name: str = "default",
    verify: bool = True,
    rank: int | None = None,
) -> ExportReport:
    """Write the live adapter to `path`, replacing what is there, and prove that the file gives it back.

    The file is written and checked under a temporary name in the same folder, so that `path` is never half written
    and never wrong. The model is as before when this returns or raises.

    Args:
        model: whose `unet` carries a peft LoRA.
        family: of the model.
        path: of the file, ending in `.safetensors`.
        layout: "kohya" or "diffusers".
        precision: of the stored weights.
        metadata: header entries, for example from `lora_metadata`.
        adapter_name: of the live adapter.
        verify: read the file back and prove it.
        rank: write the adapter at this rank where it has more; the proof is then of the smaller one.

    Raises:
        ExportError: there is nothing to export, weights are not finite, the disk refuses, or the proof fails.
    """
    modules = live_modules(model, adapter_name)
    if rank is not None and any(m.rank > rank for m in modules):
        resized, kept = resize(modules, rank)
        with beside(model, resized, _RESIZED, adapter_name):
            report = export_lora(
                *(model, family, path),
                layout=layout,
                precision=precision,
                metadata={**(metadata or {}), "ss_network_dim": str(rank), "mapo.kept_norm": f"{kept:.4f}"},
                adapter_name=_RESIZED,
                verify=verify,
            )
        return replace(report, kept_norm=kept)
    if layout == "kohya":
        header, tensors = dict(metadata or {}), kohya_tensors(modules, precision, family.kohya_prefix)
        if modules[0].kind == "dora":
            header[DORA_METADATA] = COMFYUI_LENGTHS
    else:
        header = {**(metadata or {}), ADAPTER_METADATA: adapter_metadata(modules)}
        tensors = diffusers_tensors(modules, precision)
    _require_finite(tensors, precision)
    data = serialise(tensors, header)
    temporary = path.with_name(f"{path.name}.tmp")  # not *.safetensors: ComfyUI would list it
    try:
        fault_point("export:start")
        _write(temporary, data)
        fault_point("export:written")
        proof = verify_lora(model, family, temporary, adapter_name=adapter_name) if verify else None
        temporary.replace(path)
        fault_point("export:replaced")
    except OSError as error:
        raise ExportError(
            f"Cannot write {path}: {error.strerror or error}. Make room or choose another folder, then: mapo export "
            "RUN. The run's last checkpoint still has the weights."
        ) from error
    finally:
        with suppress(OSError):  # it has been moved into place, or the folder has already refused
            temporary.unlink()
    return ExportReport(
        path=path,
        layout=layout,
        precision=precision,
        keys=len(tensors),
        modules=len(modules),
        max_abs_difference=proof.max_abs_difference if proof else None,
        relative_difference=proof.relative_difference if proof else None,
        sha256=sha256(data).hexdigest(),
        bytes=len(data),
    )


def _require_finite(tensors: Mapping[str, Tensor], precision: str) -> None:
    wrong = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
    if wrong:
        advice = ", or set export.precision to bf16 or fp32, which hold larger numbers" if precision == "fp16" else ""
        raise ExportError(
            f"The LoRA has weights that are not finite: {some(wrong)}. The training diverged: export an earlier "
            f"checkpoint and train with a smaller learning rate{advice}."
        )


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
