"""Every scorer on a tiny random model of its real architecture, saved to disk and loaded as a user's would be."""

from __future__ import annotations

import hashlib
import http.server
import json
import math
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from mapo_core import ConfigError, ModelError
from mapo_core.demo.scenes import STYLES, render, scenes, styled_caption
from mapo_core.errors import MissingWeightsError
from mapo_core.evaluate import SCORERS, ScorerOptions, aesthetic, hpsv2, load_embedder, load_scorer, weights
from mapo_core.evaluate.vision import CLIP_MEAN, CLIP_STD, HALF_MEAN, HALF_STD, pixel_values
from mapo_core.evaluate.vlm_judge import TEMPLATE, points_in

PROMPTS = ["a red star on a white ground", "a blue boat", "fish, tree and moon"]


@pytest.fixture
def pictures() -> list[Image.Image]:
    """Square, wide and tall."""
    drawn = [render(scene, "cartoon", 96) for scene, _ in zip(scenes(3, held_out=False), range(3), strict=False)]
    return [drawn[0], drawn[1].crop((0, 16, 96, 72)), drawn[2].crop((20, 0, 76, 96))]


def options(**folders: Path) -> ScorerOptions:
    return ScorerOptions(device="cpu", folders={name.replace("_", "-"): path for name, path in folders.items()})


def tiny_clip(seed: int = 0) -> Any:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(seed)
    text = {"vocab_size": 49408, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "image_size": 28, "patch_size": 14}
    heads = {"num_attention_heads": 2}
    return CLIPModel(CLIPConfig(text_config={**text, **heads}, vision_config={**vision, **heads}, projection_dim=12))


@pytest.fixture
def clip_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "clip"
    tiny_clip().save_pretrained(folder)
    return folder


def published_cosines(model: Any, images: list[Image.Image], prompts: list[str]) -> Tensor:
    """The model's own forward pass behind transformers' own image processor and tokenizer."""
    from transformers import CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    side = model.config.vision_config.image_size
    processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    x = processor(images, return_tensors="pt")["pixel_values"]
    folder = Path(weights.__file__).parents[1] / "families" / "assets" / "clip_tokenizer"
    tokens = CLIPTokenizer.from_pretrained(folder)(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        out = model.eval()(pixel_values=x, **tokens)
    return out.logits_per_image.diagonal() / model.logit_scale.exp()


def test_clip_score(tmp_path: Path, pictures: list[Image.Image]) -> None:
    model = tiny_clip()
    model.save_pretrained(tmp_path / "as it is")
    expected = 100 * published_cosines(model, pictures, PROMPTS)
    with torch.no_grad():
        model.text_projection.weight.neg_()  # cosines change their sign; one of the two models has positive ones
    model.save_pretrained(tmp_path / "turned")
    for name, sign in (("as it is", 1), ("turned", -1)):
        found = load_scorer("clip", options(clip_vit_large_patch14=tmp_path / name)).score(pictures, PROMPTS)
        assert found == pytest.approx((sign * expected).clamp(min=0).tolist(), abs=0.1)
    assert expected.abs().min() > 1


def test_pickscore(tmp_path: Path, pictures: list[Image.Image]) -> None:
    model = tiny_clip(1)
    with torch.no_grad():
        model.logit_scale.fill_(math.log(50))
    model.save_pretrained(tmp_path / "pick")
    expected = 50 * published_cosines(model, pictures, PROMPTS)
    found = load_scorer("pickscore", options(pickscore=tmp_path / "pick")).score(pictures, PROMPTS)
    assert found == pytest.approx(expected.tolist(), abs=0.1)
    assert len({round(v, 3) for v in found}) == 3


def test_long_prompts_are_cut_and_batches_have_no_influence(clip_folder: Path, pictures: list[Image.Image]) -> None:
    scorer = load_scorer("clip", options(clip_vit_large_patch14=clip_folder))
    many = [pictures[i % 3] for i in range(20)]
    prompts = [PROMPTS[i % 3] + " and a cloud" * (60 if i % 2 else 0) for i in range(20)]
    together = scorer.score(many, prompts)
    alone = [scorer.score([im], [p])[0] for im, p in zip(many, prompts, strict=True)]
    assert together == pytest.approx(alone, abs=1e-3)


class Block(nn.Module):
    """open_clip's residual block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 2 * width))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(2 * width, width))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Tower(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList([Block(width, heads) for _ in range(2)])

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class OpenCLIP(nn.Module):
    """A small model with open_clip's names and arithmetic, from its description; the widths give one head each."""

    def __init__(self) -> None:
        super().__init__()
        vision, text, out = 80, 64, 24
        self.visual = nn.Module()
        self.visual.conv1 = nn.Conv2d(3, vision, 14, 14, bias=False)
        self.visual.class_embedding = nn.Parameter(torch.randn(vision))
        self.visual.positional_embedding = nn.Parameter(torch.randn(17, vision))
        self.visual.ln_pre, self.visual.ln_post = nn.LayerNorm(vision), nn.LayerNorm(vision)
        self.visual.transformer = Tower(vision, 1)
        self.visual.proj = nn.Parameter(torch.randn(vision, out))
        self.token_embedding = nn.Embedding(49408, text)
        self.positional_embedding = nn.Parameter(torch.randn(77, text))
        self.transformer = Tower(text, 1)
        self.ln_final = nn.LayerNorm(text)
        self.text_projection = nn.Parameter(torch.randn(text, out))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))

    def images(self, x: Tensor) -> Tensor:
        v: Any = self.visual
        x = v.conv1(x).flatten(2).transpose(1, 2)
        x = torch.cat([v.class_embedding.expand(len(x), 1, -1), x], dim=1) + v.positional_embedding
        return v.ln_post(v.transformer(v.ln_pre(x))[:, 0]) @ v.proj

    def texts(self, ids: Tensor) -> Tensor:
        x = self.token_embedding(ids) + self.positional_embedding
        mask = torch.full((77, 77), float("-inf")).triu(1)
        x = self.ln_final(self.transformer(x, mask))
        return x[torch.arange(len(ids)), ids.argmax(dim=1)] @ self.text_projection


