"""A run is a folder: where everything in it lies, how it is made, found and asked for something."""

from __future__ import annotations

import difflib
import os
import re
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from ..errors import RunError
from .disk import (
    fault_point,
    folder_atomic,
    is_leftover,
    patiently,
    remove_folder,
    remove_leftovers,
    sync_folder,
    temp_folder,
    write_atomic,
)

__all__ = [
    "VERBS",
    "RunDir",
    "Verb",
    "checkpoint_step",
    "clean_leftovers",
    "create_run",
    "fault_point",
    "folder_atomic",
    "list_runs",
    "mapo_home",
    "open_run",
    "remove_folder",
    "write_atomic",
]

Verb = Literal["stop", "pause", "resume", "save", "sample"]
VERBS: tuple[Verb, ...] = get_args(Verb)

_OPPOSITE = {"pause": "resume", "resume": "pause"}
_CHECKPOINT_NAME = re.compile(r"step_(\d{8,})")


@dataclass(frozen=True)
class RunDir:
    """A run's folder; the properties only name the places in it."""

    path: Path

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.path.name

    @property
    def config(self) -> Path:
        """The TrainConfig as trained, JSON."""
        return self.path / "config.json"

    @property
    def pairs(self) -> Path:
        """The pairs as trained, JSONL."""
        return self.path / "pairs.jsonl"

    @property
    def events(self) -> Path:
        """What happened, JSONL; the trainer alone writes it."""
        return self.path / "events.jsonl"

    @property
    def log(self) -> Path:
        """Everything the training processes printed."""
        return self.path / "train.log"

    @property
    def lock(self) -> Path:
        """Locked by the living trainer; its content means nothing."""
        return self.path / "lock"

    @property
    def requests(self) -> Path:
        """Folder of the unanswered requests."""
        return self.path / "requests"

    @property
    def checkpoints(self) -> Path:
        """Folder of the states from which the run can go on."""
        return self.path / "checkpoints"

    @property
    def start_lora(self) -> Path:
        """The run's own copy of the LoRA that it continues from."""
        return self.path / "start.safetensors"

    @property
    def samples(self) -> Path:
        """Folder of the validation pictures."""
        return self.path / "samples"

    @property
    def export(self) -> Path:
        """Folder of the LoRA files."""
        return self.path / "export"

    @property
    def memory(self) -> Path:
        """How the run saves memory, and what was measured, JSON."""
        return self.path / "memory.json"

    @property
    def tracking(self) -> Path:
        """Folder of TensorBoard's and wandb's own files, where a run has such trackers."""
        return self.path / "tracking"

    @property
    def evaluation(self) -> Path:
        """Folder of the measures taken after training, one folder per step."""
        return self.path / "evaluation"

    def checkpoint_path(self, step: int) -> Path:
        """Where the state after `step` optimizer steps lies, or would lie."""
        return self.checkpoints / f"step_{step:08d}"

    def list_checkpoints(self) -> list[Path]:
        """The complete checkpoints, lowest step first."""
        if not self.checkpoints.is_dir():
            return []
        found = [p for p in self.checkpoints.iterdir() if _CHECKPOINT_NAME.fullmatch(p.name) and p.is_dir()]
        return sorted(found, key=checkpoint_step)

    def latest_checkpoint(self) -> Path | None:
        """The complete checkpoint with the highest step."""
        return next(reversed(self.list_checkpoints()), None)

    def request(self, verb: str) -> bool:
        """Ask the trainer for something.

        The request is an empty file, so it is there at once and whole. "pause" and "resume" take each other back.

        Returns:
            False if the same request is already waiting for its answer.

        Raises:
            RunError: there is no such request, or the folder cannot be written.
        """
        place = self._request_path(verb)
        try:
            place.parent.mkdir(exist_ok=True)
            if verb in _OPPOSITE:
                self.answer(_OPPOSITE[verb])
            patiently(lambda: place.open("x").close())
        except FileExistsError:
            return False
        except OSError as error:
            raise RunError(
                f"Cannot ask run {self.name} to {verb}: {error}. Check that {self.requests} is writable."
            ) from error
        return True

    def is_pending(self, verb: str) -> bool:
        """Whether a request waits for its answer."""
        return self._request_path(verb).exists()

    def pending(self) -> list[str]:
        """The requests that wait for their answer."""
        return [verb for verb in VERBS if self.is_pending(verb)]

    def answer(self, verb: str) -> None:
        """Delete a request; the trainer does so after the event that answers it. It need not be there."""
        place = self._request_path(verb)
        fault_point(f"requests/{verb}:answering")
        patiently(lambda: place.unlink(missing_ok=True))
        fault_point(f"requests/{verb}:answered")

    def _request_path(self, verb: str) -> Path:
        if verb not in VERBS:
            raise RunError(f"A run cannot be asked to {verb!r}; it can be asked to {', '.join(VERBS)}.")
        return self.requests / verb


