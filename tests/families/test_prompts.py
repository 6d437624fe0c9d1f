from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import CLIPTokenizer

from mapo_core.families import Detected, count_tokens, count_windows, load_tokenizers
from mapo_core.families._blueprint import CLIP_VOCABULARY
from mapo_core.families._clip import stack_embeds
from mapo_core.families._tokens import prompt_windows

if TYPE_CHECKING:
    from tests.families.conftest import Tiny

LONG = "a small red boat, " * 20  # 100 tokens


@pytest.fixture(scope="module")
def packaged() -> list[Any]:
    return load_tokenizers(Detected("sdxl", "single_file", None))


def test_known_token_ids(packaged: list[Any]) -> None:
    for tokenizer, pad in zip(packaged, (49407, 0), strict=True):
        (window,) = prompt_windows(tokenizer, "a photo of a cat")
        assert window == [49406, 320, 1125, 539, 320, 2368, 49407] + [pad] * 70
        assert prompt_windows(tokenizer, "") == [[49406, 49407] + [pad] * 75]
        ids = tokenizer("héllo world 1girl").input_ids
        assert prompt_windows(tokenizer, "Héllo   WORLD\n1girl") == [ids + [pad] * (77 - len(ids))]


def test_exclamation_marks_are_text_in_both_encoders(packaged: list[Any]) -> None:
    """The second tokenizer pads with "!"; transformers alone would read the prompt's own as padding."""
    for tokenizer in packaged:
        (window,) = prompt_windows(tokenizer, "wow!")
        assert window[1:4] == [*tokenizer("wow").input_ids[1:-1], 256, 49407]  # 256 is "!" at the end of a word


def test_windows_keep_words_whole(packaged: list[Any]) -> None:
    tokenizer = packaged[0]
    three = tokenizer("comfyui", add_special_tokens=False).input_ids
    assert 1 < len(three) < 8
    fill = 75 - len(three) + 1  # one token too little room for the word
    first, second = prompt_windows(tokenizer, "cat " * fill + "comfyui")
    assert first == [49406, *[2368] * fill, *[49407] * (76 - fill)]
    assert second == [49406, *three, *[49407] * (76 - len(three))]
    (only,) = prompt_windows(tokenizer, "cat " * (fill - 1) + "comfyui")
    assert only[-2:] == [three[-1], 49407]


def test_windows_cut_words_of_eight_tokens(packaged: list[Any]) -> None:
    tokenizer = packaged[0]
    word = "7" * 10
    sevens = tokenizer(word, add_special_tokens=False).input_ids
    assert len(sevens) == 10
    first, second = prompt_windows(tokenizer, "cat " * 70 + word)
    assert first == [49406, *[2368] * 70, *sevens[:5], 49407]
    assert second == [49406, *sevens[5:], *[49407] * 71]
    assert [len(w) for w in prompt_windows(tokenizer, "7" * 200)] == [77] * 3


def test_counts(packaged: list[Any]) -> None:
    assert count_tokens(packaged, "") == 0
    assert count_windows(packaged, "") == 1
    assert count_tokens(packaged[0], "a photo of a cat") == 5
    assert (count_tokens(packaged, "cat " * 75), count_windows(packaged, "cat " * 75)) == (75, 1)
    assert (count_tokens(packaged, "cat " * 76), count_windows(packaged, "cat " * 76)) == (76, 2)


def test_windows_equal_transformers_padding(packaged: list[Any]) -> None:
    plain = CLIPTokenizer.from_pretrained(CLIP_VOCABULARY)
    for prompt in ("", "a photo of a cat", "it's a naïve Ärger; 2girls, \N{GRINNING FACE} 日本", "(a:1.2) \\(b\\)"):
        assert prompt_windows(plain, prompt) == [plain(prompt, padding="max_length", max_length=77).input_ids]


@pytest.mark.parametrize("clip_skip", [0, 1])
def test_short_prompts_equal_diffusers(tiny: Tiny, clip_skip: int) -> None:
    model = tiny.load(clip_skip=clip_skip)
    prompts = ["a photo of a cat", "", "a red boat, at night"]
    ours = tiny.family.encode_prompts(model, prompts)
    for prompt, encoded in zip(prompts, ours, strict=True):
        if tiny.name == "sdxl":
            with torch.no_grad():
                embeds, _, pooled, _ = tiny.pipe.encode_prompt(
                    prompt, do_classifier_free_guidance=False, clip_skip=clip_skip
                )
            assert torch.allclose(encoded["pooled_prompt_embeds"], pooled[0], atol=1e-6)
        else:
            embeds = sd15_as_in_diffusers(tiny.pipe, prompt, clip_skip)
        assert encoded["prompt_embeds"].dtype == torch.float32
        assert torch.allclose(encoded["prompt_embeds"], embeds[0], atol=1e-6)


