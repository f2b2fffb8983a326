"""Releases to robots behind real sshd: waves, cuts, robots that fail or are not there."""

import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_runs import qvla
from small_releases import Host, sum_bundle
from ssh_fleet import Relay, SshFleet, ssh_fleet

from jetson.install.activation import CURRENT, prove
from jetson.install.store import StoreError
from jetson.install.store_state import StoreState, read_boot_id
from qvla_export.pipeline.fleet import push as push_step
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.shared.bundle import Bundle

# What ssh has taken and the robot has not got when a connection is cut: the window of a channel
# (2 MiB) and what pipes and sockets hold.
_IN_FLIGHT_BYTES = 3 << 20


@pytest.fixture(scope="module")
def host(tiny_policy: OftPolicy, tmp_path_factory: pytest.TempPathFactory) -> Host:
    root = tmp_path_factory.mktemp("host")
    host = Host.new(root / "host")
    host.release(sum_bundle(tiny_policy, root / "a", table=1_500_000).path, "good")
    return host


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(push_step, "_PAUSES_S", (0.0, 0.0))


def pushed(fleet: SshFleet, *words: str, **settings: str) -> dict[str, Any]:
    """Push; return the one document that it prints."""
    outcome = qvla("push", fleet.write(**settings), "--json", *words)
    document: dict[str, Any] = json.loads(outcome.out)
    assert outcome.code == (0 if document["passed"] else 1), outcome.err
    return document


def answers(document: dict[str, Any]) -> list[list[str]]:
    return [[one["answer"] for one in wave["robots"]] for wave in document["waves"]]


def serving(fleet: SshFleet) -> list[str | None]:
    """Return the name of the release that each robot serves."""
    states = [(StoreState.load(robot.store), robot.store) for robot in fleet.robots]
    found = [state.releases.get(store.linked(CURRENT) or "") for state, store in states]
    return [None if one is None else one.name for one in found]


def release_bytes(host: Host, name: str) -> int:
    return sum(path.stat().st_size for path in (host.root / f"release-{name}" / "bundle").iterdir())


def sent_again(fleet: SshFleet, robot: dict[str, Any], name: str) -> int:
    """Return the bytes of a release that went to a robot more than once."""
    metadata = sum(p.stat().st_size for p in fleet.host.repository.metadata.iterdir())
    document = (fleet.host.root / f"release-{name}" / "release.json").stat().st_size
    most = robot["connections"] * (metadata + document)
    return int(robot["sent_bytes"]) - release_bytes(fleet.host, name) - most


def test_three_robots_one_not_there_and_one_behind_a_way_that_breaks(
    host: Host, tmp_path: Path
) -> None:
    with ssh_fleet(tmp_path / "fleet", host, 3) as fleet:
        fleet.robots[1].stop()
        waves = ("--wave", "1", "--wave", "2", "--wave", "100%")
        first = pushed(fleet, *waves)
        # Nobody answered for the second: the third is not begun.
        assert answers(first) == [["healthy"], ["unreachable"]]
        assert first["left"] == 1 and "refused" in first["waves"][1]["robots"][0]["reason"]
        assert serving(fleet) == ["good", None, None]
        fleet.robots[1].start()
        relay = Relay(fleet.robots[1].port, [2_500_000])
        fleet.ports["arm-02"] = relay.port
        second = pushed(fleet, *waves)
        relay.close()
        assert answers(second) == [["healthy"]] * 3
        assert [wave["robots"][0]["before"] for wave in second["waves"]] == [True, False, False]
        cut = second["waves"][1]["robots"][0]
        assert cut["connections"] == relay.connections == 2
        assert sent_again(fleet, cut, "good") <= _IN_FLIGHT_BYTES < release_bytes(host, "good")
        assert serving(fleet) == ["good"] * 3
        for robot in fleet.robots:
            assert Bundle.load(robot.store.root / "current" / "bundle")
        # What stands in the store is how to pull, which nobody has told these robots.
        known = json.loads(fleet.robots[0].store.robot.read_text())
        assert known["repository"] == "" and known["target"] == "cpu"