def test_hpsv2_computes_what_open_clip_does(tmp_path: Path, pictures: list[Image.Image]) -> None:
    from transformers import CLIPTokenizer

    torch.manual_seed(2)
    model = OpenCLIP().eval()
    (tmp_path / "hps").mkdir()
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "hps" / "hps.safetensors")
    found = load_scorer("hpsv2", options(hpsv2=tmp_path / "hps")).score(pictures, PROMPTS)

    folder = Path(weights.__file__).parents[1] / "families" / "assets" / "clip_tokenizer"
    ids = CLIPTokenizer.from_pretrained(folder)(PROMPTS).input_ids
    padded = torch.tensor([[*row, *[0] * (77 - len(row))] for row in ids])  # open_clip pads with 0
    with torch.no_grad():
        x = model.images(pixel_values(pictures, 56, CLIP_MEAN, CLIP_STD, fitting="pad"))
        expected = nn.functional.cosine_similarity(x, model.texts(padded))
    assert found == pytest.approx(expected.tolist(), abs=1e-4)
    assert len({round(v, 3) for v in found}) == 3


def test_hpsv2s_pickle_needs_its_hash(tmp_path: Path, pictures: list[Image.Image]) -> None:
    folder = tmp_path / "hps"
    folder.mkdir()
    file = folder / "HPS_v2.1_compressed.pt"
    torch.manual_seed(2)
    torch.save({"state_dict": {f"module.{k}": v.half() for k, v in OpenCLIP().state_dict().items()}, "epoch": 1}, file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    with pytest.raises(ModelError, match=f"--sha256 {digest}"):
        load_scorer("hpsv2", options(hpsv2=folder))
    with pytest.raises(ModelError, match="is not read"):
        load_scorer("hpsv2", ScorerOptions("cpu", folders={"hpsv2": folder}, sha256="0" * 64))
    trusted = ScorerOptions("cpu", folders={"hpsv2": folder}, sha256=digest)
    assert all(-1 <= v <= 1 for v in load_scorer("hpsv2", trusted).score(pictures, PROMPTS))


def test_hpsv2_refuses_what_is_not_the_model(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match="not an open_clip model"):
        load_scorer("hpsv2", options(hpsv2=tmp_path))
    tensors = {k: v.contiguous() for k, v in OpenCLIP().state_dict().items() if "ln_post.bias" not in k}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=r"post_layernorm\.bias"):
        load_scorer("hpsv2", options(hpsv2=tmp_path))
    assert hpsv2.SOURCES[0].repo == "xswu/HPSv2"


