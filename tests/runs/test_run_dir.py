"""Run folders, requests, and files that are complete or not there."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mapo_core.errors import RunError
from mapo_core.runs import (
    RunDir,
    checkpoint_step,
    clean_leftovers,
    create_run,
    disk,
    folder_atomic,
    list_runs,
    mapo_home,
    open_run,
    remove_folder,
    run_dir,
    write_atomic,
)

DEAD_PID = 2**22 + 1  # above the largest id that Linux gives out


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


class TestHome:
    def test_the_variable_wins(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("MAPO_HOME", str(tmp_path / "x y"))
        assert mapo_home() == tmp_path / "x y"

    @pytest.mark.skipif(sys.platform == "win32", reason="POSIX paths")
    @pytest.mark.parametrize(
        ("platform", "variables", "expected"),
        [
            ("linux", {"XDG_DATA_HOME": "/data"}, "/data/mapo"),
            ("linux", {"XDG_DATA_HOME": "relative"}, "/home/u/.local/share/mapo"),
            ("linux", {}, "/home/u/.local/share/mapo"),
            ("darwin", {}, "/home/u/Library/Application Support/mapo"),
            ("win32", {"LOCALAPPDATA": "/local"}, "/local/mapo"),
        ],
    )
    def test_the_platforms(
        self, monkeypatch: pytest.MonkeyPatch, platform: str, variables: dict[str, str], expected: str
    ) -> None:
        for name in ("MAPO_HOME", "XDG_DATA_HOME", "LOCALAPPDATA"):
            monkeypatch.delenv(name, raising=False)
        for name, value in {"HOME": "/home/u", **variables}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(run_dir.sys, "platform", platform)
        assert mapo_home() == Path(expected)


class TestCreate:
    def test_holds_what_was_given(self, home: Path, tmp_path: Path) -> None:
        pairs = tmp_path / "pairs.jsonl"
        pairs.write_bytes(b'{"prompt": "\xe5\xae\xb6"}\n')
        run = create_run("Öl und 墨", '{"a": "ü"}', pairs, home)
        assert run.path == home / "runs" / "Öl und 墨"
        assert run.config.read_bytes() == '{"a": "ü"}'.encode()
        assert run.pairs.read_bytes() == pairs.read_bytes()
        assert names(run.path) == {"config.json", "pairs.jsonl", "requests", "checkpoints", "samples", "export"}

    def test_a_taken_name_gets_a_number(self, home: Path) -> None:
        runs = [create_run("a", f"{{}}{i}", "", home) for i in range(3)]
        assert [run.name for run in runs] == ["a", "a-2", "a-3"]
        assert [run.config.read_text() for run in runs] == ["{}0", "{}1", "{}2"]

    def test_a_race_gives_every_starter_its_own_run(self, home: Path) -> None:
        barrier = threading.Barrier(8)

        def create(number: int) -> RunDir:
            barrier.wait()
            return create_run("a", str(number), "", home)

        with ThreadPoolExecutor(8) as pool:
            runs = list(pool.map(create, range(8)))
        assert {run.name for run in runs} == {"a", *(f"a-{n}" for n in range(2, 9))}
        assert [run.config.read_text() for run in runs] == [str(n) for n in range(8)]
        assert names(home / "runs") == {run.name for run in runs}

    def test_a_name_taken_between_the_look_and_the_move(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first = create_run("a", "first", "", home)
        looks = iter([False])
        exists = os.path.lexists
        monkeypatch.setattr(run_dir.os.path, "lexists", lambda path: next(looks, exists(path)))
        assert create_run("a", "second", "", home).name == "a-2"
        assert first.config.read_text() == "first"

    def test_a_full_disk_leaves_nothing(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(run_dir, "write_atomic", refuse)
        with pytest.raises(RunError, match="No space left"):
            create_run("a", "{}", "", home)
        assert names(home / "runs") == set()

    def test_removes_what_a_killed_process_left(self, home: Path) -> None:
        dead = home / "runs" / f".tmp-{DEAD_PID}-00000000-a"
        alive = home / "runs" / f".tmp-{os.getppid()}-00000000-a"
        for folder in (dead, alive):
            folder.mkdir(parents=True)
        create_run("a", "{}", "", home)
        assert names(home / "runs") == {"a", alive.name}

    @pytest.mark.parametrize("name", ["", ".", "..", "a/b", ".hidden"])
    def test_refuses_a_name_that_is_no_folder(self, home: Path, name: str) -> None:
        with pytest.raises(RunError, match="cannot be the name"):
            create_run(name, "{}", "", home)


class TestFind:
    def test_by_name_and_by_folder(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        run = create_run("a b", "{}", "", home)
        assert open_run("a b", home) == run
        assert open_run(run.path) == run
        monkeypatch.chdir(home)
        assert open_run("runs/a b") == run
        monkeypatch.setenv("MAPO_HOME", str(home))
        assert open_run("a b") == run

    def test_a_wrong_name_is_told_the_close_ones_first(self, home: Path) -> None:
        for name in ("zebra", "sketch", "ink-style"):
            create_run(name, "{}", "", home)
        with pytest.raises(RunError, match=r"no run 'ink-stile'.* There are: ink-style, ") as caught:
            open_run("ink-stile", home)
        assert "zebra" in str(caught.value)

    def test_no_runs_at_all(self, home: Path) -> None:
        assert list_runs(home) == []
        with pytest.raises(RunError, match="no runs yet"):
            open_run("a", home)

    def test_newest_first_and_runs_only(self, home: Path) -> None:
        for age, name in enumerate(["b", "c", "a"]):
            run = create_run(name, "{}", "", home)
            os.utime(run.config, (1000 - age, 1000 - age))
        (home / "runs" / "notes").mkdir()
        (home / "runs" / f".tmp-{os.getppid()}-00000000-d").mkdir()
        (home / "runs" / f".tmp-{os.getppid()}-00000000-d" / "config.json").touch()
        assert [run.name for run in list_runs(home)] == ["b", "c", "a"]


class TestCheckpoints:
    def test_the_highest_step_that_is_complete(self, run: RunDir) -> None:
        assert run.latest_checkpoint() is None
        for step in (500, 99_999_999, 100_000_000, 20):
            with folder_atomic(run.checkpoint_path(step)):
                pass
        (run.checkpoints / ".tmp-1-00000000-step_200000000").mkdir()
        (run.checkpoints / "step_300000000.bak").mkdir()
        (run.checkpoints / "step_400000000").touch()
        latest = run.latest_checkpoint()
        assert latest is not None
        assert latest == run.checkpoint_path(100_000_000)
        assert checkpoint_step(latest) == 100_000_000
        assert run.checkpoint_path(500).name == "step_00000500"

    def test_another_name_is_an_error(self, run: RunDir) -> None:
        with pytest.raises(RunError, match="not a checkpoint"):
            checkpoint_step(run.checkpoints / "last")


class TestRequests:
    def test_a_request_waits_until_it_is_answered(self, run: RunDir) -> None:
        assert run.request("stop")
        assert run.request("save")
        assert not run.request("stop")
        assert run.pending() == ["stop", "save"]
        run.answer("stop")
        run.answer("stop")
        assert run.pending() == ["save"]
        assert run.request("stop")

    def test_pause_and_resume_take_each_other_back(self, run: RunDir) -> None:
        run.request("pause")
        run.request("resume")
        assert run.pending() == ["resume"]
        run.request("pause")
        assert run.pending() == ["pause"]

    def test_an_unknown_request(self, run: RunDir) -> None:
        with pytest.raises(RunError, match="stop, pause, resume, save, sample"):
            run.request("../config.json")


class TestAtomic:
    def test_a_file_is_old_or_new(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "new folder" / "ü.json"
        write_atomic(path, "größer\n")
        assert path.read_bytes() == "größer\n".encode()

        def refuse(_: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(disk.os, "fsync", refuse)
        with pytest.raises(OSError, match="No space"):
            write_atomic(path, b"new")
        assert path.read_bytes() == "größer\n".encode()
        assert names(path.parent) == {"ü.json"}

    @pytest.mark.skipif(sys.platform == "win32", reason="Windows does not replace a file that is being read")
    def test_a_reader_of_the_old_file_is_not_disturbed(self, tmp_path: Path) -> None:
        path = tmp_path / "a"
        write_atomic(path, "old")
        with path.open() as reader:
            write_atomic(path, "new")
            assert reader.read() == "old"
        assert path.read_text() == "new"

    def test_a_folder_appears_at_the_end(self, tmp_path: Path) -> None:
        path = tmp_path / "step"
        with folder_atomic(path) as folder:
            (folder / "a").write_text("1")
            assert not path.exists()
            assert folder.parent == tmp_path
        assert names(path) == {"a"}
        assert names(tmp_path) == {"step"}

    def test_a_failure_leaves_no_folder(self, tmp_path: Path) -> None:
        def fail() -> None:
            with folder_atomic(tmp_path / "step") as folder:
                (folder / "a").write_text("1")
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fail()
        assert names(tmp_path) == set()

    def test_a_folder_replaces_another_whole(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            with folder_atomic(tmp_path / "step") as folder:
                (folder / name).touch()
        assert names(tmp_path / "step") == {"b"}
        assert names(tmp_path) == {"step"}

    def test_a_replacement_that_cannot_move_in_leaves_the_old(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with folder_atomic(tmp_path / "step") as folder:
            (folder / "a").touch()
        rename = Path.rename

        def refuse_the_new(path: Path, target: Path) -> Path:
            if path.name.startswith(".tmp-"):
                raise PermissionError
            return rename(path, target)

        monkeypatch.setattr(Path, "rename", refuse_the_new)
        with pytest.raises(PermissionError), folder_atomic(tmp_path / "step"):
            pass
        assert names(tmp_path) == {"step"}
        assert names(tmp_path / "step") == {"a"}

    def test_remove_folder(self, tmp_path: Path) -> None:
        (tmp_path / "a" / "b").mkdir(parents=True)
        remove_folder(tmp_path / "a")
        assert names(tmp_path) == set()


class TestLeftovers:
    def test_the_dead_go_and_the_living_stay(self, run: RunDir) -> None:
        dead = [
            run.path / f".tmp-{DEAD_PID}-00000000-config.json",
            run.export / f".tmp-{DEAD_PID}-00000000-a.safetensors",
            run.samples / f".tmp-{os.getpid()}-00000000-earlier process with our id",
        ]
        living = run.export / f".tmp-{os.getppid()}-00000000-b.safetensors"
        foreign = run.export / ".tmp-notes"
        for path in (*dead, living, foreign):
            path.touch()
        (run.checkpoints / f".tmp-{DEAD_PID}-00000000-step_00000001" / "inner").mkdir(parents=True)
        with folder_atomic(run.checkpoint_path(2)):
            clean_leftovers(run)
        assert not any(path.exists() for path in dead)
        assert living.exists()
        assert foreign.exists()
        assert names(run.checkpoints) == {"step_00000002"}

    def test_a_folder_set_aside_comes_back_unless_it_was_replaced(self, run: RunDir) -> None:
        for step in (1, 2):
            old = run.checkpoints / f".old-{DEAD_PID}-00000000-step_0000000{step}"
            old.mkdir()
            (old / "old").touch()
        run.checkpoint_path(2).mkdir()
        clean_leftovers(run)
        assert names(run.checkpoints) == {"step_00000001", "step_00000002"}
        assert names(run.checkpoint_path(1)) == {"old"}
        assert names(run.checkpoint_path(2)) == set()


class TestPatience:
    """Windows refuses to move a file that a virus scanner reads."""

    @pytest.fixture
    def refusals(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Callable[[], None]]:
        monkeypatch.setattr(disk, "_ATTEMPTS", 5)
        monkeypatch.setattr(disk, "_ATTEMPT_PAUSE_S", 0)

        def refusing(times: int) -> Callable[[], None]:
            left = iter(range(times))

            def action() -> None:
                if next(left, None) is not None:
                    raise PermissionError

            return action

        return refusing

    def test_tries_again(self, refusals: Callable[[int], Callable[[], None]]) -> None:
        disk.patiently(refusals(4))

    def test_gives_up(self, refusals: Callable[[int], Callable[[], None]]) -> None:
        with pytest.raises(PermissionError):
            disk.patiently(refusals(5))