@pytest.fixture
def six(host: Host, tmp_path: Path) -> Iterator[SshFleet]:
    with ssh_fleet(tmp_path / "fleet", host, 6) as fleet:
        yield fleet


@pytest.mark.slow
def test_six_robots(six: SshFleet, tiny_policy: OftPolicy, tmp_path: Path) -> None:
    relays = [Relay(robot.port, [3_000_000, 1_500_000]) for robot in six.robots[2:4]]
    six.ports = {r.name: relay.port for r, relay in zip(six.robots[2:4], relays, strict=True)}
    first = pushed(six)
    # 20% of six are two robots.
    assert answers(first) == [["healthy"], ["healthy"], ["healthy"] * 4]
    again = [sent_again(six, one, "good") for one in first["waves"][2]["robots"][:2]]
    print(f"\n{release_bytes(six.host, 'good')} bytes, cut twice: {again} sent again")
    assert all(bytes_again <= 2 * _IN_FLIGHT_BYTES for bytes_again in again)
    for relay in relays:
        relay.close()
    six.ports = {}
    # A canary that fails: nobody else is touched.
    bundle = sum_bundle(tiny_policy, tmp_path / "b", 0.125, table=1_500_000).path
    six.host.release(bundle, "bad")
    stopped = pushed(six)
    assert answers(stopped) == [["failed"]] and stopped["left"] == 5
    assert "it shakes" in stopped["waves"][0]["robots"][0]["reason"]
    assert serving(six) == ["good"] * 6
    # Once more: it is not tried again there, and goes no further.
    assert answers(pushed(six)) == [["failed"]]
    six.host.release(sum_bundle(tiny_policy, tmp_path / "c", 0.25, table=1_500_000).path, "better")
    six.robots[1].stop()
    lost = pushed(six)
    assert answers(lost) == [["healthy"], ["unreachable"]] and lost["left"] == 4
    assert serving(six) == ["better", *["good"] * 5]
    # A host key that is another one is no robot of ours.
    six.robots[1].start()
    known = six.write() and (six.root / "known_hosts").read_text().splitlines()
    known[1] = known[1].split()[0] + " " + " ".join(known[2].split()[1:])
    (six.root / "known_hosts").write_text("\n".join(known) + "\n")
    outcome = qvla("push", six.file, "--json")
    document = json.loads(outcome.out)
    assert outcome.code == 1 and answers(document) == [["healthy"], ["unreachable"]]
    assert "Host key verification failed" in document["waves"][1]["robots"][0]["reason"]
    last = pushed(six)
    assert answers(last) == [["healthy"], ["healthy"], ["healthy"] * 4]
    # Of the changed release only what changed came: `better` is patched from `bad`, the newest
    # before it, where that is; elsewhere it came whole.
    assert serving(six) == ["better"] * 6


@pytest.mark.slow
def test_a_robot_is_healthy_once_a_client_has_proven_it(host: Host, tmp_path: Path) -> None:
    with ssh_fleet(tmp_path / "fleet", host, 1) as fleet:
        # The robot's own command, with its own self-check.
        fleet.defaults = "proven_within_s = 2\n"
        words = {"arm-01": f'command = "{sys.executable} -m qvla_export"'}
        late = pushed(fleet, **words)
        assert answers(late) == [["failed"]]
        assert "nobody has proven it" in late["waves"][0]["robots"][0]["reason"]
        fleet.defaults = "proven_within_s = 300\n"
        store, end = fleet.robots[0].store, threading.Event()

        def prove_later() -> None:
            end.wait(3)
            prove(store, read_boot_id())

        prover = threading.Thread(target=prove_later)
        prover.start()
        proven = pushed(fleet, **words)
        prover.join()
        assert answers(proven) == [["healthy"]]
        with pytest.raises(StoreError, match="no release is on probation"):
            prove(store, read_boot_id())
