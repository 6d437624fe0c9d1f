"""DreamBooth's loss by hand, and what its settings refuse."""

from __future__ import annotations

import pytest
import torch

from mapo_core.config import build_config
from mapo_core.errors import ConfigError
from mapo_core.methods import DreamBoothConfig, DreamBoothLoss

BASE = {"name": "x", "model": {"path": "demo"}, "data": {"pairs": "p.jsonl"}}


def test_by_hand() -> None:
    chosen = torch.tensor([0.1, 0.2], requires_grad=True)
    of_class = torch.tensor([0.3, 0.5], requires_grad=True)
    loss, metrics = DreamBoothLoss(prior_weight=0.5)(chosen, of_class)
    assert loss.tolist() == pytest.approx([0.25, 0.45])
    assert metrics == {}
    loss.sum().backward()
    assert chosen.grad.tolist() == [1.0, 1.0]
    assert of_class.grad.tolist() == [0.5, 0.5]


def test_without_prior_it_is_sft() -> None:
    loss, _ = DreamBoothLoss(prior_weight=0.0)(torch.tensor([0.1]), torch.tensor([9.0]))
    assert loss.item() == pytest.approx(0.1)


def test_published_defaults() -> None:
    config = DreamBoothConfig(class_prompt="a photo of a dog")
    assert (config.class_images, config.prior_weight) == (100, 1.0)


def test_a_missing_or_empty_class_prompt_is_said() -> None:
    with pytest.raises(ConfigError, match=r"method\.class_prompt: Field required"):
        build_config({**BASE, "method": {"type": "dreambooth"}})
    with pytest.raises(ConfigError, match=r"method\.class_prompt: is empty; name what kind of thing"):
        build_config({**BASE, "method": {"type": "dreambooth", "class_prompt": " "}})


def test_an_unknown_setting_names_those_of_the_method() -> None:
    with pytest.raises(ConfigError, match=r"unknown setting method\.class_promt; did you mean method\.class_prompt\?"):
        build_config({**BASE, "method": {"type": "dreambooth", "class_prompt": "a dog", "class_promt": "a dog"}})
    with pytest.raises(ConfigError, match=r"unknown setting method\.gamma; there are type, beta"):
        build_config({**BASE, "method": {"type": "dco", "gamma": 1}})
