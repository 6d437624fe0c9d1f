"""The optimizers: what they are built of, that each lowers the loss, and that each resumes exactly."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import mapo_core.trainer as trainer
from mapo_core.config import build_config
from mapo_core.errors import ConfigError
from mapo_core.export import read_lora
from mapo_core.optimizers import PACKAGES, build_optimizer, build_schedule, evaluation_weights
from mapo_core.parameters import ParameterGroup, flat
from mapo_core.runs import RunDir, read_events
from mapo_core.sections import OptimizerConfig
from mapo_core.session import prepare
from mapo_core.state import weights_in_use

from .conftest import Run, lora_of, run_here

# Rates at which twelve steps visibly lower the tiny model's loss.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"learning_rate": 5e-3},
    "adamw8bit": {"learning_rate": 5e-3},
    "paged_adamw8bit": {"learning_rate": 5e-3},
    "lion8bit": {"learning_rate": 2e-3},
    "adafactor": {"learning_rate": 5e-3},
    "prodigy": {"learning_rate": 1.0, "prodigy_d_coef": 2.0},
    "schedulefree_adamw": {"learning_rate": 2e-2, "warmup_steps": 2},
}
PARTS = {
    "lora+": {"type": "adamw", "learning_rate": 1e-3, "lora_plus_ratio": 8.0},
    "ema": {"type": "adamw", "learning_rate": 5e-3, "ema_decay": 0.9},
    "restarts": {"type": "adamw", "learning_rate": 5e-3, "schedule": "cosine_with_restarts", "schedule_cycles": 3},
}
SETTINGS: dict[str, dict[str, Any]] = {**{k: {"type": k, **v} for k, v in OPTIMIZERS.items()}, **PARTS}


@pytest.mark.filterwarnings("ignore:.*[Pp]aged")
@pytest.mark.parametrize("kind", SETTINGS)
def test_each_optimizer_lowers_the_loss_and_resumes_bit_for_bit(
    new_run: Run, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        "method": {"type": "sft"},
        "optimizer": {"max_grad_norm": 0.0, "weight_decay": 0.01, **SETTINGS[kind]},
        "adapter": {"rank": 64, "targets": ["attention"]},  # large enough for states in 8 bits
        "training": {"steps": 8, "train_batch_size": 4, "gradient_accumulation_steps": 1},
        "validation": {"every_steps": 3},
        "checkpoint": {"every_steps": 100},
    }
    whole = new_run(f"whole-{kind}", **settings)
    run_here(whole)
    evaluated = [e for e in read_events(whole.events) if e["type"] == "evaluated"]
    assert evaluated[-1]["chosen_mse"] < evaluated[0]["chosen_mse"]
    parts = new_run(f"parts-{kind}", **settings)
    stop_at(parts, 5, monkeypatch)
    run_here(parts)
    assert parts.latest_checkpoint().name == "step_00000005"
    run_here(parts)
    a, b = (load_all(r) for r in (whole, parts))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    measures = [
        [{k: v for k, v in e.items() if k != "time"} for e in read_events(r.events) if e["type"] == "evaluated"]
        for r in (whole, parts)
    ]
    assert measures[0] == measures[1]


def load_all(run: RunDir) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint."""
    path = run.latest_checkpoint()
    assert path is not None
    return {f"{f.name}:{k}": v for f in path.glob("*.safetensors") for k, v in load_file(f).items()}


