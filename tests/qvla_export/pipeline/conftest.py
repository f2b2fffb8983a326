"""What tests of forecasts share."""

import pytest
from forecast_rates import RATES


@pytest.fixture
def known_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes known rates for the machine's: measuring them, and tracing, takes seconds."""
    forecast = "qvla_export.pipeline.sizing.forecast"
    monkeypatch.setattr(f"{forecast}.measure_machine", lambda *_: RATES)
    monkeypatch.setattr(f"{forecast}.measure_tracing", lambda *_: None)
