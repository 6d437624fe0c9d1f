from __future__ import annotations

import io
import os
import stat
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from mapo_core.errors import PairsError
from mapo_core.pairs import keep_files, keep_zip, pairs_from_dropped, require_inside, unpack_zip
from mapo_core.pairs.importing import ZipLimits


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAPO_HOME", str(tmp_path / "home"))


def png(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), colour).save(buffer, "PNG")
    return buffer.getvalue()


def pack(path: Path, files: dict[str, bytes], links: dict[str, str] | None = None) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        for name, target in (links or {}).items():
            info = zipfile.ZipInfo(name)
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(info, target)
    return path


PAIR = {"set/Chosen/a.png": png(), "set/Chosen/a.txt": b"a red star", "set/rejected/a.png": png("blue")}


def test_a_zip_of_two_folders_gives_pairs(tmp_path: Path) -> None:
    others = {"__MACOSX/set/Chosen/._a.png": b"x", "set/.DS_Store": b"x", "set/virus.exe": b"x"}
    folder = keep_zip(pack(tmp_path / "my set.zip", {**PAIR, **others}))
    found = pairs_from_dropped(folder, trigger="mystyle")
    assert [(p.prompt, p.chosen.name, p.chosen.parent.name) for p in found.pairs] == [
        ("mystyle, a red star", "a.png", "Chosen")
    ]
    assert sorted(p.name for p in folder.rglob("*") if p.is_file()) == ["a.png", "a.png", "a.txt"]
    assert folder.is_relative_to(tmp_path / "home")
    assert keep_zip(tmp_path / "my set.zip") == folder  # found again, not unpacked twice


@pytest.mark.parametrize("name", ["../evil.png", "a/../../evil.png", "/etc/evil.png", "..\\evil.png", "C:\\evil.png"])
def test_no_path_leads_out_of_the_archive(tmp_path: Path, name: str) -> None:
    archive = pack(tmp_path / "x.zip", {**PAIR, name: png()})
    with pytest.raises(PairsError, match="leads out of it"):
        unpack_zip(archive, tmp_path / "out" / "x")
    assert list((tmp_path / "out").iterdir()) == []
    assert not list(tmp_path.rglob("evil.png"))


def test_links_are_not_unpacked(tmp_path: Path) -> None:
    archive = pack(tmp_path / "x.zip", PAIR, {"set/Chosen/link.png": "/etc/passwd"})
    folder = unpack_zip(archive, tmp_path / "out")
    assert not list(folder.rglob("link.png"))


def test_limits_hold_though_the_archive_lies_about_its_sizes(tmp_path: Path) -> None:
    archive = pack(tmp_path / "x.zip", {"a.png": b"\0" * 50_000, "b.png": b"\0" * 50_000})
    for limits in (ZipLimits(files=1), ZipLimits(total_bytes=60_000), ZipLimits(file_bytes=40_000)):
        with pytest.raises(PairsError):
            unpack_zip(archive, tmp_path / "out" / "x", limits)
        assert not (tmp_path / "out" / "x").exists()
    bomb = pack(tmp_path / "bomb.zip", {"a.png": b"\0" * 2**25})
    with pytest.raises(PairsError, match="suspiciously large"):
        unpack_zip(bomb, tmp_path / "out" / "x")
    content = bytearray(archive.read_bytes())
    for at in range(len(content) - 4):  # both headers now say that a file has ten bytes
        if content[at : at + 4] == (50_000).to_bytes(4, "little"):
            content[at : at + 4] = (10).to_bytes(4, "little")
    (tmp_path / "liar.zip").write_bytes(content)
    with pytest.raises(PairsError):
        unpack_zip(tmp_path / "liar.zip", tmp_path / "out" / "x", ZipLimits(file_bytes=40_000))
    assert list((tmp_path / "out").iterdir()) == []


def test_what_is_no_zip_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_bytes(b"no zip at all")
    with pytest.raises(PairsError, match="not a zip file"):
        unpack_zip(tmp_path / "x.zip", tmp_path / "out")
    with pytest.raises(PairsError, match="neither an image nor a list"):
        unpack_zip(pack(tmp_path / "y.zip", {"a.exe": b""}), tmp_path / "out")


def test_a_list_in_a_zip_may_name_its_own_images_alone(tmp_path: Path) -> None:
    line = b'{"prompt": "x", "chosen": "set/Chosen/a.png", "rejected": "set/rejected/a.png"}\n'
    folder = keep_zip(pack(tmp_path / "a.zip", {**PAIR, "pairs.jsonl": line}))
    assert pairs_from_dropped(folder).pairs[0].prompt == "x"
    secret = tmp_path / "secret.png"
    secret.write_bytes(png())
    for path in (str(secret), os.path.relpath(secret, folder), "../../../secret.png"):
        bad = line.replace(b"set/Chosen/a.png", path.encode())
        folder = keep_zip(pack(tmp_path / "b.zip", {**PAIR, "pairs.jsonl": bad}))
        with pytest.raises(PairsError, match="lies outside"):
            pairs_from_dropped(folder)


def test_a_link_on_disk_does_not_lead_out_either(tmp_path: Path) -> None:
    from mapo_core.pairs import PreferencePair

    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret.png").write_bytes(png())
    (root / "a.png").symlink_to(tmp_path / "secret.png")
    (root / "b.png").write_bytes(png())
    with pytest.raises(PairsError, match="Pair 1"):
        require_inside([PreferencePair(prompt="", chosen=root / "a.png", rejected=root / "b.png")], [root])
    require_inside([PreferencePair(prompt="", chosen=root / "b.png", rejected=root / "b.png")], [root])


def test_an_unclear_layout_is_explained(tmp_path: Path) -> None:
    folder = keep_zip(pack(tmp_path / "a.zip", {"one/a.png": png(), "two/a.png": png("blue")}))
    with pytest.raises(PairsError, match=r"Name the two folders chosen and rejected; there is one, two"):
        pairs_from_dropped(folder)


def test_uploaded_files_outlive_the_upload(tmp_path: Path) -> None:
    lies = tmp_path / "gradio" / "abc"
    lies.mkdir(parents=True)
    (lies / "a.png").write_bytes(png())
    (lies / "a.txt").write_text("a star")
    files = [("chosen/a.png", lies / "a.png"), ("chosen/a.txt", lies / "a.txt"), (".DS_Store", lies / "a.txt")]
    folder = keep_files(files, "chosen pictures")
    assert keep_files(files, "chosen pictures") == folder
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.*")) == ["chosen/a.png", "chosen/a.txt"]
    with pytest.raises(PairsError, match="leads out"):
        keep_files([("../a.png", lies / "a.png")], "x")
    with pytest.raises(PairsError, match="no image"):
        keep_files([("a.txt", lies / "a.txt")], "x")
