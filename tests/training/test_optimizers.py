"""The optimizers: what they are built of, that each lowers the loss, and that each resumes exactly."""

from __future__ import annotations

import torch

from mapo_core.optimizers import build_optimizer
from mapo_core.parameters import ParameterGroup, flat
from mapo_core.sections import OptimizerConfig


def test_a_groups_own_learning_rate_takes_the_place_of_the_common_one() -> None:
    groups = [
        ParameterGroup(name, {f"{name}.{i}": torch.nn.Parameter(torch.zeros(2)) for i in range(2)}, rate)
        for name, rate in (("unet", None), ("text_encoder", 5e-6), ("tokens", 0.5))
    ]
    optimizer = build_optimizer(groups, OptimizerConfig(type="adamw", learning_rate=1e-3))
    assert [g["lr"] for g in optimizer.param_groups] == [1e-3, 5e-6, 0.5]
    assert [id(p) for g in optimizer.param_groups for p in g["params"]] == [id(p) for p in flat(groups)]
