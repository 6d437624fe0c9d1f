from __future__ import annotations

import io
import logging
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mapo_core import cache_space
from mapo_core.cache_space import SPARE_BYTES
from mapo_core.errors import PairsError
from mapo_core.pairs import RowFilter, load_image, pairs_from_parquet, pairs_hash, read_pair_set, read_pair_source
from mapo_core.pairs import parquet as module

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def picture(number: int, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number * 40 % 256, number, 0)).save(buffer, kind)
    return buffer.getvalue()


def rows(*labels: float | None) -> list[dict[str, Any]]:
    """Row i shows pictures 2i and 2i + 1."""
    return [
        {
            "jpg_0": picture(2 * i),
            "jpg_1": picture(2 * i + 1),
            "label_0": label,
            "label_1": None if label is None else 1 - label,
            "caption": f"caption  {i}",
        }
        for i, label in enumerate(labels)
    ]


def write(path: Path, records: Sequence[dict[str, Any]], group: int = 2) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(records)), path, row_group_size=group)
    return path


def test_the_label_chooses_and_ties_are_dropped_and_counted(tmp_path: Path) -> None:
    source = write(tmp_path / "a.parquet", rows(1.0, 0.0, 0.5, 0.5, 1.0))
    found = pairs_from_parquet(source, tmp_path / "out")

    assert [p.prompt for p in found.pairs] == ["caption 0", "caption 1", "caption 4"]
    assert found.pairs[0].chosen.read_bytes() == picture(0)
    assert found.pairs[0].rejected.read_bytes() == picture(1)
    assert found.pairs[1].chosen.read_bytes() == picture(3)
    assert found.pairs[1].rejected.read_bytes() == picture(2)
    assert [p.source for p in found.pairs][2] == "a.parquet row 5; prompt from caption"
    assert found.counts == {"parquet caption": 3, "tie": 2}
    assert [(f.level, f.message) for f in found.findings] == [("note", "2 of 5 rows are ties and were left out.")]
    assert load_image(found.pairs[0].chosen).size == (8, 8)


def test_label_1_is_not_needed(tmp_path: Path) -> None:
    records = [{k: v for k, v in row.items() if k != "label_1"} for row in rows(0.0, 0.5)]
    found = pairs_from_parquet(write(tmp_path / "a.parquet", records), tmp_path / "out")
    assert found.counts == {"parquet caption": 1, "tie": 1}
    assert found.pairs[0].chosen.read_bytes() == picture(1)


def test_rows_without_a_clear_label_or_image_are_left_out_and_counted(tmp_path: Path) -> None:
    records = [{**row, "has_label": True} for row in rows(1.0, None, 1.0, 1.0, 1.0, 1.0)]
    records[2]["has_label"] = False
    records[3]["label_1"] = 1.0
    records[4]["jpg_1"] = None
    records[5]["jpg_0"] = b"<html>not found</html>"
    found = pairs_from_parquet(write(tmp_path / "a.parquet", records), tmp_path / "out")
    assert found.counts == {"parquet caption": 1, "unlabelled": 3, "no image": 2}
    assert [f.level for f in found.findings] == ["warning", "warning"]


def test_images_as_the_datasets_library_wraps_them(tmp_path: Path) -> None:
    records = rows(1.0)
    for name in ("jpg_0", "jpg_1"):
        records[0][name] = {"bytes": records[0][name], "path": None}
    found = pairs_from_parquet(write(tmp_path / "a.parquet", records), tmp_path / "out")
    assert found.pairs[0].chosen.read_bytes() == picture(0)


def test_each_different_image_is_written_once_with_its_kind(tmp_path: Path) -> None:
    records = rows(1.0, 1.0, 1.0)
    records[1]["jpg_0"] = records[0]["jpg_0"]
    records[2]["jpg_1"] = picture(9, "PNG")
    records[2]["jpg_0"] = picture(9, "WEBP")
    found = pairs_from_parquet(write(tmp_path / "a.parquet", records), tmp_path / "out")
    images = [p for p in (tmp_path / "out/images").rglob("*") if p.is_file()]
    assert len(images) == 5
    assert found.pairs[0].chosen == found.pairs[1].chosen
    assert (found.pairs[2].chosen.suffix, found.pairs[2].rejected.suffix) == (".webp", ".png")


