"""The real parser and builder of TensorRT for RTX, which need no GPU."""

from pathlib import Path

import pytest

from engines.targets import find_target
from engines.trt.log import Log
from engines.trt.modules import BuildError, load_module
from engines.trt.network import Network, parse_part


def parse(path: Path, log: Log) -> Network | None:
    """Parse a graph with TensorRT-RTX; None if it is refused."""
    try:
        return parse_part(load_module(find_target("rtx4070")), path, find_target("rtx4070"), log)
    except BuildError:
        return None


def parses(path: Path) -> bool:
    pytest.importorskip("tensorrt_rtx")
    return parse(path, Log(load_module(find_target("rtx4070")))) is not None


def builds(path: Path) -> bool:
    """Say whether TensorRT-RTX parses a graph and builds an engine for the RTX 4070."""
    pytest.importorskip("tensorrt_rtx")
    module = load_module(find_target("rtx4070"))
    log = Log(module)
    network = parse(path, log)
    if network is None:
        return False
    config = network.builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(module.api.ComputeCapability.SM89, 0)
    with log.native_errors():
        return network.builder.build_serialized_network(network.definition, config) is not None