def sd15_as_in_diffusers(pipe: Any, prompt: str, clip_skip: int) -> torch.Tensor:
    with torch.no_grad():
        if not clip_skip:
            return pipe.encode_prompt(prompt, "cpu", 1, False)[0]
        # The pipeline's own clip_skip looks for text_encoder.text_model, which transformers 5 no longer has.
        ids = pipe.tokenizer(prompt, padding="max_length", max_length=77, return_tensors="pt").input_ids
        hidden = pipe.text_encoder(ids, output_hidden_states=True)[-1][-(clip_skip + 1)]
        return pipe.text_encoder.final_layer_norm(hidden)


@pytest.mark.parametrize("clip_skip", [0, 2])
def test_layers_counted_by_hand(tiny: Tiny, clip_skip: int) -> None:
    """The layer that is taken is the one that it should be, whatever transformers calls hidden_states."""
    model = tiny.load(clip_skip=clip_skip)
    encoded = tiny.family.encode_prompts(model, ["a photo of a cat"])[0]["prompt_embeds"]
    parts: list[torch.Tensor] = []
    for encoder, tokenizer in zip(model.text_encoders, model.tokenizers, strict=True):
        core = getattr(encoder, "text_model", encoder)
        kept = 4 - clip_skip - (1 if tiny.name == "sdxl" else 0)
        seen: list[torch.Tensor] = []
        hook = core.encoder.layers[kept - 1].register_forward_hook(
            lambda _m, _i, out: seen.append(out[0] if isinstance(out, tuple) else out)  # noqa: B023
        )
        with torch.no_grad():
            encoder(torch.tensor(prompt_windows(tokenizer, "a photo of a cat")))
            parts.append(seen[0] if tiny.name == "sdxl" else core.final_layer_norm(seen[0]))
        hook.remove()
    assert torch.allclose(encoded, torch.cat(parts, dim=-1)[0], atol=1e-6)


def test_long_prompts_are_windows_side_by_side(tiny: Tiny) -> None:
    model = tiny.load()
    long, short = tiny.family.encode_prompts(model, [LONG, "a cat"])
    windows = [prompt_windows(t, LONG) for t in model.tokenizers]
    assert {len(w) for w in windows} == {2}
    parts: list[torch.Tensor] = []
    for encoder, own in zip(model.text_encoders, windows, strict=True):
        with torch.no_grad():
            output = [encoder(torch.tensor([w]), output_hidden_states=True) for w in own]
        if tiny.name == "sdxl":
            parts.append(torch.cat([o.hidden_states[-2][0] for o in output]))
            if "text_embeds" in output[0]:
                assert torch.allclose(long["pooled_prompt_embeds"], output[0].text_embeds[0], atol=1e-6)
        else:
            parts.append(torch.cat([o.last_hidden_state[0] for o in output]))
    assert long["prompt_embeds"].shape[0] == 154
    assert torch.allclose(long["prompt_embeds"], torch.cat(parts, dim=-1), atol=1e-6)
    assert short["prompt_embeds"].shape[0] == 77
    assert torch.allclose(
        short["prompt_embeds"], tiny.family.encode_prompts(model, ["a cat"])[0]["prompt_embeds"], atol=1e-6
    )


def test_more_windows_than_fit_in_one_batch(tiny: Tiny) -> None:
    model = tiny.load()
    prompts = [f"{'cat ' * (80 * (i % 3))} number {i}" for i in range(14)]  # 1 to 3 windows each, 27 in all
    together = tiny.family.encode_prompts(model, prompts)
    for i in (0, 7, 13):
        (alone,) = tiny.family.encode_prompts(model, [prompts[i]])
        for name, value in alone.items():
            assert torch.allclose(together[i][name], value, atol=1e-6)


def test_stacking_repeats_to_a_common_length() -> None:
    a, b = torch.randn(77, 4), torch.randn(154, 4)
    stacked = stack_embeds([a, b])
    assert torch.equal(stacked[0], torch.cat([a, a]))
    assert torch.equal(stacked[1], b)
    assert stack_embeds([b, torch.randn(231, 4)]).shape == (2, 462, 4)
    assert stack_embeds([a, a]).shape == (2, 77, 4)
