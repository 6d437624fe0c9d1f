"""Pairs from folders, from images in the workflow, and with rejected images made by the base model."""

from __future__ import annotations

from pathlib import Path

from comfy_api.latest import io, ui

from ..mapo_core import MapoError, pair_sheet
from ..mapo_core.pairs import PairSet, RowFilter, add_to_set, lint_pairs, pairs_from_folders, read_pair_set, set_folder
from . import _comfy, _generate
from ._types import Pairs, Settings

CATEGORY = "MaPO/pairs"
MATCHES = {"file name": "stem", "order": "order", "random, same prompt": "random"}

_LONG_LIST = 20_000_000  # bytes; some 80 000 pairs

_PROMPT = "One prompt for every image that has neither a .txt file beside it nor a prompt in its metadata."
_TRIGGER = "A word put before every prompt; say it later in a prompt to call the style. Empty: none."


class PairsFromFolders(io.ComfyNode):
    """Two folders of images, matched."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MaPOPairsFromFolders",
            display_name="Preference Pairs from Folders",
            category=CATEGORY,
            description="Matches the images of two folders: those you want more of, and those you want less of.",
            is_output_node=True,
            inputs=[
                io.String.Input(
                    "chosen",
                    default="",
                    tooltip="Folder of the images you want more of: an absolute path, or a subfolder of ComfyUI's input folder.",
                ),
                io.String.Input(
                    "rejected",
                    default="",
                    tooltip="Folder of the images you want less of, given in the same way. You have none? Use Generate Rejected.",
                ),
                io.Combo.Input(
                    "match",
                    options=list(MATCHES),
                    default="file name",
                    tooltip="file name: cat.png with cat.jpg. order: first with first. random: any rejected image of the same prompt.",
                ),
                io.String.Input("prompt", default="", multiline=True, tooltip=_PROMPT),
                io.String.Input("trigger", default="", tooltip=_TRIGGER),
                io.Int.Input(
                    "check_resolution",
                    default=1024,
                    min=64,
                    max=4096,
                    step=8,
                    tooltip="Resolution that you mean to train at, pixels. The check warns of images far below it; a larger value warns of more. Nothing is resized here.",
                ),
            ],
            outputs=[Pairs.Output("pairs", display_name="pairs"), io.String.Output("report", display_name="report")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, chosen: str | None = "", rejected: str | None = "") -> bool | str:
        try:
            for text, what in ((chosen, "chosen"), (rejected, "rejected")):
                if text is not None:
                    _comfy.images_folder(text, what)
        except MapoError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, chosen: str, rejected: str, **others: object) -> str:
        folders = (_comfy.images_folder(chosen, "chosen"), _comfy.images_folder(rejected, "rejected"))
        return str([_comfy.folder_state(f) for f in folders] + [others])

    @classmethod
    def execute(
        cls, chosen: str, rejected: str, match: str, prompt: str, trigger: str, check_resolution: int
    ) -> io.NodeOutput:
        found = pairs_from_folders(
            _comfy.images_folder(chosen, "chosen"),
            _comfy.images_folder(rejected, "rejected"),
            match=MATCHES[match],
            prompt=prompt.strip() or None,
            trigger=trigger.strip(),
        )
        return shown(cls, found, check_resolution)


class PairsFromFile(io.ComfyNode):
    """A list of pairs that somebody else has made."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MaPOPairsFromFile",
            display_name="Preference Pairs from File",
            category=CATEGORY,
            description="Reads a list of pairs: JSONL or CSV with paths, prompts, scores and weights, or parquet as Pick-a-Pic has it.",
            is_output_node=True,
            inputs=[
                io.String.Input(
                    "path",
                    default="",
                    tooltip="A .jsonl, .csv or .parquet file, or a folder of parquet files: an absolute path, or one below ComfyUI's input folder. Image paths in it are relative to the file. A data set on the Hugging Face Hub: hf://datasets/OWNER/NAME[/PATTERN]; only what the limit asks for is transferred.",
                ),
                io.Int.Input(
                    "limit",
                    default=0,
                    min=0,
                    max=10_000_000,
                    tooltip="Of parquet files, read at most so many pairs; a larger value reads more. 0: all.",
                ),
                io.Float.Input(
                    "min_margin",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Of parquet files, how clear the vote must be; a larger value keeps fewer pairs, 1 only unanimous ones.",
                ),
                io.Int.Input(
                    "check_resolution",
                    default=1024,
                    min=64,
                    max=4096,
                    step=8,
                    tooltip="Resolution that you mean to train at, pixels. The check warns of images far below it; a larger value warns of more.",
                ),
            ],
            outputs=[Pairs.Output("pairs", display_name="pairs"), io.String.Output("report", display_name="report")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, path: str | None = "") -> bool | str:
        try:
            if path is not None:
                _pairs_source(path)
        except MapoError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, path: str, **others: object) -> str:
        place = _pairs_source(path)
        if isinstance(place, str):
            return str([place, others])
        if place.is_dir() or place.suffix.lower() == ".parquet":
            return str([_comfy.folder_state(place) if place.is_dir() else place.stat().st_mtime_ns, others])
        if place.stat().st_size > _LONG_LIST:  # asking a million images for their time would hold up every Run
            return str([place.stat().st_size, place.stat().st_mtime_ns, others])
        return str([_comfy.images_state(read_pair_set(place).pairs), place.stat().st_mtime_ns, others])

    @classmethod
    def execute(cls, path: str, limit: int, min_margin: float, check_resolution: int) -> io.NodeOutput:
        keep = RowFilter(min_margin=min_margin, limit=limit or None)
        return shown(cls, read_pair_set(_pairs_source(path), keep=keep), check_resolution)


