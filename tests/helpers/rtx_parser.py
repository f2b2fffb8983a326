"""The real parser and builder of TensorRT for RTX, which need no GPU."""

from collections.abc import Mapping, Sequence
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


def builds(path: Path, profiles: Sequence[Mapping[str, int]] = ()) -> bool:
    """Say whether TensorRT-RTX parses a graph and builds an engine for the RTX 4070.

    Args:
        path: of the graph.
        profiles: what each open size is, by input, in each of the engine's static profiles.
    """
    pytest.importorskip("tensorrt_rtx")
    module = load_module(find_target("rtx4070"))
    log = Log(module)
    network = parse(path, log)
    if network is None:
        return False
    config = network.builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(module.api.ComputeCapability.SM89, 0)
    inputs = [network.definition.get_input(i) for i in range(network.definition.num_inputs)]
    for sizes in profiles:
        profile = network.builder.create_optimization_profile()
        for tensor in inputs:
            shape = tuple(sizes[tensor.name] if size < 0 else size for size in tensor.shape)
            profile.set_shape(tensor.name, shape, shape, shape)
        assert config.add_optimization_profile(profile) >= 0
    with log.native_errors():
        return network.builder.build_serialized_network(network.definition, config) is not None
