"""The playbook for those who drive their fleet with Ansible: its gate counts who is not reached."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

PLAYBOOK = ROOT / "examples" / "ansible" / "push.yml"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("ansible-playbook") is None, reason="no ansible-playbook: ansible-core"
    ),
]


def run(folder: Path, playbook: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = ["ansible-playbook", "-i", str(folder / "inventory.ini"), str(playbook), *words]
    environment = {
        **os.environ,
        "ANSIBLE_HOME": str(folder / "home"),
        "ANSIBLE_SSH_ARGS": "-o ConnectTimeout=2 -o StrictHostKeyChecking=yes",
        "ANSIBLE_NOCOLOR": "1",
        "ANSIBLE_LOCALHOST_WARNING": "0",
        "ANSIBLE_DEVEL_WARNING": "0",
    }
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def reached(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("arm-*")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve robots on this machine, in waves of 1, 2 and 9; what each would say."""
    program = tmp_path / "qvla-of"
    program.write_text(
        f"#!{sys.executable}\n"
        "import json, pathlib, sys\n"
        "name, standing, *words = sys.argv[1:]\n"
        "(pathlib.Path(sys.argv[0]).parent / name).write_text(json.dumps(words))\n"
        "print(json.dumps({'ok': standing == 'proven', 'standing': standing, 'changed': True}))\n"
        "sys.exit(0 if standing == 'proven' else 2)\n"
    )
    program.chmod(0o755)
    return tmp_path


def inventory(folder: Path, **others: str) -> None:
    lines = ["[robots]"]
    for i in range(1, 13):
        name = f"arm-{i:02d}"
        how = others.get(name.replace("-", "_"), "proven")
        qvla = f'qvla_command="{folder}/qvla-of {name} {how}"'
        connection = "ansible_connection=local"
        if how == "gone":
            connection = "ansible_host=127.0.0.1 ansible_port=9"
        lines.append(f"{name} {connection} ansible_python_interpreter={sys.executable} {qvla}")
    (folder / "inventory.ini").write_text("\n".join(lines) + "\n")


def test_it_is_a_playbook(folder: Path) -> None:
    inventory(folder)
    done = run(folder, PLAYBOOK, "--syntax-check")
    assert done.returncode == 0, done.stderr


def test_all_waves_pass_where_every_robot_is_healthy(folder: Path) -> None:
    inventory(folder)
    done = run(folder, PLAYBOOK, "-e", "repository=https://host/r", "-e", "release=pick-a")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(reached(folder)) == 12
    words = json.loads((folder / "arm-12").read_text())
    assert words[:4] == ["robot", "update", "--from", "https://host/r"]
    assert words[-3:] == ["--proven-within", "300", "pick-a"]


@pytest.mark.parametrize("how", ["gone", "failed"])
def test_one_that_is_not_reached_or_not_healthy_stops_the_wave(folder: Path, how: str) -> None:
    inventory(folder, arm_03=how)
    done = run(folder, PLAYBOOK, "-e", "repository=https://host/r")
    assert done.returncode != 0
    assert reached(folder) - {"arm-03"} == {"arm-01", "arm-02"}


def test_without_the_gate_a_robot_that_is_not_reached_goes_unnoticed(folder: Path) -> None:
    # What the gate is for: the day this fails, Ansible counts them itself.
    inventory(folder, arm_03="gone")
    text = PLAYBOOK.read_text()
    play = text[: text.index('    - name: "The gate')].replace(
        "      ignore_unreachable: true\n", ""
    )
    (folder / "push.yml").write_text(play)
    done = run(folder, folder / "push.yml", "-e", "repository=https://host/r")
    assert len(reached(folder)) == 11, done.stdout