def predictor() -> nn.Module:
    torch.manual_seed(3)
    model = nn.Module()
    model.layers = nn.Sequential(
        nn.Linear(12, 10),
        nn.Dropout(0.2),
        nn.Linear(10, 8),
        nn.Dropout(0.2),
        nn.Linear(8, 6),
        nn.Dropout(0.1),
        nn.Linear(6, 4),
        nn.Linear(4, 1),
    )
    return model.eval()


def test_aesthetic(
    clip_folder: Path, tmp_path: Path, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = predictor()
    folder = tmp_path / "aesthetic"
    folder.mkdir()
    file = folder / "sac+logos+ava1-l14-linearMSE.pth"
    torch.save(model.state_dict(), file)
    with pytest.raises(ModelError, match="Download it again"):  # a pickle of another hash
        load_scorer("aesthetic", options(clip_vit_large_patch14=clip_folder, aesthetic=folder))
    monkeypatch.setattr(aesthetic, "SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    found = load_scorer("aesthetic", options(clip_vit_large_patch14=clip_folder, aesthetic=folder))
    clip = tiny_clip().eval()
    x = pixel_values(pictures, 28, CLIP_MEAN, CLIP_STD)
    with torch.no_grad():
        embedding = clip.get_image_features(pixel_values=x)
        embedding = getattr(embedding, "pooler_output", embedding)
        expected = model.layers(nn.functional.normalize(embedding, dim=1))[:, 0]
    assert found.score(pictures, [""] * 3) == pytest.approx(expected.tolist(), abs=1e-5)
    file.unlink()
    save_file(model.state_dict(), folder / "predictor.safetensors")
    again = load_scorer("aesthetic", options(clip_vit_large_patch14=clip_folder, aesthetic=folder))
    assert again.score(pictures, [""] * 3) == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_pickle_with_code_is_refused_even_with_the_right_hash(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    file = tmp_path / "evil.pt"
    file.write_bytes(pickle.dumps(Evil()))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    with pytest.raises(ModelError, match="more than tensors"):
        weights.load_tensors(file, digest)
    assert not (tmp_path / "ran").exists()


def tiny_siglip(folder: Path) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import SiglipConfig, SiglipModel

    torch.manual_seed(4)
    text = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "image_size": 32, "patch_size": 16}
    heads = {"num_attention_heads": 2}
    specials = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "projection_size": 16}
    model = SiglipModel(SiglipConfig(text_config={**text, **heads, **specials}, vision_config={**vision, **heads}))
    with torch.no_grad():
        model.logit_scale.fill_(2.0)
        model.logit_bias.fill_(-1.5)
    model.save_pretrained(folder)
    words = sorted({w for p in PROMPTS for w in p.lower().replace(",", "").split()})
    vocabulary = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, **{w: i + 4 for i, w in enumerate(words)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("$A <eos>", special_tokens=[("<eos>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return model.eval()


def test_siglip(tmp_path: Path, pictures: list[Image.Image]) -> None:
    from tokenizers import Tokenizer
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    model = tiny_siglip(tmp_path)
    prompts = [p.upper() for p in PROMPTS]  # read in lower case
    found = load_scorer("siglip", options(siglip=tmp_path)).score(pictures, prompts)
    processor = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    x = processor(pictures, return_tensors="pt")["pixel_values"]
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.enable_padding(length=64, pad_id=0)
    ids = torch.tensor([tokenizer.encode(p).ids for p in PROMPTS])
    with torch.no_grad():
        expected = model(pixel_values=x, input_ids=ids).logits_per_image.diagonal()
    assert found == pytest.approx(expected.tolist(), abs=0.02)
    assert len({round(v, 3) for v in found}) == 3
    long = load_scorer("siglip", options(siglip=tmp_path)).score(pictures[:1], ["star " * 90])
    assert math.isfinite(long[0])


def tiny_dinov2(folder: Path) -> Any:
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(5)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 70, "patch_size": 14}
    model = Dinov2Model(Dinov2Config(**sizes, initializer_range=0.3)).eval()  # wide enough to see the picture
    model.save_pretrained(folder)
    return model


def test_dinov2(tmp_path: Path, pictures: list[Image.Image]) -> None:
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

    model = tiny_dinov2(tmp_path)
    embedder = load_embedder("dinov2", "demo", folder=tmp_path, device="cpu")
    found = embedder.embed(pictures)
    processor = BitImageProcessorPil(
        size={"shortest_edge": 256},
        crop_size={"height": 224, "width": 224},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    with torch.no_grad():
        hidden = model(**processor(pictures, return_tensors="pt")).last_hidden_state[:, 0]
    expected = nn.functional.normalize(hidden, dim=1)
    apart = (expected[0] - expected[1]).norm().item()
    assert (found - expected).norm(dim=1).max().item() < 0.05 * apart
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))

    with pytest.raises(ConfigError, match="chosen images"):
        load_scorer("dinov2", options(dinov2=tmp_path))
    told = ScorerOptions("cpu", folders={"dinov2": tmp_path}, references=pictures[1:])
    scores = load_scorer("dinov2", told).score(pictures, [""] * 3)
    assert scores == pytest.approx((found @ found[1:].T).mean(dim=1).tolist(), abs=1e-5)


def test_incomplete_weights_are_refused(tmp_path: Path) -> None:
    """transformers fills missing tensors with noise and only warns."""
    from safetensors.torch import load_file

    tiny_dinov2(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({k: v for k, v in tensors.items() if "layernorm.weight" not in k}, file)
    with pytest.raises(ModelError, match=r"lacks 1 tensors of Dinov2Model, for example layernorm\.weight"):
        load_embedder("dinov2", "demo", folder=tmp_path, device="cpu")


def tiny_llava(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    torch.manual_seed(6)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<image>": 3, **{c: i + 4 for i, c in enumerate(alphabet)}}
    bpe = Tokenizer(models.BPE(vocabulary, [], unk_token="<pad>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template="{% for m in messages %}{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}"
        "{% endfor %}{% endfor %} ASSISTANT:",
    )
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=3, vision_feature_layer=-1)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)


def test_a_local_judge(tmp_path: Path, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_llava(tmp_path)
    judge: Any = load_scorer("vlm-judge", ScorerOptions("cpu", judge_model=str(tmp_path)))
    assert tmp_path.name in judge.title
    said = judge.answer(pictures[0], "a red star")  # of random weights, but through processor, model and decoder
    assert isinstance(said, str)
    assert said == judge.answer(pictures[0], "a red star")
    seen: list[Any] = []

    def generate(**inputs: Any) -> Tensor:
        seen.append(inputs)
        answer = judge._processor.tokenizer("Points: 7", return_tensors="pt").input_ids
        return torch.cat([inputs["input_ids"], answer], dim=1)

    monkeypatch.setattr(judge._model, "generate", generate)
    assert judge.score(pictures, PROMPTS) == [7, 7, 7]
    text = judge._processor.tokenizer.decode(seen[1]["input_ids"][0], skip_special_tokens=True)
    assert TEMPLATE.format(prompt=PROMPTS[1]) in text
    assert seen[0]["pixel_values"].shape == (1, 3, 28, 28)
    assert seen[0]["do_sample"] is False


@pytest.mark.parametrize(
    ("answer", "points"),
    [
        ("Points: 7", 7),
        ("points: 10", 10),
        ("**Points**: 8.5", 8.5),
        ("The text asks for 2 boats. Points: 4", 4),
        ("Points: 3 or, all in all, points: 5", 5),
        ("6", 6),
        ("6/10", 6),
        ("I would say 9 out of 10.", 9),
        ("Points: 70", math.nan),
        ("I cannot judge pictures.", math.nan),
    ],
)
def test_points_are_read(answer: str, points: float) -> None:
    assert points_in(answer) == pytest.approx(points, nan_ok=True)


@pytest.fixture
def server() -> Iterator[tuple[str, list[Any]]]:
    """An OpenAI-compatible server that gives 8 points."""
    seen: list[Any] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, self.headers.get("Authorization"), body))
            known = self.path == "/v1/chat/completions"
            answer = {"choices": [{"message": {"content": "Points: 8"}}]} if known else {"error": "no such page"}
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_: Any) -> None:
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}", seen
    running.shutdown()
    running.server_close()


def test_a_judge_behind_an_endpoint(
    server: tuple[str, list[Any]], pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    import base64
    import io

    url, seen = server
    monkeypatch.setenv("MAPO_JUDGE_API_KEY", "a key")
    told = ScorerOptions(judge_endpoint=f"{url}/v1/", judge_model="some-model")
    assert load_scorer("vlm-judge", told).score(pictures[:2], PROMPTS[:2]) == [8, 8]
    path, key, body = seen[0]
    assert (path, key, body["model"], body["temperature"]) == ("/v1/chat/completions", "Bearer a key", "some-model", 0)
    picture, text = body["messages"][0]["content"]
    assert text["text"] == TEMPLATE.format(prompt=PROMPTS[0])
    content = base64.b64decode(picture["image_url"]["url"].removeprefix("data:image/png;base64,"))
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(content))), np.asarray(pictures[0]))

    with pytest.raises(ModelError, match="refuses \\(404\\)"):
        load_scorer("vlm-judge", ScorerOptions(judge_endpoint=url, judge_model="x")).score(pictures[:1], PROMPTS[:1])
    with pytest.raises(ConfigError, match="--judge-model"):
        load_scorer("vlm-judge", ScorerOptions(judge_endpoint=url))
    with pytest.raises(ConfigError, match="http"):
        load_scorer("vlm-judge", ScorerOptions(judge_endpoint="localhost:1", judge_model="x"))


