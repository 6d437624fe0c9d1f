"""New words for the text encoders (textual inversion, Gal et al., arXiv 2208.01618): only their vectors are trained.

A prompt names a new word by its placeholder. Its ids are negative, so that the table of the model's own words stays as
it is, bit for bit, and the end token stays the largest id, by which some text encoders look for it. For the reference
and the cache the placeholder is replaced by the word that it starts from.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from .components import UNET, parts
from .errors import ConfigError, ExportError
from .parameters import ParameterGroup

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from torch import Tensor

    from .families.base import DiffusionModel
    from .sections import AdapterConfig

STATE = "new_tokens"
_COMFYUI_KEYS = {"sd15": ("emb_params",), "sdxl": ("clip_l", "clip_g")}  # comfy/sd1_clip.py, load_embed


class WordTable(nn.Module):
    """A text encoder's table of words with new ones beside it: id -1 is the first new vector."""

    def __init__(self, base: nn.Embedding, vectors: Tensor) -> None:
        super().__init__()
        self.base = base
        self.vectors = nn.Parameter(vectors)  # [n, C] float32

    @property
    def weight(self) -> Tensor:
        """The model's own words, [V, C]."""
        return self.base.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Ids [B, T] to vectors [B, T, C] in the precision of the model's own."""
        own = self.base(ids.clamp(min=0))
        new = self.vectors.to(own.dtype)[(-1 - ids).clamp(min=0)]
        return torch.where((ids < 0)[..., None], new, own)


def class_prompt(prompt: str, entries: Iterable[str]) -> str:
    """The prompt with every placeholder replaced by the word that it starts from."""
    for placeholder, word in map(split_token, entries):
        prompt = prompt.replace(placeholder, word)
    return prompt


def split_token(entry: str) -> tuple[str, str]:
    """ "<toy>=toy" -> ("<toy>", "toy")."""
    placeholder, _, word = entry.rpartition("=")
    return placeholder.strip(), word.strip()


def require_in_prompts(config: AdapterConfig, prompts: Iterable[str]) -> None:
    """Every placeholder must stand in some prompt.

    Raises:
        ConfigError: names those that do not.
    """
    left = {split_token(entry)[0] for entry in config.new_tokens}
    for prompt in prompts:
        left = {placeholder for placeholder in left if placeholder not in prompt}
        if not left:
            return
    if left:
        raise ConfigError(
            f"adapter.new_tokens: no prompt of the pairs has {' or '.join(sorted(left))}. Write it into the prompts "
            "where its subject is shown, or leave it out."
        )


def add_new_tokens(model: DiffusionModel, config: AdapterConfig) -> list[ParameterGroup]:
    """Give every text encoder the new words; the group of their vectors, or nothing where there are none.

    Raises:
        ConfigError: a word to start from is unknown to a tokenizer.
    """
    if not config.new_tokens:
        return []
    count = config.new_token_vectors
    placeholders = [split_token(entry)[0] for entry in config.new_tokens]
    ids = {p: [-1 - (i * count + k) for k in range(count)] for i, p in enumerate(placeholders)}
    found: dict[str, nn.Parameter] = {}
    encoders: dict[str, Any] = {part: module for part, module in parts(model).items() if part != UNET}
    for (part, encoder), tokenizer in zip(encoders.items(), model.tokenizers, strict=True):
        base = encoder.get_input_embeddings()
        rows = [_start(tokenizer, base, *split_token(entry), count) for entry in config.new_tokens]
        table = WordTable(base, torch.cat(rows))
        encoder.set_input_embeddings(table)
        tokenizer.new_tokens = ids
        found[f"{part}.{STATE}"] = table.vectors
    model.trains_text = True
    model.new_tokens = tuple(config.new_tokens)
    return [ParameterGroup(STATE, found, config.new_token_learning_rate)]


def _start(tokenizer: Any, base: nn.Embedding, placeholder: str, word: str, count: int) -> Tensor:
    """The vectors [count, C] that a new word starts from: those of the word's tokens in turn, or their mean."""
    ids = tokenizer(word, add_special_tokens=False).input_ids
    if not ids or tokenizer.unk_token_id in ids[:-1]:
        raise ConfigError(f"adapter.new_tokens: the tokenizer does not know {word!r}, from which {placeholder} starts.")
    vectors = base.weight[torch.tensor(ids, device=base.weight.device)].detach().float()  # [k, C]
    if count < len(ids):
        return vectors.mean(dim=0, keepdim=True).repeat(count, 1)
    return vectors.repeat(-(-count // len(ids)), 1)[:count]


def token_state(model: DiffusionModel) -> dict[str, Tensor]:
    """The vectors of the new words by text encoder, [n, C] each; empty where there are none."""
    return {name: table.vectors.detach() for name, table in _tables(model).items()}


def load_token_state(model: DiffusionModel, state: dict[str, Tensor]) -> None:
    """Put back what `token_state` gave."""
    for name, table in _tables(model).items():
        table.vectors.data.copy_(state[name])


def _tables(model: DiffusionModel) -> dict[str, WordTable]:
    found: dict[str, WordTable] = {}
    for part, module in parts(model).items():
        table = None if part == UNET else module.get_input_embeddings()  # pyright: ignore[reportCallIssue]
        if isinstance(table, WordTable):
            found[f"{part}.{STATE}"] = table
    return found


def export_tokens(model: DiffusionModel, lora: Path) -> list[Path]:
    """Write a file for every new word beside the LoRA file, as ComfyUI loads an embedding, and read it back.

    ComfyUI's name of it is `embedding:<file name>`, with the file in its embeddings folder.

    Raises:
        ExportError: the vectors are not finite, or what was written is not what was trained.
    """
    written: list[Path] = []
    tables = list(_tables(model).values())
    for i, (placeholder, _) in enumerate(map(split_token, model.new_tokens)):
        path = lora.with_name(f"{lora.stem}-{_plain(placeholder)}.safetensors")
        count = len(tables[0].vectors) // len(model.new_tokens)
        vectors = [t.vectors.detach().float().cpu()[i * count : (i + 1) * count].contiguous() for t in tables]
        tensors = dict(zip(_COMFYUI_KEYS[model.family], vectors, strict=True))
        if not all(t.isfinite().all() for t in vectors):
            raise ExportError(f"The vectors of {placeholder} are not finite: the training diverged. Lower its rate.")
        temporary = path.with_name(f"{path.name}.tmp")
        save_file(tensors, temporary, {"modelspec.title": placeholder, "format": "pt"})
        back = load_file(temporary)
        if back.keys() != tensors.keys() or not all(torch.equal(back[k], tensors[k]) for k in tensors):
            raise ExportError(f"{path} does not hold what was written. Look at the disk, then: mapo export RUN.")
        temporary.replace(path)
        written.append(path)
    return written


def _plain(placeholder: str) -> str:
    return re.sub(r"[^\w-]+", "", placeholder) or "token"
