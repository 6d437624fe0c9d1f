"""Runs: their folders, events and processes. Standard library only."""

from __future__ import annotations

from .child import RequestWatcher, acquire_run_lock, is_locked, watch_parent
from .disk import (
    fault_point,
    faults_armed,
    folder_atomic,
    remove_folder,
    remove_leftovers,
    write_atomic,
)
from .events import (
    EVENT_TYPES,
    Event,
    EventTail,
    EventType,
    EventWriter,
    drop_superseded,
    nulls_for_nonfinite,
    read_events,
)
from .history import CURVES, History, best_step, margin_of, remember_request, request_key, run_history, runs_of_request
from .job import JobStoppedError, run_job
from .launch import Lifetime, RunHandle, attach, start_run, stop_run
from .process import is_same_process, process_start_time
from .queue import (
    QueueEntry,
    add_to_queue,
    end_run,
    ensure_queue_runner,
    move_in_queue,
    queue_entries,
    queue_state,
    remove_from_queue,
    run_queue,
)
from .reader import MAX_POINTS, Curves, RunReader, reader_of, run_status
from .run_dir import (
    VERBS,
    RunDir,
    Verb,
    checkpoint_step,
    clean_leftovers,
    create_run,
    list_runs,
    mapo_home,
    open_run,
)
from .status import RunStatus, State

__all__ = [
    "CURVES",
    "EVENT_TYPES",
    "MAX_POINTS",
    "VERBS",
    "Curves",
    "Event",
    "EventTail",
    "EventType",
    "EventWriter",
    "History",
    "JobStoppedError",
    "Lifetime",
    "QueueEntry",
    "RequestWatcher",
    "RunDir",
    "RunHandle",
    "RunReader",
    "RunStatus",
    "State",
    "Verb",
    "acquire_run_lock",
    "add_to_queue",
    "attach",
    "best_step",
    "checkpoint_step",
    "clean_leftovers",
    "create_run",
    "drop_superseded",
    "end_run",
    "ensure_queue_runner",
    "fault_point",
    "faults_armed",
    "folder_atomic",
    "is_locked",
    "is_same_process",
    "list_runs",
    "mapo_home",
    "margin_of",
    "move_in_queue",
    "nulls_for_nonfinite",
    "open_run",
    "process_start_time",
    "queue_entries",
    "queue_state",
    "read_events",
    "reader_of",
    "remember_request",
    "remove_folder",
    "remove_from_queue",
    "remove_leftovers",
    "request_key",
    "run_history",
    "run_job",
    "run_queue",
    "run_status",
    "runs_of_request",
    "start_run",
    "stop_run",
    "watch_parent",
    "write_atomic",
]