def test_every_scorer_that_lacks_weights_says_what_to_download_and_where_to_put_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAPO_HOME", str(tmp_path))
    repositories = {
        "aesthetic": "improved-aesthetic-predictor/raw/main/sac%2Blogos%2Bava1-l14-linearMSE.pth",
        "hpsv2": "hf download xswu/HPSv2",
        "pickscore": "hf download yuvalkirstain/PickScore_v1",
        "siglip": "hf download google/siglip2-base-patch16-224",
        "clip": "hf download openai/clip-vit-large-patch14",
        "dinov2": "hf download facebook/dinov2-base",
        "vlm-judge": "hf download HuggingFaceTB/SmolVLM-Instruct",
    }
    assert {*repositories, "demo-style", "demo-content"} == set(SCORERS)
    for name, words in repositories.items():
        with pytest.raises(MissingWeightsError) as caught:
            load_scorer(name, ScorerOptions("cpu", references=[Image.new("RGB", (8, 8))]))
        assert words in str(caught.value)
        assert str(tmp_path / "models") in str(caught.value)


def test_the_hub_cache_is_looked_at_and_nothing_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants
    from huggingface_hub import snapshot_download

    monkeypatch.undo()  # the real look into the cache
    monkeypatch.setenv("MAPO_HOME", str(tmp_path / "home"))
    snapshot = tmp_path / "hub" / "models--facebook--dinov2-base" / "snapshots" / "abc"
    tiny_dinov2(snapshot)
    refs = tmp_path / "hub" / "models--facebook--dinov2-base" / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda *a, **k: snapshot_download(*a, **{**k, "cache_dir": tmp_path / "hub"}),
    )
    assert load_embedder("dinov2", "demo", device="cpu").embed([Image.new("RGB", (30, 40))]).shape == (1, 16)
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(MissingWeightsError):
        load_embedder("dinov2", "demo", device="cpu")
    assert huggingface_hub.constants.HF_HUB_CACHE


