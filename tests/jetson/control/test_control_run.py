"""`qvla run` whole: in the simulator, on an episode, a camera, over HTTP, until a signal."""

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import json_numpy
import numpy as np
import pytest
from command_runs import qvla
from echo_policy import OPENVLA, EchoPolicy
from places import REFERENCE, ROOT
from scripted_policies import ConstantPolicy
from small_datasets import write_small_dataset

from jetson.control.loop_state import LoopState
from jetson.server import open_server
from jetson.server_settings import ServerSettings
from jetson.serving.policy_contract import PolicyContract
from qvla_export.pipeline.robot.control_loop import parse_vector, run_policy
from qvla_export.pipeline.robot.control_options import RunOptions
from qvla_export.shared.action import ActionChunk
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.observation import Observation

DRAWER = "simulator:drawer-open"


class Pushing(ConstantPolicy):
    """Pushes the hand forward and down, whatever it sees; one value is far outside the limits."""

    contract = PolicyContract(("image",), 8, 4, 4, "test")

    def infer(self, observation: Observation) -> ActionChunk:
        self.actions = np.tile(np.array([0, 0.5, -50, 1], np.float32), (8, 1))
        return super().infer(observation)


@pytest.fixture(scope="module")
def episodes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_dataset(tmp_path_factory.mktemp("episodes") / "data", (12, 60, 400))


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@contextlib.contextmanager
def started(*arguments: str) -> Iterator["subprocess.Popen[str]"]:
    """A `qvla run` in a process of its own, which does not outlive a failing test."""
    command = [sys.executable, "-c", "from qvla_export.cli import main; main()", "run", *arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_the_reference_policy_opens_the_drawer(tmp_path: Path) -> None:
    record = tmp_path / "run.jsonl"
    run = qvla(
        "run", REFERENCE, "--source", DRAWER, "--rate-hz", 40,
        "--simulated-time", "--record", record, "--json",
    )  # fmt: skip
    assert run.code == 0 and "the source has ended; task solved; " in run.err
    result = json.loads(run.out)
    assert (result["state"], result["ok"], result["solved"]) == ("stopped", True, True)
    assert result["counters"]["faults"] == 0
    lines = lines_of(record)
    assert sum(line["state"] == "running" for line in lines) < 110, "solved before the limit"
    assert lines[-1]["state"] == "stopped" and lines[-1]["action"][:3] == [0, 0, 0]
    assert lines[-1]["action"][3] == lines[-2]["action"][3], "the gripper stays as it is"
    assert all(np.abs(line["action"]).max() <= 1 for line in lines if line["action"])


@pytest.mark.parametrize("mode", ["receding", "ensemble"])
def test_a_scripted_policy_in_the_simulator_is_clamped(mode: str) -> None:
    policy = Pushing()
    options = RunOptions(
        "scripted", DRAWER, 40, mode, execute=4, limits="-1:1", simulated_time=True, seconds=1.0
    )
    result = run_policy(options, policy)
    assert result.ok and result.state is LoopState.STOPPED and result.solved is False
    # Slot 0 looks, the last is the safe action.
    assert (result.counters["sent"], result.counters["held"]) == (39, 1)
    assert result.counters["clamped_values"] == 39
    assert len(policy.seen) == 1 + (10 if mode == "receding" else 40), "and the warm-up"


def test_the_simulator_runs_in_real_time_with_inference_beside_it() -> None:
    options = RunOptions(
        "scripted", DRAWER, 20, limits="-1:1", max_action_age_ms=60_000, seconds=0.7
    )
    result = run_policy(options, Pushing())
    assert result.ok and result.counters["sent"] > 0


def test_a_remote_policy_on_an_episode(episodes: Path, tmp_path: Path) -> None:
    record = tmp_path / "run.jsonl"
    with open_server(EchoPolicy(OPENVLA), ServerSettings(port=0)) as url:
        run = qvla(
            "run", url, "--source", f"episode:{episodes}#1", "--rate-hz", 40, "--hold", "last",
            "--limits", "0:10,-1:2,-1:1,-1:1,-1:1,-1:1,-1:1", "--record", record, "--ramp-ms", 0,
            "--max-action-age-ms", 60_000,
        )  # fmt: skip
        assert run.code == 0 and "the source has ended" in run.out and "solved" not in run.out
        refused = qvla("run", url, "--source", f"episode:{episodes}#1", "--rate-hz", 40)
        assert "--hold last" in refused.error
        both = qvla(
            "run", url, "--source", DRAWER, "--rate-hz", 40, "--json", "--commands", "stdout"
        )
        assert "leave one out" in both.error
        missing = qvla("run", url, "--source", DRAWER, "--rate-hz", 40, "--hold", "last")
        assert "--limits" in missing.error
    actions = [line["action"] for line in lines_of(record) if line["state"] == "running"]
    assert actions and all(action[0] == 1 for action in actions), "the episode's red level"
    assert {action[1] for action in actions} <= {0, 1, 2}, "cut to the limit"


def test_an_engine_that_fails_ends_in_a_fault_and_says_so(episodes: Path) -> None:
    options = RunOptions(
        "echo", f"episode:{episodes}#2", 40, instruction="fail", hold="last", limits="-9:9",
        give_up_s=0.5, simulated_time=True,
    )  # fmt: skip
    result = run_policy(options, EchoPolicy(OPENVLA))
    assert result.state is LoopState.FAULT and result.counters["faults"] > 1
    assert result.counters["sent"] == 0


def test_nan_is_a_fault_and_never_sent(episodes: Path, tmp_path: Path) -> None:
    options = RunOptions(
        "echo", f"episode:{episodes}#0", 40, instruction="nan", hold="0", limits="-9:9",
        simulated_time=True, record=tmp_path / "run.jsonl",
    )  # fmt: skip
    result = run_policy(options, EchoPolicy(OPENVLA))
    assert not result.ok and result.counters["sent"] == 0
    assert "NaN" in lines_of(tmp_path / "run.jsonl")[2]["events"][0]


def test_a_signal_ends_with_the_safe_action(episodes: Path) -> None:
    options = [
        "--source", f"episode:{episodes}#2", "--rate-hz", "5", "--limits", "-9:9",
        "--hold", "0,0,last,last,last,last,last", "--safe", "0,0,0.5,hold,hold,hold,hold",
        "--ramp-ms", "600", "--commands", "stdout", "--max-action-age-ms", "60000",
    ]  # fmt: skip
    with (
        open_server(EchoPolicy(OPENVLA), ServerSettings(port=0)) as url,
        started(url, *options) as run,
    ):
        assert run.stdout is not None
        first = json.loads(run.stdout.readline())
        run.send_signal(signal.SIGTERM)
        out, err = run.communicate(timeout=60)
    commands = [first, *map(json.loads, out.splitlines())]
    assert run.returncode == 0, err
    assert "SIGTERM" in err and "faults 0" in err
    assert commands[0]["state"] == "running" and commands[-1]["state"] == "stopped"
    stopping = [c["action"] for c in commands if c["observed_s"] is None]
    assert len(stopping) == 3 and stopping[-1][:3] == [0.0, 0.0, 0.5]
    assert stopping[0][:2] == [0.0, 0.0] and stopping[0][2] != 0.5, "a ramp, not a jump"


def test_a_remote_client_behind_a_pipe() -> None:
    options = [
        "--source", "stdin", "--commands", "stdout", "--rate-hz", "20", "--limits", "-99:99",
        "--hold", "0", "--max-action-age-ms", "60000", "--give-up-s", "60",
    ]  # fmt: skip
    with (
        open_server(EchoPolicy(OPENVLA), ServerSettings(port=0)) as url,
        started(url, *options) as run,
    ):
        assert run.stdin is not None and run.stdout is not None
        for level in (30, 60):
            image = np.full((4, 4, 3), level, np.uint8)
            print(json_numpy.dumps({"image": image, "instruction": "go"}), file=run.stdin)
            run.stdin.flush()
            commands = (json.loads(line) for line in run.stdout)
            acted = next(c for c in commands if c["state"] == "running")
            assert acted["action"][0] == level
            held = next(c for c in commands if c["state"] == "holding")
            assert held["action"] == [0.0] * 7, "a paused client"
        out, _ = run.communicate(timeout=60)
    assert run.returncode == 0
    assert json.loads(out.splitlines()[-1])["state"] == "stopped"


class Remembering:
    """Says in each action which request and step it is of, and the state that it was shown."""

    contract = PolicyContract(("image",), 8, 4, 4, "test")

    def __init__(self) -> None:
        self.requests = 0

    def infer(self, observation: Observation) -> ActionChunk:
        time.sleep(0.06)  # so that commands are sent meanwhile
        actions = np.zeros((8, 4), np.float32)
        actions[:, 0] = 1 + np.arange(8) + 0.25 * self.requests
        actions[:, 1], actions[:, 2] = self.requests, np.arange(8)
        actions[:, 3] = observation.state[0]
        self.requests += 1
        return ActionChunk(actions, actions)


def test_a_remote_policy_is_shown_the_state_ahead() -> None:
    """Over HTTP, in real time: whatever came when, the state shown is the one commands lead to."""
    options = [
        "--source", "stdin", "--commands", "stdout", "--rate-hz", "40", "--limits", "-99:99",
        "--hold", "0,last,last,last", "--max-action-age-ms", "60000", "--give-up-s", "60",
        "--execute", "4", "--roll-forward", "0.5,stays,stays,stays",
    ]  # fmt: skip
    fields = {"image": np.zeros((4, 4, 3), np.uint8), "instruction": "go", "state": np.zeros(4)}
    sent: list[dict] = []
    with (
        open_server(Remembering(), ServerSettings(port=0)) as url,
        started(url, *options) as run,
    ):
        assert run.stdin is not None and run.stdout is not None
        while not sent or sent[-1]["action"][1] < 8:
            print(json_numpy.dumps(fields), file=run.stdin)
            run.stdin.flush()
            command = json.loads(run.stdout.readline())
            if command["state"] == "running":
                sent.append(command)
        run.communicate(timeout=60)
    foreseen = 0
    requests = [command["action"][1] for command in sent]
    for request in sorted(set(requests)):
        number = requests.index(request)
        first = number - int(sent[number]["action"][2])
        since = [c["action"][0] for c in sent[:first] if c["sent_s"] > sent[number]["observed_s"]]
        assert sent[number]["action"][3] == pytest.approx(0.5 * sum(since), rel=1e-5)
        foreseen += bool(since)
    assert foreseen > 3


def test_a_camera_needs_names_an_instruction_and_no_state(tmp_path: Path) -> None:
    cv2 = pytest.importorskip("cv2")
    policy = EchoPolicy(OPENVLA)
    video = tmp_path / "camera.avi"
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 48))
    for _ in range(3):
        writer.write(np.full((48, 64, 3), 9, np.uint8))
    writer.release()
    source = f"camera:{video}"
    options = RunOptions("echo", source, 20, hold="last", limits="-99:99", seconds=0.5)
    with pytest.raises(QvlaError, match="--instruction"):
        run_policy(options, policy)
    wanted = RunOptions(**{**vars(options), "instruction": "look", "give_up_s": 5.0})
    run_policy(wanted, policy)
    with pytest.raises(QvlaError, match="has cameras"):
        run_policy(RunOptions(**{**vars(wanted), "source": f"camera:hand={video}"}), policy)
    with pytest.raises(QvlaError, match="state"):
        run_policy(RunOptions(**{**vars(wanted), "limits": "-1:1"}), Pushing())
    assert not [t for t in threading.enumerate() if t.name.startswith("qvla-")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "video:x"}, "simulator:TASK"),
        ({"source": "simulator:"}, "simulator:TASK"),
        ({"source": "simulator:juggle"}, "juggle"),
        ({"source": "episode:nowhere", "hold": "0"}, "#0"),
        ({"rate_hz": 0.0}, "--rate-hz"),
        ({"hold": "stay"}, "--hold takes"),
        ({"hold": "0,0"}, "1 or 4"),
        ({"safe": "0,0,7,0"}, "inside the limits"),
        ({"limits": "1:-1"}, "ordered"),
        ({"limits": "low:high"}, "--limits takes"),
        ({"max_step": "0"}, "step"),
        ({"seam_limit": "none"}, "--seam-limit takes numbers or any"),
        ({"seam_limit": "0"}, "above 0"),
        ({"seam_limit": "1", "mode": "ensemble"}, "no seams"),
        ({"roll_forward": "far"}, "--roll-forward takes numbers or position or stays"),
        ({"roll_forward": "1,1"}, "1 or 4"),
        ({"roll_forward": "inf"}, "a number for each"),
        ({"roll_forward": "1", "response": "soon"}, "--response takes numbers, got"),
    ],
)
def test_impossible_options_are_refused_before_anything_moves(changes, message: str) -> None:
    base = {"policy": "x", "source": DRAWER, "rate_hz": 10.0, "limits": "-1:1"}
    with pytest.raises(QvlaError, match=message):
        run_policy(RunOptions(**{**base, **changes}), Pushing())


def test_a_state_that_no_action_reaches_is_not_rolled(episodes: Path) -> None:
    options = RunOptions(
        "x", f"episode:{episodes}#0", 10, hold="last", limits="-9:9", roll_forward="position"
    )
    with pytest.raises(QvlaError, match="takes none"):
        run_policy(options, EchoPolicy(OPENVLA))
    policy = Pushing()
    policy.contract = replace(Pushing.contract, state_dim=2)
    with pytest.raises(QvlaError, match="the state has 2; say stays"):
        run_policy(options, policy)


def test_an_episode_that_is_not_there_is_named(episodes: Path) -> None:
    options = RunOptions("x", f"episode:{episodes}#7", 10, hold="last", limits="-1:1")
    with pytest.raises(QvlaError, match="episodes 0 to 2"):
        run_policy(options, Pushing())


def test_vectors_of_options() -> None:
    assert parse_vector("0.5", 3, "--x").tolist() == [0.5, 0.5, 0.5]
    assert np.isnan(parse_vector("0, last,hold", 3, "--x")).tolist() == [False, True, True]
