"""Noise schedules: one to train on, one to sample with, from the model's own settings."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
from diffusers import DDPMScheduler, EulerDiscreteScheduler  # pyright: ignore[reportPrivateImportUsage]

_SCHEDULE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")


def build_schedulers(settings: dict[str, Any], prediction_type: str, zero_terminal_snr: bool) -> tuple[Any, Any]:
    """The training and the sampling scheduler of a model.

    Args:
        settings: its scheduler_config.json.
        prediction_type: "epsilon" or "v_prediction"; wins over the settings.
        zero_terminal_snr: rescale the betas so that the last step is pure noise ("Common Diffusion Noise Schedules
            and Sample Steps are Flawed", algorithm 1); wins over the settings.
    """
    betas = {k: settings[k] for k in _SCHEDULE if k in settings}
    ours = {"prediction_type": prediction_type, "rescale_betas_zero_snr": zero_terminal_snr}
    training = DDPMScheduler(**betas, **ours, clip_sample=False)
    own: Any = getattr(diffusers, str(settings.get("_class_name")), EulerDiscreteScheduler)
    accepted = inspect.signature(own.__init__).parameters
    if zero_terminal_snr:
        ours["timestep_spacing"] = "trailing"  # only this begins sampling at the last step (section 3.3 there)
    elif "rescale_betas_zero_snr" not in accepted:
        del ours["rescale_betas_zero_snr"]
    if not ours.keys() <= accepted.keys():
        own, settings = EulerDiscreteScheduler, betas
    return training, own.from_config(settings, **ours)
