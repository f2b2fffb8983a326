"""Errors worth catching. Every message says the rule, the value and the remedy.

QvlaError (ValueError)
├── CheckpointError      a checkpoint's files or keys do not fit the policy family
├── StatisticsError      an un-normalization key or its statistics are missing
├── ArtifactError        an artifact is damaged, truncated or of another format
│   └── ArtifactMismatch two artifacts do not belong together
│       └── PlanMismatch a bit plan was made for another policy
├── FinishedWork         what took long would be thrown away
└── InvalidObservation   an observation breaks the policy's contract
"""


class QvlaError(ValueError):
    """Base of all errors a user can mend; the command line prints it without a traceback."""


class CheckpointError(QvlaError):
    """A checkpoint's files or keys do not fit the policy family."""


class StatisticsError(QvlaError):
    """An un-normalization key or its statistics are missing."""


class ArtifactError(QvlaError):
    """An artifact is damaged, truncated or of another format."""


class ArtifactMismatch(ArtifactError):
    """Two artifacts do not belong together."""


class PlanMismatch(ArtifactMismatch):
    """A bit plan was made for another policy."""


class FinishedWork(QvlaError):
    """Work that took long would be replaced, which only `--force` does."""


class InvalidObservation(QvlaError):
    """An observation breaks the policy's contract."""
