from __future__ import annotations

import logging
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mapo_core.errors import PairsError
from mapo_core.pairs import Finding, PairSet, compose_prompt, pairs_from_folders, prompts_from_folder
from mapo_core.pairs.captions import prompt_from_name

Put = Callable[..., Path]


@pytest.fixture
def put(tmp_path: Path) -> Put:
    """put("chosen/cat.png", caption="a cat", parameters="..."): a small image, with a caption file or metadata."""

    def write(name: str, caption: str | None = None, parameters: str = "") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        info = PngInfo()
        if parameters:
            info.add_text("parameters", parameters)
        Image.new("RGB", (8, 8)).save(path, pnginfo=info if path.suffix == ".png" else None)
        if caption is not None:
            path.with_suffix(".txt").write_text(caption, encoding="utf-8")
        return path

    return write


def names(pairs: PairSet) -> list[tuple[str, str]]:
    return [(pair.chosen.name, pair.rejected.name) for pair in pairs.pairs]


def codes(findings: list[Finding]) -> list[str]:
    return [finding.code for finding in findings]


# --- matching


def test_matched_by_stem_whatever_the_format(tmp_path: Path, put: Put) -> None:
    for name in ("chosen/b.png", "chosen/a 10.jpg", "chosen/a 2.png", "rejected/a 2.webp", "rejected/b.png"):
        put(name, "p")
    put("rejected/a 10.gif")
    found = pairs_from_folders(tmp_path / "chosen", tmp_path / "rejected")
    assert names(found) == [("a 2.png", "a 2.webp"), ("a 10.jpg", "a 10.gif"), ("b.png", "b.png")]
    assert found.findings == []
    assert found.counts == {"caption file": 3}
    assert found.pairs[0].source == "stem; prompt from a 2.txt"
    assert found.pairs[0].chosen.is_absolute()


