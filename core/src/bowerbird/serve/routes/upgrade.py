"""The upgrade: how it is going, and what administrators do with it."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter

from bowerbird.serve.depends import Admin, Reader, ServerOf
from bowerbird.serve.schemas import Confirm, Finish, PlanJob, Rollback, StartPlan, StartUpgrade, UpgradeView

router = APIRouter(prefix="/v1/upgrade", tags=["upgrade"])


@router.get("", operation_id="getUpgrade", summary="How far the upgrade is, what it measured, what was forecast")
async def show(server: ServerOf, _: Reader) -> UpgradeView:
    return await server.control.view()


@router.get("/plan", operation_id="getPlan", summary="The plan that is being made, and the last one")
async def show_plan(server: ServerOf, _: Reader) -> PlanJob:
    return await server.control.plan_job()


@router.post("/plan", operation_id="startPlan", summary="Plan an upgrade to a candidate", status_code=202)
async def start_plan(asked: StartPlan, server: ServerOf, caller: Admin) -> PlanJob:
    """Encodes a sample in a process of low priority, and changes no item. `GET` says how far it is."""
    await asyncio.to_thread(server.access.audit, caller, "plan", asked.model_dump())
    return await server.control.start_plan(asked)


@router.post("/plan/cancel", operation_id="cancelPlan", summary="Give up the plan that is being made")
async def cancel_plan(server: ServerOf, caller: Admin) -> PlanJob:
    await asyncio.to_thread(server.access.audit, caller, "cancel plan")
    return await server.control.cancel_plan()


@router.post("/start", operation_id="startUpgrade", summary="Begin to move the gallery to a candidate")
async def start(asked: StartUpgrade, server: ServerOf, caller: Admin) -> UpgradeView:
    """Answers once it has begun, which takes as long as loading the encoder and encoding the watched queries.

    No search result changes by the start. Where the upgrade to this candidate is under way already, this service takes
    part in it.
    """
    await asyncio.to_thread(server.access.audit, caller, "start", asked.model_dump())
    return await server.control.start(asked)


@router.post("/pause", operation_id="pauseUpgrade", summary="Let no worker take another task; searches go on")
async def pause(asked: Confirm, server: ServerOf, caller: Admin) -> UpgradeView:
    await asyncio.to_thread(server.access.audit, caller, "pause", asked.model_dump())
    return await server.control.pause(asked.id)


@router.post("/resume", operation_id="resumeUpgrade", summary="Let workers go on; this service's takes part")
async def resume(asked: Confirm, server: ServerOf, caller: Admin) -> UpgradeView:
    """Also starts the worker of this service again where it had failed."""
    await asyncio.to_thread(server.access.audit, caller, "resume", asked.model_dump())
    return await server.control.resume(asked.id)


@router.post("/finish", operation_id="finishUpgrade", summary="Drop the old vectors, after verification, for good")
async def finish(asked: Finish, server: ServerOf, caller: Admin) -> UpgradeView:
    """Refused with 409 until every item is moved, every checksum holds, and the new encoder reproduces its vectors."""
    await asyncio.to_thread(server.access.audit, caller, "finish", asked.model_dump())
    return await server.control.finish(asked)


@router.post("/rollback", operation_id="rollbackUpgrade", summary="Back to the exact old state")
async def rollback(asked: Rollback, server: ServerOf, caller: Admin) -> UpgradeView:
    """Items that came during the upgrade are encoded by the old encoder, or left without a vector."""
    await asyncio.to_thread(server.access.audit, caller, "rollback", asked.model_dump())
    return await server.control.rollback(asked)
