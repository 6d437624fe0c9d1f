"""From what a user types to a file or folder on disk: a path, `demo`, or a Hub id."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Sequence

Kind = Literal["single_file", "diffusers", "hub"]

DEMO_MODEL = Path(__file__).resolve().parent.parent / "demo" / "model"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
DESCRIPTION_FILES = ("model_index.json", "*.json", "*/*.json", "*/*.txt")  # all but weights


def locate(source: str | Path, revision: str | None = None) -> tuple[Kind, Path]:
    """Find the file or folder; of a Hub id, the configs and tokenizers only.

    Raises:
        ModelError: there is nothing at this path, or the Hub cannot give it.
    """
    text = str(source)
    if text == "demo":
        if not (DEMO_MODEL / "model_index.json").exists():
            raise ModelError(
                f"The built-in demo model is missing: {DEMO_MODEL}. Install the package again, or make the model: "
                "python scripts/pretrain_demo.py, then with --install."
            )
        return "diffusers", DEMO_MODEL
    path = Path(source).expanduser()
    if path.is_file():
        return "single_file", path
    if path.is_dir():
        return "diffusers", path
    if is_hub_id(text):
        return "hub", download(text, revision, DESCRIPTION_FILES)
    raise ModelError(
        f"There is no model at {path}. Give a .safetensors file, a diffusers folder, a Hub id such as "
        "stabilityai/stable-diffusion-xl-base-1.0, or demo."
    )


def is_hub_id(text: str) -> bool:
    """Whether it has the form organisation/name of a Hub id and not that of a file."""
    return _HUB_ID.fullmatch(text) is not None and not text.endswith((".safetensors", ".ckpt"))


def download(repo: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The files of a Hub model that match, from the local cache where they are there.

    Raises:
        ModelError: it does not exist, access is refused, or the Hub cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    name = f"{repo} (revision {revision})" if revision else repo
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))
    except GatedRepoError as error:
        raise ModelError(
            f"{name} asks you to accept its terms: do so on https://huggingface.co/{repo}, then sign in with "
            "`hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{repo} has no revision {revision}. See https://huggingface.co/{repo}/tree/main.") from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"There is no folder {repo}, and the Hub has no public model of this name. Check the spelling; for a "
            "private model sign in with `hf auth login`."
        ) from error
    except Exception as error:  # offline, proxy, disk: the Hub's client raises the errors of several libraries
        raise ModelError(
            f"There is no folder {repo}, and the Hub model {name} is not in the local cache and cannot be downloaded "
            f"({type(error).__name__}). Connect to the internet, or give a .safetensors file or a diffusers folder."
        ) from error


def weight_patterns(component: str, variant: str | None) -> list[str]:
    """File patterns of a component's safetensors weights, whole or in shards, as diffusers and transformers save."""
    v = f".{variant}" if variant else ""
    prefix = f"{component}/" if component else ""
    return [
        f"{prefix}{stem}{end}.safetensors"
        for stem in ("diffusion_pytorch_model", "model")
        for end in (v, f"{v}-?????-of-?????", f"-?????-of-?????{v}")
    ]


def weight_files(folder: Path, variant: str | None) -> list[Path]:
    """The safetensors files with a component's weights.

    Raises:
        ModelError: there are none; names what is there instead.
    """
    for pattern in weight_patterns("", variant):
        if files := sorted(folder.glob(pattern)):
            return files
    wanted = f'weights of variant "{variant}"' if variant else "safetensors weights"
    others = sorted(p.name for p in folder.glob("*.safetensors"))
    if others and variant is None:
        advice = f"There is {', '.join(others[:3])}: set model.variant, for example to {_variant_of(others[0])}."
    elif others:
        advice = f"There is {', '.join(others[:3])}: set model.variant accordingly."
    elif any(folder.glob("*.bin")):
        advice = "There are only pickled weights (.bin), which are not read. Save the model again as safetensors."
    else:
        advice = "The download or copy is not complete; get it again."
    raise ModelError(f"{folder} has no {wanted}. {advice}")


def _variant_of(name: str) -> str:
    parts = name.removesuffix(".safetensors").split(".")
    return re.sub(r"-\d+-of-\d+$", "", parts[1]) if len(parts) > 1 else "none"
