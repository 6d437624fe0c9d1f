"""From what a person asks for to a run folder: pairs from anywhere, settings checked, nothing started."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import MapoError, ModelError, PairsError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .pairs import LintReport, PairSet
    from .runs import RunDir

DEMO_PAIRS = "demo"
_CHOSEN, _REJECTED = ("chosen", "good", "win", "preferred"), ("rejected", "bad", "lose", "dispreferred")
_MODEL_DEPTH = 4
_MOST_FILES = 20_000


def pairs_from(source: str | Path, home: Path | None = None) -> PairSet:
    """The pairs that a name or path stands for.

    Args:
        source: "demo" for the demo model's pictures, the name of a kept set, a list of pairs (JSONL, CSV, parquet),
            or a folder that holds one: `pairs.jsonl`, parquet files, or two folders called chosen and rejected.
        home: where sets are kept.

    Raises:
        PairsError: there is no such thing, or it cannot be read.
    """
    from .pairs import list_sets, pairs_from_folders, read_pair_set
    from .runs import mapo_home

    home = home or mapo_home()
    if str(source) == DEMO_PAIRS:
        from .demo.run import demo_pairs

        return demo_pairs("cartoon", home=home)
    sets = list_sets(home)
    if str(source) in sets:
        return read_pair_set(home / "sets" / str(source) / "pairs.jsonl")
    path = Path(source).expanduser()
    if not str(source).strip() or not path.exists():
        known = ", ".join(sorted(sets)) or "none yet"
        raise PairsError(f"There are no pairs {str(source)!r}. Give a kept set ({known}), a file or a folder.")
    if path.is_file():
        return read_pair_set(path)
    if (path / "pairs.jsonl").is_file():
        return read_pair_set(path / "pairs.jsonl")
    chosen, rejected = (_subfolder(path, names) for names in (_CHOSEN, _REJECTED))
    if chosen is not None and rejected is not None:
        return pairs_from_folders(chosen, rejected)
    if any(path.rglob("*.parquet")):
        return read_pair_set(path)
    raise PairsError(
        f"{path} holds no pairs: there is neither pairs.jsonl nor parquet in it, nor two folders called chosen and "
        "rejected. Make pairs of it first."
    )


def _subfolder(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((path for path in sorted(folder.iterdir()) if path.is_dir() and path.name.lower() in names), None)


def request_run(
    values: dict[str, Any],
    pairs: PairSet,
    home: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[RunDir, LintReport]:
    """Check settings, model and pairs, and make the run folder. Nothing is trained yet.

    Args:
        values: settings of TrainConfig, nested; without `data.pairs`.
        pairs: what to train on.
        home: where the runs are.
        progress: of looking at the images; called with done and total.

    Returns:
        The run, and what the linter has to say that did not stop it.

    Raises:
        ConfigError: a setting is wrong.
        ModelError: the model cannot be recognised.
        PairsError: there are no pairs, or the linter found errors; `problems` lists them.
    """
    from .config import build_config, merge_settings
    from .families import FAMILIES, detect
    from .pairs import lint_pairs, pair_lines, require_scores
    from .runs import create_run

    config = build_config(merge_settings(values, {"data": {"pairs": "pairs.jsonl"}}))
    what = detect(config.model.path, config.model.family)
    if not pairs.pairs:
        raise PairsError("There are no pairs to train on. Choose another set, or make pairs first.")
    if "chosen_score" in config.method.build("sdxl").needs:
        require_scores(pairs.pairs, config.method.type)
    native = 64 if config.model.path == "demo" else FAMILIES[what.family].resolution
    resolution = config.data.resolution or native
    report = lint_pairs(
        pairs.pairs,
        resolution=resolution,
        bucket=config.data.bucket,
        bucket_step=config.data.bucket_step or max(8, min(64, resolution // 8 // 8 * 8)),
        max_aspect=config.data.max_aspect,
        found=pairs.findings,
        progress=progress,
    )
    if report.errors:
        raise PairsError(
            f"The pairs have {report.count('error')} errors, so nothing was started. Repair or exclude these pairs:",
            problems=[finding.message for finding in report.errors],
        )
    return create_run(config.name, config.to_json(), pair_lines(pairs.pairs), home), report


def settings_text(values: dict[str, Any]) -> str:
    """Settings as YAML, as `--config` and the page's import read them."""
    import yaml

    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, default_flow_style=False)


def find_models(folders: Iterable[Path]) -> list[Path]:
    """The base models in some folders that can be trained: single files and diffusers folders; headers alone are read.

    Args:
        folders: looked into four levels deep; what cannot be read is left out.
    """
    found: dict[Path, None] = {}
    seen = 0
    for folder in folders:
        for place, inner, files in os.walk(folder, followlinks=False):
            here = Path(place)
            if "model_index.json" in files:
                inner.clear()
                found.update({here: None} if _is_model(here) else {})
                continue
            if len(here.relative_to(folder).parts) >= _MODEL_DEPTH:
                inner.clear()
            inner[:] = sorted(name for name in inner if not name.startswith("."))
            for name in sorted(files):
                seen += 1
                if name.endswith(".safetensors") and _is_model(here / name):
                    found[here / name] = None
            if seen > _MOST_FILES:
                return list(found)
    return list(found)


def _is_model(path: Path) -> bool:
    from .families import detect

    try:
        detect(path)
    except (MapoError, ModelError, OSError):
        return False
    return True