def test_a_folder_of_files_in_order(tmp_path: Path) -> None:
    write(tmp_path / "data/b.parquet", rows(1.0))
    write(tmp_path / "data/a.parquet", rows(1.0, 0.0, 1.0))
    seen: list[tuple[int, int]] = []
    found = pairs_from_parquet(tmp_path / "data", tmp_path / "out", progress=lambda *done: seen.append(done))
    assert [p.source.split(";")[0] for p in found.pairs] == [
        "a.parquet row 1",
        "a.parquet row 2",
        "a.parquet row 3",
        "b.parquet row 1",
    ]
    assert seen == [(2, 4), (3, 4), (4, 4)]


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "a.parquet", rows(*[1.0, 0.5] * 4))

    def interrupt(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pairs_from_parquet(source, tmp_path / "out", progress=interrupt)
    groups: list[int] = []
    convert = module._convert
    monkeypatch.setattr(module, "_convert", lambda f, t, g, o, k: groups.append(g) or convert(f, t, g, o, k))
    found = pairs_from_parquet(source, tmp_path / "out")
    assert groups == [2, 3]
    fresh = pairs_from_parquet(source, tmp_path / "fresh")
    assert pairs_hash(found.pairs) == pairs_hash(fresh.pairs)
    assert [p.source for p in found.pairs] == [p.source for p in fresh.pairs]
    assert found.counts == {"parquet caption": 4, "tie": 4}

    groups.clear()
    found.pairs[1].rejected.unlink()  # what is no longer there is written again
    assert pairs_from_parquet(source, tmp_path / "out").pairs[1].rejected.is_file()
    assert groups == [1]
    groups.clear()
    size, time = source.stat().st_size, source.stat().st_mtime_ns
    write(source, rows(*[0.0, 0.5] * 4))  # another file under the same name is read anew
    os.utime(source, ns=(time, time + 1_000_000_000))
    assert source.stat().st_size == size
    assert pairs_from_parquet(source, tmp_path / "out").pairs[0].chosen.read_bytes() == picture(1)
    assert groups == [0, 1, 2, 3]


def test_too_little_room_is_said_before_anything_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows without a clear label, what the limit leaves out and what is unpacked already need none."""
    records = rows(1.0, 0.0, 0.5, 1.0, 0.0, 1.0)
    for i, record in enumerate(records):
        record["jpg_0"] += random.Random(i).randbytes(40_000)  # after the picture's end; they do not compress
    source, out = write(tmp_path / "p.parquet", records), tmp_path / "out"
    room = {"bytes": 0}
    usage = lambda place: type("Usage", (), {"free": SPARE_BYTES + room["bytes"]})  # noqa: E731
    monkeypatch.setattr(cache_space.shutil, "disk_usage", usage)
    for need, keep in ((200_000, RowFilter()), (80_000, RowFilter(limit=2))):  # five of six rows; two of these
        room["bytes"] = need - 10_000
        with pytest.raises(PairsError, match=r"will take about .* MB in .*--limit"):
            pairs_from_parquet(source, out, keep=keep)
        assert not out.exists()
    room["bytes"] = 90_000
    assert len(pairs_from_parquet(source, out, keep=RowFilter(limit=2)).pairs) == 2  # the first row group is done
    room["bytes"] = 130_000
    with pytest.raises(PairsError, match="What is unpacked already is kept"):
        pairs_from_parquet(source, out)
    room["bytes"] = 150_000
    assert len(pairs_from_parquet(source, out).pairs) == 5


def test_memory_does_not_grow_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 16 MiB in 16 row groups, Arrow never holds more than a few."""
    records = rows(*[1.0] * 128)
    for row in records:
        for name in ("jpg_0", "jpg_1"):
            row[name] += random.randbytes(64 * 1024)
    source = write(tmp_path / "a.parquet", records, group=8)
    held: list[int] = []
    record = module._record
    monkeypatch.setattr(module, "_record", lambda *a: held.append(pa.total_allocated_bytes()) or record(*a))
    before = pa.total_allocated_bytes()
    del records
    pairs_from_parquet(source, tmp_path / "out")
    assert len(held) == 128
    assert max(held) - before < 8 * 2**20


def test_faults_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = write(tmp_path / "good.parquet", rows(1.0))
    (tmp_path / "cut.parquet").write_bytes(good.read_bytes()[:100])
    write(tmp_path / "other.parquet", [{"image": b"", "caption": "x"}])
    write(tmp_path / "ties.parquet", rows(0.5, 0.5))
    (tmp_path / "empty").mkdir()
    for name, why in (
        ("cut.parquet", r"cut\.parquet is not a parquet file, or was cut short"),
        ("other.parquet", "lacks the columns jpg_0, jpg_1, label_0; it has image, caption"),
        ("ties.parquet", "No pair results .*2 of 2 rows are ties"),
        ("none.parquet", r"Cannot read .*none\.parquet"),
        ("empty", r"no \.parquet files"),
        (".", r"cut\.parquet is not a parquet file"),
    ):
        with pytest.raises(PairsError, match=why):
            pairs_from_parquet(tmp_path / name, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.jpg"))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(PairsError, match="pip install pyarrow"):
        pairs_from_parquet(good, tmp_path / "out")


def test_any_source_is_read_and_parquet_unpacked_under_mapo_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MAPO_HOME", str(tmp_path / "home"))
    source = write(tmp_path / "data/a.parquet", rows(1.0, 0.5))
    found = read_pair_set(tmp_path / "data")
    assert found.pairs[0].chosen.is_relative_to(tmp_path / "home")
    with caplog.at_level(logging.WARNING):
        assert read_pair_source(source)[0].prompt == "caption 0"
    assert "1 of 2 rows are ties" in caplog.text
    assert read_pair_set(source, tmp_path / "here").pairs[0].chosen.is_relative_to(tmp_path / "here")


class HubStandIn:
    """The Hub's file system over a local folder; remembers what is listed and opened."""

    def __init__(self, root: Path) -> None:
        import fsspec

        self._system = fsspec.filesystem("dir", path=str(root), target_protocol="file")
        self.opened: list[str] = []
        self.read_bytes = 0

    def glob(self, pattern: str, detail: bool) -> dict[str, Any]:
        return {
            name: {**info, "blob_id": f"id of {name}"}
            for name, info in self._system.glob(pattern, detail=detail).items()
        }

    def open(self, path: str, mode: str) -> Any:
        self.opened.append(path)
        file, hub = self._system.open(path, mode), self

        class Counting(io.RawIOBase):
            def readable(self) -> bool:
                return True

            def seekable(self) -> bool:
                return True

            def seek(self, *where: int) -> int:
                return file.seek(*where)

            def tell(self) -> int:
                return file.tell()

            def read(self, size: int = -1) -> bytes:
                content = file.read(size)
                hub.read_bytes += len(content)
                return content

        return Counting()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubStandIn:
    from mapo_core.pairs import parquet_files

    stand_in = HubStandIn(tmp_path / "hub")
    monkeypatch.setattr(parquet_files, "hub_file_system", lambda: stand_in)
    return stand_in


PICKAPIC = "hf://datasets/owner/pickapic"


def test_a_data_set_on_the_hub_is_read_up_to_the_limit_only(tmp_path: Path, hub: HubStandIn) -> None:
    folder = tmp_path / "hub" / "datasets" / "owner" / "pickapic" / "data"
    noise = random.Random(0)
    big = [{**row, "jpg_0": row["jpg_0"] + noise.randbytes(50_000)} for row in rows(*[1.0] * 40)]
    size = write(folder / "train-0.parquet", big).stat().st_size
    write(folder / "train-1.parquet", rows(0.0))

    found = pairs_from_parquet(PICKAPIC, tmp_path / "out", keep=RowFilter(limit=3))

    assert [p.source for p in found.pairs] == [f"train-0.parquet row {n}; prompt from caption" for n in (1, 2, 3)]
    assert found.pairs[0].rejected.read_bytes() == picture(1)
    assert not [path for path in hub.opened if path.endswith("train-1.parquet")]
    assert hub.read_bytes < size / 4

    before = hub.read_bytes
    again = pairs_from_parquet(PICKAPIC, tmp_path / "out", keep=RowFilter(limit=3))
    assert again.pairs == found.pairs
    assert hub.read_bytes - before <= 2 * 2**16  # the file's end, twice: what pyarrow reads to find the footer


def test_a_pattern_chooses_files_of_the_hub_and_the_whole_set_is_its_default(tmp_path: Path, hub: HubStandIn) -> None:
    folder = tmp_path / "hub" / "datasets" / "owner" / "pickapic" / "data"
    write(folder / "train-0.parquet", rows(1.0))
    write(folder / "validation-0.parquet", rows(0.0, 1.0))
    told: list[tuple[int, int]] = []

    part = pairs_from_parquet(f"{PICKAPIC}/data/validation*.parquet", tmp_path / "a")
    whole = pairs_from_parquet(PICKAPIC, tmp_path / "b", progress=lambda done, total: told.append((done, total)))

    assert (len(part.pairs), len(whole.pairs)) == (2, 3)
    assert told[-1] == (3, 3)
    assert all(done <= total for done, total in told)


def test_a_set_of_the_hub_is_unpacked_under_mapo_home(
    tmp_path: Path, hub: HubStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAPO_HOME", str(tmp_path / "home"))
    write(tmp_path / "hub" / "datasets" / "owner" / "pickapic" / "a.parquet", rows(1.0))
    (pair,) = read_pair_source(PICKAPIC)
    assert pair.chosen.is_relative_to(tmp_path / "home" / "unpacked")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("hf://models/x/y", "is not a data set"),
        ("hf://datasets/owner", "is not a data set"),
        ("hf://datasets/owner/nothing", "no .parquet files"),
    ],
)
def test_a_wrong_name_on_the_hub_is_explained(source: str, said: str, hub: HubStandIn) -> None:
    with pytest.raises(PairsError, match=said):
        read_pair_set(source)


def test_an_unreachable_hub_is_explained(monkeypatch: pytest.MonkeyPatch, hub: HubStandIn) -> None:
    def unreachable(pattern: str, detail: bool) -> Any:
        raise ConnectionError("no route")

    monkeypatch.setattr(hub, "glob", unreachable)
    with pytest.raises(PairsError, match=r"no route.*HF_TOKEN"):
        read_pair_set(PICKAPIC)
