"""Wire form of GPUs, of what clients register of their memory, and of their events; part of ``wire.py``."""

from __future__ import annotations

from xferd.api import types as t
from xferd.api._wire_core import access_from_wire, build, enum_to_wire, text
from xferd.api.proto import session_v1_pb2 as session_pb, xferd_v1_pb2 as pb


def register_device_to_message(request: t.RegisterDeviceRequest) -> pb.RegisterDeviceRequest:
    """Return the wire form."""
    return build(pb.RegisterDeviceRequest, handle=request.handle, **_fields_of(request))


def register_device_from_message(message: pb.RegisterDeviceRequest) -> t.RegisterDeviceRequest:
    """Return the request; an access that is not known here raises ``InvalidArgument``."""
    return _request_of(message, message.handle)


def register_device_fd_to_message(request: t.RegisterDeviceRequest) -> session_pb.RegisterDeviceFd:
    """Return the wire form for the session socket, where a file descriptor comes along instead of a handle."""
    return build(session_pb.RegisterDeviceFd, **_fields_of(request))


def register_device_fd_from_message(message: session_pb.RegisterDeviceFd) -> t.RegisterDeviceRequest:
    """Return the request, without a handle; an access that is not known here raises ``InvalidArgument``."""
    return _request_of(message, b"")


def _fields_of(request: t.RegisterDeviceRequest) -> dict[str, object]:
    """Return the fields that both messages of a request have."""
    return {
        "device_uuid": request.device_uuid,
        "allocation_nbytes": request.allocation_nbytes,
        "offset": request.offset,
        "nbytes": request.nbytes,
        "access": enum_to_wire(request.access),
        "label": request.label,
        "writable": request.writable,
    }


def _request_of(
    message: pb.RegisterDeviceRequest | session_pb.RegisterDeviceFd, handle: bytes
) -> t.RegisterDeviceRequest:
    return t.RegisterDeviceRequest(
        device_uuid=message.device_uuid,
        allocation_nbytes=message.allocation_nbytes,
        handle=handle,
        offset=message.offset,
        nbytes=message.nbytes,
        access=access_from_wire(message.access),
        label=message.label,
        writable=message.writable,
    )


def device_handle_to_message(handle: t.DeviceHandle) -> pb.DeviceExport:
    """Return the wire form."""
    return pb.DeviceExport(
        device_uuid=handle.device_uuid,
        handle=handle.handle,
        allocation_nbytes=handle.allocation_nbytes,
        offset=handle.offset,
        driver=handle.driver,
    )


def device_handle_from_message(message: pb.DeviceExport) -> t.DeviceHandle:
    """Return the record."""
    return t.DeviceHandle(
        message.device_uuid, message.handle, message.allocation_nbytes, message.offset, message.driver
    )


def device_to_message(info: t.DeviceInfo) -> pb.Device:
    """Return the wire form."""
    return pb.Device(
        index=info.index,
        device_uuid=info.device_uuid,
        name=text(info.name),
        driver=info.driver,
        reason=text(info.reason),
        total_nbytes=info.total_nbytes,
        free_nbytes=info.free_nbytes,
        workers=info.workers,
        worker_restarts=info.worker_restarts,
        pinned_nbytes=info.pinned_nbytes,
        moved_nbytes=info.moved_nbytes,
        kernel_s=info.kernel_s,
        copy_s=info.copy_s,
    )


def device_from_message(message: pb.Device) -> t.DeviceInfo:
    """Return the record."""
    return t.DeviceInfo(
        index=message.index,
        device_uuid=message.device_uuid,
        name=message.name,
        driver=message.driver,
        reason=message.reason,
        total_nbytes=message.total_nbytes,
        free_nbytes=message.free_nbytes,
        workers=message.workers,
        worker_restarts=message.worker_restarts,
        pinned_nbytes=message.pinned_nbytes,
        moved_nbytes=message.moved_nbytes,
        kernel_s=message.kernel_s,
        copy_s=message.copy_s,
    )


def device_event_to_message(event: t.DeviceEvent) -> pb.DeviceEvent:
    """Return the wire form."""
    return pb.DeviceEvent(event=event.event, handle=event.handle)


def device_event_from_message(message: pb.DeviceEvent) -> t.DeviceEvent:
    """Return the record."""
    return t.DeviceEvent(message.event, message.handle)
