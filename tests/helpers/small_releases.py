"""Bundles of one sum, their releases, and a host that signs and publishes them."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from tuf.api.metadata import Metadata, MetaFile, TargetFile, Targets

from engines.targets import CPU
from jetson.install.installation import Installed, InstallRequest, install
from jetson.install.release import Release, ReleaseLimits
from jetson.install.store import Store
from jetson.install.store_state import StoreState
from qvla_export.graph.bundle_writer import BundleContents, write_bundle
from qvla_export.pipeline.release.create import create
from qvla_export.pipeline.release.keys import KeyPolicy, KeyRing, new_keys
from qvla_export.pipeline.release.publish import Published, PublishRequest, publish
from qvla_export.pipeline.release.repository import Repository
from qvla_export.pipeline.release.sign import SignedRelease, SignRequest, sign
from qvla_export.policies.base import Policy
from qvla_export.shared.artifacts import write_bytes
from qvla_export.shared.bundle import Bundle, Golden
from qvla_export.shared.observation import Observation
from qvla_export.shared.part import Part, TensorSpec
from qvla_export.shared.program import Program

_FLOAT = ir.DataType.FLOAT
_HORIZON, _WIDTH = 4, 4
MACHINE, BOOT = "this-machine", "this-boot"


def sum_bundle(
    policy: Policy,
    path: Path,
    offset: float = 0.0,
    wrong_by: float = 0.0,
    table: int = 4096,
    target: str = CPU.name,
    servable: bool = False,
) -> Bundle:
    """Write a bundle whose actions are its state plus an offset.

    Args:
        policy: whose processor makes a state of four numbers.
        path: the folder.
        offset: also changes a hundredth of the graph's table of numbers.
        wrong_by: what the golden actions are off what the graph computes.
        table: numbers in the graph that nothing depends on.
        target: of the bundle.
        servable: the graph takes all that the processor makes, not the state alone.
    """
    seen = Observation({"image": np.zeros((28, 28, 3), np.uint8)}, "push it", np.full(4, 0.25))
    feeds = policy.processor.feeds(seen)
    if not servable:
        feeds = {"state": feeds["state"]}
    actions = np.repeat(feeds["state"][:, None], _HORIZON, axis=1) + np.float32(offset)
    part = Part(
        "policy",
        tuple(
            # Sentences differ in length.
            TensorSpec(name, str(feed.dtype), (1, "length") if name == "input_ids" else feed.shape)
            for name, feed in feeds.items()
        ),
        (TensorSpec("actions", "float32", (1, _HORIZON, _WIDTH)),),
    )
    contents = BundleContents(
        target=target,
        processor=policy.processor,
        inputs=part.inputs,
        outputs=part.outputs,
        parts=(part,),
        program=Program.straight(["policy"]),
        golden=Golden((feeds,), actions + np.float32(wrong_by), actions),
        policy_digest="0" * 64,
        weight_bytes={"rest": 0},
    )
    model = _sum(part.inputs, offset, table)
    return write_bundle(path, contents, lambda folder: ir.save(model, folder / part.model))


def _sum(inputs: Sequence[TensorSpec], offset: float, table: int) -> ir.Model:
    tape = ir.tape.Tape()
    feeds = {
        one.name: ir.val(one.name, ir.DataType.from_numpy(np.dtype(one.dtype)), one.shape)
        for one in inputs
    }
    numbers = np.random.default_rng(0).normal(size=table).astype(np.float32)
    numbers[:: max(1, table // 40)] += np.float32(offset)
    constants = {
        "table": numbers,
        "zero": np.zeros(1, np.float32),
        "offset": np.full((1, _HORIZON, _WIDTH), offset, np.float32),
        "axis": np.array([1], np.int64),
        "all": np.array([0], np.int64),
    }
    values = {
        name: tape.initializer(ir.Tensor(value, name=name)) for name, value in constants.items()
    }
    mean = tape.op("ReduceMean", [values["table"], values["all"]], {"keepdims": 0})
    nothing = tape.op("Mul", [mean, values["zero"]])
    row = tape.op("Unsqueeze", [feeds["state"], values["axis"]])
    moved = tape.op("Add", [row, values["offset"]])
    actions = tape.op("Add", [moved, nothing])
    actions.name, actions.dtype = "actions", _FLOAT
    actions.shape = ir.Shape((1, _HORIZON, _WIDTH))
    graph = ir.Graph(
        list(feeds.values()), [actions], nodes=tape.nodes, initializers=tape.initializers,
        opset_imports={"": 21}, name="policy",
    )  # fmt: skip
    return ir.Model(graph, ir_version=10)


@dataclass(frozen=True)
class Host:
    """Where releases are made: keys, a repository, release folders."""

    root: Path
    policy: KeyPolicy = field(default_factory=lambda: KeyPolicy(root_keys=2, root_threshold=2))

    @property
    def keys(self) -> Path:
        return self.root / "keys"

    @property
    def repository(self) -> Repository:
        return Repository(self.root / "repository")

    @property
    def anchor(self) -> Path:
        return self.keys / "1.root.json"

    @staticmethod
    def new(root: Path, **policy: Any) -> "Host":
        root.mkdir(parents=True, exist_ok=True)
        host = Host(root, KeyPolicy(**{"root_keys": 2, "root_threshold": 2, **policy}))
        new_keys(host.keys, host.policy)
        return host

    def create(self, bundle: Path, name: str, **limits: Any) -> Path:
        folder = self.root / f"release-{name}"
        create(
            bundle, folder, name, limits.pop("minimum_runtime", "0.1.0"), ReleaseLimits(**limits)
        )
        return folder

    def sign(self, folder: Path, **request: Any) -> SignedRelease:
        return sign(folder, self.repository, self.keys, SignRequest(**request))

    def publish(self, folder: Path | None = None, **request: Any) -> Published:
        return publish(self.repository, self.keys, PublishRequest(folder, **request))

    def release(self, bundle: Path, name: str, group: str = "", **limits: Any) -> Release:
        """Create, sign and publish."""
        folder = self.create(bundle, name, **limits)
        self.sign(folder, group=group)
        self.publish(folder, group=group)
        return Release.load(folder)

    @property
    def ring(self) -> KeyRing:
        return KeyRing.load(self.keys)

    def copy(self, root: Path) -> "Host":
        shutil.copytree(self.root, root, dirs_exist_ok=True)
        return Host(root, self.policy)


@dataclass(frozen=True)
class Robot:
    """A store and the repository it is told of."""

    store: Store
    repository: str
    anchor: Path
    target: str = CPU.name

    @staticmethod
    def of(host: Host, root: Path, place: str | None = None) -> "Robot":
        return Robot(Store(root), place or str(host.repository.root), host.anchor)

    def install(
        self, release: str | None = None, groups: tuple[str, ...] | None = None
    ) -> Installed:
        request = InstallRequest(self.repository, self.target, self.anchor, release, groups)
        with self.store.open():
            return install(self.store, request)

    def pass_check(self, digest: str, machine: str = MACHINE) -> None:
        """Say that a release acted as it must, without running it."""
        with self.store.open():
            state = StoreState.load(self.store)
            state.with_release(digest, standing="checked", machine=machine).save(self.store)

    def state(self) -> StoreState:
        return StoreState.load(self.store)


def vouch(host: Host, files: dict[str, bytes], custom: dict[str, Any]) -> None:
    """Publish any files with the host's own keys: what a careless or wicked engineer could sign."""
    repository, ring = host.repository, host.ring
    offers = repository.offers()
    assert offers is not None
    targets = Targets.from_dict(offers.signed.to_dict())
    targets.version += 1
    for name, data in files.items():
        write_bytes(repository.targets / name, data)
        extra = {"custom": custom} if name.startswith("releases/") else None
        digest = hashlib.sha256(data).hexdigest()
        targets.targets[name] = TargetFile(len(data), {"sha256": digest}, name, extra)
    publish_list(host, sign_as(ring, "targets", targets))


