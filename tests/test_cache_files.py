"""What the caches hold, and that only what nobody needs goes."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch

from mapo_core.cache_files import describe_cache, list_cache, note_use, plan_prune, prune_cache
from mapo_core.cache_space import SPARE_BYTES, check_space
from mapo_core.cli import main
from mapo_core.disk_cache import CacheIndex, DiskCache
from mapo_core.errors import CacheError
from mapo_core.runs import EventWriter, RunDir, acquire_run_lock, create_run


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MAPO_HOME", str(tmp_path))
    return tmp_path


def fill(home: Path, key: str, model: str, kind: str = "latents", days: float = 0) -> Path:
    """A shard with one entry, last used so many days ago."""
    cache = DiskCache(home / "cache" / kind, {"model": model, "precision": "fp32"})
    cache.put({key: {"mean": torch.arange(100.0)}})
    path = home / "cache" / kind / cache.shards_used()[0]
    then = time.time() - days * 86_400
    os.utime(path, (then, then))
    return path


def a_run(name: str, *needs: Path) -> RunDir:
    run = create_run(name, "{}", "")
    note_use(run, {"latents": [path.name for path in needs]})
    return run


def test_the_list_says_whose_it_is(home: Path) -> None:
    one, two = fill(home, "a", "sdxl"), fill(home, "b", "sdxl", "prompts")
    other = fill(home, "c", "sd15", days=40)
    a_run("ink", one, two)
    (home / "cache" / "latents" / "note.safetensors").write_bytes(b"something else")
    shards = list_cache()
    assert [(s.path, s.kind, s.model, s.runs) for s in shards] == [
        (one, "latents", "sdxl", ("ink",)),
        (two, "prompts", "sdxl", ("ink",)),
        (other, "latents", "sd15", ()),
    ]
    assert shards[0].size == one.stat().st_size
    rows = describe_cache(shards)
    assert [(r["model"], r["kind"], r["files"], r["runs"]) for r in rows] == [
        ("sdxl", "latents", 1, ["ink"]),
        ("sdxl", "prompts", 1, ["ink"]),
        ("sd15", "latents", 1, []),
    ]


def test_only_what_is_asked_for_goes(home: Path) -> None:
    needed, old, new = fill(home, "a", "m", days=90), fill(home, "b", "m", days=90), fill(home, "c", "m")
    foreign = home / "cache" / "latents" / "mine.safetensors"
    foreign.write_bytes(b"something else")
    a_run("ink", needed)
    assert {s.path for s in plan_prune(unused=True).shards} == {old, new}
    assert {s.path for s in plan_prune(older_than_days=30).shards} == {needed, old}
    both = plan_prune(unused=True, older_than_days=30)
    assert ({s.path for s in both.shards}, both.kept, both.unknown) == ({old}, 2, ())
    with pytest.raises(CacheError, match="Say what may go"):
        plan_prune()
    assert prune_cache(both) == both.size > 400
    assert [p.exists() for p in (needed, old, new, foreign)] == [True, False, True, True]


def test_masks_are_listed_and_pruned_too(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    needed, old = fill(home, "a", "", "masks"), fill(home, "b", "", "masks", days=90)
    run = create_run("ink", "{}", "")
    note_use(run, {"latents": [], "prompts": [], "masks": [needed.name]})
    assert [(s.path, s.kind, s.runs) for s in list_cache()] == [(needed, "masks", ("ink",)), (old, "masks", ())]
    assert main(["cache"]) == 0
    out = capsys.readouterr().out
    assert "masks" in out
    assert "any model; ink" in out
    assert [s.path for s in plan_prune(unused=True).shards] == [old]


def test_masks_stay_while_a_run_trains_that_does_not_say_which_it_needs(home: Path) -> None:
    masks, prompts = fill(home, "a", "", "masks"), fill(home, "b", "m", "prompts")
    run = create_run("ink", "{}", "")
    note_use(run, {"latents": [], "prompts": []})  # as earlier versions wrote it
    with acquire_run_lock(run):
        assert [s.path for s in plan_prune(unused=True).shards] == [prompts]
    assert {s.path for s in plan_prune(unused=True).shards} == {masks, prompts}


def test_what_is_used_after_the_plan_stays(home: Path) -> None:
    path = fill(home, "a", "m", days=90)
    plan = plan_prune(unused=True)
    assert DiskCache(path.parent).missing(["a"]) == []  # a run looks it up
    assert prune_cache(plan) == 0
    assert path.exists()


def test_a_run_that_trains_keeps_what_it_needs(home: Path) -> None:
    path, other = fill(home, "a", "m", days=90), fill(home, "b", "m", days=90)
    run = a_run("ink", path)
    with acquire_run_lock(run):
        plan = plan_prune(older_than_days=30)
        assert ([s.path for s in plan.shards], plan.in_use) == ([other], 1)
        with EventWriter(run) as events:
            events.emit("run_resumed", 0)  # and has not said yet what it needs this time
        with pytest.raises(CacheError, match="being prepared"):
            plan_prune(older_than_days=30)
    new = create_run("new", "{}", "")
    with acquire_run_lock(new), pytest.raises(CacheError, match="Run new is being prepared"):
        plan_prune(unused=True)
    assert plan_prune(unused=True).unknown == ("new",)


def test_the_command_asks_first(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache"]) == 0
    assert "Nothing is cached" in capsys.readouterr().out
    path = fill(home, "a", "sdxl.safetensors", days=3)
    assert main(["cache", "--list"]) == 0
    out = capsys.readouterr().out
    assert "sdxl.safetensors; none" in out
    assert "3 days ago" in out
    assert main(["cache", "--prune", "--unused"]) == 0
    assert "repeat the command with --yes" in capsys.readouterr().out
    assert path.exists()
    assert main(["cache", "--prune", "--unused", "--yes"]) == 0
    assert "removed, 0 files stay" in capsys.readouterr().out
    assert not path.exists()
    assert main(["cache", "--prune"]) == 1


def test_too_little_room_is_said_before_anything_is_encoded(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mapo_core import cache_space

    free = SPARE_BYTES + 2_000_000_000
    monkeypatch.setattr(cache_space.shutil, "disk_usage", lambda place: type("Usage", (), {"free": free}))
    check_space(home / "cache" / "latents", 2_000_000_000, "images")
    with pytest.raises(CacheError, match=r"images will take 2\.0 GB in .*bf16.*MAPO_HOME"):
        check_space(home / "cache" / "latents", 2_000_000_001, "images")


def test_an_index_finds_every_key_in_every_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    from mapo_core import disk_cache

    monkeypatch.setattr(disk_cache, "_UNSORTED", 7)
    index = CacheIndex()
    for n in range(100):
        index.add(f"key {n % 30}", n)
    for n in range(30):
        assert list(index.find(f"key {n}")) == [m for m in reversed(range(100)) if m % 30 == n]
    assert list(index.find("key 30")) == []


def test_an_entry_in_two_shards_survives_the_damage_of_one(home: Path) -> None:
    first, second = fill(home, "a", "m"), fill(home, "a", "m")
    for path in (first, second):
        good = path.read_bytes()
        path.write_bytes(good[:-1] + b"\x7f")
        cache = DiskCache(path.parent)
        assert cache.missing(["a"]) == []
        assert torch.equal(cache.get("a")["mean"], torch.arange(100.0))
        path.write_bytes(good)
    assert json.loads(json.dumps(cache.shards_used()))
    with pytest.raises(KeyError):
        cache.get("b")
