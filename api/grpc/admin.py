"""AdminService: what an operator sees and does, with the admin token where one is configured."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xferd.api import types as t, wire
from xferd.api.errors import NotFound
from xferd.api.grpc._rpc import answers, token_of
from xferd.api.proto import xferd_v1_pb2 as pb, xferd_v1_pb2_grpc as pb_grpc

if TYPE_CHECKING:
    from xferd.api.engine import Engine
    from xferd.api.grpc._rpc import Context


class AdminServicer(pb_grpc.AdminServiceServicer):
    """Adapter over ``Admin``."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @answers
    async def Status(self, request: pb.StatusRequest, context: Context) -> pb.NodeStatus:
        self._authenticate(context)
        return wire.node_status_to_message(self._engine.status())

    @answers
    async def GetConfig(self, request: pb.GetConfigRequest, context: Context) -> pb.ConfigDocument:
        self._authenticate(context)
        return pb.ConfigDocument(toml=self._engine.config_toml())

    @answers
    async def ListPools(self, request: pb.ListPoolsRequest, context: Context) -> pb.PoolList:
        self._authenticate(context)
        return pb.PoolList(pools=[wire.pool_to_message(pool) for pool in self._engine.pools()])

    @answers
    async def ListSessions(self, request: pb.ListSessionsRequest, context: Context) -> pb.SessionList:
        self._authenticate(context)
        return pb.SessionList(sessions=[wire.session_to_message(session) for session in self._engine.sessions()])

    @answers
    async def ListBackends(self, request: pb.ListBackendsRequest, context: Context) -> pb.BackendList:
        self._authenticate(context)
        return pb.BackendList(backends=[wire.backend_to_message(backend) for backend in self._engine.backends()])

    @answers
    async def ListRoutes(self, request: pb.ListRoutesRequest, context: Context) -> pb.RouteList:
        self._authenticate(context)
        return pb.RouteList(routes=[wire.route_cost_to_message(row) for row in self._engine.routes()])

    @answers
    async def ListTransfers(self, request: pb.ListTransfersRequest, context: Context) -> pb.TransferStatusList:
        self._authenticate(context)
        statuses = self._engine.transfers(active_only=request.active_only, agent=request.agent)
        return wire.statuses_to_message(statuses)

    @answers
    async def ListHolds(self, request: pb.ListHoldsRequest, context: Context) -> pb.HoldList:
        self._authenticate(context)
        return pb.HoldList(holds=[wire.hold_to_message(hold) for hold in self._engine.holds()])

    @answers
    async def EndSession(self, request: pb.EndSessionRequest, context: Context) -> pb.EndSessionResponse:
        self._authenticate(context)
        # The engine takes an unknown session for one that has ended, which is right for a face whose connection
        # broke; a person who mistyped an id wants to know.
        if all(session.session != request.id for session in self._engine.sessions()):
            raise NotFound(f"session {request.id!r} is not live", remedy="list the sessions")
        await self._engine.end_session(t.SessionId(request.id), "ended by an operator")
        return pb.EndSessionResponse()

    @answers
    async def Drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainResponse:
        self._authenticate(context)
        if request.undo:
            self._engine.undrain()
            return pb.DrainResponse(drained=False)
        left = await self._engine.drain(wire.check_seconds("timeout_s", request.timeout_s))
        return pb.DrainResponse(drained=not left, transfers_left=left)

    @answers
    async def SetLogLevel(self, request: pb.SetLogLevelRequest, context: Context) -> pb.SetLogLevelResponse:
        self._authenticate(context)
        if not request.level:  # a question
            return pb.SetLogLevelResponse(previous=self._engine.log_level())
        return pb.SetLogLevelResponse(previous=self._engine.set_log_level(request.level))

    @answers
    async def GetStorage(self, request: pb.GetStorageRequest, context: Context) -> pb.StorageReport:
        self._authenticate(context)
        return pb.StorageReport(pools=[wire.storage_to_message(info) for info in self._engine.storage()])

    @answers
    async def ScrubStorage(self, request: pb.ScrubStorageRequest, context: Context) -> pb.StoragePool:
        self._authenticate(context)
        return wire.storage_to_message(await self._engine.scrub_storage(request.pool))

    @answers
    async def Diagnose(self, request: pb.DiagnoseRequest, context: Context) -> pb.DiagnoseReport:
        self._authenticate(context)
        return pb.DiagnoseReport(checks=[wire.check_to_message(check) for check in await self._engine.diagnose()])

    def _authenticate(self, context: Context) -> t.Caller:
        return self._engine.authenticate_admin(token_of(context))
