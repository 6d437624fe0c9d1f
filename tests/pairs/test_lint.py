from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter

from mapo_core.pairs import (
    Finding,
    LintReport,
    PreferencePair,
    images,
    inventory,
    lint_pairs,
    measure,
    pairs_from_folders,
)
from mapo_core.pairs.bias import find_bias, paired_effect
from mapo_core.pairs.duplicates import near_groups
from mapo_core.pairs.measure import ImageFacts

from .conftest import Draw, MakePairs

Change = Callable[[Image.Image, int], Image.Image]


def lint(pairs: list[PreferencePair], **options: Any) -> LintReport:
    return lint_pairs(pairs, **{"resolution": 64, "bucket_step": 8, **options})


def codes(report: LintReport) -> list[str]:
    return [finding.code for finding in report.findings]


def only(report: LintReport) -> Finding:
    assert codes(report) == codes(report)[:1], report.render()
    return report.findings[0]


def replaced(pairs: list[PreferencePair], index: int, **fields: Any) -> list[PreferencePair]:
    return [pair.model_copy(update=fields) if i == index else pair for i, pair in enumerate(pairs)]


def test_clean_pairs_give_no_finding(make_pairs: MakePairs) -> None:
    report = lint(make_pairs(40), count_tokens=lambda text: len(text.split()))
    assert report.findings == (), report.render()
    assert (report.pair_count, report.image_count) == (40, 80)
    assert report.render() == "40 pairs with 80 images checked: nothing found.\n"


def test_nothing_is_changed(make_pairs: MakePairs, tmp_path: Path) -> None:
    pairs = make_pairs(3, rejected=lambda image, i: image.resize((20, 64)))
    pairs[0].chosen.write_bytes(b"broken")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert lint(pairs).findings
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


# --- files


def test_a_missing_image_is_named_with_pair_and_path(make_pairs: MakePairs) -> None:
    pairs = make_pairs(3)
    pairs[1].rejected.unlink()
    finding = only(lint(pairs))
    assert (finding.level, finding.code) == ("error", "missing-image")
    assert finding.message == f"Pair 2: rejected image is missing: {pairs[1].rejected}. Fix the folder and scan again."
    assert (finding.pairs, finding.paths) == ((2,), (pairs[1].rejected,))


