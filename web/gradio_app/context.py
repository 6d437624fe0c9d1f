"""What all pages share: where things lie, what may be read, and how errors are said."""

from __future__ import annotations

import functools
import hashlib
import html
import inspect
import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import gradio as gr

from mapo_core import ConfigError, MapoError
from mapo_core.runs import JobStoppedError, RunDir, mapo_home, write_atomic

logger = logging.getLogger("mapo.ui")

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:(//|\\\\)|(?i:file|data|javascript):")
_PATHS = 50_000  # that are held in memory at once
_ERROR_S = 20  # how long an error stays on the page


@dataclass
class AppContext:
    """The app's folders and rules, and what one page says to another.

    Attributes:
        home: folder of runs, sets and caches.
        data_roots: folders that may be read; while `listen` is off, every folder may.
        listen: whether other machines can reach the app.
        open_run: the name of the run that the pages are about; one per browser, kept when the page is loaded again.
        clone: the name of a run whose settings the Train page is to take over, and when that was asked; [] for none.
        last: what was last started from this browser: `name`, `pairs`, `model` and `settings`; {} at first.
        beta: a first beta that the Evaluate page suggests for the Train page, and when that was asked; [] for none.
        app: the page as a whole, for what happens when it is loaded.
        models: the base models that were found, None before they were looked for.
        tabs: the row of tabs; `gr.Tabs(selected="train")` as its output shows a page.
    """

    home: Path = field(default_factory=mapo_home)
    data_roots: tuple[Path, ...] = ()
    listen: bool = False
    open_run: gr.BrowserState | None = None
    clone: gr.State | None = None
    last: gr.BrowserState | None = None
    beta: gr.State | None = None
    app: gr.Blocks | None = None
    models: list[Path] | None = None
    tabs: gr.Tabs | None = None

    @property
    def log(self) -> Path:
        """The server's log; it has the traces that the page does not show."""
        return self.home / "ui" / "server.log"

    @property
    def pictures(self) -> Path:
        """Folder of the small copies of pictures that the page shows."""
        return self.home / "ui" / "pictures"

    @property
    def served(self) -> tuple[Path, ...]:
        """The folders whose files a browser may fetch by their path."""
        return (self.home / "runs", self.pictures)

    def remembered(self, name: str, default: Any) -> gr.BrowserState:
        """Something that a browser keeps, also when the app is started again; each home folder has its own."""
        # gradio's own key is a new one at every start, and what was written with the old one is lost then. The key is
        # no secret: the page has it, and only the browser's own storage is written with it.
        key = hashlib.sha256(str(self.home).encode()).hexdigest()[:16]
        return gr.BrowserState(default, storage_key=f"mapo-{name}-{key[:8]}", secret=key)

    def safe_path(self, text: str | Path) -> Path:
        """The path that a user named, with links followed.

        Raises:
            ConfigError: it is empty or an address, or it lies outside of what may be read while others can reach
                the app.
        """
        words = str(text).strip().strip('"')
        if not words or "\x00" in words:
            raise ConfigError("Give the path of a file or folder on the machine that the app runs on.")
        if _SCHEME.match(words):
            raise ConfigError(f"{words!r} is an address. Give the path of a file or folder instead.")
        path = Path(words).expanduser()
        if self.listen and not path.is_absolute():
            inside = [root / path for root in self.data_roots if (root / path).exists()]
            path = inside[0] if inside else path
        path = path.resolve()
        if self.listen and not any(path.is_relative_to(root) for root in self._readable()):
            raise ConfigError(
                f"{words} is not in a folder that this app may read. It may read: "
                f"{', '.join(map(str, self.data_roots)) or 'no folder'}. Whoever started it can add a folder with "
                "--data-root FOLDER."
            )
        return path

    def check_readable(self, paths: Iterable[Path | None]) -> None:
        """Refuse files outside of what may be read, such as a list of pairs may name; links are followed.

        Raises:
            ConfigError: names the first.
        """
        waiting = iter(paths if self.listen else ())
        while part := set(islice(waiting, _PATHS)):
            for path in part - {None}:
                self.safe_path(path)

    def check_settings(self, values: Any) -> None:
        """Refuse settings that name a file or folder outside of what may be read, wherever in them.

        Raises:
            ConfigError: names the first.
        """
        if isinstance(values, dict):
            values = list(values.values())
        if isinstance(values, list | tuple):
            for value in values:
                self.check_settings(value)
        elif isinstance(values, str | Path) and _is_a_file(values):
            self.safe_path(values)

    def picture(self, path: Path, side: int = 512) -> str:
        """A copy of a picture for the page, at most `side` pixels long; made once per file and size.

        Raises:
            ConfigError: it may not be read.
            OSError: it is not a picture, or it is gone.
        """
        from PIL import Image, ImageOps

        path = self.safe_path(path)
        stat = path.stat()
        key = f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\0{side}"
        small = self.pictures / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.webp"
        if not small.exists():
            self.pictures.mkdir(parents=True, exist_ok=True)
            with Image.open(path) as image:
                image.draft("RGB", (side, side))
                shown = ImageOps.exif_transpose(image).convert("RGB")
            shown.thumbnail((side, side))
            import io

            buffer = io.BytesIO()
            shown.save(buffer, "WEBP", quality=88, method=2, lossless=max(shown.size) <= 128)
            write_atomic(small, buffer.getvalue())
        return str(small)

    def run(self, name: str) -> RunDir:
        """The run with this name in the home folder; never anything outside of it.

        Raises:
            ConfigError: there is none.
        """
        folder = self.home / "runs"
        run = RunDir(folder / str(name))
        if not name or Path(name).name != name or not run.config.is_file() or run.path.resolve().parent != folder:
            raise ConfigError(f"There is no run {name!r}; it may have been deleted. Choose another in the list.")
        return run

    def _readable(self) -> tuple[Path, ...]:
        return (*self.data_roots, self.home)


def shown(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a callback's errors messages on the page: what a user can act on as it is, anything else as "see the log".

    Works for functions and for generators. A job that was cancelled is no error: the page stays as it is.
    """
    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def generate(*args: Any, **kwargs: Any) -> Any:
            try:
                yield from function(*args, **kwargs)
            except JobStoppedError as stopped:
                gr.Info(_text(str(stopped)))
            except Exception as error:
                raise _as_message(error, function.__name__) from None

        return generate

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except JobStoppedError as stopped:
            gr.Info(_text(str(stopped)))
            return gr.skip()
        except Exception as error:
            raise _as_message(error, function.__name__) from None

    return call


def _as_message(error: Exception, where: str) -> gr.Error:
    if isinstance(error, gr.Error):
        return error
    if isinstance(error, MapoError):
        problems = [str(problem) for problem in getattr(error, "problems", [])][:10]
        return gr.Error(_text("\n".join([str(error), *problems])), duration=_ERROR_S, print_exception=False)
    logger.error("unexpected error in %s", where, exc_info=error)
    log = mapo_home() / "ui" / "server.log"
    words = f"Something went wrong that should not have. The log has the details: {log}"
    return gr.Error(_text(words), duration=_ERROR_S, print_exception=False, title="Unexpected error")


def _text(words: str) -> str:
    """Words as the page's messages take them, which read HTML."""
    return html.escape(words, quote=False).replace("\n", "<br>")


def _is_a_file(text: str | Path) -> bool:
    words = str(text)
    if not words or len(words) > 4096 or "\n" in words or words in ("demo", "auto"):
        return False
    if _SCHEME.match(words):
        return True
    try:
        path = Path(words).expanduser()
        return path.exists() or path.is_symlink()
    except (OSError, ValueError, RuntimeError):
        return False
