"""A vision-language model as judge: it is shown a picture and its prompt and gives 0 to 10 points.

A model of the user's choice, by transformers from local files; or, only where the user names one, any server that
speaks OpenAI's chat completions, to which the pictures are then sent. Judges differ and have tastes: compare win rates
of one judge, not points of two.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ConfigError, ModelError
from ..families._quiet import quiet_import_notices
from .weights import WeightSource, find_weights, load_pretrained

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

    from .scorers import ScorerOptions

DEFAULT_MODEL = "HuggingFaceTB/SmolVLM-Instruct"
_FILES = ("config.json", "*.safetensors", "tokenizer.json|tokenizer.model|vocab.json")
_EXTRA = ("*.json", "*.txt", "*.model", "*.jinja")
SOURCES = (WeightSource("vlm-judge", DEFAULT_MODEL, _FILES, "4.5 GB", _EXTRA),)
API_KEY = "MAPO_JUDGE_API_KEY"  # environment variable
TEMPLATE = """\
You judge a picture that was made from a text. The text is:
"{prompt}"
Give points from 0 to 10:
0-2: the picture shows something else, or is broken.
3-5: parts of the text are missing or wrong, or the picture has obvious faults.
6-8: everything in the text is there; small faults in shape, light or composition.
9-10: everything in the text is there, and the picture is well made; nothing in it disturbs.
Answer with one line: Points: N"""
_NUMBER = r"(\d+(?:[.,]\d+)?)"
_POINTS = re.compile(rf"points?\W*{_NUMBER}", re.IGNORECASE)
_FALLBACK = re.compile(rf"(?<![\d.,/]){_NUMBER}(?:\s*(?:/|out of)\s*10)?(?![\d.,])", re.IGNORECASE)
_NEW_TOKENS = 32
_TIMEOUT_S = 120


def points_in(answer: str) -> float:
    """The points in a judge's answer; not a number where it gave none between 0 and 10."""
    match = next(reversed(list(_POINTS.finditer(answer))), None) or _FALLBACK.search(answer)
    value = float(match[1].replace(",", ".")) if match else float("nan")
    return value if 0 <= value <= 10 else float("nan")


class LocalJudge:
    """A model in this process."""

    name = "vlm-judge"

    def __init__(self, model: Any, processor: Any, title: str, device: torch.device) -> None:
        self.title = f"judged by {title}, points of 10"
        self._model = model
        self._processor = processor
        self._device = device

    @torch.no_grad()
    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """[N], 0-10, not a number where the answer has none."""
        return [points_in(self.answer(image, prompt)) for image, prompt in zip(images, prompts, strict=True)]

    def answer(self, image: Image.Image, prompt: str) -> str:
        """What the model says, greedily."""
        content = [{"type": "image"}, {"type": "text", "text": TEMPLATE.format(prompt=prompt)}]
        text = self._processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = self._processor(text=text, images=[image.convert("RGB")], return_tensors="pt").to(self._device)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self._model.dtype)
        out = self._model.generate(**inputs, max_new_tokens=_NEW_TOKENS, do_sample=False)
        return self._processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


class EndpointJudge:
    """A model behind an OpenAI-compatible server."""

    name = "vlm-judge"

    def __init__(self, endpoint: str, model: str) -> None:
        self.title = f"judged by {model}, points of 10"
        self._url = f"{endpoint.rstrip('/')}/chat/completions"
        self._model = model

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """[N], 0-10, not a number where the answer has none.

        Raises:
            ModelError: the server cannot be reached or refuses.
        """
        return [points_in(self.answer(image, prompt)) for image, prompt in zip(images, prompts, strict=True)]

    def answer(self, image: Image.Image, prompt: str) -> str:
        """What the model says, at temperature 0."""
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        content = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": TEMPLATE.format(prompt=prompt)},
        ]
        messages = [{"role": "user", "content": content}]
        body = {"model": self._model, "messages": messages, "temperature": 0, "max_tokens": _NEW_TOKENS}
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(API_KEY):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self._url, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
                return json.load(answer)["choices"][0]["message"]["content"] or ""
        except urllib.error.HTTPError as error:
            detail = error.read(300).decode(errors="replace")
            raise ModelError(f"The judge at {self._url} refuses ({error.code}): {detail}. Check {API_KEY}.") from error
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise ModelError(
                f"The judge at {self._url} does not answer as OpenAI's chat completions do: {error}. Check "
                "--judge-endpoint, which ends in /v1 for most servers."
            ) from error


def load(name: str, options: ScorerOptions) -> LocalJudge | EndpointJudge:
    """The judge that the options ask for.

    Raises:
        ConfigError: an endpoint without a model's name, or with another address than http.
        MissingWeightsError: the local model is not here.
        ModelError: it cannot be loaded.
    """
    if options.judge_endpoint is not None:
        if not options.judge_endpoint.startswith(("http://", "https://")):
            raise ConfigError(f"--judge-endpoint {options.judge_endpoint}: it must begin with http:// or https://.")
        if not options.judge_model:
            raise ConfigError("--judge-endpoint needs the model's name there: --judge-model NAME.")
        return EndpointJudge(options.judge_endpoint, options.judge_model)
    quiet_import_notices()
    path, title = _local(options)
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from ..devices import preferred_device

    try:
        processor = AutoProcessor.from_pretrained(path, local_files_only=True)
    except (ImportError, OSError, ValueError) as error:
        raise ModelError(
            f"The judge's processor in {path} cannot be loaded: {str(error).strip().splitlines()[0]}. Models whose "
            f"processor needs torchvision are not for this program; {DEFAULT_MODEL} and LLaVA 1.5 do without."
        ) from error
    device = preferred_device(options.device)
    return LocalJudge(load_pretrained(AutoModelForImageTextToText, path, device), processor, title, device)


def _local(options: ScorerOptions) -> tuple[Path, str]:
    """Where the model lies, and what it is called."""
    chosen = options.judge_model
    if chosen is not None and Path(chosen).expanduser().is_dir():
        return find_weights(SOURCES[0], Path(chosen).expanduser()), Path(chosen).name
    source = (
        SOURCES[0]
        if chosen is None
        else WeightSource(f"vlm-judge-{chosen.replace('/', '--')}", chosen, _FILES, "", _EXTRA)
    )
    return find_weights(source, options.folders.get("vlm-judge"), options.download), source.repo
