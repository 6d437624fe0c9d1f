from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from mapo_core.buckets import fit
from mapo_core.errors import PairsError
from mapo_core.pairs import MAX_PIXELS, image_size, list_images, load_image, prepare_image

from .conftest import Draw

RED, BLUE = (255, 0, 0), (0, 0, 255)


def halves(width: int = 40, height: int = 20) -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(BLUE, (width // 2, 0, width, height))
    return image


def png(width: int, height: int, depth: int = 8, colour: int = 2, rows: bytes = b"") -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_the_sixteen_bits_of_a_grey_png_are_scaled_not_cut(tmp_path: Path) -> None:
    values = np.array([[0, 128, 257, 32896, 65535, 65407]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "grey16.png")
    with Image.open(tmp_path / "grey16.png") as image:
        assert image.mode.startswith("I")
    loaded = np.asarray(load_image(tmp_path / "grey16.png"))
    assert loaded.shape == (1, 6, 3)
    assert loaded[0, :, 0].tolist() == [0, 0, 1, 128, 255, 255]


def test_sixteen_bit_tiff_of_either_byte_order(tmp_path: Path) -> None:
    for name, mode in (("little", "I;16"), ("big", "I;16B")):
        values = np.array([[0, 32896, 65535]], dtype="<u2" if mode == "I;16" else ">u2")
        Image.frombytes(mode, (3, 1), values.tobytes()).save(tmp_path / f"{name}.tif")
        assert np.asarray(load_image(tmp_path / f"{name}.tif"))[0, :, 0].tolist() == [0, 128, 255]


def test_sixteen_bit_rgb(tmp_path: Path) -> None:
    row = b"\0" + struct.pack(">6H", 65535, 32896, 0, 0, 257, 65535)
    (tmp_path / "rgb16.png").write_bytes(png(2, 1, depth=16, rows=row))
    assert np.asarray(load_image(tmp_path / "rgb16.png")).tolist() == [[[255, 128, 0], [0, 1, 255]]]


@pytest.mark.parametrize(("mode", "value"), [("F", 0.5), ("I", 100_000)])
def test_pixels_of_unknown_range_are_refused(tmp_path: Path, mode: str, value: float) -> None:
    Image.new(mode, (4, 4), value).save(tmp_path / "odd.tif")
    with pytest.raises(PairsError, match=r"odd\.tif .*save it as 8-bit RGB PNG"):
        load_image(tmp_path / "odd.tif")


def test_cmyk_jpeg(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=95)
    image = load_image(tmp_path / "cmyk.jpg")
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image)[8, 8].astype(int) - RED).max() < 8


def test_greyscale_and_bilevel(tmp_path: Path) -> None:
    Image.new("L", (4, 4), 77).save(tmp_path / "l.png")
    Image.new("1", (4, 4), 1).save(tmp_path / "1.png")
    assert load_image(tmp_path / "l.png").getpixel((0, 0)) == (77, 77, 77)
    assert load_image(tmp_path / "1.png").getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "RGB"])
def test_transparency_is_laid_on_the_background(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "clear.png"
    if mode == "P":  # one entry of the palette is transparent
        image = Image.new("P", (4, 4), 0)
        image.putpalette([255, 0, 0, 0, 0, 255])
        image.putpixel((0, 0), 1)
        image.save(path, transparency=1)
    elif mode == "RGB":  # one colour is
        image = Image.new("RGB", (4, 4), RED)
        image.putpixel((0, 0), BLUE)
        image.save(path, transparency=BLUE)
    elif mode == "PA":
        image = Image.new("RGBA", (4, 4), (*RED, 255))
        image.putpixel((0, 0), (*BLUE, 0))
        path = tmp_path / "clear.webp"
        image.save(path, lossless=True)
    else:
        image = Image.new("RGBA", (4, 4), (*RED, 255))
        image.putpixel((0, 0), (*BLUE, 0))
        image.convert(mode).save(path)
    assert load_image(path).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(path, background=(10, 20, 30)).getpixel((0, 0)) == (10, 20, 30)
    assert load_image(path).getpixel((1, 1)) == (RED if mode != "LA" else (76, 76, 76))


def test_half_transparency_is_mixed(tmp_path: Path) -> None:
    Image.new("RGBA", (2, 2), (255, 0, 0, 128)).save(tmp_path / "half.png")
    assert load_image(tmp_path / "half.png").getpixel((0, 0)) == (255, 127, 127)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_the_first_frame_of_an_animation(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"moving.{suffix}"
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE)]
    options = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100, **options)
    with Image.open(path) as image:
        assert image.n_frames == 2
    assert load_image(path).getpixel((4, 4)) == RED


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, orientation: int) -> None:
    """All eight stored forms of one picture are shown the same."""
    upright = Image.new("RGB", (48, 32), (255, 255, 255))
    upright.paste(RED, (0, 0, 16, 16))
    upright.paste(BLUE, (32, 0, 48, 16))
    turn = Image.Transpose
    stored = {
        2: turn.FLIP_LEFT_RIGHT,
        3: turn.ROTATE_180,
        4: turn.FLIP_TOP_BOTTOM,
        5: turn.TRANSPOSE,
        6: turn.ROTATE_90,
        7: turn.TRANSVERSE,
        8: turn.ROTATE_270,
    }
    image = upright.transpose(stored[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "turned.png", exif=exif)
    assert image_size(tmp_path / "turned.png") == (48, 32)
    assert np.array_equal(np.asarray(load_image(tmp_path / "turned.png")), np.asarray(upright))


def test_the_size_is_read_without_decoding(tmp_path: Path) -> None:
    halves(300, 200).save(tmp_path / "cut.png")
    content = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[:60])
    assert image_size(tmp_path / "cut.png") == (300, 200)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif"])
