"""The only file that touches ComfyUI beyond its node API: folders, pictures, progress, interruption, memory."""

from __future__ import annotations

import gc
import hashlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comfy.model_management as management
import comfy.utils
import folder_paths
import numpy as np
import torch
from PIL import Image
from server import PromptServer

from ..mapo_core import ConfigError, ModelError, PairsError, RunError, copy_lora, find_lora_copy

if TYPE_CHECKING:
    from ..mapo_core.pairs import PreferencePair

DEMO = "demo (built in)"
"""What stands for the demo model in the list of checkpoints."""
SUBFOLDER = "mapo"
"""Of the loras and output folders."""
ACTIVE: dict[str, str] = {}
"""Node id -> name of the run that it is training now."""


# --- folders ---------------------------------------------------------------------------------------------------------


def set_home() -> None:
    """Runs and caches go to output/mapo, for the children too; a MAPO_HOME of the user's own is respected."""
    os.environ.setdefault("MAPO_HOME", str(Path(folder_paths.get_output_directory()).absolute() / SUBFOLDER))


def checkpoint_names() -> list[str]:
    """The demo model, then ComfyUI's checkpoints."""
    return [DEMO, *folder_paths.get_filename_list("checkpoints")]


def checkpoint_path(name: str) -> str:
    """What `model.path` takes for a name of `checkpoint_names`.

    Raises:
        ModelError: there is no such file any more.
    """
    if name == DEMO:
        return "demo"
    path = folder_paths.get_full_path("checkpoints", name)
    if path is None:
        raise ModelError(f"There is no checkpoint {name!r} in ComfyUI's checkpoints folders. Choose one of the list.")
    return str(path)


def checkpoint_of_model(path: str) -> str | None:
    """The checkpoint name that lies at a path, or None."""
    names = folder_paths.get_filename_list("checkpoints")
    return next((n for n in names if folder_paths.get_full_path("checkpoints", n) == path), None)


def input_path(text: str, what: str) -> Path:
    """A file or folder that is there: an absolute path, or one below ComfyUI's input folder.

    Raises:
        PairsError: it is empty or missing.
    """
    words = text.strip().strip('"')
    base = Path(folder_paths.get_input_directory())
    path = base / Path(words).expanduser()  # an absolute path stays what it is
    if not words or not path.exists():
        said = f"{path} does not exist" if words else "name it"
        raise PairsError(f"{what}: {said}. Give an absolute path, or one below {base}.")
    return path


def images_folder(text: str, what: str) -> Path:
    """A folder of images: a subfolder of ComfyUI's input folder, or an absolute path.

    Raises:
        PairsError: it is empty, missing or a file.
    """
    words = text.strip().strip('"')
    base = Path(folder_paths.get_input_directory())
    if not words:
        there = ", ".join(sorted(p.name for p in base.iterdir() if p.is_dir())[:10]) or "none yet"
        raise PairsError(f"{what}: name a folder: an absolute path, or a subfolder of {base} (there is: {there}).")
    path = input_path(text, what)
    if not path.is_dir():
        raise PairsError(f"{what}: {path} is a file. Give a folder: an absolute path, or a subfolder of {base}.")
    return path