def stop_at(run: RunDir, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask for a stop during a step, once."""
    real = trainer.train_step

    def counted(session: Any, group: Any, buckets: Any) -> dict[str, float]:
        if session.step == step and session.run.path == run.path:
            run.request("stop")
            assert session.watcher.stop_requested.wait(5)
        return real(session, group, buckets)

    monkeypatch.setattr(trainer, "train_step", counted)


@pytest.mark.parametrize("kind", ["ema", "schedulefree_adamw"])
def test_averaged_weights_are_measured_and_exported_and_leave_the_training_untouched(new_run: Run, kind: str) -> None:
    settings = {"optimizer": SETTINGS[kind], "training": {"steps": 6}, "export": {"precision": "fp32"}}
    quiet = new_run(f"quiet-{kind}", **settings)
    run_here(quiet)
    watched = new_run(f"watched-{kind}", **settings, validation={"every_steps": 1, "sample_every_steps": 2})
    run_here(watched)
    a, b = load_all(quiet), load_all(watched)
    assert all(torch.equal(a[k], b[k]) for k in a)  # measuring and drawing had no influence
    trained = [v for k, v in a.items() if k.startswith("training")]
    in_use = lora_of(quiet)
    up = next(v for k, v in in_use.items() if "lora_B" in k)
    assert not any(t.shape == up.shape and torch.equal(t, up) for t in trained)
    exported = read_lora(quiet.export / f"{quiet.name}.safetensors")
    tensors = load_file(quiet.export / f"{quiet.name}.safetensors")
    assert exported.layout == "kohya"
    assert any(t.shape == up.shape and torch.equal(t, up) for t in tensors.values())


def test_the_average_follows_the_weights_as_its_decay_says(new_run: Run) -> None:
    session = prepare(new_run("ema-arithmetic", optimizer={**PARTS["ema"], "ema_decay": 0.5}), None, None)
    start = [p.detach().clone() for p in session.parameters]
    expected = start
    for step in range(1, 4):
        with torch.no_grad():
            for p in session.parameters:
                p.add_(step)
        session.average.step(session.parameters)
        # diffusers counts its first step as none, so that the average starts at the first weights
        decay = 0.0 if step == 1 else min(0.5, step / (9 + step))
        expected = [decay * e + (1 - decay) * p.detach() for e, p in zip(expected, session.parameters, strict=True)]
    live = [p.detach().clone() for p in session.parameters]
    with weights_in_use(session):
        for p, e in zip(session.parameters, expected, strict=True):
            torch.testing.assert_close(p.detach(), e, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(p, before) for p, before in zip(session.parameters, live, strict=True))


def test_schedule_free_weights_come_back_bit_for_bit() -> None:
    parameter = torch.nn.Parameter(torch.randn(64, generator=torch.Generator().manual_seed(0)))
    config = OptimizerConfig(type="schedulefree_adamw", learning_rate=0.01)
    optimizer: Any = build_optimizer([ParameterGroup("unet", {"a": parameter})], config)
    optimizer.train()
    for _ in range(5):
        parameter.grad = torch.sin(parameter.detach() * 7)
        optimizer.step()
    before = parameter.detach().clone()
    with evaluation_weights(optimizer, [parameter]):
        assert not torch.equal(parameter, before)
        assert not optimizer.param_groups[0]["train_mode"]
    assert torch.equal(parameter, before)
    assert optimizer.param_groups[0]["train_mode"]


def test_a_groups_own_learning_rate_takes_the_place_of_the_common_one() -> None:
    groups = named_groups()
    optimizer = build_optimizer(groups, OptimizerConfig(type="adamw", learning_rate=1e-3))
    assert [g["lr"] for g in optimizer.param_groups] == [1e-3, 5e-6, 0.5]
    assert [id(p) for g in optimizer.param_groups for p in g["params"]] == [id(p) for p in flat(groups)]


def named_groups() -> list[ParameterGroup]:
    rates = (("unet", None), ("text_encoder", 5e-6), ("tokens", 0.5))
    return [ParameterGroup(n, {f"{n}.lora_{i}": torch.nn.Parameter(torch.zeros(2)) for i in "AB"}, r) for n, r in rates]


def test_lora_plus_multiplies_the_learning_rate_of_up_weights_alone() -> None:
    groups = named_groups()
    optimizer = build_optimizer(groups, OptimizerConfig(type="adamw", learning_rate=1e-3, lora_plus_ratio=16))
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    for group in groups:
        base = 1e-3 if group.learning_rate is None else group.learning_rate
        down, up = group.parameters.values()
        assert (rates[id(down)], rates[id(up)]) == pytest.approx((base, 16 * base))
    plain = [ParameterGroup("unet", {"hada_w1_a": torch.nn.Parameter(torch.zeros(2))})]
    with pytest.raises(ConfigError, match="up weights"):
        build_optimizer(plain, OptimizerConfig(type="adamw", lora_plus_ratio=16))


def test_prodigy_refuses_several_learning_rates() -> None:
    with pytest.raises(ConfigError, match="one learning rate"):
        build_optimizer(named_groups(), OptimizerConfig(type="prodigy", learning_rate=1))


@pytest.mark.parametrize("kind", PACKAGES)
def test_a_missing_library_is_named_with_its_pip_command(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = {"adafactor": "transformers.optimization", "lion8bit": "bitsandbytes.optim.lion"}.get(kind, PACKAGES[kind])
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim" if kind.startswith(("adamw8", "paged")) else module, None)
    with pytest.raises(ConfigError, match=f"pip install {PACKAGES[kind]}"):
        build_optimizer([], OptimizerConfig(type=kind, **OPTIMIZERS[kind]))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"type": "prodigy"}, "Set optimizer.learning_rate to 1"),  # the default of 1e-5 is Adam's
        ({"type": "prodigy", "learning_rate": 1, "lora_plus_ratio": 2}, "lora_plus_ratio to 1"),
        ({"type": "schedulefree_adamw", "schedule": "cosine"}, "optimizer.schedule"),
        ({"type": "schedulefree_adamw", "ema_decay": 0.9}, "ema_decay to 0"),
        ({"schedule": "piecewise_constant"}, "schedule_rules"),
        ({"schedule_rules": "1:5,0.1"}, "piecewise_constant"),
        ({"schedule": "piecewise_constant", "schedule_rules": "fast"}, "not of the form"),
        ({"schedule": "piecewise_constant", "schedule_rules": "1:9,0.5:3,0.1"}, "must rise"),
        ({"schedule": "piecewise_constant", "schedule_rules": "1:9,0.1", "warmup_steps": 3}, "no warm-up"),
    ],
)
def test_fields_that_do_not_suit_the_optimizer_are_said(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config({"name": "x", "model": {"path": "demo"}, "data": {"pairs": "p"}, "optimizer": fields})


def test_an_unusually_high_learning_rate_is_said_and_trains_all_the_same(new_run: Run) -> None:
    codes = []
    for rate in (0.05, 1e-3):
        run = new_run(f"rate-{rate}", optimizer={"learning_rate": rate}, training={"steps": 1})
        run_here(run)
        codes.append([e["code"] for e in read_events(run.events) if e["type"] == "warning"])
    assert codes == [["learning_rate"], []]


@pytest.mark.parametrize(
    ("fields", "factors"),
    [
        ({"schedule": "constant", "warmup_steps": 2}, [0, 0.5, 1, 1, 1, 1, 1, 1]),
        ({"schedule": "linear"}, [1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
        ({"schedule": "polynomial", "schedule_power": 2.0}, [1, 0.7656, 0.5625, 0.3906, 0.25, 0.1406, 0.0625, 0.0156]),
        ({"schedule": "cosine_with_restarts", "schedule_cycles": 2}, [1, 0.8536, 0.5, 0.1464] * 2),
        ({"schedule": "piecewise_constant", "schedule_rules": "1:3,0.5:6,0.1"}, [1, 1, 1, 0.5, 0.5, 0.5, 0.1, 0.1]),
    ],
)
def test_schedules(fields: dict[str, Any], factors: list[float]) -> None:
    config = OptimizerConfig(type="adamw", learning_rate=1.0, **fields)
    optimizer = build_optimizer([ParameterGroup("unet", {"a": torch.nn.Parameter(torch.zeros(1))})], config)
    schedule = build_schedule(optimizer, config, 8)
    found = []
    for _ in range(8):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert found == pytest.approx(factors, abs=1e-3)


def test_a_checkpoint_of_before_these_fields_is_resumed(new_run: Run) -> None:
    run = new_run("old", training={"steps": 2})
    run_here(run)
    state = json.loads((run.latest_checkpoint() / "state.json").read_text())
    state.pop("measured")
    (run.latest_checkpoint() / "state.json").write_text(json.dumps(state))
    config = json.loads(run.config.read_text())
    config["training"]["steps"] = 4
    for name in (
        "schedule_cycles",
        "schedule_power",
        "schedule_rules",
        "lora_plus_ratio",
        "prodigy_d_coef",
        "ema_decay",
    ):
        config["optimizer"].pop(name)
    for name in ("keep_every", "keep_best"):
        config["checkpoint"].pop(name)
    run.config.write_text(json.dumps(config))
    run_here(run)
    assert [e["step"] for e in read_events(run.events) if e["type"] == "step"] == [1, 2, 3, 4]