@pytest.mark.parametrize("lenient", [False, True])
def test_a_truncated_file_is_named(
    tmp_path: Path, draw: Draw, suffix: str, lenient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where another package has made Pillow accept truncated files in the whole process."""
    path = tmp_path / f"cut.{suffix}"
    draw(1, size=256).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)
    with pytest.raises(PairsError, match=rf"cut\.{suffix}.*truncated"):
        load_image(path)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is lenient


def test_files_that_are_no_images_are_named(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    for name, why in (
        ("text.png", "Not an image"),
        ("empty.png", "Not an image"),
        ("folder.png", "Cannot read"),
        ("none.png", "Image is missing"),
    ):
        for read in (load_image, image_size):
            with pytest.raises(PairsError, match=f"{why}.*{name}"):
                read(tmp_path / name)


@pytest.mark.parametrize("limit", [Image.MAX_IMAGE_PIXELS, None])
@pytest.mark.parametrize("side", [9460, 14_000, 60_000])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bombs_are_refused_from_their_header(
    tmp_path: Path, side: int, limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From Pillow's limit on, where it would only warn, and where another package has lifted the limit."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    (tmp_path / "bomb.png").write_bytes(png(side, side))
    for read in (load_image, image_size):
        with pytest.raises(PairsError, match=r"more than 89 million pixels.*bomb\.png"):
            read(tmp_path / "bomb.png")


def test_the_bound_of_pixels_is_pillows_own(tmp_path: Path) -> None:
    assert MAX_PIXELS == Image.MAX_IMAGE_PIXELS
    (tmp_path / "large.png").write_bytes(png(9459, 9459))
    assert image_size(tmp_path / "large.png") == (9459, 9459)


def test_a_damaged_exif_block_does_not_hide_the_image(tmp_path: Path) -> None:
    halves().save(tmp_path / "odd.png", exif=b"Exif\0\0this is no TIFF header")
    with Image.open(tmp_path / "odd.png") as image, pytest.raises(SyntaxError):
        image.getexif()
    assert load_image(tmp_path / "odd.png").size == image_size(tmp_path / "odd.png") == (40, 20)


def test_names_with_spaces_and_other_letters(tmp_path: Path) -> None:
    folder = tmp_path / "Bilder für 猫 и кот"
    folder.mkdir()
    halves().save(folder / "ein Bär (1).png")
    assert list_images(tmp_path) == [folder / "ein Bär (1).png"]
    assert load_image(folder / "ein Bär (1).png").getpixel((0, 0)) == RED


def test_images_are_listed_in_natural_order_without_hidden_ones(tmp_path: Path) -> None:
    names = [
        "img10.png",
        "img2.JPG",
        "a/img1.webp",
        "a/.hidden.png",
        ".cache/x.png",
        "__MACOSX/y.png",
        "b.txt",
        "²1.png",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [path.relative_to(tmp_path).as_posix() for path in list_images(tmp_path)]
    assert found == ["a/img1.webp", "img2.JPG", "img10.png", "²1.png"]
    assert len(list_images(tmp_path, recursive=False)) == 3
    with pytest.raises(PairsError, match="no folder"):
        list_images(tmp_path / "none")


def test_an_image_is_cropped_in_the_middle_and_not_stretched(tmp_path: Path) -> None:
    image = Image.new("RGB", (400, 100), (0, 255, 0))
    image.paste(RED, (150, 0, 200, 100))
    image.paste(BLUE, (200, 0, 250, 100))
    image.save(tmp_path / "wide.png")
    pixels = prepare_image(tmp_path / "wide.png", fit((400, 100), (64, 64)), (64, 64))
    assert (pixels.shape, pixels.dtype) == ((64, 64, 3), np.uint8)
    assert pixels[32, 8].tolist() == list(RED)
    assert pixels[32, 56].tolist() == list(BLUE)
    flipped = prepare_image(tmp_path / "wide.png", fit((400, 100), (64, 64)), (64, 64), flip=True)
    assert np.array_equal(flipped, pixels[:, ::-1])
    assert flipped.flags.writeable


def test_an_image_of_its_buckets_size_is_untouched(tmp_path: Path, draw: Draw) -> None:
    image = draw(3, size=64)
    image.save(tmp_path / "same.png")
    pixels = prepare_image(tmp_path / "same.png", fit((64, 64), (64, 64)), (64, 64))
    assert np.array_equal(pixels, np.asarray(image))
    assert prepare_image(tmp_path / "same.png", fit((64, 64), (32, 48)), (32, 48)).shape == (48, 32, 3)
