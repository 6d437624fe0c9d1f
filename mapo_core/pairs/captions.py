"""The prompt of each image: from its caption file, its metadata, a fixed prompt or its name."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .findings import Finding
from .metadata import collapse, prompt_from_image

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

PromptFrom = Literal["auto", "txt", "metadata", "fixed", "file_name"]
Kind = Literal["caption file", "image metadata", "fixed prompt", "file name", "no prompt"]

PROMPT_FROM: tuple[PromptFrom, ...] = ("auto", "txt", "metadata", "fixed", "file_name")
FILE_NAME_SOURCE = "prompt from the file name"
NO_PROMPT_SOURCE = "no prompt yet"

# Endings under which caption files are met that are not read, the longest first.
_CAPTION_ENDINGS = (".txt.txt", ".captions", ".caption", ".prompt", ".tags", ".text", ".docx", ".doc", ".rtf", ".txt")


@dataclass(frozen=True)
class Captioned:
    """An image and its prompt.

    Attributes:
        image: the file.
        prompt: as the model is given it, with prefix and trigger word.
        source: where the prompt comes from, for people: "prompt from cat.txt".
        kind: the same as one of five words, for counting.
        caption: the prompt without prefix and trigger word.
    """

    image: Path
    prompt: str
    source: str
    kind: Kind
    caption: str


def compose_prompt(prompt: str, trigger: str = "", prefix: str = "") -> str:
    """`trigger, prefix prompt`; a trigger word that the prompt has already is not put before it again."""
    text = " ".join(part for part in (collapse(prefix), collapse(prompt)) if part)
    trigger = collapse(trigger)
    if not trigger or re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", text, re.IGNORECASE):
        return text
    return f"{trigger}, {text}" if text else trigger


def caption_images(
    images: Sequence[Path],
    *,
    prompt: str | None = None,
    prompt_from: PromptFrom = "auto",
    trigger: str = "",
    prefix: str = "",
    keep_unprompted: bool = False,
) -> tuple[dict[Path, Captioned], list[Finding]]:
    """Find a prompt for each image.

    Args:
        images: the files.
        prompt: the fixed prompt.
        prompt_from: the only source to use, or "auto": the `.txt` beside the image, else its metadata, else the fixed
            prompt if there is one, else the file name.
        trigger: word put before every prompt.
        prefix: text between the trigger word and the prompt.
        keep_unprompted: images without a prompt get an empty one, to be filled in, instead of being left out.

    Returns:
        The images that have a prompt, in order, and what a person should know about them and the rest.
    """
    captioned: dict[Path, Captioned] = {}
    findings: list[Finding] = []
    folders = _CaptionFiles()
    for image in images:
        found = _find_prompt(image, prompt, prompt_from, folders, findings)
        text = compose_prompt(found[0], trigger, prefix) if found else ""
        if found and text:
            captioned[image] = Captioned(image, text, found[1], found[2], found[0])
        elif keep_unprompted:
            captioned[image] = Captioned(image, "", NO_PROMPT_SOURCE, "no prompt", "")
        else:
            findings.append(_no_prompt(image, prompt_from))
    if prompt_from in ("auto", "txt"):
        findings += _uncaptioned(list(captioned.values()), findings)
    if prompt_from == "auto":
        findings += _from_names([c for c in captioned.values() if c.kind == "file name"])
    return captioned, findings


def caption_hint(image: Path, folders: _CaptionFiles | None = None) -> Finding | None:
    """A caption file of the image that is not read because of its name; None if there is none or a right one."""
    if image.with_suffix(".txt").is_file():
        return None
    near = (folders or _CaptionFiles()).near(image)
    if near is None:
        return None
    message = (
        f"{image}: its caption seems to be in {near.name}, which is not read. Rename it to "
        f"{image.with_suffix('.txt').name} and scan again."
    )
    return Finding("warning", "caption-name", message, paths=(image, near))


def prompt_from_name(stem: str) -> str:
    """A file name as a prompt: underscores become spaces, a number at the end goes."""
    text = re.sub(r"[\s_]+", " ", stem).strip()
    while (shorter := re.sub(r"(^|[\s\-#(.]+)\d+[\s)\-]*$", "", text)) != text:
        text = shorter
    return text.strip(" -")


def _find_prompt(
    image: Path, prompt: str | None, prompt_from: PromptFrom, folders: _CaptionFiles, findings: list[Finding]
) -> tuple[str, str, Kind] | None:
    """(prompt, source, kind) from the first source that has one."""
    if prompt_from in ("auto", "txt") and (text := _caption_file(image, folders, findings)):
        return text, f"prompt from {image.with_suffix('.txt').name}", "caption file"
    if prompt_from in ("auto", "metadata") and (made := prompt_from_image(image)):
        return made.prompt, f"prompt from {made.source}", "image metadata"
    if prompt_from in ("auto", "fixed") and prompt is not None:
        return prompt, "fixed prompt", "fixed prompt"
    if prompt_from in ("auto", "file_name"):
        return prompt_from_name(image.stem), FILE_NAME_SOURCE, "file name"
    return None


def _caption_file(image: Path, folders: _CaptionFiles, findings: list[Finding]) -> str:
    path = image.with_suffix(".txt")
    if not path.is_file():
        if hint := caption_hint(image, folders):
            findings.append(hint)
        return ""
    content = path.read_bytes()
    try:
        # Windows' Notepad writes UTF-16 with its mark when asked for "Unicode".
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        message = f"Caption file is not UTF-8: {path}. Save it as UTF-8 and scan again."
        findings.append(Finding("error", "caption-encoding", message, paths=(path,)))
        return ""
    if not text.strip():
        message = f"Caption file is empty: {path}. Write the prompt into it, or remove it."
        findings.append(Finding("warning", "caption-empty", message, paths=(path,)))
    return collapse(text)


def _no_prompt(image: Path, prompt_from: PromptFrom) -> Finding:
    lacking = {
        "auto": "it has no caption file, no metadata, and its name is only a number",
        "txt": "it has no caption file with text",
        "metadata": "its metadata hold no prompt",
        "fixed": "no fixed prompt is given",
        "file_name": "its name is only a number",
    }[prompt_from]
    message = (
        f"{image} has no prompt: {lacking}. Write {image.with_suffix('.txt').name} beside it, or give a fixed prompt; "
        "it is left out."
    )
    return Finding("error", "no-prompt", message, paths=(image,))


def _uncaptioned(captioned: list[Captioned], known: list[Finding]) -> list[Finding]:
    """Where some images have caption files, those that have none are likely to be forgotten ones."""
    explained = {path for finding in known for path in finding.paths}
    lacking = [c for c in captioned if c.kind != "caption file"]
    missing = [c for c in lacking if not explained & {c.image, c.image.with_suffix(".txt")}]
    if len(lacking) == len(captioned):
        return []
    return [
        Finding(
            "warning", "caption-missing", f"{c.image} has no caption file, others have; {c.source}.", paths=(c.image,)
        )
        for c in missing
    ]


def _from_names(named: list[Captioned]) -> list[Finding]:
    if not named:
        return []
    message = (
        f"The prompts of images without another source ({len(named)}) are made from their file names, such as "
        f"{named[0].prompt!r} from {named[0].image.name}. If that is not meant, write .txt files beside the images, or "
        "give a fixed prompt."
    )
    return [Finding("warning", "prompt-from-file-name", message, paths=tuple(c.image for c in named))]


class _CaptionFiles:
    """What lies in the folders beside the images under names of caption files; each folder is listed once."""

    def __init__(self) -> None:
        self._folders: dict[Path, dict[str, Path]] = {}

    def near(self, image: Path) -> Path | None:
        """A file that looks like the image's caption but is not its `.txt`."""
        if image.parent not in self._folders:
            self._folders[image.parent] = _list_captions(image.parent)
        files = self._folders[image.parent]
        return files.get(_folded(image.stem)) or files.get(_folded(image.name))


def _list_captions(folder: Path) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        name = _folded(path.name)
        ending = next((e for e in _CAPTION_ENDINGS if name.endswith(e)), None)
        if ending and path.is_file():
            files.setdefault(name.removesuffix(ending), path)
    return files


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
