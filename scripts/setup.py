"""Sets up .venv beside the `mapo` script: the right torch, the requirements, gradio for `ui`, test tools for `dev`.

Run by `mapo` and `mapo.bat` before everything else, with any Python 3.11-3.13 and the standard library alone. When
nothing changed it only compares a fingerprint. Every step looks at what is there and does the rest, so that a set-up
that was interrupted is completed by the next start.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):  # noqa: UP036  a .venv of the user's own may hold any Python
    sys.exit(
        f"mapo needs Python 3.11, 3.12 or 3.13, and .venv holds {sys.version.split()[0]}: delete .venv, run again."
    )

import contextlib
import hashlib
import os
import shlex
import shutil
import subprocess
import time
import tomllib
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

LEVELS = ("run", "ui", "dev")  # each includes those before it
GPU_TRACES = ("/dev/nvidia0", "/proc/driver/nvidia")


class SetupError(Exception):
    """A step of the set-up failed; the message ends with what to do."""


def main(arguments: list[str]) -> int:
    """Set up for one of LEVELS."""
    level = arguments[0] if arguments else "run"
    if level not in LEVELS:
        print(f"setup.py takes one of {', '.join(LEVELS)}, not {level!r}", file=sys.stderr)
        return 2
    root = Path(__file__).resolve().parent.parent
    try:
        set_up(root, level)
    except SetupError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"\nSet-up failed: {error}. Is {root} writable, and is there space on the disk?", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nSet-up interrupted; the next start completes it.", file=sys.stderr)
        return 130
    return 0


def set_up(root: Path, level: str) -> None:
    """Bring `root/.venv` up to the requirements of a level, if it is not there yet.

    Raises:
        SetupError: a step failed; what was done stays, and the next call goes on from there.
    """
    venv = root / ".venv"
    if is_done(root, level):
        return
    with contextlib.suppress(FileExistsError):
        venv.mkdir()
    with locked(venv / "setup.lock") as lock, (venv / "setup.log").open("a", encoding="utf-8") as log:
        if is_done(root, level):  # by the set-up that we waited for
            return
        print(f"Setting up {venv} (a few minutes; log: {venv / 'setup.log'})", flush=True)
        # The steps inherit the lock: when this process is killed, a pip that goes on still holds it.
        os.set_inheritable(lock.fileno(), True)
        install(root, level, log)
        mark_done(root, level)


def install(root: Path, level: str, log: IO[str]) -> None:
    """The steps, each of which leaves alone what is there already."""
    venv = root / ".venv"
    python = venv_python(venv)
    if not works(python):
        drop_dead_links(python.parent)
        run_step("virtual environment", [sys.executable, "-m", "venv", "--without-pip", str(venv)], log)
    if not works(python, "-m", "pip", "--version"):
        run_step("pip", [str(python), "-m", "ensurepip", "--default-pip"], log, advice=ensurepip_advice())
    drop_half_installed(venv)

    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    if installed_torch(python) is None:
        pinned = (root / "scripts" / "torch-version").read_text(encoding="utf-8").strip()
        choice = torch_arguments(sys.platform, has_nvidia_gpu(), os.environ.get("MAPO_TORCH", ""), pinned)
        if sys.platform == "win32" and choice == ["torch"] and has_nvidia_gpu():
            print("PyPI's torch for Windows runs on the CPU only: see MAPO_TORCH in README.md to use the NVIDIA GPU.")
        run_step(" ".join(choice), [*pip, *choice], log)
    torch_version = installed_torch(python)
    if torch_version is None:
        raise SetupError("MAPO_TORCH did not install torch: give the arguments of `pip install` (README.md).")
    keep_torch = venv / "keep-torch.txt"
    keep_torch.write_text(f"torch=={torch_version}\n", encoding="utf-8")
    packages = requirements(root, level)
    run_step(f"{len(packages)} packages and what they need", [*pip, "-c", str(keep_torch), *packages], log)


def torch_arguments(platform: str, nvidia_gpu: bool, override: str, pinned: str) -> list[str]:
    """What to tell `pip install` for torch.

    Args:
        platform: as in `sys.platform`.
        nvidia_gpu: whether the machine has one.
        override: MAPO_TORCH; wins over everything where it is not blank.
        pinned: the version of `scripts/torch-version`.
    """
    if override.strip():
        if platform == "win32":  # keeps the backslashes of paths
            return [word.strip('"') for word in shlex.split(override, posix=False)]
        return shlex.split(override)
    if platform == "linux" and not nvidia_gpu:
        return [f"torch=={pinned}"]
    return ["torch"]


def has_nvidia_gpu() -> bool:
    """Whether there are traces of an NVIDIA driver."""
    return shutil.which("nvidia-smi") is not None or any(Path(trace).exists() for trace in GPU_TRACES)


def requirements(root: Path, level: str) -> list[str]:
    """The packages of a level: requirements.txt, and for the others the extras in pyproject.toml."""
    lines = (root / "requirements.txt").read_text(encoding="utf-8").splitlines()
    packages = [line.split("#")[0].strip() for line in lines]
    if level != "run":
        project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        for extra in LEVELS[1 : LEVELS.index(level) + 1]:
            packages += project["optional-dependencies"][extra]
    return [package for package in packages if package]


def fingerprint(root: Path, level: str) -> str:
    """Changes when another set-up is needed."""
    parts = [sys.version.split()[0].rpartition(".")[0], *requirements(root, level)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def is_done(root: Path, level: str) -> bool:
    """Whether a set-up of this level ended well and nothing changed since."""
    try:
        mark = (root / ".venv" / f"setup-{level}").read_text(encoding="utf-8")
    except OSError:
        return False
    return mark == fingerprint(root, level) and venv_python(root / ".venv").exists()


def mark_done(root: Path, level: str) -> None:
    """Remember a set-up that ended well, and with it those that it includes."""
    for done in LEVELS[: LEVELS.index(level) + 1]:
        mark = root / ".venv" / f"setup-{done}"
        temporary = mark.with_suffix(".tmp")
        temporary.write_text(fingerprint(root, done), encoding="utf-8")
        temporary.replace(mark)


def venv_python(venv: Path) -> Path:
    """The interpreter of a virtual environment."""
    return venv / "Scripts" / "python.exe" if os.name == "nt" else venv / "bin" / "python"


def works(python: Path, *arguments: str) -> bool:
    """Whether the interpreter starts and a command of it succeeds."""
    try:
        return _ask(python, *(arguments or ("-c", ""))).returncode == 0
    except OSError:
        return False


def installed_torch(python: Path) -> str | None:
    """The version of the torch that this interpreter sees, None without one."""
    result = _ask(python, "-c", "from importlib.metadata import version; print(version('torch'))")
    return result.stdout.strip() if result.returncode == 0 else None


def _ask(python: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(python), "-I", *arguments], capture_output=True, text=True, check=False)


def drop_dead_links(folder: Path) -> None:
    """Remove interpreter links whose target is gone (the system's Python was replaced): venv would keep them."""
    for link in folder.glob("python*"):
        if link.is_symlink() and not link.exists():
            link.unlink()


def drop_half_installed(venv: Path) -> None:
    """Remove the metadata of packages whose installation was interrupted, so that pip installs them again.

    pip takes a package with metadata for installed; INSTALLER is what it writes after all of the package's files.
    """
    for metadata in (*venv.glob("lib/python*/site-packages/*.dist-info"), *venv.glob("Lib/site-packages/*.dist-info")):
        if not (metadata / "INSTALLER").exists():
            shutil.rmtree(metadata)


def ensurepip_advice() -> str:
    """What to do where Python comes without pip, as Debian splits it."""
    package = f"python3.{sys.version_info.minor}-venv"
    return f"On Debian and Ubuntu pip comes in a package of its own: 'sudo apt install {package}', then run this again."


def run_step(name: str, command: list[str], log: IO[str], advice: str = "") -> None:
    """Run a command into the log, with one line on the terminal: a live one where a person watches.

    Raises:
        SetupError: it failed; holds its last lines.
    """
    log.write(f"\n{time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(command)}\n")
    log.flush()
    live = sys.stdout.isatty()
    if not live:
        print(f"  {name} ... ", end="", flush=True)
    start = time.monotonic()
    last_lines: list[str] = []
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        close_fds=False,  # the lock goes along
    )
    try:
        for line in process.stdout or ():
            log.write(line)
            log.flush()
            last_lines = [*last_lines[-14:], line.rstrip()]
            if live:
                show(f"  {name}: {time.monotonic() - start:.0f} s  {line.strip()}")
        returncode = process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    took = f"{time.monotonic() - start:.0f} s"
    if returncode != 0:
        advice = advice or "Check the network and the free disk space, then run this again: it goes on from here."
        raise SetupError("\n".join([*last_lines, f"Set-up failed at: {name}.", f"Whole log: {log.name}", advice]))
    if live:
        show(f"  {name}: {took}")
    print("" if live else took, flush=True)


def show(text: str) -> None:
    """Write over the terminal's current line."""
    width = shutil.get_terminal_size().columns - 1
    text = text.encode("ascii", "replace").decode()[:width]
    print(f"\r{text:<{width}}", end="", flush=True)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[IO[str]]:
    """Hold a lock file, waiting for another holder; the system frees it when the process ends, however it ends."""
    with path.open("a", encoding="utf-8") as handle:  # "w" would truncate what another may hold
        if not try_lock(handle):
            print("Another set-up is at work; waiting for it.", flush=True)
            while not try_lock(handle):
                time.sleep(0.5)
        yield handle


def try_lock(handle: IO[str]) -> bool:
    """Take the lock if it is free."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):  # Windows code pages lack most of the letters that a path may have
        stream.reconfigure(errors="replace")
    sys.exit(main(sys.argv[1:]))
