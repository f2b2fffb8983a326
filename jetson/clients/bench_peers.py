"""Two servers of published structure, re-created from their protocols to be measured beside ours.

Each does what its structure does and nothing else: no checks, no limits, no authentication.
Sources: openpi `serving/websocket_policy_server.py`; openvla `vla-scripts/deploy.py`.
"""

import asyncio
import time
from typing import Any

import json_numpy
import msgpack
import numpy as np

from jetson.errors import RefusedSetting
from jetson.serving.arrays import encode_packed

# What a policy of 8 steps and 7 dimensions returns when it does nothing.
ACTIONS = np.zeros((8, 7), np.float32)


def serve_openpi_structure(port: int) -> None:
    """Serve as openpi does: websockets and msgpack, the policy on the event loop. Never returns."""
    from websockets.asyncio.server import ServerConnection, serve

    def unpack_array(value: dict[Any, Any]) -> Any:
        if b"__ndarray__" in value:
            dtype = np.dtype(value[b"dtype"])
            return np.ndarray(buffer=value[b"data"], dtype=dtype, shape=value[b"shape"])
        return value

    async def answer(socket: ServerConnection) -> None:
        await socket.send(msgpack.packb({}))
        async for message in socket:
            start_ns = time.perf_counter_ns()
            msgpack.unpackb(message, object_hook=unpack_array)
            reply = {"actions": encode_packed(ACTIONS), "policy_timing": {"infer_ms": 0.0}}
            infer_ms = (time.perf_counter_ns() - start_ns) / 1e6
            await socket.send(msgpack.packb({**reply, "server_timing": {"infer_ms": infer_ms}}))

    async def run() -> None:
        async with serve(answer, "127.0.0.1", port, compression=None, max_size=None) as server:
            await server.serve_forever()

    asyncio.run(run())


def serve_openvla_structure(port: int) -> None:
    """Serve as OpenVLA-OFT does: FastAPI, the body parsed by a patched json. Never returns.

    Raises:
        RefusedSetting: FastAPI is not installed; it is a developer's tool.
    """
    try:
        from fastapi import FastAPI
        from fastapi.responses import JSONResponse
    except ModuleNotFoundError:
        raise RefusedSetting("measuring beside FastAPI needs it: pip install fastapi") from None
    import uvicorn

    json_numpy.patch()
    app = FastAPI()

    def act(payload: dict[str, Any]) -> JSONResponse:
        return JSONResponse(list(ACTIONS.astype(np.float64)))

    app.post("/act")(act)
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")
