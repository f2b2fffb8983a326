"""What each step of a deployment takes of a machine, from multiply-adds, numbers and bytes."""

from dataclasses import dataclass, replace

from qvla_export.allocation.setting import Setting
from qvla_export.pipeline.sizing.machine_rates import MachineRates
from qvla_export.pipeline.sizing.policy_costs import LayerCosts, PartCosts, PolicyCosts
from qvla_export.quantizer.moments import block_size
from qvla_export.quantizer.rounding_costs import alone_bytes, rounding_cost

# Widths whose errors are measured; of them those with codes, those with a search for scales.
_WIDTHS, _CODED, _SEARCHED = 4, 3, 2
_MOMENT_PROBES, _LARGEST_BLOCK = 4, 4096
# Observations that lie in a bundle with their actions.
_GOLDEN = 8
# Of tracing a layer and lowering it to a graph, of writing another plan into it, in steps of Python
# work as those of rounding a narrow layer; measured on the reference policy.
_TRACE_STEPS, _PLAN_STEPS = 8000, 1200
# Of a layer's nodes in the graph, with and without codes, and of a channel in a plan's JSON.
_NODE_BYTES, _CODED_NODE_BYTES, _CHANNEL_BYTES = 2600, 4000, 1.6
# Of a layer's outputs, for each probe: products, squares and sums of moments.
_NUMBERS_A_PROBE = 3
# What an observation that goes alone takes more than one in a batch of eight; such passes of a
# held-out observation, without and with codes; opening an engine. Measured on the reference policy.
_ALONE, _FLOAT_PASSES, _CODED_PASSES, _OPENING_S = 1.7, 2.5, 4, 0.4


@dataclass(frozen=True)
class StepCosts:
    """CPU seconds, peak memory and bytes on disk of one step; None where nothing foretells them."""

    name: str
    cpu_s: float | None
    # Beside what the process has in memory before the first step.
    memory_bytes: int
    disk_bytes: int


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
    # Whether all weights are in memory.
    resident: bool
    # Bound of the part by part measurements.
    max_bytes: int | None
    # Bytes of a weight that stays in float in the target's graph.
    float_bytes: int = 2

    def bounded(self, nbytes: int) -> int:
        """Return bytes, no more than the bound of what is read part by part."""
        bound = None if self.resident else self.max_bytes
        return nbytes if bound is None else min(nbytes, bound)

    def passes_s(self, observations: int, probes: int, forwards: float = 1.0) -> float:
        """Return the CPU seconds of passes forward, and back once for each probe."""
        passes = forwards + probes
        products = passes * self.policy.products / self.rates.products_per_s
        made = sum(part.pass_bytes for part in self.policy.parts) / 4
        return observations * (products + passes * made / self.rates.numbers_per_s)

    def reads_s(self) -> float:
        """Return the CPU seconds of reading all weights once, where they lie on disk."""
        return 0.0 if self.resident else self.policy.weight_bytes / self.rates.bytes_per_s

    def pass_bytes(self) -> int:
        """Return the bytes of a batch on its way, with its weights where they lie on disk."""
        size, parts = self.batch_size, self.policy.parts
        if self.resident:
            return size * sum(part.pass_bytes for part in parts)
        largest = max(part.weight_bytes + size * part.pass_bytes for part in parts)
        between = sum(part.output_bytes for part in parts)
        return largest + min(self.count, size) * between

    def single_pass_bytes(self) -> int:
        """Return the bytes of observations that take turns in each part, as a bundle's do."""
        return self.pass_bytes() if self.resident else replace(self, batch_size=1).pass_bytes()


def moment_costs(work: Workload) -> StepCosts:
    """Return what measuring moments takes."""
    layers = work.policy.layers
    disk = sum(4 * (_moment_numbers(layer) + layer.inputs) for layer in layers)
    held = 3 * disk if work.resident else 2 * max(map(_part_moments, work.policy.parts))
    memory = work.bounded(held + work.pass_bytes())
    return StepCosts("moments", _moments_s(work), memory, disk if work.resident else 0)


def sensitivity_costs(work: Workload) -> StepCosts:
    """Return what sensitivities of first order take; part by part, with moments on the way."""
    layers, rates = work.policy.layers, work.rates
    moved = sum(layer.tokens * layer.channels for layer in layers)
    contracted = moved * _WIDTHS * work.probes
    errors = sum(layer.products for layer in layers) * _WIDTHS / rates.products_per_s
    taken = work.passes_s(work.count, work.probes, 1.0 if work.resident else 2.0)
    taken += work.count * (errors + contracted / rates.numbers_per_s)
    taken += _searched_s(work) + 2 * work.reads_s()
    if work.compensated:
        taken += sum(_alone_s(layer, rates) for layer in layers)
        taken += 0.0 if work.resident else _moments_s(work)
    channels = sum(layer.channels for layer in layers)
    sums = 8 * 2 * _WIDTHS * channels
    own = max(_error_bytes(layer, work) for layer in layers)
    memory = sums + work.pass_bytes() + own
    if work.resident:
        memory += sum(4 * _CODED * layer.weights for layer in layers)
    elif work.compensated:
        memory += max(map(_part_moments, work.policy.parts))
    disk = 4 * channels * _WIDTHS
    return StepCosts("sensitivities", taken, work.bounded(memory), disk)


