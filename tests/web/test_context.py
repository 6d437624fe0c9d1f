"""What a page may read, and how errors are said."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

gr = pytest.importorskip("gradio", reason="install gradio to test the page")

from mapo_core import ConfigError, PairsError  # noqa: E402
from mapo_core.runs import JobStoppedError, create_run  # noqa: E402
from web.gradio_app.context import AppContext, shown  # noqa: E402


@pytest.fixture
def context(tmp_path: Path) -> AppContext:
    """Others can reach the app; one folder may be read."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").write_bytes(b"png")
    (tmp_path / "data two").mkdir()
    (tmp_path / "secret.txt").write_text("hands off")
    (tmp_path / "data" / "link").symlink_to(tmp_path / "secret.txt")
    (tmp_path / "data" / "up").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "home").mkdir()
    return AppContext(home=tmp_path / "home", data_roots=(tmp_path / "data",), listen=True)


def test_only_the_named_folders_are_read(context: AppContext, tmp_path: Path) -> None:
    data = tmp_path / "data"
    assert context.safe_path(f' "{data / "a.png"}" ') == data / "a.png"
    assert context.safe_path("a.png") == data / "a.png"
    assert context.safe_path(context.home / "sets") == context.home / "sets"
    for text in (
        str(tmp_path / "secret.txt"),
        str(data / ".." / "secret.txt"),
        str(data / "link"),
        str(data / "up" / "secret.txt"),
        str(tmp_path / "data two"),
        "../secret.txt",
        "~/.ssh",
        "/etc/passwd",
        f"file://{data / 'a.png'}",
        f"FILE:{data / 'a.png'}",
        "https://example.com/a.png",
        "",
        "a\x00.png",
    ):
        with pytest.raises(ConfigError):
            context.safe_path(text)


def test_on_ones_own_machine_every_folder_is_read_but_no_address(tmp_path: Path) -> None:
    own = AppContext(home=tmp_path)
    assert own.safe_path("/etc/hosts") == Path("/etc/hosts").resolve()
    with pytest.raises(ConfigError, match="is an address"):
        own.safe_path("file:///etc/hosts")


def test_settings_and_lists_of_pairs_cannot_name_other_files(context: AppContext, tmp_path: Path) -> None:
    context.check_settings({"model": {"path": "demo"}, "a": ["x/y", 1, None], "data": {"pairs": "pairs.jsonl"}})
    for wrong in (str(tmp_path / "secret.txt"), "file:///etc/passwd", str(tmp_path / "data" / "link")):
        with pytest.raises(ConfigError):
            context.check_settings({"model": {"path": "demo", "vae": wrong}})
        with pytest.raises(ConfigError):
            context.check_settings({"validation": {"prompts": [wrong]}})
    context.check_readable([tmp_path / "data" / "a.png", None])
    with pytest.raises(ConfigError):
        context.check_readable([tmp_path / "data" / "a.png", tmp_path / "data" / "link"])


def test_runs_are_found_by_name_alone(context: AppContext, tmp_path: Path) -> None:
    run = create_run("ink", "{}", "", context.home)
    assert context.run("ink").path == run.path
    outside = create_run("other", "{}", "", tmp_path / "elsewhere")
    (context.home / "runs" / "linked").symlink_to(outside.path, target_is_directory=True)
    for name in ("", "..", "../runs/ink", str(run.path), "linked", "missing"):
        with pytest.raises(ConfigError, match="no run"):
            context.run(name)


def test_pictures_are_shown_as_small_copies(context: AppContext, tmp_path: Path) -> None:
    from PIL import Image

    large = tmp_path / "data" / "large.png"
    Image.new("RGB", (2000, 1000), (200, 30, 30)).save(large)
    with Image.open(context.picture(large, 256)) as small:
        assert small.size == (256, 128)
        red = small.convert("RGB").getpixel((5, 5))
    assert red[0] > 180
    assert red[1] < 60
    (tmp_path / "data" / "linked.png").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(ConfigError):
        context.picture(tmp_path / "data" / "linked.png")


def test_errors_say_what_to_do_and_never_show_a_trace(caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    @shown
    def known() -> None:
        raise PairsError("Two <b>faults</b>.", problems=["one", "two"])

    @shown
    def unknown() -> None:
        raise KeyError("/home/somebody/secret")

    @shown
    def steps() -> Any:
        yield 1
        raise RuntimeError("half way")

    with pytest.raises(gr.Error) as said:
        known()
    assert said.value.message == "Two &lt;b&gt;faults&lt;/b&gt;.<br>one<br>two"
    assert caplog.records == []
    with caplog.at_level(logging.ERROR), pytest.raises(gr.Error, match=r"server\.log") as said:
        unknown()
    assert "secret" not in said.value.message
    assert "KeyError" in caplog.text
    running = steps()
    assert next(running) == 1
    with pytest.raises(gr.Error, match=r"server\.log"):
        next(running)


def test_a_cancelled_job_leaves_the_page_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(gr, "Info", told.append)

    @shown
    def cancelled() -> None:
        raise JobStoppedError("Stopped: compare.")

    assert cancelled() == gr.skip()
    assert told == ["Stopped: compare."]
