"""Where the modules of a model lie: which config, which files, and how these name the tensors."""

from __future__ import annotations

import hashlib
import logging
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import ModelError
from ._blueprint import UNET_PREFIX, VAE_PREFIX, Blueprint
from ._header import read_header
from ._keys import (
    Naming,
    clip_folder_names,
    clip_ldm_names,
    open_clip_names,
    same_names,
    unet_ldm_names,
    vae_folder_names,
    vae_ldm_names,
)
from ._locate import DESCRIPTION_FILES, download, is_hub_id, locate, weight_files, weight_patterns
from .detect import read_json

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from ..sections import ModelConfig
    from .base import Detected

log = logging.getLogger(__name__)

_BLOCK = 1 << 22  # bytes hashed at once
# Beside the modules in published checkpoints, and not needed: EMA copies, noise schedules, training counters, flags.
_NOT_NEEDED = re.compile(
    r"model_ema\.|(.*_)?alphas_cumprod|betas|sqrt_|log_one_minus|posterior_|lvlb_weights|logvar|denoiser\.|scale_factor"
    r"|v_pred$|ztsnr$|.*logit_scale$|global_step|iteration|epoch|embedding_manager\."
)


@dataclass(frozen=True)
class Component:
    """One module on disk.

    Attributes:
        config: its config.json.
        files: safetensors files that hold it.
        prefix: of its tensors in them.
        naming: how they are named after the prefix.
        what: for messages.
    """

    config: dict[str, Any]
    files: list[Path]
    prefix: str
    naming: Naming
    what: str


def components_of_file(blueprint: Blueprint, path: Path) -> dict[str, Component]:
    """UNet, VAE (if it has one) and text encoders of a single file."""
    header = read_header(path)

    def component(name: str, prefix: str, naming: Naming) -> Component:
        config = read_json(blueprint.configs / name / "config.json")
        return Component(config, [path], prefix, naming, f"the {name} of {blueprint.title}")

    unet = read_json(blueprint.configs / "unet" / "config.json")
    vae = read_json(blueprint.configs / "vae" / "config.json")
    found = {"unet": component("unet", UNET_PREFIX, unet_ldm_names(unet["layers_per_block"]))}
    if any(name.startswith(VAE_PREFIX) for name in header.tensors):
        found["vae"] = component("vae", VAE_PREFIX, vae_ldm_names(len(vae["block_out_channels"])))
    for text in blueprint.text:
        naming = open_clip_names if text.layout == "open_clip" else clip_ldm_names
        found[text.name] = component(text.name, text.prefix, naming)
    prefixes = (UNET_PREFIX, VAE_PREFIX, *(t.prefix for t in blueprint.text))
    unknown = [n for n in header.tensors if not n.startswith(prefixes) and not _NOT_NEEDED.match(n)]
    if unknown:
        log.warning("%s: %d tensors are not used, for example %s", path, len(unknown), ", ".join(unknown[:3]))
    return found


def components_of_folder(blueprint: Blueprint, found: Detected, config: ModelConfig) -> dict[str, Component]:
    """UNet, VAE and text encoders of a diffusers folder; of a Hub id, the weights are downloaded first."""
    folder = found.path
    assert folder is not None
    names = ["unet", *(t.name for t in blueprint.text), *([] if config.vae else ["vae"])]
    if found.kind == "hub":
        weights = [p for n in names for p in weight_patterns(n, config.variant)]
        folder = download(config.path, config.revision, [*DESCRIPTION_FILES, *weights])
    namings = {"unet": same_names, "vae": vae_folder_names}
    components: dict[str, Component] = {}
    for name in names:
        files = weight_files(folder / name, config.variant)
        settings = read_json(folder / name / "config.json")
        what = f"the {name} of {blueprint.title}"
        components[name] = Component(settings, files, "", namings.get(name, clip_folder_names), what)
    return components


def external_vae(blueprint: Blueprint, source: str) -> Component:
    """A VAE from elsewhere: its own file or a checkpoint, its diffusers folder or a whole model's, or a Hub id.

    Raises:
        ModelError: it is no VAE, or one for other latents.
    """
    kind, path = locate(source)
    if kind == "single_file":
        return _vae_of_file(blueprint, path)
    if (path / "vae" / "config.json").exists():
        path = path / "vae"
    config = read_json(path / "config.json")
    if config.get("_class_name") != "AutoencoderKL" or config.get("latent_channels", 4) != 4:
        raise ModelError(
            f"{source} is not a VAE for {blueprint.title} ({config.get('_class_name')}, "
            f"{config.get('latent_channels')} latent channels). Choose another model.vae, or none."
        )
    if is_hub_id(source) and kind == "hub":
        download(source, None, [*DESCRIPTION_FILES, *weight_patterns("vae" if path.name == "vae" else "", None)])
    return Component(config, weight_files(path, None), "", vae_folder_names, f"the VAE {source}")


def _vae_of_file(blueprint: Blueprint, path: Path) -> Component:
    names = read_header(path).tensors
    config = read_json(blueprint.configs / "vae" / "config.json")
    for prefix in (VAE_PREFIX, "vae.", ""):
        if f"{prefix}encoder.down.0.block.0.conv1.weight" in names:
            naming = vae_ldm_names(len(config["block_out_channels"]))
        elif f"{prefix}encoder.down_blocks.0.resnets.0.conv1.weight" in names:
            naming = vae_folder_names
        else:
            continue
        return Component(config, [path], prefix, naming, f"a VAE for {blueprint.title}")
    raise ModelError(f"{path} holds no VAE. Choose another model.vae, or none to take the model's own.")


def fingerprint(components: Iterable[Component]) -> str:
    """A hash of weights and configs; file names and the modules beside them do not matter."""
    digest = hashlib.sha256()
    for component in components:
        digest.update(str(sorted((k, v) for k, v in component.config.items() if not k.startswith("_"))).encode())
        for path in component.files:
            tensors = read_header(path).tensors
            with path.open("rb") as file:
                for name in sorted(n for n in tensors if n.startswith(component.prefix)):
                    entry = tensors[name]
                    digest.update(f"{name} {entry.dtype} {entry.shape}".encode())
                    file.seek(entry.start)
                    for at in range(entry.start, entry.end, _BLOCK):
                        digest.update(file.read(min(_BLOCK, entry.end - at)))
    return digest.hexdigest()
