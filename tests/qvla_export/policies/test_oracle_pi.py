"""Golden data of upstream pi0 and pi0.5: every intermediate result and the flow."""

import numpy as np
import pytest
import torch
from pi_cases import CASE_IDS, CASES, FOLDER, Case
from places import DATA

from qvla_export.policies.flow.module import Prefix
from qvla_export.policies.pi.module import PiModule

FEATURES, ACTIONS = 1e-4, 3e-4  # absolute, float32: the oracles' READMEs


@pytest.fixture(scope="module", params=CASES, ids=CASE_IDS)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


@pytest.fixture(scope="module")
def module(case: Case) -> PiModule:
    return case.module()


@pytest.fixture(scope="module")
def prefix(case: Case, module: PiModule) -> Prefix:
    with torch.no_grad():
        return module.prefix(case.inputs(module))


def check(found: torch.Tensor, case: Case, name: str, tolerance: float = FEATURES) -> None:
    np.testing.assert_allclose(
        found.numpy(), case.golden[name], rtol=0, atol=tolerance, err_msg=name
    )


@pytest.mark.skipif(FOLDER == DATA / "oracles", reason="the committed subset has none whole")
def test_cases_are_found() -> None:
    assert len(CASES) >= 2


@torch.no_grad()
def test_the_prefix_is_upstreams(case: Case, module: PiModule, prefix: Prefix) -> None:
    inputs = case.inputs(module)
    hidden, seen = module.embed(inputs)
    assert seen is not None
    assert torch.equal(seen, case.tensor("prefix_pad_masks"))
    counts = (
        np.where(seen[..., None], hidden, 0),
        np.where(seen[..., None], case.golden["prefix_embs"], 0),
    )
    np.testing.assert_allclose(*counts, rtol=0, atol=FEATURES)
    assert prefix.length.tolist() == seen.sum(dim=1).tolist()
    rows = seen[:, None, :, None]
    for name, found in (
        ("prefix_keys", [pair.keys for pair in prefix.pairs]),
        ("prefix_values", [pair.values for pair in prefix.pairs]),
    ):
        for layer, expected in zip(found, case.golden[name], strict=True):
            np.testing.assert_allclose(
                np.where(rows, layer, 0),
                np.where(rows, expected, 0),
                rtol=0,
                atol=FEATURES,
                err_msg=name,
            )


@torch.no_grad()
def test_every_step_is_upstreams(case: Case, module: PiModule, prefix: Prefix) -> None:
    flow = case.tensor("noise")
    suffix, _ = module.suffix(prefix, flow, torch.tensor([0]))
    check(suffix, case, "suffix_embs_step0")
    times = module.arch.flow.time_points()
    assert times.tolist() == case.golden["time"][:, 0].tolist()
    assert len(times) == int(case.golden["num_steps"])
    for number, given in enumerate(case.tensor("x_t")):
        index = torch.tensor([number])
        velocity = module.velocity(prefix, given, index)
        np.testing.assert_allclose(velocity, case.golden["v_t"][number], rtol=0, atol=FEATURES)
        np.testing.assert_allclose(flow, given, rtol=0, atol=FEATURES)
        flow = flow + module.arch.flow.step * velocity
    name = "actions_padded" if case.lerobot else "actions"
    check(flow, case, name, ACTIONS)