def test_relative_folders_give_absolute_paths(tmp_path: Path, put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    put("chosen/a.png", "p")
    put("rejected/a.png")
    monkeypatch.chdir(tmp_path)
    for match in ("stem", "order", "random"):
        pair = pairs_from_folders(Path("chosen"), Path("rejected"), match=match, prompt_from="fixed", prompt="p").pairs[
            0
        ]
        assert (pair.chosen, pair.rejected) == (tmp_path / "chosen/a.png", tmp_path / "rejected/a.png")
    assert prompts_from_folder(Path("chosen"))[0].image == tmp_path / "chosen/a.png"


def test_subfolders_match_by_their_path_and_else_by_a_stem_that_is_unique(tmp_path: Path, put: Put) -> None:
    for name in ("x/1", "y/1", "z/only"):
        put(f"chosen/{name}.png", name)
    for name in ("x/1", "y/1", "elsewhere/only"):
        put(f"rejected/{name}.png")
    found = pairs_from_folders(tmp_path / "chosen", tmp_path / "rejected")
    places = [(p.chosen.parent.name, p.rejected.parent.name) for p in found.pairs]
    assert places == [("x", "x"), ("y", "y"), ("z", "elsewhere")]
    assert found.findings == []
    with pytest.raises(PairsError, match="no images"):
        pairs_from_folders(tmp_path / "chosen", tmp_path / "rejected", recursive=False)


def test_composed_and_decomposed_accents_match(tmp_path: Path, put: Put) -> None:
    put(f"chosen/{unicodedata.normalize('NFC', 'Bär')}.png", "p")
    put(f"rejected/{unicodedata.normalize('NFD', 'Bär')}.png")
    assert len(pairs_from_folders(tmp_path / "chosen", tmp_path / "rejected").pairs) == 1


def test_missing_partners_are_named_on_both_sides(tmp_path: Path, put: Put) -> None:
    put("chosen/a.png", "p")
    alone = put("chosen/Only.png", "p")
    put("rejected/a.png")
    other = put("rejected/only.png")
    found = pairs_from_folders(tmp_path / "chosen", tmp_path / "rejected")
    assert names(found) == [("a.png", "a.png")]
    assert codes(found.findings) == ["missing-partner"] * 2
    assert {f.level for f in found.findings} == {"warning"}
    assert [f.paths for f in found.findings] == [(alone,), (other,)]
    assert "has no rejected image of the same name" in found.findings[0].message
    assert f"{other} differs in upper and lower case only" in found.findings[0].message


def test_two_images_of_one_name_are_an_error(tmp_path: Path, put: Put) -> None:
    put("chosen/a.png", "p")
    put("chosen/a.jpg")
    put("chosen/b.png", "p")
    put("rejected/a.png")
    put("rejected/b.png")
    found = pairs_from_folders(tmp_path / "chosen", tmp_path / "rejected")
    assert names(found) == [("b.png", "b.png")]
    ambiguous = next(f for f in found.findings if f.code == "ambiguous-name")
    assert ambiguous.level == "error"
    assert {path.name for path in ambiguous.paths} == {"a.png", "a.jpg"}


def test_matched_by_order(tmp_path: Path, put: Put) -> None:
    for name in ("chosen/1.png", "chosen/2.png", "chosen/10.png", "rejected/x.png", "rejected/y.png"):
        put(name, "p")
    found = pairs_from_folders(tmp_path / "chosen", tmp_path / "rejected", match="order")
    assert names(found) == [("1.png", "x.png"), ("2.png", "y.png")]
    assert codes(found.findings) == ["missing-partner"]
    assert found.findings[0].paths[0].name == "10.png"
    assert found.pairs[0].source == "order; prompt from 1.txt"


def test_random_partners_have_the_same_prompt(tmp_path: Path, put: Put) -> None:
    for i in range(30):
        put(f"chosen/c{i}.png", "a cat" if i % 2 else "A  dog")
        put(f"rejected/r{i}.png", "a cat" if i % 3 else "a dog")
    lonely = put("chosen/c99.png", "a bird")
    unused = put("rejected/r99.png", "a fish")

    def match(seed: int) -> PairSet:
        return pairs_from_folders(tmp_path / "chosen", tmp_path / "rejected", match="random", seed=seed, trigger="zz")

    first, again, other = match(0), match(0), match(1)
    assert len(first.pairs) == 30
    assert names(first) == names(again) != names(other)
    for pair in first.pairs:
        is_cat = int(pair.rejected.stem[1:]) % 3 != 0
        assert pair.prompt.casefold() == ("zz, a cat" if is_cat else "zz, a dog")
    assert len({p.rejected for p in first.pairs}) > 10
    assert [f.paths[0] for f in first.findings] == [lonely, unused]
    assert "same prompt" in first.findings[0].message
    # A pair's partner depends on its own name alone, not on what else is in the folder.
    lonely.unlink()
    lonely.with_suffix(".txt").unlink()
    (tmp_path / "chosen/c3.png").unlink()
    assert set(names(match(0))) < set(names(first))


def test_one_folder_may_lie_in_the_other(tmp_path: Path, put: Put) -> None:
    put("all/a.png", "p")
    put("all/rejected/a.png")
    found = pairs_from_folders(tmp_path / "all", tmp_path / "all/rejected")
    assert [(p.chosen.parent.name, p.rejected.parent.name) for p in found.pairs] == [("all", "rejected")]
    assert found.findings == []
    found = pairs_from_folders(tmp_path / "all/rejected", tmp_path / "all", prompt="p")
    assert found.findings == []


def test_wrong_folders_and_choices_are_explained(tmp_path: Path, put: Put) -> None:
    put("chosen/a.png", "p")
    put("rejected/b.png")
    (tmp_path / "empty").mkdir()
    chosen, rejected = tmp_path / "chosen", tmp_path / "rejected"
    for arguments, why in (
        ((chosen, chosen), "same folder"),
        ((chosen, tmp_path / "none"), r"no folder .*none"),
        ((tmp_path / "empty", rejected), r"no images in .*empty"),
    ):
        with pytest.raises(PairsError, match=why):
            pairs_from_folders(*arguments)
    with pytest.raises(PairsError, match=r"No pair results .*a\.png has no rejected image") as caught:
        pairs_from_folders(chosen, rejected)
    assert len(caught.value.problems) == 2
    with pytest.raises(PairsError, match="match must be one of stem, order, random"):
        pairs_from_folders(chosen, rejected, match="name")  # type: ignore[arg-type]
    with pytest.raises(PairsError, match="prompt_from must be one of auto, txt"):
        pairs_from_folders(chosen, rejected, prompt_from="caption")  # type: ignore[arg-type]


def test_formats_that_are_not_read_are_pointed_out(tmp_path: Path, put: Put) -> None:
    put("chosen/a.png", "p")
    put("rejected/a.png")
    (tmp_path / "chosen/b.HEIC").touch()
    found = pairs_from_folders(tmp_path / "chosen", tmp_path / "rejected")
    assert codes(found.findings) == ["unread-format"]
    assert "b.HEIC" in found.findings[0].message


# --- prompts


def one(put: Put, tmp_path: Path, **options: str | None) -> PairSet:
    put("rejected/red_fox_0007.png", "never read")
    return pairs_from_folders(tmp_path / "chosen", tmp_path / "rejected", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("caption", "parameters", "fixed", "expected", "source", "kind"),
    [
        ("by file", "by metadata", "fixed", "by file", "prompt from red_fox_0007.txt", "caption file"),
        (None, "by metadata", "fixed", "by metadata", "prompt from A1111 metadata", "image metadata"),
        (None, "", "fixed", "fixed", "fixed prompt", "fixed prompt"),
        (None, "", None, "red fox", "prompt from the file name", "file name"),
    ],
)
def test_the_sources_of_a_prompt_in_their_order(
    tmp_path: Path,
    put: Put,
    caption: str | None,
    parameters: str,
    fixed: str | None,
    expected: str,
    source: str,
    kind: str,
) -> None:
    put("chosen/red_fox_0007.png", caption, parameters)
    found = one(put, tmp_path, prompt=fixed)
    assert found.pairs[0].prompt == expected
    assert found.pairs[0].source == f"stem; {source}"
    assert found.counts == {kind: 1}
    assert codes(found.findings) == (["prompt-from-file-name"] if kind == "file name" else [])


@pytest.mark.parametrize(
    ("prompt_from", "expected"),
    [("txt", "by file"), ("metadata", "by metadata"), ("fixed", "fixed"), ("file_name", "red fox")],
)
def test_one_source_alone(tmp_path: Path, put: Put, prompt_from: str, expected: str) -> None:
    put("chosen/red_fox_0007.png", "by file", "by metadata")
    found = one(put, tmp_path, prompt="fixed", prompt_from=prompt_from)
    assert found.pairs[0].prompt == expected
    assert found.findings == []


def test_a_source_that_lacks_is_an_error(tmp_path: Path, put: Put) -> None:
    put("chosen/red_fox_0007.png", "by file")
    with pytest.raises(PairsError, match=r"red_fox_0007\.png has no prompt: its metadata hold no prompt"):
        one(put, tmp_path, prompt_from="metadata")
    with pytest.raises(PairsError, match="no fixed prompt is given"):
        one(put, tmp_path, prompt_from="fixed")


def test_a_name_that_is_only_a_number_is_no_prompt_but_the_trigger_word_may_be(tmp_path: Path, put: Put) -> None:
    for role in ("chosen", "rejected"):
        put(f"{role}/00012.png")
    with pytest.raises(PairsError, match="its name is only a number"):
        pairs_from_folders(tmp_path / "chosen", tmp_path / "rejected")
    found = pairs_from_folders(tmp_path / "chosen", tmp_path / "rejected", trigger="mystyle")
    assert found.pairs[0].prompt == "mystyle"


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("red_fox_00012_", "red fox"),
        ("red fox (3)", "red fox"),
        ("red_fox-02", "red fox"),
        ("a_t-shirt", "a t-shirt"),
        ("route66", "route66"),
        ("fox_1_2", "fox"),
        ("0001", ""),
        ("Bär #4", "Bär"),
    ],
)
def test_prompts_from_file_names(name: str, prompt: str) -> None:
    assert prompt_from_name(name) == prompt


