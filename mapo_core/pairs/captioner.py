"""Captions for images that have none, by a local image-to-text model: Florence-2 or BLIP.

Both are classes of transformers; nothing of a model's repository is run. A caption goes into a new `.txt` file; a file
that is there is never written over.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from ..errors import MissingWeightsError, ModelError, PairsError
from ..evaluate.weights import WeightSource, find_weights, load_pretrained

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from PIL import Image

Detail = Literal["short", "long", "longest"]

_FILES = ("config.json", "*.safetensors", "preprocessor_config.json|processor_config.json", "tokenizer.json|vocab.txt")
_EXTRA = ("*.json", "*.txt", "*.jinja")
FLORENCE = "florence-community/Florence-2-base"
BLIP = "Salesforce/blip-image-captioning-large"
CAPTIONERS: dict[str, str] = {  # Hub id -> size of the download
    FLORENCE: "0.5 GB",
    "florence-community/Florence-2-large": "1.7 GB",
    BLIP: "1.9 GB",
}
_TASKS: dict[Detail, str] = {
    "short": "<CAPTION>",
    "long": "<DETAILED_CAPTION>",
    "longest": "<MORE_DETAILED_CAPTION>",
}
_NEW_TOKENS: dict[Detail, int] = {"short": 40, "long": 120, "longest": 250}
_BEAMS = 3


@dataclass(frozen=True)
class CaptionSettings:
    """How captions are made.

    Attributes:
        model: Hub id, or a folder, of a Florence-2 or BLIP captioning model.
        detail: how much is said; BLIP knows short captions only.
        trigger: word put before every caption.
        prefix: text between the trigger word and the caption.
        device: as of `training.device`.
        download: fetch the model from the Hub where it is missing.
    """

    model: str = FLORENCE
    detail: Detail = "short"
    trigger: str = ""
    prefix: str = ""
    device: str = "auto"
    download: bool = False


class Captioner(Protocol):
    """Pictures to text."""

    def caption(self, image: Image.Image) -> str:
        """What is in the picture, one line."""
        ...


@dataclass(frozen=True)
class Captions:
    """What `write_caption_files` did.

    Attributes:
        written: image -> its new caption file.
        kept: images that have a caption file already.
        failed: image -> why it has none; a damaged file does not end the work.
    """

    written: dict[Path, Path]
    kept: list[Path]
    failed: dict[Path, str]


def uncaptioned(images: Sequence[Path]) -> list[Path]:
    """Those that have neither a caption file nor a prompt in their metadata."""
    from .metadata import prompt_from_image

    return [p for p in images if not p.with_suffix(".txt").exists() and prompt_from_image(p) is None]


def caption_file(image: Path, out: Path | None = None) -> Path:
    """Where an image's caption goes: beside it, or into a folder under a name of its own."""
    if out is None:
        return image.with_suffix(".txt")
    return out / f"{image.stem[:60]}-{hashlib.sha256(str(image).encode(errors='replace')).hexdigest()[:12]}.txt"


def read_captions(images: Sequence[Path], out: Path | None = None) -> dict[Path, str]:
    """The captions that `write_caption_files` has written so far, by image."""
    files = {image: caption_file(image, out) for image in images}
    return {
        im: " ".join(f.read_text(encoding="utf-8", errors="replace").split()) for im, f in files.items() if f.exists()
    }


