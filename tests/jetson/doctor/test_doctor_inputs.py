"""`qvla doctor` on checkpoints, data sets, LIBERO's versions, the server; and as a command."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from command_runs import qvla
from house import HOST_ONLY
from robot_runs import run_on_robot
from safetensors.torch import load_file, save_file
from small_datasets import write_small_dataset

from jetson.board.state import UNKNOWN, ClockState
from jetson.doctor.column_proposals import propose_columns
from jetson.doctor.finding import BoardFinding
from jetson.doctor.libero import check_libero
from jetson.doctor.machine import Machine
from jetson.doctor.observations import (
    DatasetFacts,
    Needs,
    check_cameras,
    check_columns,
    check_dataset,
)
from jetson.doctor.server_facts import check_port, check_token, read_serving
from jetson.doctor.statistics import check_config, check_key, check_stored, read_checkpoint
from qvla_export.policies.families import load_policy
from qvla_export.shared.artifacts import read_json, write_json
from qvla_export.shared.errors import CheckpointError


class TestCheckpoint:
    @pytest.fixture
    def folder(self, tiny_checkpoint: Path, tmp_path: Path) -> Path:
        """A checkpoint with the statistics of two data sets."""
        folder = tmp_path / "checkpoint"
        folder.mkdir()
        for name in ("config.json", "qvla_policy.json", "dataset_statistics.json"):
            shutil.copy(tiny_checkpoint / name, folder)
        # Without a head it would be OpenVLA's, which needs no description.
        for head in tiny_checkpoint.glob("action_head--*"):
            shutil.copy(head, folder)
        table = read_json(folder / "dataset_statistics.json", "statistics")
        both = {"libero_goal_no_noops": table["tiny"], "libero_spatial_no_noops": table["tiny"]}
        write_json(folder / "dataset_statistics.json", both)
        return folder

    def test_the_only_key_needs_no_choice(self, tiny_checkpoint: Path) -> None:
        facts = read_checkpoint(tiny_checkpoint, None)
        assert check_key(facts).severity == check_config(facts).severity == "ok"

    def test_keys_that_exist_are_listed_the_nearest_first(self, folder: Path) -> None:
        finding = check_key(read_checkpoint(folder, "libero_spatial"))
        assert finding.severity == "error"
        assert finding.remedy == (
            "--unnorm-key libero_spatial_no_noops or --unnorm-key libero_goal_no_noops"
        )
        assert finding.wanted == "one of libero_goal_no_noops, libero_spatial_no_noops"
        missing = check_key(read_checkpoint(folder, None))
        assert "holds several data sets" in missing.observed and missing.remedy
        assert check_key(read_checkpoint(folder, "libero_goal_no_noops")).severity == "ok"

    def test_statistics_in_the_configuration_are_read(self, folder: Path) -> None:
        table = read_json(folder / "dataset_statistics.json", "statistics")
        (folder / "dataset_statistics.json").unlink()
        finding = check_key(read_checkpoint(folder, None))
        assert "rsync" in finding.remedy
        config = read_json(folder / "config.json", "configuration")
        write_json(folder / "config.json", {**config, "norm_stats": table})
        assert check_key(read_checkpoint(folder, "libero_goal_no_noops")).severity == "ok"
        assert "--unnorm-key" in check_key(read_checkpoint(folder, None)).remedy

    def test_a_policy_nobody_describes_needs_a_preset(self, folder: Path) -> None:
        (folder / "qvla_policy.json").unlink()
        for preset in (None, "kuka"):
            finding = check_config(read_checkpoint(folder, None, preset))
            assert "--preset aloha|bridge|libero" in finding.remedy
        facts = read_checkpoint(folder, "libero_goal_no_noops", "libero")
        assert check_config(facts).severity == "ok"
        # Seven actions, the statistics have four.
        assert check_key(facts).remedy.endswith("qvla_policy.json")
        table = read_json(folder / "dataset_statistics.json", "statistics")
        for name in ("q01", "q99", "mask"):
            table["libero_goal_no_noops"]["action"][name] = [1] * 14
            table["libero_goal_no_noops"]["proprio"][name] = [1] * 14
        write_json(folder / "dataset_statistics.json", table)
        facts = read_checkpoint(folder, "libero_goal_no_noops", "libero")
        assert check_key(facts).remedy.endswith("; --preset aloha has these")

    @pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[]", b"{}", b'{"a": 1}', b'{"a": {}}'])
    def test_hostile_statistics_are_an_error_with_a_remedy(
        self, folder: Path, content: bytes
    ) -> None:
        (folder / "dataset_statistics.json").write_bytes(content)
        for key in (None, "a", "b"):
            finding = check_key(read_checkpoint(folder, key))
            assert (finding.severity, bool(finding.remedy)) == ("error", True)
        (folder / "qvla_policy.json").write_bytes(content)
        assert check_config(read_checkpoint(folder, None)).severity == "error"

    def test_it_refuses_what_deploy_refuses(self, tiny_checkpoint: Path, tmp_path: Path) -> None:
        def finding(folder: Path) -> dict[str, str]:
            done = qvla("doctor", folder, "--json")
            found = {f["what"]: f for f in json.loads(done.out)["findings"]}
            return dict(found["parts of the checkpoint"])

        assert finding(tiny_checkpoint)["severity"] == "ok"
        both = qvla("doctor", tiny_checkpoint, "--checkpoint", tiny_checkpoint)
        assert "two checkpoints" in both.error
        folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))
        weights = load_file(folder / "model.safetensors")
        weights["projector.fc2.bias"][0] = np.nan
        save_file(weights, folder / "model.safetensors")
        (folder / "value_head--1_checkpoint.pt").write_bytes(b"")
        for rule in (
            "no part of this policy that is known",
            "projector.fc2.bias has weights that are NaN",
        ):
            with pytest.raises(CheckpointError, match=rule) as refused:
                load_policy(folder)
            assert finding(folder)["severity"] == "error"
            assert finding(folder)["observed"] == str(refused.value)
            assert finding(folder)["remedy"].startswith(f"{refused.value}; then look again: qvla")
            (folder / "value_head--1_checkpoint.pt").unlink(missing_ok=True)
        weights["projector.fc2.bias"][0] = 0
        save_file(weights, folder / "model.safetensors")
        (folder / "tokenizer.json").unlink()
        assert "has no tokenizer.json; add it" in finding(folder)["observed"]

    def test_where_torch_is_missing_it_says_so(self, folder: Path) -> None:
        assert check_stored(read_checkpoint(folder, None)).severity == "unknown"


class TestDataset:
    def test_cameras_and_sizes_are_compared(self) -> None:
        needs = Needs(("image",), state_dim=4, action_dim=4)
        facts = DatasetFacts(Path("d"), frames=3, cameras={"image": "c"}, state_dim=4, action_dim=4)
        assert check_columns(facts, needs).severity == "ok"
        other = replace(facts, cameras={"front": "observation.images.front"})
        finding = check_columns(other, needs)
        assert finding.remedy.endswith("--dataset d --camera image=observation.images.front")
        two = Needs(("full_image", "wrist_image"), state_dim=4, action_dim=4)
        named = replace(facts, cameras={"wrist": "images.wrist", "top": "images.top"})
        assert check_columns(named, two).remedy.endswith(
            "--camera full_image=images.top --camera wrist_image=images.wrist"
        )
        half = replace(facts, cameras={"full_image": "full_image", "hand": "hand"})
        assert check_columns(half, two).remedy.endswith(
            "--camera full_image=full_image --camera wrist_image=hand"
        )
        assert (
            "--state-column COLUMN, of" in check_columns(replace(facts, state_dim=9), needs).remedy
        )
        # Calibration needs no action; another one is named by its own option.
        assert check_columns(replace(facts, action_dim=0), needs).severity == "ok"
        assert (
            "action: --action-column" in check_columns(replace(facts, action_dim=7), needs).remedy
        )
        both = check_columns(replace(facts, state_dim=9, action_dim=7), needs).remedy
        assert "--state-column COLUMN and --action-column COLUMN" in both

    @pytest.mark.parametrize(
        ("needed", "present", "columns", "unused"),
        [
            (["full_image", "wrist_image"], ["image", "wrist_image"], ["image", "wrist_image"], []),
            (
                ["full_image", "left_wrist_image", "right_wrist_image"],
                ["cam_right_wrist", "cam_left_wrist", "cam_high"],
                ["cam_high", "cam_left_wrist", "cam_right_wrist"],
                [],
            ),
            (["full_image", "wrist"], ["hand", "agentview"], ["agentview", "hand"], []),
            (
                ["full_image", "wrist_image"],
                ["exterior_1_left", "exterior_2_left", "wrist_left"],
                [None, "wrist_left"],
                ["exterior_1_left", "exterior_2_left"],
            ),
            # A left camera is never a right one, and order says nothing.
            (["left_wrist"], ["right_wrist"], [None], ["right_wrist"]),
            (["left", "right"], ["cam0", "cam1"], [None, None], ["cam0", "cam1"]),
            (["left", "right"], ["cam0", "cam_right"], ["cam0", "cam_right"], []),
            (["a", "b"], ["a"], ["a", None], []),
        ],
    )
    def test_each_missing_camera_gets_a_column_of_its_own(
        self,
        needed: list[str],
        present: list[str],
        columns: list[str | None],
        unused: list[str],
    ) -> None:
        for names in (present, present[::-1]):
            proposal = propose_columns(needed, {name: f"images.{name}" for name in names})
            expected = [column and f"images.{column}" for column in columns]
            assert list(proposal.columns.items()) == list(zip(needed, expected, strict=True))
            assert sorted(proposal.unused) == [f"images.{name}" for name in unused]

    def test_what_names_do_not_say_is_left_to_the_user(self) -> None:
        facts = DatasetFacts(Path("d"), frames=3, cameras={"cam0": "c.0", "cam1": "c.1"})
        remedy = check_columns(facts, Needs(("left", "right"), 4, 4)).remedy
        assert "--camera left=COLUMN --camera right=COLUMN; COLUMN is one of c.0, c.1: " in remedy
        facts = replace(facts, cameras={"a": "c.a"})
        remedy = check_columns(facts, Needs(("a", "b"), 4, 4)).remedy
        assert "--camera a=c.a --camera b=COLUMN; the data set has no column left" in remedy

    def test_columns_are_named_as_everywhere(self, tmp_path: Path) -> None:
        write_small_dataset(tmp_path / "data", [3])
        command = ("doctor", "--dataset", tmp_path / "data", "--json")
        named = qvla(*command, "--camera", "wrist=observation.images.image")
        assert "wrist (observation.images.image)" in named.out
        assert "no nowhere; its keys are" in qvla(*command, "--state-column", "nowhere").out

    def test_it_is_read_where_its_library_is(self, tmp_path: Path, tiny_checkpoint: Path) -> None:
        write_small_dataset(tmp_path / "data", [3])
        done = qvla(
            "doctor", "--checkpoint", tiny_checkpoint, "--dataset", tmp_path / "data", "--json"
        )
        found = {f["what"]: f for f in json.loads(done.out)["findings"]}
        assert found["data set"]["observed"] == "3 frames"
        assert found["data set's cameras"]["severity"] == "ok"
        done = qvla("doctor", "--dataset", tmp_path, "--json")
        found = {f["what"]: f for f in json.loads(done.out)["findings"]}
        assert (done.code, found["data set"]["severity"]) == (2, "error")
        told = found["data set"]
        assert told["remedy"].startswith(f"{told['observed']}; to look into it: ls ")
        missing = DatasetFacts(tmp_path, "pyarrow is not installed", "pip install 'qvla[host]'")
        assert check_dataset(missing).severity == "unknown"


@pytest.mark.parametrize(
    ("package", "version", "severity"),
    [
        ("robosuite", "1.4.0", "ok"),
        ("robosuite", "1.4.1", "ok"),
        ("robosuite", "1.5.2", "error"),
        ("robosuite", None, "error"),
        ("mujoco", "3.3.7", "ok"),
        ("mujoco", "3.4.0", "error"),
        ("mujoco", "unreleased", "unknown"),
    ],
)
def test_libero_s_versions(package: str, version: str | None, severity: str) -> None:
    installed = {} if version is None else {package: version}
    assert check_libero(Machine(packages=installed), package, True).severity == severity
    assert check_libero(Machine(packages=installed), package, False).severity == "not applicable"
    there = Machine(packages={**installed, "hf-libero": "0.1.0"})
    assert check_libero(there, package, False).severity == severity


def test_a_token_must_be_a_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QVLA_TOKEN", raising=False)
    path = tmp_path / "my token"

    def finding(host: str = "127.0.0.1") -> BoardFinding:
        return check_token(read_serving(host, 0, path))

    assert finding().remedy == f"(umask 077; openssl rand -hex 32 > '{path}')"
    path.write_text("0123456789abcdef" * 2)
    path.chmod(0o644)
    assert finding().remedy == f"chmod 600 '{path}'"
    path.chmod(0o600)
    assert finding().severity == "ok"
    path.write_bytes(b"\xff\xff")
    assert finding().severity == "error"
    assert check_token(read_serving("127.0.0.1", 0, None)).severity == "not applicable"
    assert check_token(read_serving("0.0.0.0", 0, None)).severity == "error"
    monkeypatch.setenv("QVLA_TOKEN", "0123456789abcdef")
    assert check_token(read_serving("0.0.0.0", 0, None)).severity == "ok"


# None of them asks a name server: an address for documents, no text, too long for a name.
@pytest.mark.parametrize("host", ["203.0.113.7", "\udcff", "a" * 300])
def test_an_address_that_is_not_ours_is_named(host: str) -> None:
    finding = check_port(read_serving(host, 0, None))
    assert (finding.severity, bool(finding.remedy)) == ("error", True)


def test_the_command_prints_remedies_on_one_line_and_counts(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    done = qvla("doctor", tmp_path / "no bundle", "--checkpoint", tiny_checkpoint)
    assert done.code == 2
    assert f"rsync -a --checksum --delete HOST:RUN/settings/SETTING/bundle/ '{tmp_path}" in done.out
    assert "doctor: 1 error, " in done.out
    assert "  engines: " in done.out.split("not applicable here:")[1]
    fine = qvla("doctor", "--json")
    report = json.loads(fine.out)
    assert fine.code == 0 and report["format"] == "qvla.doctor/1"
    assert sum(report["counts"].values()) == len(report["findings"])


def test_cameras_are_listed_and_never_a_fault() -> None:
    machine = Machine(cameras=("/dev/video0",))
    assert check_cameras(machine, None).severity == "not applicable"
    finding = check_cameras(machine, Needs(("front", "wrist"), 4, 4))
    assert finding.observed == "the policy's: front, wrist; found /dev/video0"
    assert finding.severity == check_cameras(Machine(), Needs(("front",), 4, 4)).severity == "ok"


def test_the_command_runs_where_only_the_robot_s_libraries_are(tiny_checkpoint: Path) -> None:
    printed = run_on_robot(
        "-c",
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {sorted(HOST_ONLY)!r}:\n"
        "            raise ModuleNotFoundError(name, name=name.partition('.')[0])\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "from qvla_export.cli import main\n"
        f"sys.argv = 'qvla doctor --dataset d --checkpoint'.split() + [{str(tiny_checkpoint)!r}]\n"
        "main()",
    )
    assert "unknown: data set\n    pip install 'qvla[host]'" in printed
    assert "doctor: 0 error, " in printed


def test_a_server_says_at_its_start_what_makes_it_slow(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loose = ClockState("gpu", 306.0, 306.0, 1300.0, locked=False)
    slow = replace(UNKNOWN, l4t="36.4.3", clocks=(loose,), clocks_locked=False)
    monkeypatch.setattr("jetson.board.read_board_state", lambda: slow)
    monkeypatch.setattr("jetson.server.serve", lambda policy, settings: None)
    assert qvla("serve", tiny_checkpoint).code == 0
    [warned] = [r.getMessage() for r in caplog.records if "qvla doctor" in r.getMessage()]
    assert "clocks locked: gpu 306 to 1300 MHz (sudo jetson_clocks)" in warned