def test_a_direct_download_is_kept_only_with_the_known_hash(
    tmp_path: Path, server: tuple[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAPO_HOME", str(tmp_path))
    file = tmp_path / "served.bin"
    file.write_bytes(b"weights")
    wanted = hashlib.sha256(b"weights").hexdigest()
    for digest in ("0" * 64, wanted):
        source = weights.WeightSource("w", "x/y", ("served.bin",), "1 B", url=file.as_uri(), sha256=digest)
        with pytest.raises(MissingWeightsError, match="curl"):
            weights.find_weights(source)
        if digest == wanted:
            assert (weights.find_weights(source, download=True) / "served.bin").read_bytes() == b"weights"
        else:
            with pytest.raises(ModelError, match="not kept"):
                weights.find_weights(source, download=True)
            assert not (tmp_path / "models").exists()


def test_the_demo_scorers_know_styles_and_scenes() -> None:
    drawn = [scene for scene, _ in zip(scenes(23, held_out=False), range(20), strict=False)]
    for style in STYLES:
        references = [render(s, style) for s in drawn[10:]]
        scorer = load_scorer("demo-style", ScorerOptions(references=references))
        in_style = scorer.score([render(s, style) for s in drawn[:10]], [""] * 10)
        other = scorer.score([render(s, "plain" if style != "plain" else "neon") for s in drawn[:10]], [""] * 10)
        assert np.mean(in_style) > 0.8
        assert np.mean(other) < 0.2
    content = load_scorer("demo-content")
    captions = [styled_caption(s, "cartoon") for s in drawn]
    right = content.score([render(s) for s in drawn], captions)
    assert np.mean(right) > 0.9
    swapped = content.score([render(s) for s in drawn], captions[1:] + captions[:1])
    assert np.mean(swapped) < 0.2
    assert math.isnan(content.score([render(drawn[0])], ["a castle at night"])[0])
    named = load_scorer("demo-style").score([render(drawn[0], "cartoon")] * 3, ["x, cartoon style", "neon style", "x"])
    assert named[0] > 0.8
    assert named[1] < 0.2
    assert math.isnan(named[2])


def test_pictures_are_fitted_as_each_model_was_trained() -> None:
    wide = Image.new("RGB", (100, 50), "white")
    padded = pixel_values([wide], 20, HALF_MEAN, HALF_STD, fitting="pad")[0]
    assert padded[:, 5:15].min() == 1
    assert padded[:, :5].max() == padded[:, 15:].max() == -1
    half = wide.copy()
    half.paste("black", (50, 0, 100, 50))
    cut = pixel_values([half], 20, HALF_MEAN, HALF_STD)[0]
    assert cut[:, :, :8].min() == 1
    assert cut[:, :, 12:].max() == -1
    squashed = pixel_values([half], 20, HALF_MEAN, HALF_STD, fitting="squash")[0]
    assert squashed.shape == cut.shape


def test_the_job_says_which_scorers_can_be_used_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mapo_core.jobs import JOBS

    monkeypatch.setenv("MAPO_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    rows = {row["name"]: row for row in JOBS["scorers"]({}, lambda what, done, total: None)["scorers"]}
    assert list(rows) == list(SCORERS)
    assert rows["demo-style"]["missing"] is None
    assert f'--local-dir "{tmp_path / "models" / "pickscore"}"' in rows["pickscore"]["missing"]
    assert all(row["about"] for row in rows.values())
