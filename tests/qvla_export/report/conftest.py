"""What tests of a report's words and tables share."""

import pytest


@pytest.fixture
def empty_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves figures out of a page, which take most of its seconds."""
    for module in ("figures", "result_figures", "traces"):
        monkeypatch.setattr(f"qvla_export.report.{module}.to_svg", lambda *_: "<svg></svg>")
