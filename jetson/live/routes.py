"""The page's routes: its files, the state it polls, the pictures it shows.

Nothing comes from elsewhere and nothing runs that is not one of these files: the policy below
says so to the browser. The page asks; the server pushes nothing, so a page that is closed costs
nothing and one that is open holds up no shutdown.
"""

import json
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from jetson.live.feed import LiveFeed
from jetson.serving.metrics import Metrics

_FILES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/live/page.css": ("page.css", "text/css; charset=utf-8"),
    "/live/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/live/draw.js": ("draw.js", "text/javascript; charset=utf-8"),
    "/live/icon.svg": ("icon.svg", "image/svg+xml"),
}
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    # What a robot sees stays out of a phone's disk.
    "cache-control": "no-store",
}


def live_routes(feed: LiveFeed, metrics: Metrics) -> list[BaseRoute]:
    """Return the routes of the page and of `/metrics`, all GET."""

    # Not coroutines: starlette runs them beside the event loop, which moves the robot's bytes.
    def state(request: Request) -> Response:
        content = json.dumps(feed.snapshot(), allow_nan=False)
        return Response(content, 200, HEADERS, "application/json")

    def picture(request: Request) -> Response:
        content = feed.picture(request.path_params["index"])
        if content is None:
            return Response(status_code=404, headers=HEADERS)
        return Response(content, 200, HEADERS, "image/jpeg")

    def read_metrics(request: Request) -> Response:
        content, content_type = metrics.render(request.headers.get("accept"))
        return Response(content, 200, {**HEADERS, "content-type": content_type})

    return [
        *(_file(path, *file) for path, file in _FILES.items()),
        Route("/live/state", state, methods=["GET"]),
        Route("/live/picture/{index:int}", picture, methods=["GET"]),
        Route("/metrics", read_metrics, methods=["GET"]),
    ]


def _file(path: str, name: str, content_type: str) -> Route:
    content = files("jetson.live").joinpath("static", name).read_bytes()

    async def send(request: Request) -> Response:
        return Response(content, 200, {**HEADERS, "content-type": content_type})

    return Route(path, send, methods=["GET"])
