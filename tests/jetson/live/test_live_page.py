"""The live page: what it shows, in a browser, and what it never does."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import requests
from browser import Page, open_browser
from echo_policy import OFT, EchoPolicy, oft_fields, post
from metrics_pages import TOKEN, acted
from PIL import Image

from jetson.board import read_board_state
from jetson.errors import PolicyFailure, Unauthorized
from jetson.live.feed import LiveFeed, preview
from jetson.recording.writer import McapRecorder
from jetson.server import open_server
from jetson.server_settings import ServerSettings
from jetson.serving.request_observer import ServedRequest
from qvla_export.shared.normalization import Bounds
from qvla_export.shared.observation import Observation

HOSTILE = '"><script>window.hit=1</script><img src=x onerror="window.hit=2">\u202e${7*7}'
# Messages shorten what is longer.
SHORT = "<script>hit=1</script>"
LIMITS = Bounds(np.full(7, -1.0), np.full(7, 2.0), np.ones(7, bool))
SHOWN = "document.querySelectorAll('#actions .dimension').length == 7"
LOADED = "document.images.length == 2 && [...document.images].every(i => i.naturalWidth > 0)"


class LimitedPolicy(EchoPolicy):
    """Says its limits; the last step of the echo policy's second dimension, 3, is outside."""

    processor = SimpleNamespace(
        command_limits=LIMITS,
        statistics=SimpleNamespace(action=LIMITS, key="tiny"),
        spec=SimpleNamespace(history=None),
    )


def seen(side: int = 40) -> Observation:
    picture = np.zeros((side, side * 2, 3), np.uint8)
    picture[:, side:] = (200, 40, 90)
    return Observation({"front": picture, "hand": picture[::-1].copy()}, "push", np.zeros(8))


def feed(**options: Any) -> LiveFeed:
    state = read_board_state()
    return LiveFeed(OFT, lambda: state, **options)


def test_the_feed_shows_the_newest_action_and_what_failed() -> None:
    found = feed(limits=LIMITS, deadline_ms=30.0)
    assert found.snapshot()["latest"] is None and found.picture(0) is None
    for total_ms in (10.0, 40.0, 20.0):
        found.on_request(replace(acted(engine=5.0, total=total_ms), observation=seen()))
    found.on_request(ServedRequest(seen(), None, {"total": 1.0}, PolicyFailure("on fire")))
    found.on_request(ServedRequest(None, None, {}, Unauthorized("a stranger")))
    now = found.snapshot()
    assert now["recent_ms"] == [10.0, 40.0, 20.0]
    assert now["counts"] == {
        "actions": 3, "misses": 1, "errors": {"PolicyFailure": 1, "Unauthorized": 1},
    }  # fmt: skip
    assert now["latest"]["number"] == 3 and len(now["latest"]["actions"]) == 4
    assert now["latest"]["cameras"][0] == {"name": "front", "width": 80, "height": 40}
    assert now["failed"]["message"] == "on fire", "strangers are counted, not reported"
    assert now["limits"] == [[-1.0] * 7, [2.0] * 7]


def test_pictures_are_made_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr("jetson.live.feed.preview", lambda image: made.append(image) or b"jpeg")
    found = feed()
    for _ in range(100):
        found.on_request(replace(acted(total=1.0), observation=seen()))
    found.snapshot()
    assert made == []
    assert found.picture(1) == b"jpeg" and len(made) == 1
    assert found.picture(2) is None and found.picture(-1) is None


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 4000, 3), (2160, 3840, 3), (224, 224, 3)])
def test_previews_are_small_jpegs(shape: tuple[int, int, int], tmp_path: Path) -> None:
    path = tmp_path / "preview.jpg"
    path.write_bytes(preview(np.full(shape, 90, np.uint8)))
    with Image.open(path) as image:
        assert image.format == "JPEG" and max(image.size) <= 360
        assert np.abs(np.asarray(image).astype(int) - 90).max() <= 2


def test_routes_are_strict_and_behind_the_token() -> None:
    settings = ServerSettings(port=0, token=TOKEN)
    paths = ("/", "/live/page.js", "/live/draw.js", "/live/page.css", "/live/state")
    with open_server(EchoPolicy(OFT), settings) as url:
        bearer = {"authorization": f"Bearer {TOKEN}"}
        post(url, oft_fields(), headers=bearer)
        for path in (*paths, "/live/picture/0", "/live/icon.svg"):
            refused = requests.get(url + path, timeout=20)
            assert refused.status_code == 401
            assert refused.headers["www-authenticate"] == 'Basic realm="QVLA"'
            assert requests.get(url + path, auth=("me", "wrong" * 5), timeout=20).status_code == 401
            reply = requests.get(url + path, auth=("anybody", TOKEN), timeout=20)
            assert reply.status_code == 200
            policy = reply.headers["content-security-policy"]
            assert policy.startswith("default-src 'none'; script-src 'self'")
            assert "unsafe" not in policy and "frame-ancestors 'none'" in policy
            assert reply.headers["cache-control"] == "no-store"
            assert reply.headers["x-content-type-options"] == "nosniff"
            if path in paths:
                addresses = {*re.findall(r"https?://[\w.]+", reply.text)} - {"http://user"}
                assert addresses <= {"http://www.w3.org"}, "the name of SVG, which nobody loads"
        for path in ("/live/picture/2", "/live/picture/x", "/live/../server.py", "/live/none.js"):
            assert requests.get(url + path, headers=bearer, timeout=20).status_code == 404
        asked = requests.get(url + "/metrics", headers={"origin": "http://evil"}, timeout=20)
        assert asked.status_code == 403


