"""What each step of a deployment takes of a machine, from multiply-adds, numbers and bytes."""

from dataclasses import dataclass, replace

from qvla_export.allocation.setting import Setting
from qvla_export.pipeline.sizing.machine_rates import MachineRates
from qvla_export.pipeline.sizing.policy_costs import LayerCosts, PolicyCosts
from qvla_export.pipeline.sizing.streamed_memory import StreamedMemory
from qvla_export.pipeline.sizing.tracing import TraceRates
from qvla_export.pipeline.sizing.trial import Trial
from qvla_export.quantizer.moments import block_size
from qvla_export.quantizer.rounding_costs import alone_bytes, rounding_cost

# Widths whose errors are measured; of them those with codes, those with a search for scales.
_WIDTHS, _CODED, _SEARCHED = 4, 3, 2
_MOMENT_PROBES, _LARGEST_BLOCK = 4, 4096
# Held-out observations that lie in a bundle with their actions, at most.
_GOLDEN = 8
# Of tracing a layer and lowering it to a graph, of writing another plan into it, in steps of Python
# work as those of rounding a narrow layer; measured on the reference policy. The same of a graph
# by itself: what two parts without or with three layers took, of a policy read part by part.
_TRACE_STEPS, _PLAN_STEPS, _GRAPH_STEPS = 11000, 1600, 100_000
# Of Python work, in the same steps: what any step opens, records and writes, and a layer each time
# that an observation goes through it by itself, forward or back. Measured on calibrations, and on
# moments of a policy 640 wide that was read part by part.
_RECORD_STEPS, _CALL_STEPS = 10_000, 50
# Of a channel in a plan: 1.8 million of a 7B policy are allocated in 2.5 s and written in as many.
_CHANNEL_STEPS = 0.15
# Of a layer's nodes in the graph, with and without codes, and of a channel in a plan's JSON.
_NODE_BYTES, _CODED_NODE_BYTES, _CHANNEL_BYTES = 2600, 4000, 1.6
# Of a layer's outputs, for each probe, and of its inputs: products, squares and sums of moments.
_NUMBERS_MOVED = 3
# Of libraries that only steps after the codes load.
LIBRARY_BYTES = 150_000_000
# Copies in float32 of a policy's weights while it is exported; of those of a part that is read by
# itself, with what is read and rounded on the way: measured at the width of 1024.
_WHOLE_COPIES, _PART_COPIES = 3, 1.25
# What an observation that goes alone takes more than one in a batch of eight; such passes of a
# held-out observation, without and with codes; opening an engine. Measured on the reference policy.
_ALONE, _FLOAT_PASSES, _CODED_PASSES, OPENING_S = 1.7, 2.5, 4, 0.4
# Of a policy read part by part: torch computes as often as weights are read, without codes and with
# them, the engine once, and opens each part for each observation (640 wide: 12 of them in 1.1 s).
_PART_OPENING_S = 0.09


@dataclass(frozen=True)
class StepCosts:
    """CPU seconds, peak memory and bytes on disk of one step; None where nothing foretells them."""

    name: str
    cpu_s: float | None
    # Beside what the process has in memory before the first step.
    memory_bytes: int
    disk_bytes: int

    def beside(self, loaded: int) -> "StepCosts":
        """Return the costs where bytes that steps before loaded are still in memory."""
        return replace(self, memory_bytes=self.memory_bytes + loaded)


@dataclass(frozen=True)
class Workload:
    """What is done, as the costs depend on it."""

    policy: PolicyCosts
    rates: MachineRates
    # Observations measured on, and judged by.
    count: int
    held_out: int
    # Observations that run together.
    batch_size: int
    # Of an observation: random ones, or the action's numbers.
    probes: int
    compensated: bool
    # What planning the steps found that read a policy part by part; None: it is in memory.
    streamed: StreamedMemory | None
    # Bytes of a weight that stays in float in the target's graph.
    float_bytes: int = 2
    # What a batch took; None where the policy is read part by part, or too large to try.
    trial: Trial | None = None
    # What tracing takes; None where nothing showed it.
    tracing: TraceRates | None = None

    @property
    def resident(self) -> bool:
        """Return whether all weights are in memory."""
        return self.streamed is None

    def passes_s(self, observations: int, probes: int, forwards: float = 1.0) -> float:
        """Return the CPU seconds of passes forward, and back once for each probe."""
        passes = forwards + probes
        products = passes * self.policy.products / self.rates.products_per_s
        made = sum(part.pass_bytes for part in self.policy.parts) / 4
        taken = observations * (products + passes * made / self.rates.numbers_per_s)
        if self.resident:
            return taken
        calls = observations * passes * len(self.policy.layers)
        return taken + self.python_s(calls * _CALL_STEPS)

    def alone_s(self, observations: int) -> float:
        """Return the CPU seconds of observations that act one after another."""
        if self.trial is not None:
            return observations * self.trial.acts_s
        return _ALONE * self.passes_s(observations, 0)

    def python_s(self, steps: float) -> float:
        """Return the CPU seconds of steps of Python work, as those of rounding a narrow layer."""
        return steps / self.rates.rounding.narrow_steps_per_s

    def recorded(self, costs: "StepCosts") -> "StepCosts":
        """Return a step's costs with what any step opens, records and writes."""
        if costs.cpu_s is None:
            return costs
        return replace(costs, cpu_s=costs.cpu_s + self.python_s(_RECORD_STEPS))

    def reads_s(self) -> float:
        """Return the CPU seconds of reading all weights once, where they lie on disk."""
        return 0.0 if self.resident else self.policy.weight_bytes / self.rates.bytes_per_s

    def pass_bytes(self) -> int:
        """Return the bytes of a batch on its way through a policy that is in memory."""
        return self.batch_size * sum(part.pass_bytes for part in self.policy.parts)

    def acting_bytes(self, copies: float) -> int:
        """Return the bytes of observations that act, one after another.

        Args:
            copies: of the weights that are in memory: of all, or of the part that has most.
        """
        parts = self.policy.parts
        if self.resident:
            passed = sum(part.pass_bytes for part in parts)
            return int(copies * self.policy.weight_bytes) + passed
        return max(int(copies * part.weight_bytes) + part.pass_bytes for part in parts)


