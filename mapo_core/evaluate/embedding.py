"""Embeddings of images: what "similar" means in the reference mismatch, in diversity and among generated pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from ..errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from PIL import Image
    from torch import Tensor

    from ..buckets import Size

EMBEDDERS = ("dinov2", "demo")
_CHUNK = 32


class Embedder(Protocol):
    """Images to unit vectors."""

    name: str
    title: str

    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """[N, D] float32 on the CPU, L2-normalised."""
        ...


def load_embedder(
    name: str, model: str, *, folder: Path | None = None, device: str = "auto", download: bool = False
) -> Embedder:
    """The embedder of a name.

    Args:
        name: "dinov2", "demo" (features of the demo world's classifier), or "auto": "demo" for the demo model, else
            "dinov2".
        model: the base model's path, id or "demo".
        folder: of DINOv2's weights; None looks for them.
        device: as of `training.device`.
        download: fetch missing weights.

    Raises:
        ConfigError: there is no such embedder, or it cannot judge this model's pictures.
        MissingWeightsError: its weights are not here.
    """
    chosen = ("demo" if model == "demo" else "dinov2") if name == "auto" else name
    if chosen == "demo":
        if model != "demo":
            raise ConfigError("The demo embedding knows the demo model's pictures alone. Use --embedder dinov2.")
        from .demo_world import DemoEmbedder

        return DemoEmbedder()
    if chosen == "dinov2":
        from .dinov2 import load_dinov2

        return load_dinov2(folder, device=device, download=download)
    raise ConfigError(f"There is no embedder {name!r}: use auto, {', '.join(EMBEDDERS)}.")


def embed_files(
    embedder: Embedder,
    paths: Sequence[Path],
    sizes: Sequence[Size],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """Embed image files, each fitted to a size as training does it; [N, D].

    Args:
        embedder: the one to use.
        paths: N files.
        sizes: N of (width, height), pixels.
        progress: called with images done and images in all.
    """
    import torch
    from PIL import Image

    from ..buckets import fit
    from ..pairs import image_size, prepare_image

    parts: list[Tensor] = []
    for start in range(0, len(paths), _CHUNK):
        chunk = list(zip(paths[start : start + _CHUNK], sizes[start : start + _CHUNK], strict=True))
        arrays = [prepare_image(path, fit(image_size(path), size), size) for path, size in chunk]
        parts.append(embedder.embed([Image.fromarray(array) for array in arrays]))
        progress(start + len(chunk), len(paths))
    return torch.cat(parts)