def plan_costs(work: Workload, setting: Setting) -> StepCosts:
    """Return what drawing up a plan takes."""
    channels = sum(layer.channels for layer in work.policy.layers)
    disk = int(_CHANNEL_BYTES * channels)
    steps = channels * _WIDTHS / work.rates.rounding.narrow_steps_per_s / 10
    return StepCosts(f"{setting.name}: plan", steps, 100 * channels, disk)


def rounding_costs(work: Workload, setting: Setting) -> StepCosts:
    """Return what codes that make up for each other take; part by part, moments on the way."""
    layers = work.policy.layers
    costs = [rounding_cost(layer.channels, layer.inputs, _LARGEST_BLOCK, 64) for layer in layers]
    taken = sum(cost.cpu_s(work.rates.rounding) for cost in costs)
    memory = max(cost.memory_bytes for cost in costs)
    if work.resident:
        memory += sum(4 * layer.weights for layer in layers)
    else:
        taken += _moments_s(work)
        memory += max(map(_part_moments, work.policy.parts))
        memory += max(part.weight_bytes for part in work.policy.parts)
    disk = sum(cost.disk_bytes for cost in costs)
    return StepCosts(f"{setting.name}: rounding", taken, work.bounded(memory), disk)


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
    disk = stored + work.float_bytes * numbers + _GOLDEN * _golden_bytes(policy)
    disk += len(policy.layers) * (_CODED_NODE_BYTES if coded else _NODE_BYTES)
    # Scales: one of 16 bits for 64 inputs.
    disk += (weights / 32 + _CHANNEL_BYTES * channels) if coded else 0
    traced = _TRACE_STEPS if first or not work.resident else _PLAN_STEPS
    taken = len(policy.layers) * traced / work.rates.rounding.narrow_steps_per_s
    taken += 2 * (disk + policy.weight_bytes) / work.rates.bytes_per_s
    taken += work.passes_s(2 * _GOLDEN, 0)
    largest = max(part.weight_bytes for part in policy.parts)
    memory = 3 * (policy.weight_bytes if work.resident else largest) + work.single_pass_bytes()
    return StepCosts(f"{setting.name}: bundle", taken, memory, int(disk))


def error_costs(work: Workload, setting: Setting) -> StepCosts:
    """Return what acting on the held-out observations takes: torch's policy, and the engine."""
    passes = _FLOAT_PASSES if setting.kind == "float" else _CODED_PASSES
    taken = _OPENING_S + _ALONE * passes * work.passes_s(work.held_out, 0)
    taken += work.policy.weight_bytes / work.rates.bytes_per_s
    largest = max(part.weight_bytes for part in work.policy.parts)
    memory = 2 * (work.policy.weight_bytes if work.resident else largest) + work.pass_bytes()
    disk = 4 * work.held_out * work.policy.action_numbers
    return StepCosts(f"{setting.name}: action error", taken, memory, disk)


def latency_costs(work: Workload, settings: int, samples: int) -> StepCosts:
    """Return what timing every setting in process and over HTTP takes."""
    taken = settings * (2 * _OPENING_S + _ALONE * work.passes_s(2 * samples, 0))
    return StepCosts("latency", taken, 2 * settings * work.policy.weight_bytes, 13_000 * settings)


def _moments_s(work: Workload) -> float:
    layers, rates = work.policy.layers, work.rates
    products = sum(
        layer.tokens
        * (
            _MOMENT_PROBES * layer.channels * block_size(layer.channels, _LARGEST_BLOCK)
            + layer.inputs * block_size(layer.inputs, _LARGEST_BLOCK)
        )
        for layer in layers
    )
    moved = sum(layer.tokens * layer.channels for layer in layers)
    numbers = moved * _NUMBERS_A_PROBE * _MOMENT_PROBES
    batches = -(-work.count // work.batch_size)
    # Of each batch's products for each probe, raised to float64 and added.
    added = 3 * batches * _MOMENT_PROBES * sum(map(_moment_numbers, layers))
    each = products / rates.products_per_s + numbers / rates.numbers_per_s
    passed = work.passes_s(work.count, _MOMENT_PROBES, 1.0 if work.resident else 2.0)
    return passed + work.count * each + added / rates.numbers_per_s + 2 * work.reads_s()


def _searched_s(work: Workload) -> float:
    weights = sum(layer.weights for layer in work.policy.layers)
    return _SEARCHED * weights / work.rates.rounding.weights_per_s


def _alone_s(layer: LayerCosts, rates: MachineRates) -> float:
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


def _moment_numbers(layer: LayerCosts) -> int:
    widths = layer.inputs, layer.channels
    return sum(width * block_size(width, _LARGEST_BLOCK) for width in widths)


def _part_moments(part: PartCosts) -> int:
    return 8 * sum(map(_moment_numbers, part.layers))


def _golden_bytes(policy: PolicyCosts) -> int:
    return policy.feed_bytes + 3 * 4 * policy.action_numbers