def mapo_home() -> Path:
    """The folder of the runs and caches: `MAPO_HOME`, or else `mapo` in the platform's user data folder."""
    if home := os.environ.get("MAPO_HOME"):
        return Path(home).expanduser().absolute()
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else Path.home() / "AppData" / "Local") / "mapo"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "mapo"
    # The XDG specification tells programs to ignore a relative path here.
    data = Path(os.environ.get("XDG_DATA_HOME", ""))
    return (data if data.is_absolute() else Path.home() / ".local" / "share") / "mapo"


def create_run(
    name: str, config_json: str, pairs_jsonl: str | Path | Iterable[str], home: Path | None = None
) -> RunDir:
    """Make a run folder; it appears complete or not at all, and never replaces another.

    Args:
        name: the run's name; if it is taken, the run becomes `<name>-2`, `<name>-3`, ...
        config_json: content of config.json.
        pairs_jsonl: content of pairs.jsonl, or its lines one after the other, or as a Path the file to copy.
        home: where the `runs` folder lies; None is `mapo_home()`.

    Raises:
        RunError: the name cannot be a folder's, or the disk refuses.
    """
    if not name or name.startswith(".") or Path(name).name != name:
        raise RunError(f"{name!r} cannot be the name of a run: choose one without slashes and without a leading dot.")
    runs = _runs_folder(home)
    try:
        runs.mkdir(parents=True, exist_ok=True)
        remove_leftovers(runs)
        with temp_folder(runs, name) as temp:
            fault_point("run:opened")
            draft = RunDir(temp)
            for folder in (draft.requests, draft.checkpoints, draft.samples, draft.export):
                folder.mkdir()
            write_atomic(draft.config, config_json)
            if isinstance(pairs_jsonl, str):
                write_atomic(draft.pairs, pairs_jsonl)
            else:
                _write_pairs(draft.pairs, pairs_jsonl)
            sync_folder(temp)
            fault_point("run:synced")
            run = RunDir(_move_to_free_name(temp, runs / name))
        fault_point("run:created")
        sync_folder(runs)
    except OSError as error:
        raise RunError(f"Cannot create run {name} in {runs}: {error}. Check its disk, or set MAPO_HOME.") from error
    return run


def _write_pairs(path: Path, content: Path | Iterable[str]) -> None:
    """A file as large as it may be, into a folder that nobody sees before it is complete."""
    with path.open("wb") as file:
        if isinstance(content, Path):
            with content.open("rb") as source:
                shutil.copyfileobj(source, file)
        else:
            file.writelines(line.encode() for line in content)
        fault_point("pairs.jsonl:written")
        file.flush()
        os.fsync(file.fileno())


def _move_to_free_name(temp: Path, wanted: Path) -> Path:
    """Claim the first free of `wanted`, `wanted-2`, ...: renaming a filled folder never replaces another one."""
    target, number = wanted, 1
    while True:
        if not os.path.lexists(target):
            try:
                patiently(lambda target=target: temp.rename(target))
                return target
            except OSError:
                if not os.path.lexists(target):
                    raise
        number += 1
        target = wanted.with_name(f"{wanted.name}-{number}")


def open_run(name_or_path: str | Path, home: Path | None = None) -> RunDir:
    """Find a run by its name, or by its folder.

    Raises:
        RunError: there is none; the message names those that exist, the closest first.
    """
    runs = _runs_folder(home)
    text = str(name_or_path)
    for path in (runs / text, Path(text).absolute()):
        run = RunDir(path)
        if text and run.config.is_file() and not is_leftover(path):
            return run
    names = [run.name for run in list_runs(home)]
    close = difflib.get_close_matches(Path(text).name, names, n=3)
    listed = ", ".join((close + [name for name in names if name not in close])[:10])
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    hint = f"There are: {listed}{more}." if names else "There are no runs yet: start one with `mapo train`."
    raise RunError(f"There is no run {text!r} in {runs}. {hint}")


def list_runs(home: Path | None = None) -> list[RunDir]:
    """The runs, newest first."""
    runs = _runs_folder(home)
    if not runs.is_dir():
        return []
    found = [RunDir(path) for path in runs.iterdir() if not is_leftover(path)]
    dated = [(run.config.stat().st_mtime_ns, run.name, run) for run in found if run.config.is_file()]
    return [run for *_, run in sorted(dated, key=lambda entry: entry[:2], reverse=True)]


def clean_leftovers(run: RunDir) -> None:
    """Remove what a killed process left unfinished anywhere in the run; the trainer does so first when it resumes.

    Call it before `latest_checkpoint`: a checkpoint that was set aside for its replacement is put back.
    """
    for folder, _, _ in os.walk(run.path):
        remove_leftovers(Path(folder))


def checkpoint_step(path: Path) -> int:
    """The step of a checkpoint folder, from its name.

    Raises:
        RunError: it is not named like one.
    """
    match = _CHECKPOINT_NAME.fullmatch(path.name)
    if match is None:
        raise RunError(f"{path} is not a checkpoint: its name must be step_ and at least 8 digits.")
    return int(match[1])


def _runs_folder(home: Path | None) -> Path:
    return (mapo_home() if home is None else home).absolute() / "runs"
