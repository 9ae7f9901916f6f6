"""Handlers about descriptor lists, transfers and notifications."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from xferd.api.rest import _answers as a, _bodies as b
from xferd.api.rest._route import SLICE_S, Call

if TYPE_CHECKING:
    from xferd.api import types as t


async def prepare(call: Call[None, b.DescriptorsBody]) -> t.PreparedInfo:
    """Check a descriptor list once and keep it under a handle, for transfers to name."""
    return await call.engine.prepare(call.caller, call.body.to_list(call.settings.max_descriptors))


async def release_prepared(call: Call[None, None]) -> None:
    """Forget a prepared list; transfers that use it are not disturbed."""
    await call.engine.release_prepared(call.caller, (call.handle(),))


async def list_transfers(call: Call[b.TransfersQuery, None]) -> a.TransferList:
    """List transfers: a session's agent's own, all of them to the operator."""
    agent = call.query.agent if call.caller.session is None else call.caller.agent
    return a.TransferList(tuple(call.engine.transfers(active_only=call.query.active, agent=agent)))


async def submit_transfer(call: Call[None, b.SubmitBody]) -> t.TransferStatus:
    """Make a transfer and, unless `hold`, post it; the same `key` gives the same transfer again.

    With `wait_s` the answer comes when the transfer has ended or the time is over, whichever is first. A transfer
    that failed is an answer too: its `state` is FAILED and its `error` says why.
    """
    request = call.body.to_request(call.settings.max_descriptors, hold=call.body.hold)
    status = await call.engine.submit(call.caller, request)
    if call.body.wait_s and not call.body.hold:
        return await call.wait_ended(status.id, call.body.wait_s)
    return status


async def get_transfer(call: Call[None, None]) -> t.TransferStatus:
    """Return a transfer as it is now."""
    (status,) = call.engine.poll(call.caller, (call.transfer(),))
    return status


async def post_transfer(call: Call[None, b.PostBody]) -> t.TransferStatus:
    """Post a held transfer, or an ended one again."""
    status = await call.engine.post(call.caller, call.transfer())
    return await call.wait_ended(status.id, call.body.wait_s) if call.body.wait_s else status


async def wait_transfer(call: Call[None, b.WaitBody]) -> t.TransferStatus:
    """Wait until a transfer has ended; one that has not in time is answered as it is, which is no error."""
    return await call.wait_ended(call.transfer(), call.body.timeout_s)


async def cancel_transfer(call: Call[None, None]) -> t.TransferStatus:
    """Cancel a transfer; answers when no byte of it moves any more. One that had ended keeps its state."""
    (status,) = await call.engine.cancel(call.caller, (call.transfer(),))
    return status


async def release_transfer(call: Call[None, None]) -> None:
    """Forget a transfer, after cancelling it if it runs."""
    await call.engine.release(call.caller, (call.transfer(),))


async def estimate_transfer(call: Call[None, b.TransferBody]) -> t.Estimate:
    """Say how long a transfer would take, without doing it."""
    return await call.engine.estimate(call.caller, call.body.to_request(call.settings.max_descriptors))


async def explain_transfer(call: Call[None, b.TransferBody]) -> t.Explanation:
    """Say which route a transfer would take and why, without doing it."""
    return await call.engine.explain(call.caller, call.body.to_request(call.settings.max_descriptors))


async def send_notification(call: Call[None, b.NotificationBody]) -> None:
    """Deliver bytes to an agent's inbox, here or on another node."""
    await call.engine.notify(call.caller, call.body.to_notification())


async def receive_notifications(call: Call[b.ReceiveQuery, None]) -> a.NotificationList:
    """Take what has arrived for the calling agent, waiting up to `timeout` seconds for the first.

    What is answered is taken out of the inbox. A client that hangs up while it waits takes nothing.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + call.query.timeout
    while True:
        left_s = deadline - loop.time()
        taken = await call.engine.notifications(call.caller, call.query.limit, max(0.0, min(left_s, SLICE_S)))
        if taken or left_s <= SLICE_S:
            return a.NotificationList(tuple(taken))
        call.renew()