def moment_costs(work: Workload) -> StepCosts:
    """Return what measuring the moments of a policy in memory takes."""
    disk = moment_bytes(work)
    if work.trial is None:
        taken = _moments_s(work, _MOMENT_PROBES)
    else:
        taken = work.trial.batches(work.count) * work.trial.moments_s
        taken += 2 * disk / work.rates.bytes_per_s
    return StepCosts("moments", taken, 3 * disk + work.pass_bytes(), disk)


def moment_bytes(work: Workload) -> int:
    """Return the bytes of all layers' moments."""
    layers = work.policy.layers
    return sum(4 * (sum(_moment_numbers(layer)) + layer.inputs) for layer in layers)


def sensitivity_costs(work: Workload) -> StepCosts:
    """Return what sensitivities of first order take; part by part, with moments on the way."""
    layers, tried = work.policy.layers, work.trial
    if tried is None:
        taken = _sensitivities_s(work)
    else:
        taken = tried.errors_s + tried.batches(work.count) * tried.sensitivities_s
    channels = sum(layer.channels for layer in layers)
    if work.streamed is not None:
        memory = work.streamed.sensitivities
    else:
        memory = 8 * 2 * _WIDTHS * channels + work.pass_bytes()
        memory += max(_error_bytes(layer, work) for layer in layers)
        memory += sum(4 * _CODED * layer.weights for layer in layers)
        # Codes are made of them, layer by layer.
        memory += moment_bytes(work) if work.compensated else 0
    disk = 4 * channels * _WIDTHS
    return StepCosts("sensitivities", taken, memory, disk)


def plan_costs(work: Workload, setting: Setting) -> StepCosts:
    """Return what drawing up a plan takes."""
    channels = sum(layer.channels for layer in work.policy.layers)
    disk = int(_CHANNEL_BYTES * channels)
    taken = work.python_s(_CHANNEL_STEPS * channels)
    return StepCosts(f"{setting.name}: plan", taken, 100 * channels, disk)


def rounding_costs(work: Workload, setting: Setting) -> StepCosts:
    """Return what codes that make up for each other take; part by part, moments on the way."""
    layers = work.policy.layers
    costs = [rounding_cost(layer.channels, layer.inputs, _LARGEST_BLOCK, 64) for layer in layers]
    taken = sum(cost.cpu_s(work.rates.rounding) for cost in costs)
    taken = taken if work.trial is None else work.trial.rounding_s
    if work.streamed is not None:
        taken += _moments_s(work, _MOMENT_PROBES)
        memory = work.streamed.rounding
    else:
        memory = max(cost.memory_bytes for cost in costs) + sum(4 * x.weights for x in layers)
    disk = sum(cost.disk_bytes for cost in costs)
    return StepCosts(f"{setting.name}: rounding", taken, memory, disk)


def export_costs(work: Workload, setting: Setting, first: bool) -> StepCosts:
    """Return what a bundle takes.

    Args:
        work: what is done.
        setting: of the bundle.
        first: whether the policy is traced for it: a graph in memory is traced once.
    """
    policy, coded = work.policy, setting.kind != "float"
    weights, channels = (
        sum(getattr(layer, name) for layer in policy.layers) for name in ("weights", "channels")
    )
    numbers = policy.graph_numbers - weights
    stored = weights * (setting.bits / 8 if coded else work.float_bytes)
    golden = min(_GOLDEN, work.held_out)
    disk = stored + work.float_bytes * numbers + golden * _golden_bytes(policy)
    disk += len(policy.layers) * (_CODED_NODE_BYTES if coded else _NODE_BYTES)
    # Scales: one of 16 bits for 64 inputs.
    disk += (weights / 32 + _CHANNEL_BYTES * channels) if coded else 0
    taken = _traced_s(work, first)
    taken += 2 * (disk + policy.weight_bytes) / work.rates.bytes_per_s
    taken += work.alone_s(2 * golden)
    memory = LIBRARY_BYTES + work.acting_bytes(_WHOLE_COPIES if work.resident else _PART_COPIES)
    return StepCosts(f"{setting.name}: bundle", taken, memory, int(disk))


