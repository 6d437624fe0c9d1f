"""What is done with whole sets of pairs: join, split, filter."""

from __future__ import annotations

from comfy_api.latest import io

from ..mapo_core import ConfigError
from ..mapo_core.pairs import TITLES, PairSet, filter_set, join_sets, lint_pairs, split_set
from . import _comfy
from ._types import Pairs
from .pairs import CATEGORY, shown

# The findings by which pairs can be dropped; the others are no property of single pairs, or errors that stop anyway.
DROPS = {
    "repeated": ("repeated-pair", "exact-duplicate"),
    "near_duplicates": ("near-duplicate",),
    "nearly_identical": ("near-identical-pair",),
    "contradictory": ("contradictory-vote",),
    "low_resolution": ("low-resolution",),
    "much_cropped": ("loses-in-crop",),
    "without_prompt": ("no-prompt",),
}


class JoinPairs(io.ComfyNode):
    """Several sets in one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MaPOJoinPairs",
            display_name="Join Pairs",
            category=CATEGORY,
            description="Several sets of pairs in one; a pair that is in more than one of them is taken once.",
            is_output_node=True,
            inputs=[
                Pairs.Input("pairs_1", tooltip="A set of pairs."),
                Pairs.Input("pairs_2", tooltip="Another one."),
                *(Pairs.Input(f"pairs_{n}", optional=True, tooltip="Another one.") for n in (3, 4)),
            ],
            outputs=[Pairs.Output("pairs", display_name="pairs"), io.String.Output("report", display_name="report")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, **sets: PairSet) -> io.NodeOutput:
        return shown(cls, join_sets([sets[name] for name in sorted(sets) if sets[name] is not None]), None)


class SplitPairs(io.ComfyNode):
    """A set in two parts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MaPOSplitPairs",
            display_name="Split Pairs",
            category=CATEGORY,
            description="Holds out a share of the pairs, chosen at random. Pairs of the same chosen image stay together.",
            inputs=[
                Pairs.Input("pairs", tooltip="The set to split."),
                io.Float.Input(
                    "share",
                    default=0.1,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share that is held out; a larger value leaves less to train on.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**53 - 1,
                    control_after_generate=False,
                    tooltip="Another seed holds out other pairs.",
                ),
            ],
            outputs=[
                Pairs.Output("rest", display_name="pairs"),
                Pairs.Output("held_out", display_name="held out"),
            ],
        )

    @classmethod
    def execute(cls, pairs: PairSet, share: float, seed: int) -> io.NodeOutput:
        return io.NodeOutput(*split_set(pairs, share, seed))


class FilterPairs(io.ComfyNode):
    """A set without what the check found."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MaPOFilterPairs",
            display_name="Filter Pairs",
            category=CATEGORY,
            description="Drops the pairs that the check complains of. No file is deleted.",
            is_output_node=True,
            inputs=[
                Pairs.Input("pairs", tooltip="The set to filter."),
                *(
                    io.Boolean.Input(
                        f"drop_{name}",
                        default=name == "repeated",
                        tooltip="Drop: " + "; ".join(TITLES[code] for code in codes) + ".",
                    )
                    for name, codes in DROPS.items()
                ),
                io.Int.Input(
                    "check_resolution",
                    default=1024,
                    min=64,
                    max=4096,
                    step=8,
                    tooltip="Resolution that you mean to train at, pixels; a larger value finds more images too small.",
                ),
            ],
            outputs=[
                Pairs.Output("kept", display_name="pairs"),
                Pairs.Output("dropped", display_name="dropped"),
                io.String.Output("report", display_name="report"),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, pairs: PairSet, check_resolution: int, **switches: bool) -> io.NodeOutput:
        codes = {code for name, found in DROPS.items() if switches[f"drop_{name}"] for code in found}
        bar = _comfy.Progress(cls.hidden.unique_id)
        report = lint_pairs(pairs.pairs, resolution=check_resolution, progress=bar.check)
        kept, dropped = filter_set(pairs, report.findings, codes)
        if not kept.pairs:
            raise ConfigError(f"All {len(pairs.pairs)} pairs would be dropped. Switch off some of the reasons.")
        note = f"{len(kept.pairs)} of {len(pairs.pairs)} pairs kept, {len(dropped.pairs)} dropped."
        out = shown(cls, kept, check_resolution, note)
        return io.NodeOutput(out.args[0], dropped, out.args[1], ui=out.ui)


NODES = [JoinPairs, SplitPairs, FilterPairs]
