"""Objects that hold each other are freed while few of them are there, whatever else there is."""

import gc
from collections import deque

from jetson.serving.object_rings import rings_collected_early

# As many as live at once, as connections do, and so reach the oldest generation.
LIVING = 2_000
CONNECTIONS = 50_000


class Connection:
    """Holds itself, as a transport that keeps its own bound method."""

    there = 0

    def __init__(self) -> None:
        self.on_data = self.close
        Connection.there += 1

    def close(self) -> None:
        pass

    def __del__(self) -> None:
        Connection.there -= 1


def most_there() -> int:
    """Return how many connections there were at most while many came and went."""
    living: deque[Connection] = deque(maxlen=LIVING)
    most = 0
    for _ in range(CONNECTIONS):
        living.append(Connection())
        most = max(most, Connection.there)
    living.clear()
    gc.collect()
    return most


def test_rings_wait_for_no_quarter_of_all_modules() -> None:
    # As a server's modules: a full collection waits until a quarter as much was added.
    modules = [[number] for number in range(150_000)]
    gc.collect()
    usual = most_there()
    with rings_collected_early():
        early = most_there()
    assert Connection.there == 0 and len(modules) == 150_000
    assert early < 10_000 < 18_000 < usual, (early, usual)


def test_settings_are_those_of_before_when_a_server_ends() -> None:
    thresholds, frozen = gc.get_threshold(), gc.get_freeze_count()
    with rings_collected_early():
        assert gc.get_threshold() != thresholds and gc.get_freeze_count() > frozen
    assert gc.get_threshold() == thresholds and gc.get_freeze_count() == 0