def _pairs_source(text: str) -> Path | str:
    words = text.strip().strip('"')
    return words if words.startswith("hf://") else _comfy.input_path(text, "path")


class PairsFromImages(io.ComfyNode):
    """Images of the workflow, added to a set that is kept."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MaPOPairsFromImages",
            display_name="Preference Pairs from Images",
            category=CATEGORY,
            description="Adds pairs of images to a named set. The set is kept on disk and grows with every run; what is in it already is not added again.",
            is_output_node=True,
            inputs=[
                io.Image.Input("chosen", tooltip="Images you want more of."),
                io.Image.Input("rejected", tooltip="As many images that you want less of, in the same order."),
                io.String.Input(
                    "prompts",
                    default="",
                    multiline=True,
                    tooltip="One prompt for all pairs, or one line for each pair.",
                ),
                io.String.Input(
                    "set_name", default="my pairs", tooltip="Name of the set; another name begins another set."
                ),
            ],
            outputs=[Pairs.Output("pairs", display_name="pairs"), io.String.Output("report", display_name="report")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, set_name: str | None = None) -> bool | str:
        try:
            if set_name is not None:
                set_folder(set_name)
        except MapoError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, chosen: object, rejected: object, prompts: str, set_name: str) -> io.NodeOutput:
        found, added = add_to_set(
            set_name, _comfy.to_pictures(chosen), _comfy.to_pictures(rejected), prompts.splitlines()
        )
        return shown(cls, found, None, f"{added} pairs added, {len(found.pairs)} in the set.")


class GenerateRejected(io.ComfyNode):
    """Rejected images by the base model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MaPOGenerateRejected",
            display_name="Generate Rejected",
            category=CATEGORY,
            description="For those who have only the images they want: the base model draws the rejected ones from the same prompts. Images that are there already are not made again.",
            is_output_node=True,
            inputs=[
                io.String.Input(
                    "chosen",
                    default="",
                    tooltip="Folder of the images you want more of: an absolute path, or a subfolder of ComfyUI's input folder.",
                ),
                io.Combo.Input(
                    "checkpoint",
                    options=[_generate.WIRED, *_comfy.checkpoint_names()],
                    default=_generate.WIRED,
                    tooltip="The model that you will train. It draws in a process of its own; or wire MODEL, CLIP and VAE in, and ComfyUI's sampler draws.",
                ),
                io.String.Input("prompt", default="", multiline=True, tooltip=_PROMPT),
                io.String.Input("trigger", default="", tooltip=_TRIGGER),
                io.Int.Input(
                    "per_image",
                    default=1,
                    min=1,
                    max=16,
                    tooltip="Rejected images for each chosen one; more give more pairs and take longer.",
                ),
                io.Int.Input(
                    "steps", default=25, min=1, max=200, tooltip="Sampling steps; more take longer and may look better."
                ),
                io.Float.Input(
                    "cfg",
                    default=5.0,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    tooltip="Guidance: a larger value follows the prompt more closely.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**53 - 1,
                    control_after_generate=False,
                    tooltip="Every image has its own seed, derived from this one.",
                ),
                io.Model.Input(
                    "model", optional=True, tooltip="With clip and vae: ComfyUI's sampler draws with this model."
                ),
                io.Clip.Input("clip", optional=True, tooltip="The text encoder of the model."),
                io.Vae.Input("vae", optional=True, tooltip="The VAE of the model."),
                Settings.Input(
                    "settings", optional=True, tooltip="Training settings; the resolution is taken from them."
                ),
            ],
            outputs=[Pairs.Output("pairs", display_name="pairs"), io.String.Output("report", display_name="report")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, chosen: str | None = "") -> bool | str:
        try:
            if chosen is not None:
                _comfy.images_folder(chosen, "chosen")
        except MapoError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, chosen: str, **others: object) -> str:
        plain = {k: v for k, v in others.items() if isinstance(v, str | int | float)}
        return str([_comfy.folder_state(_comfy.images_folder(chosen, "chosen")), plain])

    @classmethod
    def execute(
        cls,
        chosen: str,
        checkpoint: str,
        prompt: str,
        trigger: str,
        per_image: int,
        steps: int,
        cfg: float,
        seed: int,
        model: object = None,
        clip: object = None,
        vae: object = None,
        settings: dict | None = None,
    ) -> io.NodeOutput:
        request = _generate.Request(
            folder=_comfy.images_folder(chosen, "chosen"),
            words={"prompt": prompt.strip() or None, "trigger": trigger.strip(), "prefix": ""},
            per_image=per_image,
            steps=steps,
            cfg=cfg,
            seed=seed,
            settings=settings or {},
        )
        bar = _comfy.Progress(cls.hidden.unique_id)
        if checkpoint == _generate.WIRED:
            found = _generate.with_comfy(request, model, clip, vae, bar)
        else:
            found = _generate.with_checkpoint(request, checkpoint, bar)
        return shown(cls, found, None)


def shown(cls: type[io.ComfyNode], found: PairSet, resolution: int | None, note: str = "") -> io.NodeOutput:
    """Pairs with their sheet and the report of the check in the node; stops with the errors if there are some."""
    bar = _comfy.Progress(cls.hidden.unique_id)
    sizes = {"resolution": resolution} if resolution else {"resolution": 64, "bucket": False, "bucket_step": 64}
    report = lint_pairs(found.pairs, found=found.findings, progress=bar.check, **sizes)
    if report.errors:
        raise MapoError(report.render())
    alone = sum(finding.code == "missing-partner" for finding in report.findings)
    left_out = f" {alone} images have no partner and are left out." if alone else ""
    text = f"{note or f'{len(found.pairs)} pairs.'}{left_out}\n\n{report.render()}"
    checked = PairSet(found.pairs, list(report.findings), found.counts)
    sheet = ui.PreviewImage(_comfy.to_tensor([pair_sheet(found.pairs)]), cls=cls).as_dict()
    return io.NodeOutput(checked, text, ui={**sheet, "mapo_text": [text]})


NODES = [PairsFromFolders, PairsFromFile, PairsFromImages, GenerateRejected]