def test_truncated_and_foreign_files_are_errors(make_pairs: MakePairs) -> None:
    pairs = make_pairs(3)
    content = pairs[0].chosen.read_bytes()
    pairs[0].chosen.write_bytes(content[: len(content) // 2])
    pairs[2].rejected.write_text("hello")
    report = lint(pairs)
    assert [(f.code, f.pairs) for f in report.errors] == [("unreadable-image", (1,)), ("unreadable-image", (3,))]
    assert "truncated" in report.findings[0].message
    assert "Not an image" in report.findings[1].message
    assert report.warnings == ()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_an_error(make_pairs: MakePairs, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = make_pairs(2)
    monkeypatch.setattr(images, "MAX_PIXELS", 64 * 64)
    Image.new("RGB", (65, 64)).save(pairs[1].chosen)
    finding = only(lint(pairs))
    assert (finding.level, finding.code, finding.pairs) == ("error", "too-many-pixels", (2,))


def test_masks_are_checked_too(make_pairs: MakePairs, tmp_path: Path) -> None:
    Image.new("L", (64, 64), 255).save(tmp_path / "mask.png")
    pairs = replaced(make_pairs(2), 0, chosen_mask=tmp_path / "mask.png", rejected_mask=tmp_path / "none.png")
    finding = only(lint(pairs))
    assert finding.message.startswith("Pair 1: rejected mask is missing")


def test_every_image_is_decoded_once(make_pairs: MakePairs, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = make_pairs(4)
    pairs = replaced(pairs, 3, rejected=pairs[0].rejected)
    decoded: list[Path] = []
    load = inventory.load_image
    monkeypatch.setattr(inventory, "load_image", lambda path: decoded.append(path) or load(path))
    seen: list[tuple[int, int]] = []
    lint(pairs, progress=lambda *done: seen.append(done))
    assert sorted(decoded) == sorted({p for pair in pairs for p in (pair.chosen, pair.rejected)})
    assert seen == [(i, 7) for i in range(1, 8)]


# --- prompts


def test_prompts_over_the_window(make_pairs: MakePairs) -> None:
    pairs = replaced(make_pairs(3), 1, prompt="very long " * 39)
    asked: list[str] = []
    report = lint(pairs, count_tokens=lambda text: asked.append(text) or len(text.split()))
    finding = only(report)
    assert (finding.level, finding.code, finding.pairs) == ("note", "prompt-too-long", (2,))
    assert "78 tokens, over 77; it is encoded in chunks, as ComfyUI does" in finding.message
    assert len(asked) == 3
    assert lint(replaced(pairs, 1, prompt="long " * 77), count_tokens=lambda text: len(text.split())).findings == ()
    assert lint(pairs, count_tokens=lambda text: len(text.split()), token_window=78).findings == ()
    assert only(
        lint(replaced(pairs, 1, rejected_prompt="x", prompt="y"), count_tokens=lambda t: 100 * (t == "x"))
    ).pairs == (2,)
    assert lint(pairs).findings == ()


def test_an_empty_prompt_and_its_caption_of_another_name(make_pairs: MakePairs) -> None:
    pairs = replaced(make_pairs(2), 0, prompt=" ")
    assert only(lint(pairs)).code == "no-prompt"
    caption = pairs[0].chosen.with_suffix(".caption")
    caption.write_text("a fox")
    report = lint(pairs)
    assert codes(report) == ["caption-name", "no-prompt"]
    assert report.findings[0].paths == (pairs[0].chosen, caption)
    assert lint(replaced(pairs, 0, prompt="given")).findings == ()


def test_findings_of_the_scan_are_part_of_the_report(make_pairs: MakePairs, tmp_path: Path) -> None:
    make_pairs(2)[0].chosen.with_suffix(".text").write_text("a fox")
    (tmp_path / "rejected/001.png").rename(tmp_path / "rejected/other.png")
    (tmp_path / "chosen/000.png").rename(tmp_path / "chosen/fox.png")
    (tmp_path / "chosen/000.text").rename(tmp_path / "chosen/fox.text")
    (tmp_path / "rejected/000.png").rename(tmp_path / "rejected/fox.png")
    found = pairs_from_folders(tmp_path / "chosen", tmp_path / "rejected", trigger="sks")
    report = lint(found.pairs, found=found.findings)
    assert codes(report) == ["caption-name", "missing-partner", "missing-partner", "prompt-from-file-name"]
    assert codes(lint(found.pairs)) == ["caption-name"]  # of pairs from a file, the scan is over


# --- sizes


@pytest.mark.parametrize(("size", "far"), [(42, True), (43, False), (64, False), (200, False)])
def test_sizes_far_below_the_training_resolution(make_pairs: MakePairs, size: int, far: bool) -> None:
    pairs = make_pairs(2)
    with Image.open(pairs[1].rejected) as image:
        image.resize((size, size), Image.Resampling.LANCZOS).save(pairs[1].rejected)
    report = lint(pairs)
    assert codes(report) == ["low-resolution"] * far
    if far:
        assert report.findings[0].level == "warning"
        assert (
            f"Pair 2: rejected image (42 x 42) is enlarged 1.5 times to 64 x 64: {pairs[1].rejected}"
            in report.render().replace("\n    ", " ")
        )


def test_rejected_images_that_lose_much_in_the_chosen_bucket(make_pairs: MakePairs) -> None:
    """Chosen 5:3, rejected square: the chosen image's bucket has no room for two fifths of the rejected one."""
    pairs = make_pairs(1, lambda image, i: image.resize((160, 96)), lambda image, i: image.resize((128, 128)))
    finding = only(lint(pairs))
    assert (finding.level, finding.code, finding.paths) == ("warning", "loses-in-crop", (pairs[0].rejected,))
    assert "Pair 1: rejected image (128 x 128) loses 40% in the chosen image's bucket, 80 x 48" in finding.message
    square = lint(pairs, bucket=False)
    assert [f.paths for f in square.findings] == [(pairs[0].chosen,)]
    assert "in its bucket, 64 x 64" in square.findings[0].message


@pytest.mark.parametrize(("width", "found"), [(79, False), (81, True)])
def test_a_fifth_may_be_lost(make_pairs: MakePairs, width: int, found: bool) -> None:
    pairs = make_pairs(1, rejected=lambda image, i: image.resize((width, 64)))
    assert codes(lint(pairs)) == ["loses-in-crop"] * found


# --- the same picture


def test_the_same_picture_twice_is_an_error_whatever_the_file(make_pairs: MakePairs) -> None:
    pairs = make_pairs(3)
    with Image.open(pairs[1].chosen) as image:
        image.convert("RGB").save(pairs[1].rejected, "BMP")  # other bytes, the same pixels
    finding = only(lint(pairs))
    assert (finding.level, finding.code, finding.pairs) == ("error", "identical-pair", (2,))
    assert finding.paths == (pairs[1].chosen, pairs[1].rejected)


def changed(name: str, image: Image.Image) -> Image.Image:
    small = image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)
    return {
        "half the size": small.resize(image.size, Image.Resampling.BICUBIC),
        "brighter": ImageEnhance.Brightness(image).enhance(1.04),
        "flatter": ImageEnhance.Contrast(image).enhance(0.9),
        "softer": image.filter(ImageFilter.GaussianBlur(1)),
        "cropped": image.crop((2, 2, image.width - 2, image.height - 2)).resize(image.size),
    }[name]


@pytest.mark.parametrize("change", ["half the size", "brighter", "flatter", "softer", "cropped"])
def test_nearly_the_same_picture(make_pairs: MakePairs, draw: Draw, change: str) -> None:
    pairs = make_pairs(4, size=256)
    changed(change, draw(10_000, size=256)).save(pairs[0].rejected)
    report = lint(pairs, resolution=256)
    finding = only(report)
    assert (finding.level, finding.code, finding.pairs) == ("warning", "near-identical-pair", (1,))


@pytest.mark.parametrize("role", ["chosen", "rejected"])
def test_exact_and_near_duplicates_on_one_side(make_pairs: MakePairs, draw: Draw, role: str) -> None:
    pairs = make_pairs(6, size=256)
    paths = [getattr(pair, role) for pair in pairs]
    with Image.open(paths[1]) as image:
        picture = image.convert("RGB")
    picture.save(paths[3])
    picture.save(paths[4], "JPEG", quality=70)
    exact, near = lint(pairs, resolution=256).findings
    assert (exact.level, exact.code, exact.pairs) == ("warning", "exact-duplicate", (2, 4))
    assert exact.paths == (paths[1], paths[3])
    assert f"2 {role} images are the same picture (pairs 2, 4): {paths[1]}, {paths[3]}" in exact.message
    assert (near.level, near.code, near.pairs) == ("warning", "near-duplicate", (2, 5))


def test_one_file_in_several_pairs_is_no_duplicate(make_pairs: MakePairs) -> None:
    pairs = make_pairs(3)
    assert lint(replaced(pairs, 2, chosen=pairs[0].chosen)).findings == ()


def test_different_pictures_alike_at_first_sight_are_not_duplicates() -> None:
    """Flat grounds, the same shape in another colour or place, grey levels: what a difference hash takes for equal."""
    pictures = [Image.new("RGB", (64, 64), (v, v, v)) for v in (20, 60, 120, 250)]
    for colour in ((255, 0, 0), (0, 0, 255), (0, 140, 0)):
        for x in (4, 28):
            pictures.append(Image.new("RGB", (64, 64), (250, 250, 250)))
            pictures[-1].paste(colour, (x, 20, x + 28, 48))
    signatures = np.stack([measure.measure(picture, 64).signature for picture in pictures])
    assert list(near_groups(signatures)) == []


def test_near_duplicates_among_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups are the same as by comparing each with each, over the borders of blocks too, and chains are one group."""
    monkeypatch.setattr("mapo_core.pairs.duplicates._BLOCK", 7)
    rng = np.random.default_rng(0)
    base = rng.normal(size=(30, 193)).astype(np.float32)
    base /= np.linalg.norm(base, axis=1, keepdims=True)
    step = np.zeros(193, dtype=np.float32)
    step[0] = 0.09
    groups = near_groups(np.stack([*base, *base[:5] + step, *base[:5] + 2 * step]))
    assert [group.tolist() for group in groups] == [[i, 30 + i, 35 + i] for i in range(5)]


# --- votes


def test_the_same_pair_voted_both_ways(make_pairs: MakePairs, tmp_path: Path) -> None:
    pairs = make_pairs(4)
    copy = tmp_path / "copy.bmp"
    with Image.open(pairs[0].rejected) as image:
        image.save(copy)
    swapped = replaced(pairs, 3, prompt=f" {pairs[0].prompt} ", chosen=copy, rejected=pairs[0].chosen)
    finding = only(lint(swapped))
    assert (finding.level, finding.code, finding.pairs) == ("warning", "contradictory-vote", (1, 4))
    assert "the other way round" in finding.message
    assert lint(replaced(swapped, 3, prompt="another question")).findings == ()


def test_the_same_pair_twice(make_pairs: MakePairs) -> None:
    pairs = make_pairs(3)
    finding = only(lint([*pairs, pairs[1]]))
    assert (finding.level, finding.code, finding.pairs) == ("warning", "repeated-pair", (2, 4))


# --- bias


BIASES: list[tuple[str, Change]] = [
    ("brighter", lambda image, i: ImageEnhance.Brightness(image.point(lambda v: v * 0.7)).enhance(1.35)),
    ("softer", lambda image, i: image.filter(ImageFilter.GaussianBlur(1.2))),
    ("less saturated", lambda image, i: ImageEnhance.Color(image).enhance(0.4)),
    ("larger", lambda image, i: image.resize((72 + i % 3, 72 + i % 3), Image.Resampling.LANCZOS)),
    ("wider", lambda image, i: image.crop((0, 2, 64, 62 - i % 3))),
]


@pytest.mark.parametrize(("word", "change"), BIASES, ids=[word for word, _ in BIASES])
def test_shortcut_bias_is_found_with_its_effect_size(make_pairs: MakePairs, word: str, change: Change) -> None:
    def darker(image: Image.Image, i: int) -> Image.Image:
        return image.point(lambda v: v * 0.7)

    pairs = make_pairs(24, chosen=change, rejected=darker) if word == "brighter" else make_pairs(24, chosen=change)
    found = [f for f in lint(pairs).findings if f.code == "shortcut-bias"]
    match = next((f for f in found if f.message.startswith(f"Chosen images are {word} in")), None)
    assert match is not None, lint(pairs).render()
    assert match.level == "warning"
    assert "Cohen's d = " in match.message
    assert "95 % interval" in match.message


def test_a_difference_that_is_the_same_everywhere(make_pairs: MakePairs) -> None:
    pairs = make_pairs(8, chosen=lambda image, i: image.resize((96, 96), Image.Resampling.LANCZOS))
    messages = [f.message for f in lint(pairs).findings if "larger" in f.message]
    assert len(messages) == 1
    assert "larger in 8 of 8 pairs" in messages[0]
    assert "typical size in million pixels 0.0092 against 0.0041 (by the same amount everywhere)" in messages[0]
    assert json.loads(lint(pairs).to_json())["warnings"] >= 1


def facts(
    brightness: float = 0.5, saturation: float = 0.5, sharpness: float = 0.0, size: tuple[int, int] = (64, 64)
) -> ImageFacts:
    return ImageFacts(size, b"", np.zeros(193, dtype=np.float32), brightness, saturation, sharpness)


def test_bias_needs_eight_pairs() -> None:
    pairs = [(facts(brightness=0.6 + i / 100), facts()) for i in range(8)]
    assert len(find_bias(pairs)) == 1
    assert find_bias(pairs[:7]) == []


def test_bias_needs_a_difference_that_matters_and_an_interval_off_zero() -> None:
    assert find_bias([(facts(brightness=0.51 + i / 1e4), facts()) for i in range(50)]) == []
    spread = [(facts(brightness=0.5 + (0.3 if i % 2 else -0.25)), facts()) for i in range(50)]
    assert find_bias(spread) == []
    few = [(facts(brightness=0.5 + d), facts()) for d in (0.3, 0.3, 0.3, 0.3, 0.3, -0.2, -0.2, 0.0)]  # d = 0.58
    assert find_bias(few) == []
    many = few * 8
    assert len(find_bias(many)) == 1


def test_the_effect_size_is_that_of_the_textbook() -> None:
    """Mean 2, standard deviation 2, n = 9: d = 1, t(0.975, 8) = 2.306, so 1 -+ 2.306 / 3."""
    differences = np.array([0.0, 0, 0, 2, 2, 2, 4, 4, 4]) * np.sqrt(4 / 3) + 2 - 2 * np.sqrt(4 / 3)
    assert differences.std(ddof=1) == pytest.approx(2)
    assert paired_effect(differences) == pytest.approx((1.0, 1 - 2.306 / 3, 1 + 2.306 / 3), abs=1e-3)


def test_sharpness_is_that_of_the_training_image(draw: Draw) -> None:
    """A large original is not sharper than what is made of it; a small one, enlarged, is softer."""
    large = draw(5, size=256)
    small = large.resize((64, 64), Image.Resampling.BICUBIC)
    at_64 = [measure.measure(image, 64).sharpness for image in (large, small)]
    at_256 = [measure.measure(image, 256).sharpness for image in (large, small)]
    assert at_64[0] == pytest.approx(at_64[1], abs=0.1)
    assert at_256[0] > at_256[1] + 1


def test_chance_alone_seldom_looks_like_bias() -> None:
    rng = np.random.default_rng(1)

    def drawn() -> ImageFacts:
        b, s, h = rng.normal((0.5, 0.4, 0.0), (0.15, 0.1, 1.0))
        return facts(b, s, h)

    def reported(n: int) -> int:
        return sum(bool(find_bias([(drawn(), drawn()) for _ in range(n)])) for _ in range(200))

    assert reported(8) <= 24
    assert reported(50) <= 2


# --- report


def test_the_report_groups_counts_and_fits_the_terminal(make_pairs: MakePairs) -> None:
    pairs = make_pairs(7)
    for pair in pairs[:5]:
        pair.chosen.write_text("broken")
    pairs = replaced(pairs, 6, prompt="")
    text = lint(pairs).render()
    assert text.startswith("ERROR  unreadable-image (5): files that cannot be read as images\n  - Pair 1: ")
    assert "Pair 3" in text
    assert "Pair 4" not in text
    assert "    and 2 more\n" in text
    assert text.index("ERROR") < text.index("WARNING  no-prompt (1): no prompt")
    assert text.endswith("7 pairs with 14 images checked: 5 errors, 1 warning. Repair the errors and check again.\n")
    assert all(len(line) <= 96 or max(map(len, line.split())) > 80 for line in text.splitlines())


def test_the_report_as_json(make_pairs: MakePairs) -> None:
    pairs = make_pairs(2)
    pairs[1].chosen.unlink()
    values = json.loads(lint(pairs).to_json())
    assert {k: values[k] for k in ("pairs", "images", "errors", "warnings", "notes")} == {
        "pairs": 2,
        "images": 4,
        "errors": 1,
        "warnings": 0,
        "notes": 0,
    }
    assert values["findings"][0]["code"] == "missing-image"
    assert values["findings"][0]["pairs"] == [2]
    assert values["findings"][0]["paths"] == [str(pairs[1].chosen)]


def test_no_pairs() -> None:
    assert lint([]).render() == "0 pairs with 0 images checked: nothing found.\n"
