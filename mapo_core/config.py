"""TrainConfig: the whole request. Everything that can change a result is in it, and it is written into the run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin

from pydantic import Field, ValidationError, field_validator, model_validator

from ._settings import Settings
from .errors import ConfigError
from .methods import (
    METHODS,
    WITH_INVERSION,
    WITH_SFT_TERM,
    DCOConfig,
    DiffusionDPOConfig,
    DreamBoothConfig,
    InPOConfig,
    MaPOConfig,
    SFTConfig,
    SmPOConfig,
)
from .sections import (
    AdapterConfig,
    CacheConfig,
    CheckpointConfig,
    DataConfig,
    ExportConfig,
    GuardConfig,
    LossConfig,
    MemoryConfig,
    ModelConfig,
    OptimizerConfig,
    TrackingConfig,
    TrainingConfig,
    ValidationConfig,
)

SCHEMA_VERSION = 1

MethodSettings = Annotated[
    MaPOConfig | SFTConfig | DiffusionDPOConfig | DCOConfig | DreamBoothConfig | InPOConfig | SmPOConfig,
    Field(discriminator="type"),
]


class TrainConfig(Settings):
    """A training run, complete."""

    schema_version: Literal[1] = SCHEMA_VERSION
    """Version of this format."""
    name: str
    """Name of the run and of the LoRA file."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of everything random; 0 is a seed like any other."""
    model: ModelConfig
    data: DataConfig
    method: MethodSettings = MaPOConfig()
    adapter: AdapterConfig = AdapterConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    cache: CacheConfig = CacheConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    export: ExportConfig = ExportConfig()
    parent: str | None = None
    """The run and checkpoint that this one continues with changed settings or pairs, if any."""
    memory: MemoryConfig = MemoryConfig()
    loss: LossConfig = LossConfig()
    guard: GuardConfig = GuardConfig()
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("name")
    @classmethod
    def _name_is_a_file_name(cls, value: str) -> str:
        return checked_name(value)

    @model_validator(mode="after")
    def _warmup_fits(self) -> Self:
        if self.optimizer.warmup_steps >= self.training.steps:
            raise ValueError(
                f"optimizer.warmup_steps ({self.optimizer.warmup_steps}) must be below training.steps "
                f"({self.training.steps})"
            )
        return self

    @model_validator(mode="after")
    def _layout_has_the_kind(self) -> Self:
        if self.adapter.type in {"loha", "lokr"} and self.export.layout == "diffusers":
            raise ValueError(
                f"export.layout diffusers has no form for adapter.type {self.adapter.type}: set export.layout to "
                "kohya, the LyCORIS form that ComfyUI loads"
            )
        return self

    @model_validator(mode="after")
    def _loss_fits_the_method(self) -> Self:
        loss, method = self.loss, self.method.type
        if loss.max_timestep is not None and loss.max_timestep < loss.min_timestep:
            raise ValueError(
                f"loss.max_timestep ({loss.max_timestep}) must not be below loss.min_timestep ({loss.min_timestep})"
            )
        if loss.snr_weighting != "none" and method not in WITH_SFT_TERM:
            raise ValueError(
                f"loss.snr_weighting weighs the plain denoising error, and {method} has none beside its preference; "
                f"leave it at 'none', or choose one of {', '.join(sorted(WITH_SFT_TERM))}"
            )
        if (loss.noise_offset or loss.multires_noise_levels) and method in WITH_INVERSION:
            raise ValueError(
                f"loss.noise_offset and loss.multires_noise_levels shape noise that is added, and {method} finds its "
                "noise by inversion; leave both at 0"
            )
        return self

    def to_json(self) -> str:
        """As stored in a run folder."""
        return self.model_dump_json(indent=2) + "\n"


