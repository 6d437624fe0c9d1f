"""The settings nodes. Every field of TrainConfig is a widget of exactly one of them, made from the config's schema."""

from __future__ import annotations

import re
from typing import Any

from comfy_api.latest import io

from ..mapo_core import METHODS, ConfigError, MapoError, form_field, form_groups, merge_settings, set_value
from ._types import Settings
from ._widgets import Widget, inputs_of, problem, rest_of, values_of, widgets_of

CATEGORY = "MaPO/settings"

TRAINING = ("adapter.rank", "optimizer.learning_rate", "training.steps", "data.resolution")
MEMORY = (
    "training.train_batch_size",
    "training.gradient_accumulation_steps",
    "training.gradient_checkpointing",
    "training.precision",
    "optimizer=optimizer.type",
    "cache_precision=cache.precision",
    "training.device",
    "memory.split_pairs",
    "training.autocast",
    "training.processes",
    "memory.base_precision",
    "memory.offload",
    "memory.offload_share",
    "memory.plan",
    "memory.preflight",
    "memory.prefetch",
    "memory.compile",
    "memory.channels_last",
    "memory.tf32",
    "memory.fused_optimizer",
    "memory.shard_base",
)
HOMES = {*TRAINING, *(text.rpartition("=")[2] for text in MEMORY)}

# Node id, title, what it is for; the settings are those of the group that no node above has.
GROUPS = {
    "model": ("MaPOModelSettings", "Model Settings", "How the base model is read: VAE, prediction type, clip skip."),
    "data": (
        "MaPODataSettings",
        "Data Settings",
        "How images are shown: buckets, flips, caption dropout, held-out share.",
    ),
    "adapter": ("MaPOAdapterSettings", "LoRA Settings", "Which layers get a LoRA, its alpha and dropout."),
    "optimizer": ("MaPOOptimizerSettings", "Optimizer Settings", "Schedule, warm-up, decay and clipping."),
    "loss": (
        "MaPOLossSettings",
        "Loss Settings",
        "What counts: noise levels, kind of noise, masks, and how far the votes are believed.",
    ),
    "validation": ("MaPOValidationSettings", "Validation Settings", "Measures and pictures during training."),
    "checkpoint": ("MaPOCheckpointSettings", "Checkpoint Settings", "When states are saved, and how many are kept."),
    "guard": (
        "MaPOGuardSettings",
        "Guard Settings",
        "When a run that moves away from the chosen images is taken back.",
    ),
    "tracking": (
        "MaPOTrackingSettings",
        "Tracking Settings",
        "TensorBoard and Weights & Biases, for those who use them.",
    ),
    "export": ("MaPOExportSettings", "Export Settings", "The LoRA file: layout, precision, trigger word."),
}

# Settings of another group that have their widget there: after which of the group's own -> setting.
ALSO = {"optimizer": {"optimizer.max_grad_norm": "training.max_nonfinite_steps"}}

_AUTO_BETA = "0: the method's own published value."


class SettingsNode(io.ComfyNode):
    """What all settings nodes do: lay their own settings over those that come in."""

    widgets: tuple[Widget, ...] = ()
    node: tuple[str, str, str] = ("", "", "")
    fixed: dict[str, Any] = {}  # noqa: RUF012  replaced, never changed

    @classmethod
    def define_schema(cls) -> io.Schema:
        node_id, title, text = cls.node
        return io.Schema(
            node_id=node_id,
            display_name=title,
            category=CATEGORY,
            description=text,
            inputs=[
                *inputs_of(list(cls.widgets)),
                Settings.Input("settings", optional=True, tooltip="Other settings; this node's are laid over them."),
            ],
            outputs=[Settings.Output("merged", display_name="settings")],
        )

    @classmethod
    def validate_inputs(cls, **given: Any) -> bool | str:
        given.pop("settings", None)
        if any(value is None for value in given.values()):  # a linked widget is known only when it runs
            return True
        try:
            return problem(cls.own(given)) or True
        except MapoError as error:
            return str(error)

    @classmethod
    def execute(cls, settings: dict[str, Any] | None = None, **given: Any) -> io.NodeOutput:
        own = cls.own(given)
        if wrong := problem(own):
            raise ConfigError(wrong)
        merged = merge_settings(settings or {}, own)
        if wrong := problem(merged):
            raise ConfigError(wrong)
        return io.NodeOutput(merged)

    @classmethod
    def own(cls, given: dict[str, Any]) -> dict[str, Any]:
        """This node's settings."""
        return merge_settings(cls.fixed, values_of(list(cls.widgets), given))