def publish_list(host: Host, targets: Metadata[Targets]) -> None:
    """Say that a list is the newest."""
    repository, ring = host.repository, host.ring
    snapshot, timestamp = repository.snapshot(), repository.timestamp()
    assert snapshot is not None and timestamp is not None
    version = targets.signed.version
    (repository.metadata / f"{version}.targets.json").write_bytes(targets.to_bytes())
    snapshot.signed.version += 1
    snapshot.signed.meta["targets.json"] = MetaFile(version)
    name = f"{snapshot.signed.version}.snapshot.json"
    signed = sign_as(ring, "snapshot", snapshot.signed)
    (repository.metadata / name).write_bytes(signed.to_bytes())
    timestamp.signed.version += 1
    timestamp.signed.snapshot_meta = MetaFile(snapshot.signed.version)
    signed = sign_as(ring, "timestamp", timestamp.signed)
    (repository.metadata / "timestamp.json").write_bytes(signed.to_bytes())


def sign_as(ring: KeyRing, role: str, signed: Any) -> Metadata[Any]:
    metadata = Metadata(signed)
    for signer in ring.require_signers(role):
        metadata.sign(signer, append=True)
    return metadata


def change_metadata(path: Path, change: Any) -> None:
    """Change a file of signed metadata, its signatures left as they were."""
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
