from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.families import checkpoints


@pytest.fixture(scope="session", params=["sdxl", "sd15"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A tiny random model of each family: as a pipeline, as a diffusers folder and as a single file."""
    name = request.param
    place = tmp_path_factory.mktemp(name)
    pipe = checkpoints.tiny_pipeline(name)
    checkpoints.write_folder(name, pipe, place / "folder")
    tensors = checkpoints.ldm_tensors(name, checkpoints.pipeline_modules(name, pipe))
    file = checkpoints.write_single_file(place / "tiny.safetensors", tensors)
    return Tiny(name, pipe, place / "folder", file)


class Tiny:
    def __init__(self, name: str, pipe: Any, folder: Path, file: Path) -> None:
        self.name, self.pipe, self.folder, self.file = name, pipe, folder, file
        self.family = checkpoints.family_for(name, folder)

    def modules(self) -> dict[str, Any]:
        return checkpoints.pipeline_modules(self.name, self.pipe)

    def load(self, path: Path | None = None, **settings: Any) -> Any:
        from mapo_core.config import ModelConfig

        options = {k: settings.pop(k) for k in ("dtype", "encoders") if k in settings}
        return self.family.load(ModelConfig(path=str(path or self.folder), **settings), **options)
