"""Which process is it: an id alone does not tell, because systems give ids out again."""

from __future__ import annotations

import calendar
import os
import subprocess
import sys
import time
from pathlib import Path


def process_start_time(pid: int) -> float | None:
    """When a process started, in seconds, or None if none with that id runs; a zombie does not run.

    Only good for comparison on the same machine: it counts from the machine's start on Linux and from a fixed date
    elsewhere. It never changes while the process runs, also when the clock is set.
    """
    if pid <= 0:
        return None
    if sys.platform == "win32":
        return _windows_start_time(pid)
    if sys.platform == "linux":
        return _linux_start_time(pid)
    return _posix_start_time(pid)


def is_same_process(pid: int, pid_started: float | None) -> bool:
    """Whether the process that had this id and start time still runs."""
    return pid_started is not None and process_start_time(pid) == pid_started


if sys.platform == "win32":

    def _windows_start_time(pid: int) -> float | None:
        import ctypes
        from ctypes import wintypes

        kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)
        kernel32.OpenProcess.restype = wintypes.HANDLE
        synchronize, query_limited_information, wait_timeout = 0x100000, 0x1000, 0x102
        opened = kernel32.OpenProcess(synchronize | query_limited_information, False, pid)
        if not opened:
            return None
        handle = wintypes.HANDLE(opened)
        try:
            # An ended process can still be opened while somebody holds a handle to it.
            if kernel32.WaitForSingleObject(handle, 0) != wait_timeout:
                return None
            created, exited, kernel, user = (wintypes.FILETIME() for _ in range(4))
            times = [ctypes.byref(t) for t in (created, exited, kernel, user)]
            if not kernel32.GetProcessTimes(handle, *times):
                return None
            return ((created.dwHighDateTime << 32) | created.dwLowDateTime) / 1e7
        finally:
            kernel32.CloseHandle(handle)

else:

    def _linux_start_time(pid: int) -> float | None:
        try:
            stat = Path(f"/proc/{pid}/stat").read_bytes()
        except OSError:
            return None
        # The second field is the program's name in parentheses, which may hold spaces and parentheses.
        fields = stat.rpartition(b")")[2].split()
        state, start_ticks = fields[0], int(fields[19])
        return None if state in (b"Z", b"X") else start_ticks / os.sysconf("SC_CLK_TCK")

    def _posix_start_time(pid: int) -> float | None:
        environment = {**os.environ, "LC_ALL": "C", "TZ": "UTC"}
        command = ["ps", "-o", "stat=", "-o", "lstart=", "-p", str(pid)]
        answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout
        state, _, started = answer.strip().partition(" ")
        if not started or state.startswith("Z"):
            return None
        return float(calendar.timegm(time.strptime(started.strip(), "%a %b %d %H:%M:%S %Y")))
