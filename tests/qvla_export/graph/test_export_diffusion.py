"""FiLM and a diffusion head in graphs: what the program runs is upstream's chunk."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from graph_checks import require_clean
from oft_variants import CASES, Variant
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from engines.ort import OrtEngine
from engines.targets import CPU
from engines.verify import judge
from qvla_export.graph.export import ExportOptions, export_bundle
from qvla_export.shared.observation import Observation


@pytest.mark.parametrize(
    ("name", "layers_per_part"),
    [
        ("film_diffusion", None),
        pytest.param("film_diffusion", 1, marks=pytest.mark.slow),
        pytest.param("film_l1", None, marks=pytest.mark.slow),
        pytest.param("film_l1", 1, marks=pytest.mark.slow),
        pytest.param("diffusion_1img", None, marks=pytest.mark.slow),
    ],
)
def test_an_engine_makes_upstreams_chunk(
    tmp_path: Path, name: str, layers_per_part: int | None
) -> None:
    case = Variant(next(path for path in CASES if f"case_{name}" in path.stem), tmp_path)
    # The case has no tokenizer; one of anything makes the bundle whole.
    tokenizer = Tokenizer(WordLevel({"<unk>": 0, "a": 3}, unk_token="<unk>"))
    policy = replace(case.policy, processor=replace(case.policy.processor, tokenizer=tokenizer))
    side, spec = policy.processor.spec.image.size, policy.processor.spec
    images = {camera: np.zeros((side, side, 3), np.uint8) for camera in spec.cameras}
    seen = [Observation(images, "a", np.zeros(spec.state_dim, np.float32))]
    options = ExportOptions(layers_per_part=layers_per_part)
    bundle = export_bundle(policy, None, CPU, seen, tmp_path / "bundle", options)
    require_clean(bundle)
    with OrtEngine(bundle, threads=1) as engine:
        assert judge(bundle, engine).passed
        actions = engine.infer(case.feeds())["actions"][0]
        if case.steps and layers_per_part is None:
            assert engine.part_calls == {"prefix": 1, "denoise": case.steps}
    got = bundle.processor.chunk(actions).actions
    np.testing.assert_allclose(got, case.golden["actions"], rtol=0, atol=1e-3)
    if case.steps:
        assert bundle.processor.spec.noise is not None
