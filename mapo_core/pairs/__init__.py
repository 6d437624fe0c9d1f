"""Pairs: from folders, manifests and parquet files to a checked `pairs.jsonl`.

Names are loaded when first used, so that importing this package costs neither Pillow nor numpy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .captioner import (
        CAPTIONERS,
        Captions,
        CaptionSettings,
        caption_file,
        load_captioner,
        missing_captioner,
        read_captions,
        uncaptioned,
        write_caption_files,
    )
    from .captions import Captioned, PromptFrom, compose_prompt
    from .checking import caption_edit, check_edit, lacks_caption, last_check
    from .drawn import draw_rejected
    from .editing import EditedPair, FilterHint, PairEditor, begin_edit, filter_hints, open_edit, require_editable
    from .findings import TITLES, Finding, LintReport
    from .folders import Match, pairs_from_folders, prompts_from_folder
    from .generate import GenerationSettings, generate_rejected, rejected_folder
    from .images import IMAGE_SUFFIXES, MAX_PIXELS, image_size, list_images, load_image, prepare_image
    from .importing import keep_files, keep_zip, pairs_from_dropped, require_inside, two_folders, unpack_zip
    from .lint import lint_pairs
    from .manifests import pairs_from_csv, pairs_from_jsonl, pairs_from_manifest, read_pair_set, read_pair_source
    from .metadata import ImagePrompt, prompt_from_image
    from .pair import PairSet, PreferencePair, pair_lines, pairs_hash, pairs_text, read_pairs, write_pairs
    from .pair_list import PairList, load_pairs, open_pairs, spool_pairs
    from .parquet import RowFilter, pairs_from_parquet
    from .prompts import read_prompts
    from .scores import require_scores
    from .sets import KEEP_FIRST, add_to_set, filter_set, join_sets, list_sets, set_folder, split_set
    from .synthesize import SynthesisSettings, synthesize_pairs

__all__ = [
    "CAPTIONERS",
    "IMAGE_SUFFIXES",
    "KEEP_FIRST",
    "MAX_PIXELS",
    "TITLES",
    "CaptionSettings",
    "Captioned",
    "Captions",
    "EditedPair",
    "FilterHint",
    "Finding",
    "GenerationSettings",
    "ImagePrompt",
    "LintReport",
    "Match",
    "PairEditor",
    "PairList",
    "PairSet",
    "PreferencePair",
    "PromptFrom",
    "RowFilter",
    "SynthesisSettings",
    "add_to_set",
    "begin_edit",
    "caption_edit",
    "caption_file",
    "check_edit",
    "compose_prompt",
    "draw_rejected",
    "filter_hints",
    "filter_set",
    "generate_rejected",
    "image_size",
    "join_sets",
    "keep_files",
    "keep_zip",
    "lacks_caption",
    "last_check",
    "lint_pairs",
    "list_images",
    "list_sets",
    "load_captioner",
    "load_image",
    "load_pairs",
    "missing_captioner",
    "open_edit",
    "open_pairs",
    "pair_lines",
    "pairs_from_csv",
    "pairs_from_dropped",
    "pairs_from_folders",
    "pairs_from_jsonl",
    "pairs_from_manifest",
    "pairs_from_parquet",
    "pairs_hash",
    "pairs_text",
    "prepare_image",
    "prompt_from_image",
    "prompts_from_folder",
    "read_captions",
    "read_pair_set",
    "read_pair_source",
    "read_pairs",
    "read_prompts",
    "rejected_folder",
    "require_editable",
    "require_inside",
    "require_scores",
    "set_folder",
    "split_set",
    "spool_pairs",
    "synthesize_pairs",
    "two_folders",
    "uncaptioned",
    "unpack_zip",
    "write_caption_files",
    "write_pairs",
]

_MODULES = {
    "captioner": (
        "CAPTIONERS",
        "CaptionSettings",
        "Captions",
        "caption_file",
        "write_caption_files",
        "load_captioner",
        "missing_captioner",
        "read_captions",
        "uncaptioned",
    ),
    "captions": ("Captioned", "PromptFrom", "compose_prompt"),
    "drawn": ("draw_rejected",),
    "checking": ("caption_edit", "check_edit", "lacks_caption", "last_check"),
    "editing": (
        "EditedPair",
        "FilterHint",
        "PairEditor",
        "begin_edit",
        "filter_hints",
        "open_edit",
        "require_editable",
    ),
    "findings": ("TITLES", "Finding", "LintReport"),
    "folders": ("Match", "pairs_from_folders", "prompts_from_folder"),
    "generate": ("GenerationSettings", "generate_rejected", "rejected_folder"),
    "images": ("IMAGE_SUFFIXES", "MAX_PIXELS", "image_size", "list_images", "load_image", "prepare_image"),
    "importing": ("keep_files", "keep_zip", "pairs_from_dropped", "require_inside", "two_folders", "unpack_zip"),
    "lint": ("lint_pairs",),
    "manifests": ("pairs_from_csv", "pairs_from_jsonl", "pairs_from_manifest", "read_pair_set", "read_pair_source"),
    "metadata": ("ImagePrompt", "prompt_from_image"),
    "pair": ("PairSet", "PreferencePair", "pair_lines", "pairs_hash", "pairs_text", "read_pairs", "write_pairs"),
    "pair_list": ("PairList", "load_pairs", "open_pairs", "spool_pairs"),
    "parquet": ("RowFilter", "pairs_from_parquet"),
    "scores": ("require_scores",),
    "sets": ("KEEP_FIRST", "add_to_set", "filter_set", "join_sets", "list_sets", "set_folder", "split_set"),
    "prompts": ("read_prompts",),
    "synthesize": ("SynthesisSettings", "synthesize_pairs"),
}
_WHERE = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_WHERE[name]}", __name__), name)
    globals()[name] = value
    return value
