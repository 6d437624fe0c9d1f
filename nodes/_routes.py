"""HTTP routes under /mapo/: what the page shows of the runs, and what it may ask of them.

Importing this registers them, because ComfyUI 0.3.64 has no other moment for it. Everything is read below the runs
folder; answers that are not a file are JSON, and a refusal is `{"error": "<what, where, what next>"}`.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from aiohttp import web
from server import PromptServer

from ..mapo_core import MapoError, runs
from . import _comfy
from ._run_view import PICTURES, RefusedError, RunList, detail, find_file, find_run

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_server = PromptServer.instance
_run_list = RunList()
_one_start = asyncio.Lock()


def _answering(handler: Handler) -> Handler:
    """Turn refusals and errors into JSON that a person understands."""

    @functools.wraps(handler)
    async def answer(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except RefusedError as refusal:
            return web.json_response({"error": str(refusal)}, status=refusal.status)
        except MapoError as error:
            return web.json_response({"error": str(error)}, status=409)
        except OSError as error:
            logging.exception("MaPO: %s %s failed", request.method, request.path)
            return web.json_response({"error": f"The disk refused: {error}."}, status=500)

    return answer


# --- reading -----------------------------------------------------------------------------------------------------


@_server.routes.get("/mapo/runs")
@_answering
async def list_runs(request: web.Request) -> web.StreamResponse:
    """All runs, newest first."""
    return web.json_response({"runs": await asyncio.to_thread(_run_list.read, _find_copy)})


@_server.routes.get("/mapo/runs/{name}")
@_answering
async def show_run(request: web.Request) -> web.StreamResponse:
    """One run with its curves, pictures, warnings and the end of its log."""
    run = find_run(request.match_info["name"])
    return web.json_response(await asyncio.to_thread(detail, run, _find_copy))


@_server.routes.get("/mapo/runs/{name}/files/{path:.+}")
@_answering
async def show_file(request: web.Request) -> web.StreamResponse:
    """A picture, or a LoRA file as a download."""
    path = find_file(find_run(request.match_info["name"]), request.match_info["path"])
    # A picture is drawn again under the same name after a resume, so the browser asks whether it has changed.
    headers = {"Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"}
    kind = PICTURES.get(path.suffix.lower())
    if kind is None:
        kind = "application/octet-stream"
        headers["Content-Disposition"] = "attachment"
    return web.FileResponse(path, headers={**headers, "Content-Type": kind})


@_server.routes.get("/mapo/active")
@_answering
async def list_active(request: web.Request) -> web.StreamResponse:
    """The trainings that nodes are executing now, so that a page that was reloaded finds its charts again."""
    active = dict(_comfy.ACTIVE)
    return web.json_response({"active": [{"node": node, "run": run} for node, run in active.items()]})


# --- asking ------------------------------------------------------------------------------------------------------


@_server.routes.post("/mapo/runs/{name}/request")
@_answering
async def request_verb(request: web.Request) -> web.StreamResponse:
    """Stop, pause, resume, save or sample; a second stop changes nothing and never kills."""
    run = find_run(request.match_info["name"])
    verb = (await _body(request)).get("verb")
    if verb not in runs.VERBS:
        raise RefusedError(f"A run can be asked to {', '.join(runs.VERBS)}, not {verb!r}.")
    if not await asyncio.to_thread(_is_trained, run):
        raise RefusedError(f"Run {run.name} is not being trained at the moment, so it cannot {verb}.", 409)
    return web.json_response({"ok": True, "new": await asyncio.to_thread(run.request, verb)})


@_server.routes.post("/mapo/runs/{name}/resume")
@_answering
async def resume_run(request: web.Request) -> web.StreamResponse:
    """Train a run on from its newest checkpoint, in a process that ends with ComfyUI."""
    run = find_run(request.match_info["name"])
    if _comfy.is_executing():
        raise RefusedError("ComfyUI is busy with a workflow. Resume the run when the queue is empty.", 409)
    async with _one_start:
        for other in await asyncio.to_thread(_run_list.read, lambda path: None):
            if other["alive"]:
                raise RefusedError(
                    f"Run {other['name']} is being trained. Stop it first: two at once run out of memory.", 409
                )
            if other["name"] == run.name and not other["can_resume"]:
                raise RefusedError(f"Run {run.name} has {other['state']}: there is nothing left to train.", 409)
        await asyncio.to_thread(_comfy.free_vram)
        await asyncio.to_thread(runs.start_run, run, "tied")
    return web.json_response({"ok": True})


@_server.routes.post("/mapo/runs/{name}/copy")
@_answering
async def copy_lora(request: web.Request) -> web.StreamResponse:
    """Put the run's LoRA into ComfyUI's loras folder, beside what is there."""
    run = find_run(request.match_info["name"])
    shown = await asyncio.to_thread(detail, run, lambda path: None)
    if shown["lora"] is None:
        raise RefusedError(f"Run {run.name} has no LoRA file yet. Train it to the end, or press Stop and save.", 409)
    name = await asyncio.to_thread(_comfy.publish_lora, run.path / shown["lora"])
    return web.json_response({"ok": True, "lora_name": name})


@_server.routes.delete("/mapo/runs/{name}")
@_answering
async def delete_run(request: web.Request) -> web.StreamResponse:
    """Delete a run's folder; the request repeats its name, so that no accident deletes one."""
    run = find_run(request.match_info["name"])
    if (await _body(request)).get("confirm") != run.name:
        raise RefusedError(f'To delete the run, send {{"confirm": "{run.name}"}}.')
    if await asyncio.to_thread(_is_trained, run):
        raise RefusedError(f"Run {run.name} is being trained. Stop it first, then delete it.", 409)
    await asyncio.to_thread(runs.remove_folder, run.path)
    return web.json_response({"ok": True})


async def _body(request: web.Request) -> dict[str, Any]:
    try:
        body = await request.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise RefusedError("The request has no JSON object in its body.")
    return body


def _is_trained(run: runs.RunDir) -> bool:
    return runs.attach(run) is not None or runs.is_locked(run)


def _find_copy(path: Path) -> str | None:
    """Where a LoRA lies in the loras folder too; a ComfyUI without such a folder shows its runs all the same."""
    try:
        return _comfy.published_name(path)
    except (MapoError, OSError):
        return None
