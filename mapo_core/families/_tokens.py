"""Tokenizers, and the windows into which a prompt is cut. Nothing here imports torch, so that linting stays light."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from ..errors import ModelError
from ._blueprint import BLUEPRINTS, CLIP_VOCABULARY

if TYPE_CHECKING:
    from pathlib import Path

    from .base import Detected

_SAMPLE = "a photo of a cat"
_SAMPLE_IDS = [49406, 320, 1125, 539, 320, 2368, 49407]  # with CLIP's own vocabulary
_CLIP_SIZE = 49408
_LONG_WORD = 8  # tokens; ComfyUI keeps shorter words in one window


def load_tokenizers(found: Detected) -> list[Any]:
    """The tokenizers of a recognised model, without its weights, in the order of its text encoders.

    Raises:
        ModelError: a tokenizer is missing or does not know words.
    """
    blueprint = BLUEPRINTS[found.family]
    if found.kind == "single_file":
        return [_load(CLIP_VOCABULARY, t.pad_token) for t in blueprint.text]
    assert found.path is not None
    return [_load(found.path / t.tokenizer) for t in blueprint.text]


def _load(folder: Path, pad_token: str | None = None) -> Any:
    from transformers import CLIPTokenizer

    extra: dict[str, Any] = {"pad_token": pad_token} if pad_token else {}
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True, **extra)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"The tokenizer in {folder} cannot be loaded ({error}). Download the model again.") from error
    ids = list(tokenizer(_SAMPLE).input_ids)
    # A tokenizer without its vocabulary loads without an error and turns every word into the end token.
    right = ids == _SAMPLE_IDS if len(tokenizer) == _CLIP_SIZE else _knows_words(ids, tokenizer)
    if not right:
        raise ModelError(
            f'The tokenizer in {folder} does not know words: "{_SAMPLE}" becomes {ids}. Its tokenizer.json, or its '
            "vocab.json and merges.txt, are missing or damaged; download the model again."
        )
    if tokenizer.model_max_length > 10_000:
        raise ModelError(f"{folder}/tokenizer_config.json does not say model_max_length, 77 for CLIP. Add it.")
    return tokenizer


def _knows_words(ids: list[int], tokenizer: Any) -> bool:
    inner = set(ids[1:-1])
    ends = (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return ends and len(inner) > 3 and not inner & {tokenizer.unk_token_id, tokenizer.eos_token_id}


def count_tokens(tokenizers: Any, prompt: str) -> int:
    """Tokens of a prompt without start and end; the most that any of the tokenizers needs."""
    return max(sum(len(word) for word in _words(t, prompt)) for t in _as_list(tokenizers))


def count_windows(tokenizers: Any, prompt: str) -> int:
    """In how many pieces a prompt is encoded: 1 for up to 75 tokens of CLIP."""
    return max(len(prompt_windows(t, prompt)) for t in _as_list(tokenizers))


def _as_list(tokenizers: Any) -> list[Any]:
    return list(tokenizers) if isinstance(tokenizers, list | tuple) else [tokenizers]


def prompt_windows(tokenizer: Any, prompt: str, at_least: int = 1) -> list[list[int]]:
    """Cut a prompt into windows as ComfyUI does for text without weights (comfy/sd1_clip.py, tokenize_with_weights).

    Each window is start + tokens + end + padding, `model_max_length` ids. A word of fewer than 8 tokens is not cut;
    brackets and backslashes are text like any other.

    Args:
        tokenizer: CLIP's.
        prompt: of any length; empty gives one window.
        at_least: lengthen with empty windows to this number.
    """
    room = tokenizer.model_max_length - 2
    windows: list[list[int]] = [[]]
    for word in _words(tokenizer, prompt):
        rest = word
        while len(windows[-1]) + len(rest) > room:
            if len(rest) >= min(_LONG_WORD, room + 1):
                free = room - len(windows[-1])
                windows[-1] += rest[:free]
                rest = rest[free:]
            windows.append([])
        windows[-1] += rest
    windows += [[]] * (at_least - len(windows))
    start, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    return [[start, *w, end, *[pad] * (room - len(w))] for w in windows]


def _words(tokenizer: Any, prompt: str) -> list[list[int]]:
    """Token ids per word, words being what spaces and line breaks separate."""
    new: dict[str, list[int]] = getattr(tokenizer, "new_tokens", {})
    words = [w for w in prompt.replace("\n", " ").split(" ") if w]
    if new:
        placeholders = "|".join(re.escape(name) for name in new)
        words = [part for word in words for part in re.split(f"({placeholders})", word) if part]
    if not words:
        return []
    # SDXL's second tokenizer pads with "!" and would take every "!" of a prompt for padding, which neither the
    # original nor ComfyUI does; split_special_tokens reads it as the text that it is.
    ids = tokenizer(words, add_special_tokens=False, split_special_tokens=True, truncation=False).input_ids
    return [new.get(word, list(i)) for word, i in zip(words, ids, strict=True)]
