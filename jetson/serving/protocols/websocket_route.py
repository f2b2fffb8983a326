"""Which protocol a websocket speaks: vla-eval's at its path, openpi's at every other."""

from jetson.serving.protocols.openpi import OpenpiEndpoint
from jetson.serving.protocols.vla_eval import PATH, VlaEvalEndpoint, VlaEvalOptions
from jetson.serving.request_queue import RequestQueue
from jetson.serving.security import RateLimit
from jetson.serving.upgrade import Route, WebsocketHandler


def websocket_route(queue: RequestQueue, rate: RateLimit) -> Route:
    """Return what finds the handler of a websocket by its path and query."""
    openpi = OpenpiEndpoint(queue, rate)

    def route(target: str) -> WebsocketHandler:
        path, _, query = target.partition("?")
        if path != PATH:  # openpi's clients ask for any
            return openpi
        return VlaEvalEndpoint(queue, rate, VlaEvalOptions.parse(query))

    return route