def folder_state(folder: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of every file below a folder; changes when an image or caption does."""
    return sorted(
        (str(p.relative_to(folder)), stat.st_size, stat.st_mtime_ns)
        for p in folder.rglob("*")
        if p.is_file() and (stat := p.stat())
    )


def images_state(pairs: list[PreferencePair]) -> str:
    """Size and time of the images of pairs, as a hash."""
    digest = hashlib.sha256()
    for path in {path: None for pair in pairs for path in (pair.chosen, pair.rejected)}:
        stat = path.stat() if path.exists() else None
        digest.update(f"{path}{(stat.st_size, stat.st_mtime_ns) if stat else None}".encode())
    return digest.hexdigest()


def lora_folder() -> Path:
    """Where LoRAs are put: `mapo` in the first loras folder.

    Raises:
        RunError: ComfyUI knows no loras folder.
    """
    folders = folder_paths.get_folder_paths("loras")
    if not folders:
        raise RunError("ComfyUI has no loras folder. Add one to its model paths (extra_model_paths.yaml).")
    return Path(folders[0]) / SUBFOLDER


def publish_lora(path: Path, name: str | None = None) -> str:
    """Copy a LoRA into the loras folder and give the name under which the stock loaders list it.

    A file with the same content is left as it is; no other file is ever replaced, not even an earlier copy of the
    same run: the stock loader keeps what it has loaded by name and would not notice.

    Args:
        path: the LoRA in its run's export folder.
        name: stem of the copy; None: as the file is called.
    """
    folder = lora_folder()
    return str(copy_lora(path, folder, name).relative_to(folder.parent))


def published_name(path: Path) -> str | None:
    """The name of a LoRA's copy in the loras folder, or None if there is none with the same content."""
    folder = lora_folder()
    copy = find_lora_copy(path, folder)
    return str(copy.relative_to(folder.parent)) if copy else None


# --- pictures --------------------------------------------------------------------------------------------------------


def to_tensor(pictures: list[Image.Image]) -> torch.Tensor:
    """Pictures of one size to an IMAGE [B, H, W, 3] in [0, 1]; smaller ones are placed on the largest size."""
    width, height = max(p.width for p in pictures), max(p.height for p in pictures)
    arrays = []
    for picture in pictures:
        canvas = Image.new("RGB", (width, height))
        canvas.paste(picture.convert("RGB"), (0, 0))
        arrays.append(np.asarray(canvas, dtype=np.float32) / 255.0)
    return torch.from_numpy(np.stack(arrays))


def to_pictures(images: torch.Tensor) -> list[Image.Image]:
    """An IMAGE [B, H, W, 3 or 4] in [0, 1] to pictures."""
    array = (images[..., :3].float().clamp(0, 1) * 255).round().byte().cpu().numpy()
    return [Image.fromarray(a) for a in array]


# --- progress, interruption, memory ----------------------------------------------------------------------------------


class Progress:
    """ComfyUI's progress bar of a node, and whether the user has pressed Cancel.

    The two belong together: ComfyUI's bar looks for a Cancel, too, raises it and forgets it, so whoever shows progress
    must take notice there.
    """

    def __init__(self, node_id: str, total: int = 1) -> None:
        self._bar = comfy.utils.ProgressBar(total, node_id=node_id)
        self._waiting: Exception | None = None
        self.stop: Exception | None = None

    def show(self, done: int, total: int, preview: Image.Image | None = None) -> None:
        """Where things stand, with a preview picture if there is a new one; never raises an interruption."""
        try:
            self._bar.update_absolute(done, max(total, 1), ("JPEG", preview, 512) if preview is not None else None)
        except management.InterruptProcessingException as stop:
            self._waiting = stop

    def interruption(self) -> Exception | None:
        """What to raise if the user has pressed Cancel since the last call, else None."""
        try:
            management.throw_exception_if_processing_interrupted()
        except management.InterruptProcessingException as stop:
            self._waiting = stop
        found, self._waiting = self._waiting, None
        return found

    def cancelled(self) -> bool:
        """Whether the user has pressed Cancel; it is kept in `stop`, to be raised when the work has come to an end."""
        self.stop = self.stop or self.interruption()
        return self.stop is not None

    def check(self, done: int, total: int) -> None:
        """Show where things stand, and raise an interruption."""
        self.show(done, total)
        if self.cancelled():
            assert self.stop is not None
            raise self.stop


def send(event: str, **detail: Any) -> None:
    """An event of our own to the page that queued the prompt."""
    server = PromptServer.instance
    server.send_sync(event, detail, server.client_id)


def free_vram() -> None:
    """Give the device's memory to the child."""
    management.unload_all_models()
    gc.collect()
    management.soft_empty_cache()


def is_executing() -> bool:
    """Whether ComfyUI is working on a prompt."""
    return bool(PromptServer.instance.prompt_queue.currently_running)


# --- models ----------------------------------------------------------------------------------------------------------


def load_lora_state(path: Path) -> dict[str, torch.Tensor]:
    """A LoRA file as ComfyUI's LORA_MODEL."""
    return comfy.utils.load_torch_file(str(path), safe_load=True)


def apply_lora(model: Any, clip: Any, path: Path, strength_model: float, strength_clip: float) -> tuple[Any, Any]:
    """What the stock loader does with a LoRA file."""
    import comfy.sd

    return comfy.sd.load_lora_for_models(model, clip, load_lora_state(path), strength_model, strength_clip)


def model_identity(model: Any, clip: Any, vae: Any) -> str:
    """What tells wired models from others, in this session and the next: some of their weights, and all patches."""
    digest = hashlib.sha256()
    for part in (model.model.diffusion_model, clip.cond_stage_model, vae.first_stage_model):
        weights = list(part.named_parameters())
        for name, weight in weights[:: max(1, len(weights) // 32)]:
            digest.update(name.encode() + _first(weight))
    for patcher in (model, clip.patcher):
        for name, patches in sorted((str(k), v) for k, v in patcher.patches.items()):
            digest.update(name.encode())
            for patch in patches:
                digest.update(repr([p for p in patch if isinstance(p, int | float | str)]).encode())
                for tensor in _tensors(patch):
                    digest.update(_first(tensor))
        digest.update(repr(sorted(map(str, patcher.object_patches))).encode())
    return f"wired {type(model.model).__name__} {digest.hexdigest()[:16]}"


def _first(tensor: torch.Tensor) -> bytes:
    return tensor.detach().reshape(-1)[:16].float().cpu().numpy().tobytes()


def _tensors(value: Any) -> list[torch.Tensor]:
    """The tensors in a patch, which is a tuple, or an adapter object with its weights."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [t for v in value for t in _tensors(v)]
    return _tensors(getattr(value, "weights", ()))


def native_side(model: Any) -> int:
    """Side of the square pictures that a wired model was made for, pixels."""
    return 1024 if type(model.model).__name__.startswith("SDXL") else 512


def sample(
    model: Any,
    clip: Any,
    vae: Any,
    prompt: str,
    negative: str,
    seed: int,
    size: tuple[int, int],
    steps: int,
    cfg: float,
) -> Image.Image:
    """One picture by ComfyUI's own sampler, Euler on the model's normal schedule; `size` is (width, height)."""
    import comfy.sample

    width, height = size
    positive = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
    unwanted = clip.encode_from_tokens_scheduled(clip.tokenize(negative))
    latent = torch.zeros([1, 4, height // 8, width // 8], device=management.intermediate_device())
    latent = comfy.sample.fix_empty_latent_channels(model, latent)
    noise = comfy.sample.prepare_noise(latent, seed)
    samples = comfy.sample.sample(
        model, noise, steps, cfg, "euler", "normal", positive, unwanted, latent, disable_pbar=True, seed=seed
    )
    return to_pictures(vae.decode(samples))[0]


# --- checks before anything is started -------------------------------------------------------------------------------


def missing_packages() -> str | None:
    """What the training process needs and this Python lacks, as advice; None if nothing."""
    from importlib.util import find_spec

    wanted = ("diffusers", "peft", "accelerate", "transformers", "safetensors", "pydantic", "yaml")
    missing = [name for name in wanted if find_spec(name) is None]
    if not missing:
        return None
    requirements = Path(__file__).resolve().parent.parent / "requirements.txt"
    return (
        f"{', '.join(missing)} missing in ComfyUI's Python. Install what MaPO needs and start ComfyUI again: "
        f'"{sys.executable}" -m pip install -r "{requirements}"'
    )


def require_packages() -> None:
    """Raises ConfigError with the command that installs what is missing."""
    if advice := missing_packages():
        raise ConfigError(advice)
