"""Golden data of the official code: which channels it demotes, given what demotions cost."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import oracle_root
from small_plans import TARGET, sensitivities

from qvla_export.allocation.algorithm1 import demote_greedily
from qvla_export.allocation.demotions import DemotionTable, PruningRule, demotion_table
from qvla_export.shared.errors import QvlaError

FOLDER = oracle_root() / "quantization"
RUNS: Sequence[Mapping[str, Any]] = json.loads((FOLDER / "greedy_allocate.json").read_text())
# The first entry of a case holds its proxies.
PROXIES = {run["case"]: run["proxies"] for run in RUNS if isinstance(run["proxies"], dict)}
IDS = [f"{run['case']}-{run['target_avg']:g}" for run in RUNS]


def table_of(run: Mapping[str, Any]) -> DemotionTable:
    """Lay out a case so that a step costs what it costs upstream: the proxy at the new width.

    Upstream demotes by that, not by what it adds to the proxy of the width before (eq. 8).
    """
    proxies = PROXIES[run["case"]]
    known = {bits for proxy in proxies.values() for bits in map(int, proxy)}
    widths = tuple(sorted(set(run["bit_list"]) & known, reverse=True))
    # Where a width has no proxy, channels stay at the one before it.
    missing = [bits for bits in run["bit_list"] if bits not in known]
    widths = tuple(bits for bits in widths if bits > max(missing, default=-1))
    shape = {name: np.zeros((4, len(proxy["8"])), np.float32) for name, proxy in proxies.items()}
    table = demotion_table(sensitivities(shape), TARGET, widths, PruningRule())
    rows = [np.concatenate([proxy[str(bits)] for proxy in proxies.values()]) for bits in widths]
    rows[0] = np.zeros(table.channels)
    return replace(table, errors=np.cumsum(rows, axis=0, dtype=np.float64))


@pytest.mark.parametrize("run", RUNS, ids=IDS)
def test_the_heap_takes_the_official_steps(run: Mapping[str, Any]) -> None:
    table = table_of(run)
    start, limit = np.zeros(table.channels, np.int8), run["target_avg"] * table.channels
    cost = table.nominal_bits()
    if limit < table.widths[-1] * table.channels:
        # Upstream says nothing and stays above the target.
        assert run["stats"]["final_avg_bits"] > run["target_avg"]
        with pytest.raises(QvlaError, match="target"):
            demote_greedily(table, start, cost, limit, "the target")
        return
    found = table.widths_of(demote_greedily(table, start, cost, limit, "the target"))
    if run["case"] == "ties":
        # Upstream takes steps of equal cost in the order it met them, ours by channel.
        assert sum(int(w.sum()) for w in found.values()) <= limit
        return
    assert {name: widths.tolist() for name, widths in found.items()} == run["assign"]
    assert sum(int(w.sum()) for w in found.values()) == run["stats"]["final_total_bits"]


def test_the_file_between_the_official_scripts_has_these_proxies(oracles: Path) -> None:
    stored = torch.load(FOLDER / "proxy.pt", weights_only=True)
    assert PROXIES["from_proxy_pt"].keys() == stored.keys()
    golden = np.load(oracles / "quantization" / "hessian_proxy.npz")
    for name, proxies in stored.items():
        for key, values in proxies.items():
            bits = key.removeprefix("proxy_")
            assert values.tolist() == PROXIES["from_proxy_pt"][name][bits]
            expected = golden[f"{name.rpartition('.')[2]}_proxy_{bits}"]
            np.testing.assert_allclose(values.numpy(), expected, rtol=1e-6)
