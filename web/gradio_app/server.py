"""Serve the app: options, password, log, and the guard in front of it."""

from __future__ import annotations

import argparse
import getpass
import hmac
import logging
import logging.handlers
import os
import sys
import threading
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .context import AppContext

PORT = 7860
PASSWORD_VARIABLE = "MAPO_PASSWORD"
USER = "mapo"
MAX_UPLOAD_MB = 4096
LISTENING_UPLOAD_MB = 1024


@dataclass(frozen=True)
class Options:
    """What the command line said.

    Attributes:
        port: to serve at; None takes 7860 or the next free one.
        listen: for other machines too.
        password: needed with `listen`; None without.
        data_roots: folders that may be read.
        max_upload_bytes: of one upload.
        browser: whether to open the page.
    """

    port: int | None = None
    listen: bool = False
    password: str | None = None
    data_roots: tuple[Path, ...] = ()
    max_upload_bytes: int = MAX_UPLOAD_MB * 1024**2
    browser: bool = True


def parse(arguments: list[str]) -> Options:
    """Read the command line; ends the process with a message where it is wrong."""
    parser = argparse.ArgumentParser(
        prog="mapo ui",
        description="The trainer in your browser.",
        epilog="Example: mapo ui --listen --data-root /data/pictures",
        allow_abbrev=False,
    )
    parser.add_argument("--port", type=int, help=f"port to serve at (default: {PORT}, or the next free one)")
    parser.add_argument("--listen", action="store_true", help="let other machines in; needs a password")
    parser.add_argument(
        "--password", help=f"password for --listen, user {USER}; better in {PASSWORD_VARIABLE}, or typed when asked"
    )
    parser.add_argument(
        "--data-root",
        action="append",
        default=[],
        metavar="FOLDER",
        help="folder with pictures or models; with --listen only such folders can be read. May be repeated",
    )
    parser.add_argument("--max-upload", type=int, metavar="MB", help="largest upload (default: 4096; --listen: 1024)")
    parser.add_argument("--no-browser", action="store_true", help="do not open the page")
    known = parser.parse_args(arguments)
    roots = [Path(text).expanduser() for text in known.data_root]
    for root in roots:
        if not root.is_dir():
            parser.error(f"--data-root {root} is not a folder")
    password = known.password or os.environ.get(PASSWORD_VARIABLE)
    if known.listen and not password:
        if not sys.stdin.isatty():
            parser.error(f"--listen needs a password: --password, or the variable {PASSWORD_VARIABLE}")
        password = getpass.getpass("Password for the page: ")
    if known.listen and len(password or "") < 8:
        parser.error("the password must have 8 characters or more")
    megabytes = known.max_upload or (LISTENING_UPLOAD_MB if known.listen else MAX_UPLOAD_MB)
    return Options(
        port=known.port,
        listen=known.listen,
        password=password if known.listen or known.password else None,
        data_roots=tuple(root.resolve() for root in roots),
        max_upload_bytes=megabytes * 1024**2,
        browser=not (known.no_browser or known.listen),
    )


def main(arguments: list[str]) -> int:
    """Serve until Ctrl-C; runs and the queue go on without the page."""
    options = parse(arguments)
    context = make_context(options)
    print("Starting the page ...", flush=True)
    try:
        _, url = serve(options, context)
    except OSError as error:
        print(f"Cannot serve: {error}. Choose another --port.", file=sys.stderr)
        return 1
    print(f"MaPO trainer: {url}   (Ctrl-C ends the page; trainings go on)", flush=True)
    if options.listen:
        print(f"Other machines: this machine's address, the same port, user {USER} and the password.", flush=True)
    if options.browser:
        import webbrowser

        webbrowser.open(url)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print("\nThe page is closed. What was being trained goes on; `mapo ui` shows it again.")
    return 0


def make_context(options: Options) -> AppContext:
    """Prepare the environment that gradio reads when it is imported, the log, and the context of the pages."""
    from mapo_core.runs import mapo_home

    home = mapo_home().resolve()
    (home / "ui").mkdir(parents=True, exist_ok=True)
    os.environ["MAPO_HOME"] = str(home)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    for variable in ("NO_PROXY", "no_proxy"):  # gradio asks itself whether it is there
        os.environ[variable] = ",".join(filter(None, [os.environ.get(variable), "127.0.0.1", "localhost"]))
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["GRADIO_TEMP_DIR"] = str(home / "ui" / "cache")
    handler = logging.handlers.RotatingFileHandler(
        home / "ui" / "server.log", maxBytes=2_000_000, backupCount=2, encoding="utf-8"
    )
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    logging.getLogger("mapo").setLevel(logging.INFO)

    from .context import AppContext

    return AppContext(home=home, data_roots=options.data_roots, listen=options.listen)


def serve(options: Options, context: AppContext) -> tuple[Any, str]:
    """Start the server in threads of its own.

    Returns:
        The running app, and the address to open on this machine.

    Raises:
        OSError: the port is taken.
    """
    from starlette.middleware import Middleware

    from .app import LOOK, build_app
    from .guard import Guard

    cache = context.home / "ui" / "cache"
    for folder in (cache, *context.served):
        folder.mkdir(parents=True, exist_ok=True)
    guard = Middleware(
        Guard,
        served=context.served,
        listen=options.listen,
        max_upload_bytes=options.max_upload_bytes,
        cache=(cache,),
    )
    app = build_app(context)
    app.queue(default_concurrency_limit=8)
    app.launch(
        server_name="0.0.0.0" if options.listen else "127.0.0.1",
        server_port=options.port,
        auth=partial(_may_enter, options.password) if options.password else None,
        auth_message=f"User: {USER}",
        inbrowser=False,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        allowed_paths=[str(folder) for folder in context.served],
        max_file_size=options.max_upload_bytes,
        app_kwargs={"middleware": [guard], "docs_url": None, "redoc_url": None},
        footer_links=["api", "settings"],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        _frontend=False,  # or gradio asks itself for the page, and gives up if a busy machine needs 3 s for it
        **LOOK,
    )
    return app, f"http://127.0.0.1:{app.server_port}/"


def _may_enter(password: str, user: str, given: str) -> bool:
    name, right = (
        hmac.compare_digest(user.encode(), USER.encode()),
        hmac.compare_digest(given.encode(), password.encode()),
    )
    return name and right
