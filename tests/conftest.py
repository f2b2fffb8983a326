"""Shared fixtures: a tiny untrained OpenVLA-OFT policy and random observations for it."""

import gc
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from certificates import write_certificates
from hypothesis import settings
from made_once import made_once
from oracles import ReadingReport, oracle_root, watch_reading
from tiny_policy import tiny_observations as make_tiny_observations
from tiny_policy import write_tiny_checkpoint

from qvla_export.policies.oft.policy import OftPolicy, load_oft_policy
from qvla_export.shared.observation import Observation

if TYPE_CHECKING:
    from command_runs import Inputs, Outcome

# Processes that tests start take one thread each, as tests do.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# How long an example takes depends on what else the machine does.
# A change is judged on the same examples every time; new ones are sought where people work.
settings.register_profile("qvla", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("qvla")


def pytest_configure(config: pytest.Config) -> None:
    """Say at the end which golden files were read."""
    watch_reading()
    config.pluginmanager.register(ReadingReport())


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order modules so that workers end together: a module stays in one of them.

    Those of whole pipelines are begun first; of the others, the largest are.
    """
    wholes = {"pipeline", "cli", "end_to_end"}
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (wholes.isdisjoint(item.path.parts), -tests[item.path]))


def pytest_collection_finish() -> None:
    """Leave what thousands of tests and their modules are made of out of every later collection.

    Measuring memory collects first, and took most of a second each time.
    """
    if "qvla_export.graph.float_graph" in sys.modules:
        from traced_graphs import keep_graphs

        keep_graphs()
    gc.collect()
    gc.freeze()


def pytest_runtest_setup() -> None:
    """Give torch one thread; a command under test may have changed that.

    Threads of several processes that spin for each other on shared cores take fifty times as
    long, and sums in another order are not bit for bit the same.
    """
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a seeded, untrained OFT checkpoint with every layer 64 or 128 wide."""
    folder = made_once(
        tmp_path_factory, "tiny", lambda new: write_tiny_checkpoint(new / "checkpoint")
    )
    return folder / "checkpoint"


@pytest.fixture(scope="session")
def tiny_policy(tiny_checkpoint: Path) -> OftPolicy:
    """The tiny checkpoint, loaded. Shared by the session: leave its weights as they were."""
    return load_oft_policy(tiny_checkpoint)


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CA, a server certificate for loopback and a client certificate; and another CA's client."""
    return write_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def trt_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for a module's bundles and engines, and the key that seals them."""
    root = tmp_path_factory.mktemp("trt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(root / "state"))
        yield root


@pytest.fixture(scope="session")
def tiny_observations() -> Callable[..., list[Observation]]:
    """Return `make(count, seed=0)`: random observations that the tiny policy takes."""
    return make_tiny_observations


@pytest.fixture(scope="session")
def pristine_report_run(
    tiny_policy: OftPolicy,
    tiny_observations: Callable[..., list[Observation]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Run folder of the tiny policy with all that a report shows. Copy it before changing it."""
    from report_runs import make_report_run

    folder = made_once(
        tmp_path_factory,
        "report",
        lambda new: make_report_run(tiny_policy, tiny_observations(2), new / "run"),
    )
    return _own_copy(folder / "run", tmp_path_factory)


@pytest.fixture(scope="session")
def inputs(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> "Inputs":
    """A checkpoint and a data set for commands."""
    from command_runs import Inputs
    from small_datasets import write_small_dataset

    folder = made_once(
        tmp_path_factory, "cli", lambda new: write_small_dataset(new / "demos", [6] * 10)
    )
    return Inputs(tiny_checkpoint, folder / "demos")


@pytest.fixture(scope="session")
def deployed(inputs: "Inputs", tmp_path_factory: pytest.TempPathFactory) -> "tuple[Path, Outcome]":
    """Run folder that `qvla deploy` made, and what it said. Copy it before changing it."""
    from command_runs import Outcome

    def deploy(new: Path) -> None:
        said = asdict(inputs.deploy(new / "run"))
        (new / "said.json").write_text(json.dumps(said))

    folder = made_once(tmp_path_factory, "deployed", deploy)
    made, own = folder / "run", _own_copy(folder / "run", tmp_path_factory)
    # Whoever writes the report again writes the recommendation too, with the copy's commands.
    recommendation = own / "recommendation.json"
    recommendation.write_text(recommendation.read_text().replace(str(made), str(own)))
    said = json.loads((folder / "said.json").read_text())
    texts = {name: said[name].replace(str(made), str(own)) for name in ("out", "err")}
    return own, Outcome(**(said | texts))


def _own_copy(run: Path, factory: pytest.TempPathFactory) -> Path:
    """Copy a run for this process: commands write into it what they say anew."""
    return shutil.copytree(run, factory.mktemp("own") / run.name)


@pytest.fixture(scope="session")
def oracles() -> Path:
    """Folder of golden data: see `oracle_root`."""
    return oracle_root()
