"""Masks: found beside the images, cropped like them, and refused where they cannot be right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mapo_core.buckets import fit
from mapo_core.errors import PairsError
from mapo_core.pairs import PreferencePair, lint_pairs, pairs_from_folders
from mapo_core.pairs.images import prepare_image
from mapo_core.pairs.masks import has_transparency, mask_grid, masks_of


def write(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


def test_masks_beside_images_belong_to_their_pairs_and_are_no_images(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / "good" / f"{name}.png", np.zeros((8, 8, 3)))
        write(tmp_path / "bad" / f"{name}.jpg", np.zeros((8, 8, 3)))
    mask = write(tmp_path / "good" / "a-masklabel.png", np.full((8, 8), 255))
    other = write(tmp_path / "bad" / "b-masklabel.png", np.full((8, 8), 255))
    found = pairs_from_folders(tmp_path / "good", tmp_path / "bad", prompt="x", prompt_from="fixed")
    assert [p.chosen.name for p in found.pairs] == ["a.png", "b.png"]
    assert [(p.chosen_mask, p.rejected_mask) for p in found.pairs] == [(mask, None), (None, other)]
    assert found.findings == []


def test_a_file_with_the_ending_but_without_an_image_is_an_image(tmp_path: Path) -> None:
    assert masks_of([tmp_path / "x-masklabel.png"]) == {}
    assert masks_of([tmp_path / "x-masklabel.png", tmp_path / "x.webp"]) == {
        tmp_path / "x.webp": tmp_path / "x-masklabel.png"
    }


@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("size", [(32, 16), (64, 48), (16, 40)])
def test_the_grid_is_the_mean_of_the_cells_of_the_crop_that_the_image_gets(
    tmp_path: Path, size: tuple[int, int], alpha: bool
) -> None:
    rng = np.random.default_rng(0)
    width, height = size
    blocks = rng.integers(0, 2, (height // 8, width // 8)).repeat(8, 0).repeat(8, 1) * 255
    blocks[height // 2, width // 2] = 255
    image = np.dstack([blocks, blocks, blocks]) if not alpha else np.dstack([np.full((*blocks.shape, 3), 9), blocks])
    path = write(tmp_path / "m.png", image)
    how = fit(size, (16, 16))
    grid = mask_grid(path, how, (16, 16), 4, alpha=alpha)
    grey = path if not alpha else write(tmp_path / "g.png", np.dstack([blocks, blocks, blocks]))
    same = prepare_image(grey, how, (16, 16))[:, :, 0].astype(float) / 255
    assert grid.shape == (4, 4)
    assert grid.dtype == np.float32
    expected = same.reshape(4, 4, 4, 4).mean(axis=(1, 3))
    assert np.abs(grid - expected).max() < (0.15 if how.resized != size else 1e-6)  # two kinds of scaling
    assert 0 <= grid.min() <= grid.max() <= 1


def test_a_turned_mask_is_upright(tmp_path: Path) -> None:
    pixels = np.zeros((16, 16), dtype=np.uint8)
    pixels[:, :8] = 255  # left; turned by a quarter it is the top
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "m.png", exif=exif)
    grid = mask_grid(tmp_path / "m.png", fit((16, 16), (16, 16)), (16, 16), 8)
    assert grid.tolist() == [[1, 1], [0, 0]]


def test_a_mask_that_is_black_in_the_crop_is_refused(tmp_path: Path) -> None:
    pixels = np.zeros((16, 64))
    pixels[:, :8] = 255  # outside the middle square
    path = write(tmp_path / "m.png", pixels)
    with pytest.raises(PairsError, match=r"black everywhere in the part that is trained: .*m\.png"):
        mask_grid(path, fit((64, 16), (16, 16)), (16, 16), 8)
    assert mask_grid(path, fit((64, 16), (64, 16)), (64, 16), 8).sum() > 0


def test_which_images_have_transparency(tmp_path: Path) -> None:
    assert not has_transparency(write(tmp_path / "rgb.png", np.zeros((4, 4, 3))))
    assert has_transparency(write(tmp_path / "rgba.png", np.zeros((4, 4, 4))))


def test_lint_finds_black_masks_and_masks_of_another_shape(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    images = [write(tmp_path / f"{i}.png", rng.integers(0, 255, (32, 48, 3))) for i in range(4)]
    black, tall, right = (
        write(tmp_path / "black.png", np.zeros((32, 48))),
        write(tmp_path / "tall.png", np.full((48, 32), 255)),
        write(tmp_path / "right.png", np.full((64, 96), 200)),
    )
    pairs = [
        PreferencePair(prompt="a", chosen=images[0], rejected=images[1], chosen_mask=black, rejected_mask=right),
        PreferencePair(prompt="b", chosen=images[2], rejected=images[3], rejected_mask=tall),
    ]
    found = [
        f for f in lint_pairs(pairs, resolution=32, bucket_step=8).findings if f.code in ("black-mask", "mask-shape")
    ]
    assert [(f.level, f.code, f.pairs) for f in found] == [("error", "black-mask", (1,)), ("error", "mask-shape", (2,))]