def checked_name(name: str) -> str:
    """A name that is a file name on every system.

    Raises:
        ValueError: it is empty, too long, or has characters or a form that some system refuses.
    """
    if not name or len(name) > 100 or re.search(r'[<>:"/\\|?*\x00-\x1f]', name) or name != name.strip(" ."):
        raise ValueError(
            f'{name!r} cannot be a file name: use 1-100 characters without < > : " / \\ | ? * and without a space or '
            "a dot at the ends"
        )
    if re.fullmatch(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?", name):
        raise ValueError(f"{name!r} is a reserved name on Windows: choose another")
    return name


def build_config(values: dict[str, Any], where: str = "settings") -> TrainConfig:
    """Validate settings.

    Raises:
        ConfigError: names every wrong field, what is wrong with it, and for an unknown field those that exist.
    """
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        lines = [_explain(e) for e in error.errors()]
        raise ConfigError(f"{where}: " + "; ".join(lines)) from None


def load_config(path: Path) -> TrainConfig:
    """Read a config from JSON, as a run folder has it.

    Raises:
        ConfigError: the file is missing, is not JSON, or has wrong fields.
    """
    return build_config(load_settings(path), str(path))


def load_settings(path: Path) -> dict[str, Any]:
    """The values of a JSON or YAML file, unchecked.

    Raises:
        ConfigError: the file is missing or is not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"Cannot read the config {path}: {error.strerror}. Check the path.") from error
    try:
        if path.suffix.lower() in {".yaml", ".yml"}:
            import yaml

            values = yaml.safe_load(text)
        else:
            values = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}. Correct it, or save it as YAML with .yaml.") from error
    except Exception as error:  # yaml.YAMLError, whose module is only known once imported
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of settings, as in docs/settings.md.")
    return values


def merge_settings(first: dict[str, Any], *others: dict[str, Any]) -> dict[str, Any]:
    """Nested settings of several sources in one; a later source wins, setting by setting.

    Another method takes nothing of the settings of the one before.
    """
    merged = dict(first)
    for other in others:
        for name, value in other.items():
            before = merged.get(name)
            if (
                isinstance(value, dict)
                and isinstance(before, dict)
                and (name != "method" or value.get("type", before.get("type")) == before.get("type"))
            ):
                merged[name] = merge_settings(before, value)
            else:
                merged[name] = value
    return merged


def set_value(values: dict[str, Any], dotted: str, text: str) -> None:
    """Put one `--section.field value` into nested settings, in place; the text is read as JSON where it is JSON.

    A list of names or numbers may be given as `a,b`; a text that is not a JSON list is one entry of a list of texts.
    Types are checked by `build_config`.
    """
    entry = _list_entry(dotted)
    *groups, name = dotted.split(".")
    for group in groups:
        inner = values.setdefault(group, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--{dotted}: {group} is not a group of settings")
        values = inner
    value = _parse(text)
    if entry is not None and isinstance(value, str | int | float):
        value = [text] if entry is str else [part.strip() for part in text.split(",") if part.strip()]
    values[name] = value


def _list_entry(dotted: str) -> Any:
    """The type of the entries if a setting is a list, else None."""
    group, _, name = dotted.rpartition(".")
    model = TrainConfig.model_fields[group].annotation if group in TrainConfig.model_fields else None
    fields = getattr(model, "model_fields", {})
    annotation = fields[name].annotation if name in fields else None
    return get_args(annotation)[0] if get_origin(annotation) is tuple else None


def _parse(text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        return None if text.lower() == "none" else text
    return text if isinstance(value, float) and value != value else value


def _explain(error: Any) -> str:
    place = ".".join(str(part) for part in _without_tag(error["loc"]))
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        return f"unknown setting {place}{_alternatives(error['loc'])}"
    given = "" if error["type"] in {"missing", "value_error"} else f" (got {error['input']!r})"
    return f"{place + ': ' if place else ''}{message}{given}"


def _without_tag(loc: tuple[Any, ...]) -> tuple[Any, ...]:
    """The place as the user writes it: method.beta, not method.dco.beta."""
    return (loc[0], *loc[2:]) if loc[:1] == ("method",) else loc


def _alternatives(loc: tuple[Any, ...]) -> str:
    """The names that exist where an unknown one was given."""
    import difflib

    group: Any = TrainConfig
    for part in _without_tag(loc)[:-1]:
        group = METHODS[loc[1]] if part == "method" else group.model_fields[part].annotation
    names = list(group.model_fields)
    place = ".".join(str(part) for part in _without_tag(loc)[:-1])
    close = difflib.get_close_matches(str(loc[-1]), names, n=1)
    if close:
        return f"; did you mean {place + '.' if place else ''}{close[0]}?"
    elsewhere = [
        g for g, f in TrainConfig.model_fields.items() if str(loc[-1]) in getattr(f.annotation, "model_fields", {})
    ]
    if elsewhere:
        return f"; did you mean {elsewhere[0]}.{loc[-1]}?"
    return f"; there are {', '.join(names) or 'none'}"
