"""The sections of TrainConfig: one class per group of settings, one docstring per field."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from ._settings import Settings


class ModelConfig(Settings):
    """The base model."""

    path: str
    """A `.safetensors` single file, a diffusers folder, a Hub id such as `stabilityai/stable-diffusion-xl-base-1.0`,
    or `demo` for the built-in model."""
    family: Literal["auto", "sdxl", "sd15"] = "auto"
    """Model family; "auto" recognises it from the file."""
    vae: str | None = None
    """Another VAE: a `.safetensors` file, a diffusers folder or a Hub id. None takes the model's own, in float32."""
    prediction_type: Literal["auto", "epsilon", "v_prediction"] = "auto"
    """What the denoiser predicts; "auto" reads the checkpoint's `v_pred` key or the folder's scheduler."""
    zero_terminal_snr: bool | None = None
    """Rescale the noise schedule so that the last step is pure noise; None reads the checkpoint's `ztsnr` key or the
    folder's scheduler."""
    clip_skip: int = Field(default=0, ge=0, le=10)
    """How many more of the text encoders' last layers to skip than the family does; 0 is the published behaviour."""
    variant: str | None = None
    """Weight variant of a diffusers folder or Hub id, for example "fp16"."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id."""
    merge_loras: tuple[str, ...] = ()
    """LoRA files that are merged into the model before anything else, each "path" or "path=strength"; a larger strength
    shows more of it. The model with them is the reference, and pictures with the trained LoRA need them too."""

    @field_validator("merge_loras")
    @classmethod
    def _merges(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            split_merge(text)
        return value


class DataConfig(Settings):
    """The pairs and how their images are read."""

    pairs: Path
    """The checked `pairs.jsonl`; the run keeps its own copy."""
    resolution: int | None = Field(default=None, ge=32, le=4096, multiple_of=8)
    """Side of the square bucket, pixels; other buckets have at most as many pixels. None takes the model's own: 1024
    for SDXL, 512 for SD 1.5, 64 for the demo model."""
    bucket: bool = True
    """Train each pair at the aspect ratio nearest to its chosen image; off crops everything square."""
    bucket_step: int | None = Field(default=None, ge=8, le=512, multiple_of=8)
    """Granularity of the bucket sides, pixels. None: 64, or an eighth of the resolution where that is smaller."""
    max_aspect: float = Field(default=2.0, ge=1.0, le=4.0)
    """Longest side ratio of a bucket; a larger value crops long images less."""
    flip: bool = False
    """Show both images of a pair mirrored at random, half of the time. Leave it off for text, faces and anything with
    a left and a right."""
    caption_dropout: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share of the steps at which a pair's prompt is empty, so that the LoRA also learns the unprompted look."""
    held_out: float = Field(default=0.1, ge=0.0, le=0.5)
    """Share of the pairs kept from training, to measure accuracy and margin on (at most 200 pairs); more measure better
    and leave less to train on."""


class AdapterConfig(Settings):
    """The LoRA."""

    rank: int = Field(default=8, ge=1, le=1024)
    """Width of the update; a larger rank learns more, needs more memory and overfits sooner. Default: the authors'
    LoRA recipe."""
    alpha: float | None = Field(default=None, gt=0)
    """Scale of the update, alpha / rank. None: equal to the rank, which is scale 1."""
    targets: tuple[Literal["attention", "feed_forward", "conv"], ...] = ("attention",)
    """Which UNet layers get a LoRA: attention (with its projections), feed_forward, conv (the residual blocks)."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the LoRA's inputs dropped while training; more makes it harder to memorise the images. With LoHa and
    LoKr it is the share of the update's rows."""
    type: Literal["lora", "rslora", "dora", "loha", "lokr"] = "lora"
    """Kind of update. "lora": two narrow matrices, what every program loads. "rslora": LoRA whose scale is alpha /
    sqrt(rank), for ranks of 32 and more. "dora": LoRA with a trained length for every output, often better at low ranks
    and slower. "loha" and "lokr" (LyCORIS): products of small matrices; "lokr" makes the smallest files. "loha" and
    "lokr" are exported in the kohya layout alone."""
    target_pattern: str | None = None
    """Regular expression in place of `targets`: every layer of the UNet's blocks in whose name it is found gets a LoRA,
    for example `attn2`, which is all cross-attention, or `^up_blocks.*attn`. None: the groups of `targets`."""
    rank_pattern: tuple[str, ...] = ()
    """Other ranks for some layers, each "regular expression=rank"; the first that is found in a layer's name counts.
    What kohya's users know as conv_dim=4 is `conv=4` and `time_emb_proj=4`, with conv among the targets."""
    alpha_pattern: tuple[str, ...] = ()
    """Other alphas for some layers, each "regular expression=alpha", as with `rank_pattern`; kohya's conv_alpha=1 is
    `conv=1` and `time_emb_proj=1`. Where alpha is None, every other layer's alpha is its own rank."""
    lokr_factor: int = Field(default=-1, ge=-1)
    """With "lokr": into which size the layers' sides are split; a larger value, up to the square root of a layer's
    width, gives smaller files. -1 splits as evenly as possible."""

    text_encoder: bool = False
    """Train the text encoders too, with the same kind, rank and groups of layers; prompts are then encoded in every
    step, which takes time and memory. For new words and subjects; for styles the UNet alone is usually enough."""
    text_encoder_learning_rate: float | None = Field(default=None, ge=0, le=1)
    """Learning rate of the first text encoder's LoRA; a larger one changes more what words mean, and text encoders want
    less than the UNet. 0 leaves it as it is; None takes optimizer.learning_rate."""
    text_encoder_2_learning_rate: float | None = Field(default=None, ge=0, le=1)
    """The same for SDXL's second text encoder; None takes optimizer.learning_rate, a larger one changes more."""

    init_from: str | None = None
    """A LoRA file to continue from, in the kohya or diffusers layout: its layers, ranks and alphas are taken, and model
    with this LoRA is the reference. The run keeps a copy. None starts afresh."""

    new_tokens: tuple[str, ...] = ()
    """New words whose vectors are trained in the text encoders (textual inversion), each "placeholder=word it starts
    from", for example `<toy>=toy`. Prompts name the subject by the placeholder; for the reference it is replaced by the
    word. Each is written beside the LoRA as a file that ComfyUI loads as an embedding."""
    new_token_vectors: int = Field(default=1, ge=1, le=16)
    """Vectors of each new word; more hold more of a subject and take more room in the prompt."""
    new_token_learning_rate: float | None = Field(default=None, gt=0, le=1)
    """Learning rate of the new words' vectors; a larger one learns them faster. Textual inversion wants more than a
    LoRA, 5e-4 to 5e-3. None takes optimizer.learning_rate."""

    @field_validator("new_tokens")
    @classmethod
    def _tokens(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        names = [text.rpartition("=")[0].strip() for text in value]
        for text, name in zip(value, names, strict=True):
            if not name or " " in name or not text.rpartition("=")[2].strip():
                raise ValueError(f"{text!r} is not of the form placeholder=word, for example <toy>=toy")
        inside = [(a, b) for a in names for b in names if a is not b and a in b]
        if inside:
            raise ValueError(f"the placeholder {inside[0][0]!r} is a part of {inside[0][1]!r}: choose others")
        return value

    @field_validator("target_pattern")
    @classmethod
    def _a_pattern(cls, value: str | None) -> str | None:
        if value is not None:
            _compiled(value)
        return value or None

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _patterns(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        for text in value:
            pattern, number = split_pattern(text)
            _compiled(pattern)
            whole = info.field_name == "rank_pattern"
            if not number > 0 or (whole and number != int(number)):
                raise ValueError(f"{text!r}: after the last = stands a {'whole ' if whole else ''}number above 0")
        return value

    @field_validator("targets")
    @classmethod
    def _some_target(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("name at least one of attention, feed_forward, conv")
        return tuple(dict.fromkeys(value))


def split_merge(text: str) -> tuple[str, float]:
    """ "style.safetensors=0.8" -> ("style.safetensors", 0.8); without a strength it is 1.

    Raises:
        ValueError: there is no path, or the strength is no finite number.
    """
    path, equals, strength = text.rpartition("=")
    if not equals:
        path, strength = text, "1"
    try:
        number = float(strength)
    except ValueError:  # an = in the name
        path, number = text, 1.0
    if not path.strip() or not math.isfinite(number):
        raise ValueError(f"{text!r} is not of the form path=strength, for example style.safetensors=0.8")
    return path.strip(), number


def split_pattern(text: str) -> tuple[str, float]:
    """ "attn2=16" -> ("attn2", 16.0); the last = counts.

    Raises:
        ValueError: it is not of this form.
    """
    pattern, equals, number = text.rpartition("=")
    try:
        if equals and pattern.strip():
            return pattern.strip(), float(number)
    except ValueError:
        pass
    raise ValueError(f"{text!r} is not of the form regular expression=number, for example attn2=16")


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error


class OptimizerConfig(Settings):
    """The optimizer and its learning rate."""

    type: Literal["adamw", "adamw8bit", "paged_adamw8bit", "lion8bit", "adafactor", "prodigy", "schedulefree_adamw"] = (
        "adamw8bit"
    )
    """"adamw8bit" keeps its state in 8 bits (bitsandbytes), a quarter of the memory of "adamw"; "paged_adamw8bit" moves
    it to the CPU's memory when the GPU's is full; "lion8bit" has half the state and wants a learning rate 3 to 10 times
    lower; "adafactor" hardly has any state; "prodigy" finds the learning rate by itself (learning_rate 1); and
    "schedulefree_adamw" averages the weights instead of lowering the learning rate. The last two need
    `pip install prodigyopt schedulefree`."""
    learning_rate: float = Field(default=1e-5, gt=0, le=1)
    """Step size; a larger one learns faster and, too large, ruins the pictures. Default: the authors' LoRA recipe for
    SDXL; LoRAs of styles often use 1e-4. With "prodigy" it is a factor on the one that it finds: 1."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of Adam's two averages; nearer to 1 averages over more steps."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Pull of the LoRA weights towards zero; a larger value keeps the LoRA weaker."""
    eps: float = Field(default=1e-8, gt=0)
    """Adam's guard against division by zero; a larger value makes steps smaller where gradients are tiny."""
    schedule: Literal["constant", "cosine", "linear", "cosine_with_restarts", "polynomial", "piecewise_constant"] = (
        "constant"
    )
    """Course of the learning rate after the warm-up; "cosine", "linear", "cosine_with_restarts" and "polynomial" end at
    zero, "piecewise_constant" follows schedule_rules. "schedulefree_adamw" takes "constant" only."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises from zero; more begin more gently."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients are scaled down to this norm, so a larger value lets larger steps through; 0 switches clipping off."""
    schedule_cycles: int = Field(default=1, ge=1, le=1000)
    """Number of falls of "cosine_with_restarts"; more start again at the full learning rate more often."""
    schedule_power: float = Field(default=1.0, gt=0, le=10)
    """Exponent of "polynomial"; a larger value falls faster at first, 1 is a straight line."""
    schedule_rules: str = ""
    """For "piecewise_constant": factors on the learning rate with the step at which each ends, and the last one, for
    example 1:500,0.3:1000,0.1."""
    lora_plus_ratio: float = Field(default=1.0, ge=1, le=64)
    """LoRA+ (arXiv 2402.12354): learning rate of the up weights over that of the down weights; a larger value learns
    faster at the same learning_rate. The paper advises 16 with half the usual learning rate; 1 switches it off."""
    prodigy_d_coef: float = Field(default=1.0, gt=0, le=100)
    """Prodigy's factor on the learning rate that it finds; larger values train harder. Its authors advise 0.5 to 2."""
    ema_decay: float = Field(default=0.0, ge=0, lt=1)
    """Keep a moving average of the weights, which is then what is measured, drawn, saved and exported; nearer to 1
    averages over more steps (0.99: about the last 100), which calms a noisy training. 0 switches it off."""

    @model_validator(mode="after")
    def _fields_suit_the_type(self) -> Self:
        if self.type == "prodigy" and not self.learning_rate >= 0.1:
            raise ValueError(
                "prodigy finds the learning rate by itself and learning_rate is a factor on it: "
                f"{self.learning_rate:g} would leave it nearly still. Set optimizer.learning_rate to 1"
            )
        if self.type == "prodigy" and self.lora_plus_ratio != 1:
            raise ValueError(
                "prodigy finds one learning rate for all weights, so LoRA+ has none to multiply. Set "
                "optimizer.lora_plus_ratio to 1, or choose another optimizer.type"
            )
        if self.type == "schedulefree_adamw" and (self.schedule != "constant" or self.ema_decay):
            raise ValueError(
                "schedulefree_adamw averages the weights instead of lowering the learning rate. Set optimizer.schedule "
                'to "constant" and optimizer.ema_decay to 0, or choose another optimizer.type'
            )
        if (self.schedule == "piecewise_constant") != bool(self.schedule_rules):
            raise ValueError(
                'optimizer.schedule "piecewise_constant" and optimizer.schedule_rules, such as 1:500,0.3:1000,0.1, '
                "need each other"
            )
        if self.schedule_rules:
            _check_rules(self.schedule_rules)
            if self.warmup_steps:
                raise ValueError("piecewise_constant has no warm-up: begin schedule_rules with a small factor instead")
        return self


def _check_rules(text: str) -> None:
    *parts, last = text.split(",")
    if not all(re.fullmatch(r"\s*\d*\.?\d+\s*:\s*\d+\s*", p) for p in parts) or not re.fullmatch(
        r"\s*\d*\.?\d+\s*", last
    ):
        raise ValueError(f"schedule_rules: {text!r} is not of the form factor:step,factor:step,factor")
    ends = [int(p.split(":")[1]) for p in parts]
    if ends != sorted(set(ends)):
        raise ValueError(f"schedule_rules: the steps of {text!r} must rise")


class TrainingConfig(Settings):
    """How long and in what precision."""

    steps: int = Field(default=2000, ge=1, le=10_000_000)
    """Optimizer steps; more learn more, and memorise the images in the end. Default: the authors' recipe."""
    train_batch_size: int = Field(default=1, ge=1, le=4096)
    """Pairs in one forward pass; a pair is two images. More need more memory and are faster per pair."""
    gradient_accumulation_steps: int = Field(default=16, ge=1, le=4096)
    """Forward passes per step. Pairs per step = train_batch_size x this x processes; the authors used 16."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the frozen model and of the arithmetic; LoRA weights are float32 in all. "auto": bf16 on a GPU
    that has it, fp16 on an older one, fp32 on the CPU."""
    gradient_checkpointing: bool | None = None
    """Compute activations twice instead of keeping them: a third to a half slower, far less memory, the same gradients.
    None: off where the memory plan finds that a step fits without it, otherwise on (with memory.plan "manual" always,
    with memory.preflight "off" on cards below 48 GB, because nothing is found out then)."""
    device: str = "auto"
    """"auto", "cpu", "cuda", "cuda:1", "mps"."""
    max_nonfinite_steps: int = Field(default=5, ge=1)
    """Stop when the loss was not finite at this many steps in a row; each such step is skipped and counted."""
    autocast: bool | None = None
    """Let torch choose the precision of every operation of a step (norms in float32), or compute all of it in
    `precision`, which copies less and keeps less. None: on for fp16, and for adapters other than plain LoRAs of linear
    layers; off for bf16 otherwise. Turn it on if the loss of a bf16 run is not finite. Without effect in fp32."""
    processes: int = Field(default=1, ge=1, le=64)
    """How many processes train on this machine, one per GPU; pairs per step are train_batch_size x
    gradient_accumulation_steps x this. For several machines leave it at 1 and use `accelerate launch`
    (docs/multi_gpu.md)."""


class LossConfig(Settings):
    """What counts: noise levels, kind of noise, parts of the images, and how far the votes are believed."""

    snr_weighting: Literal["none", "min_snr", "debiased"] = "none"
    """Weight of the denoising error by noise level, in plain fine-tuning: methods sft and dreambooth, and beside the
    margin of mapo. "min_snr" takes weight from the little noised levels and usually converges sooner (Hang et al.
    2023); "debiased" weighs strongly noised levels up, for composition rather than detail (Yu et al. 2023); "none" is
    the methods' published form."""
    min_snr_gamma: float = Field(default=5.0, gt=0, le=1000)
    """Of "min_snr": signal-to-noise ratio above which a level counts less; a smaller value moves the weight to strongly
    noised levels, a large one changes nothing. Default 5, the paper's."""
    timestep_sampling: Literal["uniform", "logit_normal"] = "uniform"
    """How a pair's noise level is drawn: all alike, or as "logit_normal" mostly from the middle (Esser et al. 2024)."""
    logit_mean: float = Field(default=0.0, ge=-10, le=10)
    """Of "logit_normal": where its middle lies; above 0 more noise and composition, below 0 less noise and detail."""
    logit_std: float = Field(default=1.0, gt=0, le=10)
    """Of "logit_normal": its width; a larger value draws from both ends more often."""
    min_timestep: int = Field(default=0, ge=0, le=999)
    """Smallest noise level that is trained, of 0 to 999. A larger value leaves fine detail as it is."""
    max_timestep: int | None = Field(default=None, ge=0, le=999)
    """Largest noise level that is trained, itself included; a smaller value leaves composition as it is. None: the
    last."""
    noise_offset: float = Field(default=0.0, ge=0, le=1)
    """Share of noise that is the same all over a channel, so that very dark and very bright pictures can be learned
    from models trained without it. Usual: 0.03 to 0.1; too much tints everything. 0: none."""
    multires_noise_levels: int = Field(default=0, ge=0, le=12)
    """Add coarser noise in up to so many steps, each two to four times as coarse (multi-resolution or pyramid noise):
    learns contrast and large areas sooner. Usual: 6; more makes no difference below 1024 pixels. 0: none."""
    multires_noise_discount: float = Field(default=0.3, gt=0, lt=1)
    """Strength of each coarser step relative to the one before; a larger value changes more. Usual: 0.1 to 0.3 for a
    LoRA."""
    label_noise: float = Field(default=0.0, ge=0, le=1)
    """Share of the pairs whose chosen and rejected images change places, always the same ones for a seed. For research
    on how much wrong votes harm; held-out pairs stay as they are."""
    mask: Literal["file", "alpha", "off"] = "file"
    """What of an image counts. "file": the white parts of its mask, where the pair names one (or `name-masklabel.png`
    lies beside `name.png`); "alpha": that, else what is not transparent; "off": everything. Images without a mask
    count as a whole."""
    mask_floor: float = Field(default=0.0, ge=0, lt=1)
    """How much the parts outside a mask count, 0 to 1. A larger value keeps the background from drifting; usual 0.1."""


class CacheConfig(Settings):
    """What is kept on disk of the encoded images and prompts."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of cached latents and prompt embeddings; bf16 halves the disk space."""


class ValidationConfig(Settings):
    """Measures and pictures during training."""

    every_steps: int = Field(default=250, ge=0)
    """Steps between two measurements on the held-out pairs; 0: only before the first and after the last step."""
    draws: int = Field(default=4, ge=1, le=64)
    """Fixed timesteps, spread over the schedule, at which each held-out pair is measured; more measure more
    finely and take longer."""
    prompts: tuple[str, ...] = ()
    """Prompts of the validation pictures; empty: four prompts of the held-out pairs."""
    negative_prompt: str = ""
    """What the pictures should not show."""
    sample_every_steps: int = Field(default=500, ge=0)
    """Steps between two sheets of validation pictures; 0: only at the end."""
    seed: int = Field(default=0, ge=0)
    """Seed of the pictures; prompt i uses seed + i, always the same noise."""
    num_inference_steps: int = Field(default=25, ge=1, le=1000)
    """Sampling steps of a picture; more take longer and may look better."""
    guidance_scale: float = Field(default=5.0, ge=0, le=50)
    """Classifier-free guidance of a picture; a larger value follows the prompt more closely."""
    width: int | None = Field(default=None, ge=32, le=4096, multiple_of=8)
    """Width of a picture, pixels; None: data.resolution."""
    height: int | None = Field(default=None, ge=32, le=4096, multiple_of=8)
    """Height of a picture, pixels; None: data.resolution."""


class CheckpointConfig(Settings):
    """States from which a run can go on."""

    every_steps: int = Field(default=250, ge=0)
    """Steps between two checkpoints; 0: only on stop and at the end."""
    keep: int = Field(default=3, ge=1)
    """How many of the newest to keep; more take more disk space."""
    keep_every: int = Field(default=0, ge=0)
    """Keep those of every so many steps for good, beside the newest; smaller values keep more. 0: none."""
    keep_best: bool = True
    """Keep the best on the held-out pairs, too, by accuracy, then margin. It needs validation.every_steps to be such
    that steps with a checkpoint are measured."""


class GuardConfig(Settings):
    """What happens when a run moves away from the chosen images."""

    enabled: bool = True
    """Go back to the last good state and lower the learning rate when the error on held-out chosen images rises while
    the margin rises; off, it is only said."""
    tolerance: float = Field(default=0.1, gt=0, le=10)
    """Rise of that error over the start of the run, relative, that is allowed; a larger value waits longer. A rise of
    five times as much counts whatever the margin does."""
    z: float = Field(default=3.0, ge=0, le=20)
    """Standard errors, over the pairs, that a rise must exceed as well; a larger value wants more certainty."""
    patience: int = Field(default=2, ge=1, le=100)
    """Measurements in a row that must find it; more wait longer. The second comes window_steps after the first."""
    window_steps: int = Field(default=20, ge=4, le=10_000)
    """Steps over which the error of the training itself is averaged, between measurements; where it is clearly above
    its lowest, the next measurement comes at once. Fewer see a divergence sooner and measure more often."""
    learning_rate_factor: float = Field(default=0.3, gt=0, lt=1)
    """Factor on the learning rate when going back; a smaller value is calmer and slower."""
    max_rollbacks: int = Field(default=3, ge=0, le=100)
    """How often to go back; the time after, the run goes back once more and ends there, with the LoRA of that state."""


class ExportConfig(Settings):
    """The LoRA file."""

    layout: Literal["kohya", "diffusers"] = "kohya"
    """"kohya" is what ComfyUI, A1111 and kohya load completely; "diffusers" is for diffusers' own loader."""
    precision: Literal["fp32", "fp16", "bf16"] = "fp16"
    """Precision of the stored weights."""
    trigger: str = ""
    """Trigger word, written into the metadata."""
    rank: int | None = Field(default=None, ge=1, le=1024)
    """Write the LoRA at this rank where it has more, by singular value decomposition; a larger one keeps more of what
    was learned, and how much is said. None leaves the rank as trained."""


class MemoryConfig(Settings):
    """How a run fits into the memory of its device."""

    split_pairs: Literal["auto", "on", "off"] = "auto"
    """Compute the chosen and the rejected images of a pair one after the other, with the same gradients: a pair then
    takes the memory of one image and more time. "auto": where the memory plan asks for it and the method allows it."""
    base_precision: Literal["auto", "full", "int8", "nf4", "fp8"] = "auto"
    """How the frozen weights of the denoiser are kept. "int8" and "nf4" (bitsandbytes) keep the linear layers in 8 and
    4 bits, "fp8" linear layers and convolutions in 8-bit floats; each layer is turned back where it is used, and the
    LoRA stays float32. Fewer bits save memory, cost time and move the model a little; how far is measured and said.
    "full": training.precision. "auto": "full", unless the memory plan needs less."""
    offload: Literal["auto", "on", "off"] = "auto"
    """Keep a part of the frozen denoiser in the computer's memory and bring each block to the device shortly before it
    is used; exact, and slower. "auto": only where the memory plan needs it."""
    offload_share: float = Field(default=0.5, gt=0, le=1)
    """Share of the denoiser's blocks that memory.offload "on" keeps off the device; a larger share saves more memory
    and takes more time."""
    plan: Literal["auto", "manual", "6GB", "8GB", "10GB", "12GB", "16GB", "24GB", "48GB"] = "auto"
    """How memory is saved. "auto" starts from the settings as they are and only ever adds savings, one after the other,
    while a measurement says that a step does not fit. "8GB" and so on start with what a card of that size needs, and
    go on like "auto" within that size. "manual" changes nothing. The docs name the savings and their order."""
    preflight: Literal["auto", "on", "off"] = "auto"
    """Before training, measure two real steps of the largest pictures: memory, seconds per step, time left. Nothing of
    the training changes by it. "auto": on a GPU. "off" also leaves out the forward pass that says whether
    training.gradient_checkpointing is needed; it then stays on."""
    prefetch: bool | None = None
    """Read the next batch of a step in a second thread while the device works on the one before; the batches are the
    same. Off saves the memory of one batch. None: on with a GPU, where we have not measured it yet, and off on the CPU,
    where it does not help (docs/benchmarks.md)."""
    compile: bool = False
    """Compile the denoiser's repeated blocks (torch.compile); the first steps take minutes. For long runs on a GPU
    under Linux; needs a C++ compiler, and the base in full precision and on the device."""
    channels_last: bool = False
    """Lay convolutions' weights out by channels last, which some GPUs compute faster; mapo preflight measures it."""
    tf32: bool = False
    """Let float32 matrix products and convolutions on a GPU use TF32: faster on Ampere and later, with 10 bits of
    precision. Matters for precision fp32 and for the VAE; bf16 and fp16 training hardly change."""
    fused_optimizer: bool = False
    """AdamW in one kernel instead of several; only with optimizer.type "adamw"."""
    shard_base: bool = False
    """With several processes: each keeps only its share of the frozen denoiser and fetches the rest block by block
    while it computes (FSDP2). For a model that does not fit on one GPU beside the activations; the same result, slower
    by what the GPUs send each other. Without effect with one process. An FSDP configuration of accelerate switches it
    on."""


class TrackingConfig(Settings):
    """Who else is told the numbers of a run; events.jsonl and the pages have them all without any of this."""

    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """"tensorboard" writes its files into the run folder (`tensorboard --logdir` on the folder of all runs compares
    them). "wandb" sends numbers, settings with their paths and prompts, and pictures to Weights & Biases; with
    WANDB_MODE=offline they stay on this machine. Each needs its package (pip install tensorboard, pip install wandb).
    Empty: none."""
    project: str = Field(default="mapo", pattern=r"^\w([\w .-]*[\w-])?$", max_length=100)
    """Project under which wandb lists the run; TensorBoard's files lie in a folder of this name. Letters, digits,
    and within it spaces, dots and hyphens."""
