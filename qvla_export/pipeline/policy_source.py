"""Open a policy of any kind: a checkpoint, a bundle, a baseline, a running server."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qvla_export.policies.adapters import model_config
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.target import Runtime, WeightForm

if TYPE_CHECKING:
    from qvla_export.policies.base import Policy
    from qvla_export.shared.action import ActionPolicy


@dataclass(frozen=True)
class PolicySource:
    """Where a policy is; picklable, so that worker processes open it themselves."""

    # Checkpoint folder, bundle folder, folder of a `qvla baseline`, or URL of `qvla serve`.
    place: str
    unnorm_key: str | None = None
    preset: str | None = None
    # CPU threads; None for the runtime's own choice.
    threads: int | None = None
    # Of a bundle: compute with the stored codes, make them float32 at load, or as tuned.
    weights: WeightForm = "packed"
    # Of a bundle: None for its target's own; "ort" executes its graphs on a CPU.
    runtime: Runtime | None = None
    # Of a checkpoint: False leaves its weights on disk; it can be exported only.
    resident: bool = True
    # Of a baseline: the checkpoint that it quantizes.
    checkpoint: str | None = None

    @property
    def kind(self) -> str:
        """ "server", "bundle", "checkpoint" or "baseline"."""
        if self.place.startswith(("http://", "https://")):
            return "server"
        if (Path(self.place) / "manifest.json").is_file():
            return "bundle"
        if model_config(Path(self.place)).is_file():
            return "checkpoint"
        if (Path(self.place) / "baseline.json").is_file():
            return "baseline"
        raise QvlaError(
            f"{self.place!r} is neither a checkpoint folder (config.json), a bundle folder "
            "(manifest.json), a baseline (baseline.json) nor the URL of a server"
        )

    def describe(self) -> str:
        """Say in one line what a checkpoint was found to be, and what is assumed of it.

        Raises:
            QvlaError: it is no checkpoint.
            CheckpointError, ArtifactError, StatisticsError: as `describe_checkpoint`.
        """
        from qvla_export.policies.families import describe_checkpoint

        _require_checkpoint(self)
        return describe_checkpoint(Path(self.place), self.unnorm_key, self.preset)

    def __call__(self) -> "ActionPolicy":
        """Open the policy."""
        kind = self.kind
        if kind == "server":
            from jetson.clients.http_client import RemotePolicy

            return RemotePolicy(self.place)
        if kind == "bundle":
            from jetson.policy import open_bundle

            return open_bundle(self.place, self.threads, self.weights, self.runtime)
        if kind == "baseline":
            return self._open_baseline()
        import torch

        from qvla_export.policies.families import load_policy

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        return load_policy(Path(self.place), self.unnorm_key, self.preset, self.resident)

    def digest(self, policy: "ActionPolicy") -> str:
        """Return the digest of the checkpoint or bundle behind an opened policy."""
        if self.kind == "server":
            from jetson.serving.policy_contract import contract_of

            return contract_of(policy).bundle_digest
        if self.kind == "bundle":
            from qvla_export.shared.bundle import Bundle

            return Bundle.load(Path(self.place)).digest
        if self.kind == "baseline":
            from qvla_export.baselines.baseline import Baseline

            return Baseline.load(Path(self.place)).digest
        return str(getattr(policy, "digest"))  # noqa: B009  # not part of the ActionPolicy protocol

    def _open_baseline(self) -> "ActionPolicy":
        from qvla_export.baselines.applied import BaselineSource

        if self.checkpoint is None:
            raise QvlaError(
                f"{self.place} is a baseline, which runs in the policy that it quantizes: "
                "qvla evaluate takes it with --checkpoint"
            )
        quantized = replace(self, place=self.checkpoint, checkpoint=None)
        if quantized.kind != "checkpoint":
            raise QvlaError(f"{self.checkpoint} must be a checkpoint, it is a {quantized.kind}")
        return BaselineSource(quantized, Path(self.place))()


def open_checkpoint(
    place: Path, unnorm_key: str | None = None, preset: str | None = None, resident: bool = True
) -> "Policy":
    """Load a checkpoint folder on the host; `resident` False leaves its weights on disk.

    Raises:
        QvlaError: it is no checkpoint.
    """
    from qvla_export.policies.families import load_policy

    _require_checkpoint(PolicySource(str(place)))
    return load_policy(place, unnorm_key, preset, resident)


def _require_checkpoint(source: PolicySource) -> None:
    if source.kind != "checkpoint":
        raise QvlaError(f"{source.place} must be a checkpoint folder, it is a {source.kind}")