@pytest.mark.parametrize(
    ("trigger", "prefix", "prompt", "expected"),
    [
        ("", "", " a  fox\n", "a fox"),
        ("sks", "", "a fox", "sks, a fox"),
        ("", "photo of", "a fox", "photo of a fox"),
        ("sks", "photo of", "a fox", "sks, photo of a fox"),
        ("sks", "", "a SKS fox", "a SKS fox"),
        ("sks", "", "asks a fox", "sks, asks a fox"),
        ("sks", "", "", "sks"),
        ("[v]", "", "a [v] dog", "a [v] dog"),
        ("(x", "", "a dog", "(x, a dog"),
    ],
)
def test_trigger_word_and_prefix(trigger: str, prefix: str, prompt: str, expected: str) -> None:
    assert compose_prompt(prompt, trigger, prefix) == expected


def test_trigger_word_and_prefix_reach_the_pairs(tmp_path: Path, put: Put) -> None:
    put("chosen/red_fox_0007.png", "a fox")
    assert one(put, tmp_path, trigger="sks", prefix="photo of").pairs[0].prompt == "sks, photo of a fox"


@pytest.mark.parametrize(
    "name", ["fox.caption", "fox.text", "fox.TXT", "fox.txt.txt", "FOX.txt", "fox.png.txt", "fox.captions", "fox.docx"]
)
def test_a_caption_under_a_wrong_name_is_pointed_out(tmp_path: Path, put: Put, name: str) -> None:
    image = put("chosen/fox.png")
    put("rejected/fox.png")
    (tmp_path / "chosen" / name).write_text("a fox")
    if (tmp_path / "chosen/fox.txt").is_file():
        pytest.skip("upper and lower case are the same to this file system")
    found = pairs_from_folders(tmp_path / "chosen", tmp_path / "rejected", prompt="fixed")
    assert codes(found.findings) == ["caption-name"]
    assert found.findings[0].level == "warning"
    assert found.findings[0].paths == (image, tmp_path / "chosen" / name)
    assert f"in {name}, which is not read. Rename it to fox.txt" in found.findings[0].message