class TrainingSettings(SettingsNode):
    """The few settings that everybody looks at."""

    node = (
        "MaPOTrainingSettings",
        "Training Settings",
        "What everybody looks at: method, strength, rank, learning rate, steps.",
    )
    widgets = tuple(widgets_of(*TRAINING))

    @classmethod
    def define_schema(cls) -> io.Schema:
        schema = super().define_schema()
        beta, weight = form_field("method", "mapo", "beta"), form_field("method", "mapo", "margin_weight")
        schema.inputs = [
            io.Combo.Input(
                "method",
                options=list(METHODS),
                default="mapo",
                tooltip="mapo: preference without a reference model. sft: plain fine-tuning on the chosen images. diffusion_dpo and the others: the paper's baselines.",
            ),
            io.Float.Input(
                "beta",
                default=0.0,
                min=0.0,
                max=1e6,
                step=1.0,
                round=False,
                tooltip=f"{_AUTO_BETA} With mapo it selects the paper's form, where a larger value approaches plain fine-tuning. {beta.text}",
            ),
            io.Float.Input(
                "margin_weight",
                default=-1.0,
                min=-1.0,
                max=weight.maximum,
                step=0.01,
                round=False,
                tooltip=f"{weight.text} A larger value pushes harder away from the rejected images.",
            ),
            *schema.inputs,
        ]
        return schema

    @classmethod
    def own(cls, given: dict[str, Any]) -> dict[str, Any]:
        method: dict[str, Any] = {"type": given["method"]}
        takes = METHODS[given["method"]].model_fields
        for name, automatic in (("beta", 0), ("margin_weight", -1)):
            if given[name] == automatic:
                continue
            if name not in takes:
                raise ConfigError(f"{given['method']} has no {name}: set it to {automatic}, which leaves it out.")
            method[name] = given[name]
        if given["method"] == "mapo" and "beta" in method:
            if "margin_weight" in method:
                raise ConfigError("Give beta (the paper's form) or margin_weight (the authors' code), not both.")
            method["parametrisation"] = "paper"
        rest = {k: v for k, v in given.items() if k not in ("method", "beta", "margin_weight")}
        return merge_settings({"method": method}, values_of(list(cls.widgets), rest))


class MemorySettings(SettingsNode):
    """What decides how much memory is needed."""

    node = ("MaPOMemorySettings", "Memory Settings", "What decides how much memory is needed, and how fast a step is.")
    widgets = tuple(widgets_of(*MEMORY))


def group_nodes() -> list[type[SettingsNode]]:
    """One node for each group whose settings the nodes above do not have, and one for each method with its own."""
    nodes = [_group_node(*GROUPS[name], widgets_of(*_of_group(name))) for name in GROUPS]
    for group in form_groups():
        if group.path[:1] == ("method",):
            taken = {f"method.{group.path[1]}.{name}" for name in ("beta", "margin_weight")}
            rest = rest_of(".".join(group.path), taken)
            if rest:
                nodes.append(_method_node(group.path[1], group.text, rest))
    return nodes


def _group_node(node_id: str, title: str, text: str, widgets: list[Widget], **more: Any) -> type[SettingsNode]:
    return type(node_id, (SettingsNode,), {"node": (node_id, title, text), "widgets": tuple(widgets), **more})


def _of_group(name: str) -> list[str]:
    """The settings of a group's node, in the order of its widgets."""
    found = list(rest_of(name, HOMES))
    for before, other in ALSO.get(name, {}).items():
        found.insert(found.index(before) + 1, other)
    return found


def _method_node(name: str, text: str, rest: list[str]) -> type[SettingsNode]:
    words = name.split("_")
    node_id = "MaPOMethod" + "".join(w.capitalize() for w in words)
    return _group_node(
        node_id,
        f"Method Settings: {name}",
        f"Settings that only the method {name} has. Choose {name} in Training Settings, and wire the two together.",
        widgets_of(*rest),
        fixed={"method": {"type": name}},
    )


class SettingsText(SettingsNode):
    """Any setting by its name."""

    node = (
        "MaPOSettingsText",
        "Settings as Text",
        "Any setting by its name, one per line: section.field = value. All names are in docs/settings.md.",
    )

    @classmethod
    def define_schema(cls) -> io.Schema:
        schema = super().define_schema()
        text = io.String.Input(
            "lines",
            default="",
            multiline=True,
            tooltip="One setting per line, for example: optimizer.learning_rate = 2e-5. Text after a # between spaces is not read.",
        )
        schema.inputs = [text, *schema.inputs]
        return schema

    @classmethod
    def own(cls, given: dict[str, Any]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for number, line in enumerate(given["lines"].splitlines(), start=1):
            words = re.split(r"(?:^|\s)#(?:\s|$)", line)[0].strip()  # "a house #3" is no comment
            if not words:
                continue
            name, equals, value = words.partition("=")
            if not equals or not name.strip():
                raise ConfigError(f"Line {number}: {words!r} is not of the form section.field = value.")
            set_value(values, name.strip(), value.strip())
        return values


NODES = [TrainingSettings, MemorySettings, *group_nodes(), SettingsText]
