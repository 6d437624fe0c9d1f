"""The settings nodes are the config's own schema: every field once, same defaults, ranges and texts."""

from __future__ import annotations

from typing import Any

import pytest

from mapo_core import METHODS, ConfigError, TrainConfig, build_config, form_field, form_groups, merge_settings

COMPLETE = {"name": "x", "model": {"path": "demo"}, "data": {"pairs": "p.jsonl"}}
# Given by Train LoRA itself, or by nothing because a new run has no parent.
ELSEWHERE = {"name", "seed", "parent", "model.path", "data.pairs"}


def nodes(pack: Any) -> list[Any]:
    return pack.module("settings").NODES


def widgets(pack: Any) -> list[tuple[Any, Any]]:
    return [(node, widget) for node in nodes(pack) for widget in node.widgets]


def inputs(node: Any) -> dict[str, Any]:
    return {one.id: one for one in node.GET_SCHEMA().inputs}


def test_every_setting_is_a_widget_of_exactly_one_node(pack: Any) -> None:
    homes: dict[str, list[str]] = {}
    for node, widget in widgets(pack):
        homes.setdefault(".".join(widget.field.path), []).append(node.GET_SCHEMA().node_id)
    for group in form_groups():
        for field in group.fields:
            name = ".".join(field.path)
            if name in ELSEWHERE:
                assert name not in homes
                continue
            in_training_settings = group.path[:1] == ("method",) and field.name in ("beta", "margin_weight")
            if not in_training_settings:
                # settings of a method have one path for all methods, so each method's own node may have it
                assert homes.get(name), f"{name} has no widget"
                assert len(set(homes[name])) == len(homes[name])
                assert len(homes[name]) == 1 or group.path[:1] == ("method",), homes[name]
    assert {"beta", "margin_weight"} <= set(inputs(pack.node("MaPOTrainingSettings")))


def test_widgets_have_the_defaults_ranges_and_texts_of_the_schema(pack: Any) -> None:
    for node, widget in widgets(pack):
        field, known = widget.field, inputs(node)
        if field.kind == "toggles":
            made = [known[f"{widget.id}_{choice}"] for choice in field.choices]
            assert [m.id for m in made if m.default] == [f"{widget.id}_{c}" for c in field.default]
            continue
        made = known[widget.id]
        assert made.default == field.default, widget.id
        assert field.text in made.tooltip
        if field.kind in ("int", "float"):
            assert (made.min, made.max) == (field.minimum, field.maximum)
            assert made.min <= made.default <= made.max
            assert made.step > 0
        if field.kind == "choice":
            assert tuple(made.choices) == field.choices


def test_the_defaults_of_all_widgets_are_the_default_config(pack: Any) -> None:
    default = build_config(COMPLETE)
    for node in nodes(pack):
        if node.fixed.get("method", {}).get("type", "mapo") != "mapo":
            continue
        given = {i.id: i.default for i in node.GET_SCHEMA().inputs if getattr(i, "default", None) is not None}
        assert build_config(merge_settings(COMPLETE, node.own(given))) == default, node.GET_SCHEMA().node_id


def test_the_bounds_of_every_widget_are_accepted(pack: Any) -> None:
    """A number that the widget offers must not be refused when the training begins."""
    for node, widget in widgets(pack):
        if widget.field.kind not in ("int", "float"):
            continue
        method = node.fixed.get("method", {}).get("type")
        for value in (widget.field.minimum, widget.field.maximum):
            values = pack.module("_widgets").values_of([widget], {widget.id: value})
            fixed = {"method": {"type": method}} if method else {}
            if (widget.id, value) == ("warmup_steps", widget.field.maximum):
                continue  # has no bound of its own, but must be below the steps
            assert pack.module("_widgets").problem(merge_settings(fixed, values)) is None, (widget.id, value)


def test_a_warm_up_is_not_measured_by_steps_that_another_node_gives(pack: Any) -> None:
    out = pack.run("MaPOTrainingSettings", steps=9000).args[0]
    out = pack.run("MaPOOptimizerSettings", settings=out, warmup_steps=3000).args[0]
    assert build_config(merge_settings(COMPLETE, out)).optimizer.warmup_steps == 3000
    with pytest.raises(ConfigError, match="must be below training"):
        pack.run("MaPOSettingsText", lines="training.steps = 5\noptimizer.warmup_steps = 5")


def test_automatic_values_are_left_to_the_trainer(pack: Any) -> None:
    assert form_field("data", "resolution").automatic == 0
    assert pack.run("MaPOTrainingSettings").args[0]["method"] == {"type": "mapo"}
    assert "data" not in pack.run("MaPOTrainingSettings", resolution=0).args[0]
    assert pack.run("MaPOTrainingSettings", resolution=512).args[0]["data"] == {"resolution": 512}
    assert "zero_terminal_snr" not in pack.run("MaPOModelSettings").args[0]["model"]
    assert pack.run("MaPOModelSettings", zero_terminal_snr="off").args[0]["model"]["zero_terminal_snr"] is False


def test_toggles_lines_and_numbers(pack: Any) -> None:
    out = pack.run("MaPOAdapterSettings", targets_attention=False, targets_conv=True).args[0]
    assert out["adapter"]["targets"] == ["conv"]
    out = pack.run("MaPOValidationSettings", prompts="one\n\n two \n").args[0]
    assert out["validation"]["prompts"] == ["one", "two"]
    assert pack.run("MaPOOptimizerSettings", betas="0.8 0.9").args[0]["optimizer"]["betas"] == [0.8, 0.9]
    with pytest.raises(ConfigError, match=r"optimizer\.betas: 'high' is not a list of numbers"):
        pack.run("MaPOOptimizerSettings", betas="high")


