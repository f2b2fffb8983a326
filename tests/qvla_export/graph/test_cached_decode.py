"""Decoding with kept keys and values beside a whole pass for every token: what each multiplies.

Milliseconds are printed and not judged; docs/results.md has them.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from engines.ort import session_options
from engines.program.ort_values import call_part, to_ort
from engines.targets import CPU
from qvla_export.graph.export import export_bundle
from qvla_export.latency_model.network_shape import PolicyInputs
from qvla_export.latency_model.published_sizes import Geometry, TransformerSize
from qvla_export.policies.openvla.policy import load_openvla_policy
from qvla_export.policies.openvla.random_checkpoint import write_random_checkpoint
from qvla_export.shared.bundle import Bundle
from qvla_export.shared.observation import Observation
from qvla_export.shared.program import PartRuns, Program, run_program

# OpenVLA-7B's picture, prompt and tokens; a decoder of a size that a test can hold.
GEOMETRY = Geometry(
    dino=TransformerSize(64, 128, 1),
    siglip=TransformerSize(64, 192, 1),
    llama=TransformerSize(1024, 2816, 4),
    patch_size=14,
    inputs=PolicyInputs(1, 224, 30, 1, 7, head="tokens", autoregressive=True),
)
TOKENS, ROUNDS = 7, 5
# The most that the cached way may take of the other.
SHARE = 0.4


@dataclass
class Passes:
    """Runs programs of one bundle; counts and times what its decoder is given."""

    bundle: Bundle
    # Positions that went through the decoder, and its seconds.
    positions: int = 0
    seconds: float = 0.0
    sessions: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        options = session_options(self.bundle, threads=1)
        self.sessions = {
            part.name: onnxruntime.InferenceSession(str(self.bundle.model_path(part)), options)
            for part in self.bundle.parts
        }

    def run(self, program: Program, feeds: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
        """Return all values of a program, as the runtime's tensors."""
        parts = {part.name: part for part in self.bundle.parts}

        def call(run: PartRuns, name: str, inputs: dict[str, Any]) -> dict[str, Any]:
            start = time.perf_counter()
            outputs = call_part(self.sessions[name], parts[name], inputs, "cpu")
            if name == "decoder":
                self.seconds += time.perf_counter() - start
                self.positions += inputs["hidden"].shape()[1]
            return outputs

        return run_program(program, self.bundle.reads, to_ort(feeds), call)


def cached(passes: Passes, feeds: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    """Return the actions [1, 1, 7] of the bundle's own program."""
    actions: NDArray[Any] = passes.run(passes.bundle.program, feeds)["actions"].numpy()
    return actions


def uncached(passes: Passes, feeds: Mapping[str, NDArray[Any]], first_token: int) -> NDArray[Any]:
    """Return the actions [1, 1, 7] of a pass for each token over the prompt and those so far."""
    program = Program(passes.bundle.program.runs[:2])
    assert [run.name for run in program.runs] == ["prefix", "prefill"]
    ids, bins = feeds["input_ids"], []
    for _ in range(TOKENS):
        values = passes.run(program, {**feeds, "input_ids": ids})
        bins.append(values["actions"].numpy()[0, 0, -1])
        same = values["token_embeddings"].numpy() == values["next_hidden"].numpy()[0]
        token = first_token + np.flatnonzero(same.all(axis=1))[0]
        ids = np.append(ids, [[token]], axis=1)
    return np.array([[bins]])


@pytest.fixture(scope="module")
def random_policy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Bundle, int]]:
    """A float bundle of random weights, and the lowest id of its action tokens."""
    folder = tmp_path_factory.mktemp("random")
    write_random_checkpoint(folder / "checkpoint", GEOMETRY)
    policy = load_openvla_policy(folder / "checkpoint")
    picture = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    prompt = "pick up the black bowl between the plate and the ramekin and place it on the plate"
    seen = [Observation({"full_image": picture}, prompt)]
    bundle = export_bundle(policy, None, CPU, seen, folder / "bundle")
    yield bundle, policy.module.vocabulary.first


def timed(call: Callable[[Passes], NDArray[Any]], bundle: Bundle) -> tuple[float, float, Passes]:
    """Return median milliseconds of a whole action and of its decoder, and what was counted."""
    passes, whole, decoder = Passes(bundle), [], []
    call(passes)
    for _ in range(ROUNDS):
        passes.positions, passes.seconds = 0, 0.0
        start = time.perf_counter()
        call(passes)
        whole.append(time.perf_counter() - start)
        decoder.append(passes.seconds)
    return 1e3 * median(whole), 1e3 * median(decoder), passes


@pytest.mark.slow
def test_keys_and_values_that_stay_save_most_of_the_work(
    random_policy: tuple[Bundle, int],
) -> None:
    """Seven tokens behind a real prompt: the same actions, at most 0.4 of the positions."""
    bundle, first_token = random_policy
    feeds = {name: value[:1] for name, value in bundle.golden().feeds[0].items()}
    chosen = cached(Passes(bundle), feeds)
    np.testing.assert_allclose(uncached(Passes(bundle), feeds, first_token), chosen, atol=1e-4)
    np.testing.assert_allclose(chosen, bundle.golden().reference[:1], atol=1e-4)
    kept = timed(lambda passes: cached(passes, feeds), bundle)
    anew = timed(lambda passes: uncached(passes, feeds, first_token), bundle)
    positions = 257 + feeds["input_ids"].shape[1] - 1
    assert kept[2].positions == positions + TOKENS - 1
    assert anew[2].positions == sum(positions + token for token in range(TOKENS))
    assert kept[2].positions <= SHARE * anew[2].positions
    for name, place in (("an action", 0), ("its decoder", 1)):
        share = kept[place] / anew[place]
        print(f"{name}: {kept[place]:.1f} ms of {anew[place]:.1f}, {share:.3f}")
