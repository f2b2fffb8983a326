"""Fixtures of the tests of flashing: releases for every target, and a request to prepare a BSP."""

from pathlib import Path

import pytest
from small_bsp import new_bsp, runtime
from small_releases import Host, sum_bundle

from qvla_export.pipeline.flash.preparation import PrepareRequest
from qvla_export.policies.oft.policy import OftPolicy


@pytest.fixture(scope="session")
def published(tiny_policy: OftPolicy, tmp_path_factory: pytest.TempPathFactory) -> Host:
    host = Host.new(tmp_path_factory.mktemp("host"), root_keys=1, root_threshold=1)
    for i, target in enumerate(("orin-jp7", "orin-jp6", "cpu")):
        bundle = host.root / f"bundle-{target}"
        sum_bundle(tiny_policy, bundle, i / 8, table=64, target=target)
        host.release(bundle, f"pick-{target}")
    return host


@pytest.fixture
def request_of(published: Host, tmp_path: Path) -> PrepareRequest:
    return PrepareRequest(
        new_bsp(tmp_path / "Linux_for_Tegra"),
        published.repository.root,
        published.anchor,
        runtime(tmp_path / "qvla-jp7.pex"),
    )