def write_caption_files(
    images: Sequence[Path],
    captioner: Captioner,
    settings: CaptionSettings,
    *,
    target: Callable[[Path], Path] = lambda image: image.with_suffix(".txt"),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Captions:
    """Write a caption file for each image that has none; one that is interrupted goes on where it was.

    Args:
        images: the files.
        captioner: of `load_captioner`.
        settings: trigger word and prefix.
        target: where an image's caption goes.
        progress: called with images done and in all.

    Raises:
        PairsError: a caption cannot be written.
    """
    from .captions import compose_prompt
    from .images import load_image

    todo = [p for p in dict.fromkeys(images) if not target(p).exists()]
    done = Captions({}, [p for p in dict.fromkeys(images) if target(p).exists()], {})
    for number, image in enumerate(todo):
        progress(number, len(todo))
        try:
            picture = load_image(image)
        except PairsError as error:
            done.failed[image] = str(error)
            continue
        text = compose_prompt(captioner.caption(picture), settings.trigger, settings.prefix)
        if not text:
            done.failed[image] = f"{image}: the model said nothing. Write its caption yourself."
        elif _write_new(target(image), text + "\n"):
            done.written[image] = target(image)
        else:
            done.kept.append(image)
    progress(len(todo), len(todo))
    return done


def load_captioner(settings: CaptionSettings | None = None) -> Captioner:
    """Load a captioning model.

    Raises:
        MissingWeightsError: it is not on this machine; the message says what to download and where to put it.
        ModelError: it is neither Florence-2 nor BLIP, or is damaged.
    """
    settings = settings or CaptionSettings()
    folder = _folder(settings)
    from ..families._quiet import quiet_import_notices

    quiet_import_notices()
    from transformers import AutoConfig, AutoProcessor

    from ..devices import preferred_device

    device = preferred_device(settings.device)
    try:
        kind = AutoConfig.from_pretrained(folder, local_files_only=True).model_type
        made = _model_class(kind, folder)
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    except (ImportError, OSError, ValueError, AttributeError) as error:
        raise ModelError(
            f"{folder} cannot be read as a captioning model: {_first_line(error)}. Use {FLORENCE} or {BLIP}."
        ) from error
    model = load_pretrained(made, folder, device)
    if kind == "florence2":
        return _Florence(model, processor, device, settings.detail)
    return _Blip(model, processor, device, settings.detail)


def missing_captioner(settings: CaptionSettings) -> str | None:
    """What a captioning model lacks on this machine, as a message, or None; nothing is downloaded or loaded."""
    try:
        _folder(replace(settings, download=False))
    except MissingWeightsError as error:
        return str(error)
    return None


class _Florence:
    """Florence-2 (Xiao et al. 2023): the task is named in the prompt."""

    def __init__(self, model: Any, processor: Any, device: torch.device, detail: Detail) -> None:
        self._model, self._processor, self._device = model, processor, device
        self._detail: Detail = detail

    def caption(self, image: Image.Image) -> str:
        task = _TASKS[self._detail]
        inputs = self._processor(text=task, images=image, return_tensors="pt").to(self._device)
        out = _generate(self._model, inputs, self._detail)
        text = self._processor.batch_decode(out, skip_special_tokens=True)[0]
        return " ".join(text.split())


class _Blip:
    """BLIP (Li et al. 2022)."""

    def __init__(self, model: Any, processor: Any, device: torch.device, detail: Detail) -> None:
        self._model, self._processor, self._device = model, processor, device
        self._detail: Detail = detail

    def caption(self, image: Image.Image) -> str:
        inputs = self._processor(images=image, return_tensors="pt").to(self._device)
        out = _generate(self._model, inputs, self._detail)
        return " ".join(self._processor.decode(out[0], skip_special_tokens=True).split())


def _generate(model: Any, inputs: Any, detail: Detail) -> Any:
    import torch

    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    with torch.no_grad():
        return model.generate(**inputs, max_new_tokens=_NEW_TOKENS[detail], num_beams=_BEAMS, do_sample=False)


def _model_class(kind: str, folder: Path) -> Any:
    import transformers

    names = {"florence2": "Florence2ForConditionalGeneration", "blip": "BlipForConditionalGeneration"}
    if kind not in names:
        raise ModelError(f"{folder} is a model of type {kind!r}, not Florence-2 or BLIP. Use {FLORENCE} or {BLIP}.")
    if not hasattr(transformers, names[kind]):
        raise ModelError(
            f"transformers {transformers.__version__} does not know {names[kind]}. Update it: "
            'pip install -U "transformers>=4.56"'
        )
    return getattr(transformers, names[kind])


def _folder(settings: CaptionSettings) -> Path:
    """Where the model lies."""
    if settings.detail not in get_args(Detail):
        raise PairsError(f"detail must be one of {', '.join(get_args(Detail))}, not {settings.detail!r}.")
    given = Path(settings.model).expanduser()
    name = settings.model.rpartition("/")[2].lower()
    size = CAPTIONERS.get(settings.model, "")
    source = WeightSource(name, settings.model, _FILES, size, _EXTRA, name_folder="give its folder: --model FOLDER")
    if given.is_dir():
        return find_weights(replace(source, repo=FLORENCE, name=FLORENCE.rpartition("/")[2].lower()), given)
    if given.is_absolute() or settings.model.count("/") != 1:
        raise MissingWeightsError(
            f"There is no folder {settings.model}. Give that of a captioning model, or a Hub id such as {FLORENCE}."
        )
    return find_weights(source, None, settings.download)


def _write_new(path: Path, text: str) -> bool:
    """Write a file in one move if none is there; False where one is, even if it has just come."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            if path.exists():
                return False
            temporary.rename(path)
        return True
    except OSError as error:
        raise PairsError(f"Cannot write {path}: {error.strerror}. Check the folder.") from error
    finally:
        temporary.unlink(missing_ok=True)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