def _traced_s(work: Workload, first: bool) -> float:
    """Return the seconds of tracing a bundle's graphs and lowering them."""
    layers, graphs = len(work.policy.layers), 1 if work.resident else len(work.policy.parts)
    anew = first or not work.resident
    if work.tracing is None:
        steps = layers * (_TRACE_STEPS if anew else _PLAN_STEPS)
        return work.python_s(steps + (0 if work.resident else graphs * _GRAPH_STEPS))
    traced = work.tracing.cpu_s(graphs, first) if anew else 0.0
    return traced + work.python_s(layers * _PLAN_STEPS)


def error_costs(work: Workload, setting: Setting) -> StepCosts:
    """Return what acting on the held-out observations takes: torch's policy, and the engine."""
    coded = setting.kind != "float"
    if work.resident:
        passes, reads, opening_s = _CODED_PASSES if coded else _FLOAT_PASSES, 1, OPENING_S
    else:
        reads = 2 if coded else 1
        passes, opening_s = reads + 1, _PART_OPENING_S * len(work.policy.parts) * work.held_out
    taken = opening_s + passes * work.alone_s(work.held_out)
    taken += reads * work.policy.weight_bytes / work.rates.bytes_per_s
    memory = LIBRARY_BYTES + work.acting_bytes(2 if work.resident else _PART_COPIES)
    disk = 4 * work.held_out * work.policy.action_numbers
    return StepCosts(f"{setting.name}: action error", taken, memory, disk)


def _sensitivities_s(work: Workload) -> float:
    layers, rates = work.policy.layers, work.rates
    moved = sum(layer.tokens * layer.channels for layer in layers)
    contracted = moved * _WIDTHS * work.probes
    errors = sum(layer.products for layer in layers) * _WIDTHS / rates.products_per_s
    taken = work.passes_s(work.count, work.probes, 1.0 if work.resident else 2.0)
    taken += work.count * (errors + contracted / rates.numbers_per_s)
    taken += _searched_s(work) + 2 * work.reads_s()
    if work.compensated:
        taken += sum(alone_seconds(layer, rates) for layer in layers)
        taken += 0.0 if work.resident else _moments_s(work, work.probes) + _energies_s(work)
    return taken


def _moments_s(work: Workload, probes: int) -> float:
    layers, rates = work.policy.layers, work.rates
    numbers = [_moment_numbers(layer) for layer in layers]
    products = sum(
        layer.tokens * (inputs + probes * channels)
        for layer, (inputs, channels) in zip(layers, numbers, strict=True)
    )
    moved = sum(layer.tokens * (layer.inputs + probes * layer.channels) for layer in layers)
    # Products are raised to float64 and added: of a batch, or of each observation where these go
    # through a part one after another.
    additions = -(-work.count // work.batch_size) if work.resident else work.count
    added = 3 * additions * sum(inputs + probes * channels for inputs, channels in numbers)
    each = products / rates.products_per_s + _NUMBERS_MOVED * moved / rates.numbers_per_s
    passed = work.passes_s(work.count, probes, 1.0 if work.resident else 2.0)
    return passed + work.count * each + added / rates.numbers_per_s + 2 * work.reads_s()


def _energies_s(work: Workload) -> float:
    """Return the seconds of the sweep that finds what observations count, part by part."""
    layers = work.policy.layers
    moved = sum(layer.tokens * (layer.inputs + work.probes * layer.channels) for layer in layers)
    passed = work.passes_s(work.count, work.probes, 2.0)
    return passed + work.count * moved / work.rates.numbers_per_s + 2 * work.reads_s()


def _searched_s(work: Workload) -> float:
    weights = sum(layer.weights for layer in work.policy.layers)
    return _SEARCHED * weights / work.rates.rounding.weights_per_s


def alone_seconds(layer: LayerCosts, rates: MachineRates) -> float:
    """Return the seconds of codes of every width whose channels do not answer each other."""
    of = rates.rounding
    return (
        layer.inputs**3 / 3 / of.factors_per_s
        + _CODED * layer.weights * layer.inputs / 2 / of.products_per_s
        + _CODED * layer.weights / 512 / of.steps_per_s
    )


def _error_bytes(layer: LayerCosts, work: Workload) -> int:
    answers = alone_bytes(layer.channels, layer.inputs) if work.compensated else 0
    moved = layer.numbers_in + (2 + _WIDTHS) * layer.tokens * layer.channels
    return answers + 4 * (_CODED * layer.weights + work.batch_size * moved)


def _moment_numbers(layer: LayerCosts) -> tuple[int, int]:
    """Return the numbers of a layer's moments: of its inputs, of its channels."""
    inputs, channels = (
        width * block_size(width, _LARGEST_BLOCK) for width in (layer.inputs, layer.channels)
    )
    return inputs, channels


def _golden_bytes(policy: PolicyCosts) -> int:
    return policy.feed_bytes + 3 * 4 * policy.action_numbers
