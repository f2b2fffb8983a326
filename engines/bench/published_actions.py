"""What others publish of an action on a Jetson AGX Orin; shown beside predictions, never fitted on.

Three quarters of such gains over eager torch are the compiled graph's and one quarter precision's
(FoldQuantVLA's control arms, arXiv 2609.24433), so a prediction has its own float graph beside it.
"""

from dataclasses import dataclass

from qvla_export.shared.target import Target


@dataclass(frozen=True)
class PublishedAction:
    """One published latency of an action, of another policy and runtime than predicted."""

    policy: str
    weights: str
    low_ms: float
    high_ms: float
    # Who says so, and of what.
    source: str

    def __str__(self) -> str:
        ms = f"{self.low_ms:.0f}"
        if round(self.high_ms) != round(self.low_ms):
            ms += f" to {self.high_ms:.0f}"
        return f"published, AGX Orin 64 GB: {self.policy}, {self.weights}, {ms} ms ({self.source})"


_ORIN = (
    PublishedAction("pi0.5", "INT8", 124.0, 125.99, "FlashRT, two cameras; pi.cpp, TensorRT 10.3"),
    PublishedAction("GR00T N1.7", "W8A8", 56.7, 56.7, "ApxInf, one view, preprocessing left out"),
    PublishedAction("SmolVLA", "width not stated", 67.4, 67.4, "ApxInf, preprocessing left out"),
    PublishedAction("OpenVLA-7B", "INT4", 336.0, 375.0, "jetson-ai-lab, MLC; SQIL, ICCV 2025"),
)


def published_actions(target: Target) -> tuple[PublishedAction, ...]:
    """Return what is published of a target's device; nothing where nothing is known."""
    return _ORIN if target.name.startswith("orin") else ()
