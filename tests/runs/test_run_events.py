"""Events: what is written, what still counts, and the status that follows from them."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from mapo_core.runs import (
    EVENT_TYPES,
    EventTail,
    EventWriter,
    RunDir,
    events,
    process_start_time,
    read_events,
    reader,
    run_status,
)


def lines(run: RunDir) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.events.read_text().splitlines()]


def history(run: RunDir, *told: tuple[str, int] | tuple[str, int, dict[str, Any]]) -> list[tuple[str, int]]:
    with EventWriter(run) as writer:
        for kind, step, *fields in told:
            writer.emit(kind, step, **(fields[0] if fields else {}))  # pyright: ignore[reportArgumentType]
    return [(event["type"], event["step"]) for event in read_events(run.events)]


class TestWriter:
    def test_one_line_per_event(self, run: RunDir) -> None:
        with EventWriter(run) as writer:
            returned = writer.emit("step", 3, loss=0.5, prompt="größer\n\u2028")
        assert lines(run) == [returned]
        assert returned["v"] == 1
        assert returned["time"] > 1e9
        assert {**returned, "v": 0, "time": 0} == {
            "v": 0,
            "time": 0,
            "type": "step",
            "step": 3,
            "loss": 0.5,
            "prompt": "größer\n\u2028",
        }

    def test_a_start_tells_its_process(self, run: RunDir) -> None:
        with EventWriter(run) as writer:
            started = writer.emit("run_started", 0)
        assert started["pid"] == os.getpid()
        assert started["pid_started"] == process_start_time(os.getpid())
        assert lines(run)[0]["pid_started"] == process_start_time(os.getpid())

    def test_not_finite_is_null_and_says_so(self, run: RunDir) -> None:
        with EventWriter(run) as writer:
            writer.emit("step", 1, loss=float("nan"), margins=[1.0, float("-inf")], inner={"x": (float("inf"), 2)})
            writer.emit("step", 2, loss=1.0)
        bad, good = lines(run)
        assert (bad["loss"], bad["margins"], bad["inner"]) == (None, [1.0, None], {"x": [None, 2]})
        assert bad["nonfinite"] is True
        assert "nonfinite" not in good

    def test_refuses_what_is_no_event(self, run: RunDir) -> None:
        with EventWriter(run) as writer:
            with pytest.raises(ValueError, match="run_finished"):
                writer.emit("finished")  # pyright: ignore[reportArgumentType]
            with pytest.raises(ValueError, match="time"):
                writer.emit("step", 1, time=3)
            with pytest.raises(TypeError):
                writer.emit("step", 1, tensor=object())
        with pytest.raises(ValueError, match="closed"):
            writer.emit("step", 1)
        assert run.events.read_bytes() == b""

    def test_the_types_are_the_design_s(self) -> None:
        assert " ".join(EVENT_TYPES) == (
            "run_started run_resumed phase step evaluated sample_saved checkpoint_saved rolled_back memory_step_down "
            "paused warning run_finished run_stopped run_failed"
        )

    @pytest.mark.parametrize("length", [1, 5, 64 * 1024 - 1, 64 * 1024, 200_000])
    def test_opening_removes_a_partial_line(self, run: RunDir, length: int) -> None:
        whole = b'{"v":1,"time":1,"type":"phase","step":1}\n' * 3
        run.events.write_bytes(whole + b"x" * length)
        with EventWriter(run) as writer:
            writer.emit("step", 1)
        assert run.events.read_bytes().startswith(whole + b'{"v": 1')
        assert len(lines(run)) == 4

    def test_opening_removes_a_partial_first_line(self, run: RunDir) -> None:
        run.events.write_bytes(b'{"v":1,"ti')
        EventWriter(run).close()
        assert run.events.read_bytes() == b""

    def test_a_full_disk_leaves_whole_lines(self, run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
        write = os.write

        def fill_up(file: int, data: bytes) -> int:
            if len(data) > 10:
                return write(file, data[:10])
            raise OSError(28, "No space left on device")

        with EventWriter(run) as writer:
            first = writer.emit("step", 1)
            with monkeypatch.context() as full:
                full.setattr(events.os, "write", fill_up)
                with pytest.raises(OSError, match="No space"):
                    writer.emit("step", 2)
            third = writer.emit("step", 3)
        assert lines(run) == [first, third]

    def test_threads_do_not_mix_their_lines(self, run: RunDir) -> None:
        with EventWriter(run) as writer:
            threads = [
                threading.Thread(target=lambda n=n: [writer.emit("step", n, text="x" * 500) for _ in range(50)])
                for n in range(4)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        written = lines(run)
        assert len(written) == 200
        assert [event["time"] for event in written] == sorted(event["time"] for event in written)


class TestReading:
    def test_ignores_what_cannot_be_read(self, run: RunDir) -> None:
        good = '{"v":1,"time":1.5,"type":"step","step":1}'
        run.events.write_text(f'{good}\n{{"v":1,"ti\n[1]\nnull\n{{"type":"step"}}\n\x00\x00\n{good}\n{good}')
        assert read_events(run.events) == [json.loads(good)] * 2
        assert read_events(run.path / "no such file") == []

    def test_a_tail_gives_each_line_once_and_whole(self, tmp_path: Path) -> None:
        path = tmp_path / "events.jsonl"
        tail = EventTail(path)
        assert tail.poll() == []
        line = b'{"v":1,"time":1,"type":"step","step":%d}\n'
        path.write_bytes(line % 1 + (line % 2)[:20])
        assert [event["step"] for event in tail.poll()] == [1]
        assert tail.poll() == []
        with path.open("ab") as file:
            file.write((line % 2)[20:] + line % 3 + b'{"v"')
        assert [event["step"] for event in tail.poll()] == [2, 3]
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - 4)
        with path.open("ab") as file:
            file.write(line % 4)
        assert [event["step"] for event in tail.poll()] == [4]

    def test_a_resume_undoes_the_steps_above_it(self, run: RunDir) -> None:
        assert history(
            run,
            ("run_started", 0),
            ("step", 1),
            ("step", 2),
            ("checkpoint_saved", 2),
            ("step", 3),
            ("evaluated", 3),
            ("sample_saved", 3),
            ("warning", 3),
            ("memory_step_down", 3),
            ("checkpoint_saved", 3),
            ("run_resumed", 2),
            ("step", 3),
        ) == [
            ("run_started", 0),
            ("step", 1),
            ("step", 2),
            ("checkpoint_saved", 2),
            ("memory_step_down", 3),
            ("run_resumed", 2),
            ("step", 3),
        ]

    def test_a_rollback_and_a_start_from_zero_do_too(self, run: RunDir) -> None:
        told = [("run_started", 0), ("step", 1), ("step", 2), ("rolled_back", 1), ("step", 2)]
        expected = [("run_started", 0), ("step", 1), ("rolled_back", 1), ("step", 2)]
        assert history(run, *told) == expected
        assert history(run, ("run_started", 0)) == [("run_started", 0), ("rolled_back", 1), ("run_started", 0)]


class TestStatus:
    @pytest.mark.parametrize(
        ("told", "state", "message"),
        [
            ([("run_started", 0)], "running", ""),
            ([("run_started", 0), ("phase", 0, {"phase": "encoding"})], "running", "encoding"),
            ([("run_started", 0), ("step", 1), ("paused", 1)], "paused", ""),
            ([("run_started", 0), ("paused", 0), ("phase", 0, {"phase": "training"})], "running", "training"),
            ([("run_started", 0), ("paused", 0), ("warning", 0), ("step", 1)], "running", ""),
            ([("run_started", 0), ("phase", 0, {"phase": "stopping"}), ("step", 1)], "stopping", "stopping"),
            (
                [("run_started", 0), ("phase", 0, {"phase": "stopping"}), ("phase", 1, {"phase": "saving"})],
                "stopping",
                "saving",
            ),
            ([("run_started", 0), ("run_failed", 0, {"message": "no memory"})], "failed", "no memory"),
            ([("run_started", 0), ("phase", 0, {"phase": "stopping"}), ("run_stopped", 0)], "stopped", ""),
            ([("run_started", 0), ("run_finished", 9), ("run_resumed", 9)], "running", ""),
            ([("run_started", 0), ("run_finished", 9)], "finished", ""),
        ],
    )
    def test_the_state(self, run: RunDir, told: list[Any], state: str, message: str) -> None:
        history(run, *told)
        status = run_status(run)
        assert (status.state, status.message, status.alive) == (state, message, True)

    def test_before_anything(self, run: RunDir) -> None:
        status = run_status(run)
        assert (status.state, status.step, status.steps, status.pid, status.alive) == ("created", 0, None, None, False)
        assert status.last_event_time is None

    def test_the_numbers(self, run: RunDir) -> None:
        history(
            run,
            ("run_started", 0, {"steps": 50}),
            ("step", 1, {"loss": 0.5}),
            ("step", 2, {"loss": 0.25, "margin": 1.0}),
            ("evaluated", 2, {"accuracy": 1.0}),
        )
        status = run_status(run)
        assert (status.step, status.steps, status.metrics) == (2, 50, {"loss": 0.25, "margin": 1.0})
        assert status.last_event_time == read_events(run.events)[-1]["time"]
        history(run, ("rolled_back", 1))
        assert run_status(run).step == 1
        assert run_status(run).metrics == {"loss": 0.5}
        history(run, ("run_resumed", 0))
        assert run_status(run).step == 0

    def test_another_process_with_the_same_id_is_not_ours(self, run: RunDir) -> None:
        history(run, ("run_started", 0, {"pid_started": 1.25}), ("step", 7))
        status = run_status(run)
        assert (status.state, status.alive, status.pid) == ("interrupted", False, os.getpid())
        assert "step 7" in status.message

    def test_last_words_are_heard(self, run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
        """The process ends between our look at its events and our look at it."""
        history(run, ("run_started", 0))

        def end(*_: object) -> bool:
            history(run, ("run_finished", 5))
            return False

        monkeypatch.setattr(reader, "is_same_process", end)
        assert run_status(run).state == "finished"
