"""What `/metrics` shows, as Prometheus reads it, and what is counted there."""

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from jetson.serving.request_observer import ServedRequest
from qvla_export.shared.action import ActionChunk

CHUNK = ActionChunk(np.zeros((4, 7), np.float32), np.zeros((4, 7), np.float32))
TOKEN = "correct-horse-battery"


def samples(page: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """(name, labels) -> value of everything on the page, as Prometheus parses it."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


def acted(**timing_ms: float) -> ServedRequest:
    return ServedRequest(None, CHUNK, timing_ms)
