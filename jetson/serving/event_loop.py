"""The event loop that serves HTTP and websockets: a TLS handshake may not take for ever."""

import asyncio
from typing import Any

# As long as the head of a request may take.
HANDSHAKE_TIMEOUT_S = 10.0


class ServingLoop(asyncio.SelectorEventLoop):
    """asyncio's own, where handshakes end in time: it waits a minute, uvicorn has no setting."""

    async def create_server(self, *args: Any, **kwargs: Any) -> asyncio.Server:
        """Listen; see `asyncio.loop.create_server`."""
        if kwargs.get("ssl") is not None:
            kwargs.setdefault("ssl_handshake_timeout", HANDSHAKE_TIMEOUT_S)
        return await super().create_server(*args, **kwargs)