@pytest.mark.parametrize(
    ("given", "expected"), [("auto", None), ("on", True), ("off", False), (True, True), (False, False)]
)
def test_a_workflow_saved_while_checkpointing_was_a_switch_means_what_it_meant(
    pack: Any, given: object, expected: bool | None
) -> None:
    node = pack.node("MaPOMemorySettings")
    values = {one.id: one.default for one in node.GET_SCHEMA().inputs if hasattr(one, "default")}
    values["gradient_checkpointing"] = given
    assert node.validate_inputs(**values) is True  # it takes any name, so ComfyUI leaves the list of choices to it
    settings = node.execute(**values).result[0]
    assert settings["training"].get("gradient_checkpointing") == expected
    assert build_config(merge_settings(settings, COMPLETE)).training.gradient_checkpointing is expected


def test_later_nodes_win_setting_by_setting(pack: Any) -> None:
    first = pack.run("MaPOSettingsText", lines="adapter.rank = 4\nadapter.dropout = 0.5").args[0]
    then = pack.run("MaPOTrainingSettings", settings=first, rank=32).args[0]
    assert then["adapter"] == {"rank": 32, "dropout": 0.5}
    assert first["adapter"] == {"rank": 4, "dropout": 0.5}, "what comes in is not changed"


def test_another_method_drops_the_settings_of_the_one_before(pack: Any) -> None:
    first = pack.run("MaPOMethodMapo", link_scale=2.0).args[0]
    assert first["method"]["link_scale"] == 2.0
    then = pack.run("MaPOTrainingSettings", settings=first, method="sft").args[0]
    assert then["method"] == {"type": "sft"}
    same = pack.run("MaPOTrainingSettings", settings=first, margin_weight=0.3).args[0]
    assert same["method"]["link_scale"] == 2.0
    assert same["method"]["margin_weight"] == 0.3


def test_beta_of_mapo_is_the_papers_form(pack: Any) -> None:
    out = pack.run("MaPOTrainingSettings", beta=8.0).args[0]
    assert out["method"] == {"type": "mapo", "beta": 8.0, "parametrisation": "paper"}
    assert pack.run("MaPOTrainingSettings", method="diffusion_dpo", beta=500.0).args[0]["method"] == {
        "type": "diffusion_dpo",
        "beta": 500.0,
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"beta": 8.0, "margin_weight": 0.1}, "not both"),
        ({"method": "sft", "beta": 8.0}, "sft has no beta: set it to 0"),
        ({"method": "diffusion_dpo", "margin_weight": 0.1}, "diffusion_dpo has no margin_weight: set it to -1"),
    ],
)
def test_strengths_that_a_method_does_not_have(pack: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pack.run("MaPOTrainingSettings", **given)
    node = pack.node("MaPOTrainingSettings")
    widgets = {i.id: i.default for i in node.GET_SCHEMA().inputs if getattr(i, "default", None) is not None}
    assert message in node.validate_inputs(**{**widgets, **given})


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_can_be_chosen(pack: Any, method: str) -> None:
    assert pack.run("MaPOTrainingSettings", method=method).args[0]["method"]["type"] == method


def test_a_linked_widget_is_checked_when_it_is_known(pack: Any) -> None:
    node = pack.node("MaPOTrainingSettings")
    widgets = {i.id: i.default for i in node.GET_SCHEMA().inputs if getattr(i, "default", None) is not None}
    assert node.validate_inputs(**{**widgets, "rank": None, "method": "sft", "beta": 8.0}) is True
    assert node.validate_inputs(**widgets, settings=None) is True


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("adapter.rank 4", r"Line 1: 'adapter.rank 4' is not of the form section.field = value"),
        ("\n# no\n= 4", r"Line 3: '= 4' is not of the form"),
        ("adapter.rnk = 4", "rnk"),
        ("adapter.rank = many", r"adapter\.rank"),
        ("adapter.rank = 0", r"adapter\.rank"),
        ("adaptor.rank = 4", "adaptor"),
        ("seed.x = 4", "seed"),
    ],
)
def test_wrong_text_is_said_in_plain_words(pack: Any, lines: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pack.run("MaPOSettingsText", lines=lines)
    assert isinstance(pack.node("MaPOSettingsText").validate_inputs(lines=lines), str)


def test_text_reaches_every_setting(pack: Any) -> None:
    lines = "optimizer.learning_rate = 2e-5  # small\nvalidation.prompts = a star\ndata.flip=true\nmethod.type = sft"
    out = pack.run("MaPOSettingsText", lines=lines).args[0]
    config = build_config(merge_settings(COMPLETE, out))
    assert config.optimizer.learning_rate == 2e-5
    assert config.validation.prompts == ("a star",)
    assert config.data.flip is True
    assert config.method.type == "sft"
    assert isinstance(config, TrainConfig)


def test_a_section_with_a_type_keeps_its_other_settings() -> None:
    """Only another method starts afresh: the node that chooses the optimizer must not undo the learning rate."""
    merged = merge_settings({"optimizer": {"learning_rate": 1e-4}}, {"optimizer": {"type": "adamw"}})
    assert merged == {"optimizer": {"learning_rate": 1e-4, "type": "adamw"}}
    merged = merge_settings({"method": {"type": "mapo", "beta": 8}}, {"method": {"type": "sft"}})
    assert merged == {"method": {"type": "sft"}}