@contextmanager
def acting(url: str, **changes: Any) -> Iterator[None]:
    """A robot that asks, again and again."""
    ended = threading.Event()

    def ask() -> None:
        index = 0
        while not ended.wait(0.02):
            index += 1
            post(url, oft_fields(full_image=np.full((32, 24, 3), index % 3, np.uint8), **changes))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with open_browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(autouse=True)
def no_complaints(request: pytest.FixtureRequest) -> Iterator[None]:
    """The browser says nothing of the page that a developer would have to look at."""
    yield
    if "page" in request.fixturenames:
        opened: Page = request.getfixturevalue("page")
        complaints, opened.complaints = opened.complaints, []
        assert [c for c in complaints if "ERR_CONNECTION" not in c] == []


@pytest.mark.parametrize(
    ("width", "height", "phone"), [(1280, 900, False), (390, 844, True), (360, 740, True)]
)
def test_the_page_fits_every_screen(
    page: Page, tmp_path: Path, width: int, height: int, phone: bool
) -> None:
    with open_server(LimitedPolicy(OFT), ServerSettings(port=0)) as url, acting(url):
        page.open(url + "/", width, height, phone)
        page.wait_for(SHOWN)
        page.wait_for(LOADED)
        page.wait_for("document.querySelectorAll('#strip .bar').length > 20")
        assert page.value("document.documentElement.scrollWidth") == width
        sizes = page.value(
            "[...document.querySelectorAll('button, summary')]"
            ".map(e => e.getBoundingClientRect()).map(r => [r.width, r.height])"
        )
        assert len(sizes) == 2 and min(map(min, sizes)) >= 44
        assert page.value("document.getElementById('status').textContent") == "Live"
        outside = page.value(
            "[...document.querySelectorAll('.outside .name')].map(e => e.textContent)"
        )
        assert "1" in outside and "2" not in outside
        page.picture(tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    for color in ((0x1F, 0x78, 0xB8), (0xB3, 0x26, 0x1E), (0xF6, 0xF6, 0xF4)):
        assert (pixels == color).all(axis=1).sum() > 20


def test_what_clients_say_stays_text(page: Page) -> None:
    with open_server(EchoPolicy(OFT), ServerSettings(port=0)) as url:
        with acting(url, instruction=HOSTILE):
            page.open(url + "/")
            page.wait_for(SHOWN)
            page.wait_for(LOADED)
        assert page.value("document.getElementById('instruction').textContent") == HOSTILE
        post(url, oft_fields(instruction="x", unnorm_key=SHORT))
        trouble = page.wait_for("document.getElementById('trouble').textContent")
        assert SHORT in trouble
        assert page.value("window.hit === undefined")
        assert page.value("document.querySelectorAll('script').length") == 1
        assert page.value("document.images.length") == 2


def test_pause_idle_and_a_lost_connection_are_said(page: Page) -> None:
    with open_server(EchoPolicy(OFT), ServerSettings(port=0)) as url:
        page.open(url + "/")
        page.wait_for("document.getElementById('status').textContent == 'No action yet'")
        post(url, oft_fields())
        page.wait_for("document.getElementById('status').textContent == 'Live'")
        page.value("document.getElementById('pause').click()")
        post(url, oft_fields(instruction="while paused"))
        assert page.value("document.getElementById('status').textContent") == "Paused"
        page.wait_for("performance.now() > 2 * 250")
        assert page.value("document.getElementById('instruction').textContent") == "push"
        page.value("document.getElementById('pause').click()")
        page.wait_for("document.getElementById('instruction').textContent == 'while paused'")
        page.wait_for("document.getElementById('status').textContent.startsWith('Idle')")
    page.wait_for("document.getElementById('status').textContent == 'Connection lost'")
    assert "is old" in page.value("document.getElementById('trouble').textContent")


def test_a_recorder_that_died_is_said(
    page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ServerSettings(port=0, record=tmp_path / "run.mcap")
    with open_server(EchoPolicy(OFT), settings) as url:
        page.open(url + "/")
        page.wait_for("document.getElementById('status').textContent == 'No action yet'")
        assert page.value("document.getElementById('trouble').textContent") == ""
        monkeypatch.setattr(McapRecorder, "failure", "OSError: No space left on device")
        trouble = page.wait_for("document.getElementById('trouble').textContent")
        assert trouble == "Nothing is recorded any more: OSError: No space left on device"


def test_a_browser_that_knows_the_token_sees_the_page(page: Page) -> None:
    with open_server(EchoPolicy(OFT), ServerSettings(port=0, token=TOKEN)) as url:
        post(url, oft_fields(), headers={"authorization": f"Bearer {TOKEN}"})
        page.open(url.replace("http://", f"http://phone:{TOKEN}@") + "/", 390, 844, True)
        page.wait_for(SHOWN)
        page.wait_for(LOADED)