def test_captions_of_other_images_are_no_hint(tmp_path: Path, put: Put) -> None:
    put("chosen/fox.png", "a fox")
    put("rejected/fox.png")
    (tmp_path / "chosen/fox2.caption").write_text("another")
    (tmp_path / "chosen/fox.caption").write_text("an older one, beside the right one")
    assert pairs_from_folders(tmp_path / "chosen", tmp_path / "rejected").findings == []


def test_a_forgotten_caption_is_pointed_out_where_others_have_one(tmp_path: Path, put: Put) -> None:
    for i in range(3):
        put(f"chosen/{i}.png", "p" if i else None)
        put(f"rejected/{i}.png")
    found = pairs_from_folders(tmp_path / "chosen", tmp_path / "rejected", prompt="fixed")
    assert codes(found.findings) == ["caption-missing"]
    assert "0.png has no caption file, others have; fixed prompt" in found.findings[0].message
    assert found.counts == {"fixed prompt": 1, "caption file": 2}


def test_empty_and_unreadable_captions(tmp_path: Path, put: Put) -> None:
    put("chosen/empty.png", " \n")
    put("chosen/latin.png")
    (tmp_path / "chosen/latin.txt").write_bytes("ein Bär".encode("latin-1"))
    put("chosen/wide.png")
    (tmp_path / "chosen/wide.txt").write_bytes("ein Bär".encode("utf-16"))
    put("chosen/marked.png")
    (tmp_path / "chosen/marked.txt").write_text("ein Bär", encoding="utf-8-sig")
    for name in ("empty", "latin", "wide", "marked"):
        put(f"rejected/{name}.png")
    found = pairs_from_folders(tmp_path / "chosen", tmp_path / "rejected", prompt="fixed")
    assert {(f.level, f.code, f.paths[0].name) for f in found.findings} == {
        ("warning", "caption-empty", "empty.txt"),
        ("error", "caption-encoding", "latin.txt"),
    }
    prompts = {p.chosen.stem: p.prompt for p in found.pairs}
    assert prompts == {"empty": "fixed", "latin": "fixed", "wide": "ein Bär", "marked": "ein Bär"}


def test_one_folder_alone(tmp_path: Path, put: Put, caplog: pytest.LogCaptureFixture) -> None:
    put("style/b 10.png", "ten")
    put("style/b 2.png", None, "two")
    with caplog.at_level(logging.WARNING):
        found = prompts_from_folder(tmp_path / "style", trigger="sks")
    assert [(c.image.name, c.prompt, c.source, c.kind) for c in found] == [
        ("b 2.png", "sks, two", "prompt from A1111 metadata", "image metadata"),
        ("b 10.png", "sks, ten", "prompt from b 10.txt", "caption file"),
    ]
    assert "b 2.png has no caption file" in caplog.text
    put("style/3.png")
    with pytest.raises(PairsError, match=r"3\.png has no prompt") as caught:
        prompts_from_folder(tmp_path / "style")
    assert len(caught.value.problems) == 1
