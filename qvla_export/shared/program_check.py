"""Judge a program before anything runs: names, order, types, shapes, bounds."""

from collections.abc import Iterable, Mapping, Sequence

from qvla_export.shared.part import Part, TensorSpec
from qvla_export.shared.program import MOST_TIMES, PartRuns, Program, ProgramError, run_program

# Repetitions after which shapes must stay as they are: the first reads what came before, the
# second what the first put out.
_SETTLED = 3


def require_runnable(
    program: Program,
    parts: Sequence[Part],
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
) -> None:
    """Refuse a program that cannot run on its parts.

    Args:
        program: of the bundle.
        parts: of the bundle.
        inputs: what the bundle takes.
        outputs: what it must put out.

    Raises:
        ProgramError: a name is unknown or is there twice, a run repeats too often, a part reads
            what comes later or what nothing provides, types or shapes do not meet, or a tensor
            grows from one repetition to the next.
    """
    _require_names(program, parts, inputs)
    by_name = {part.name: part for part in parts}
    for run in program.runs:
        _require_run(run, [by_name[name] for name in run.parts])
    reads = {part.name: [spec.name for spec in part.inputs] for part in parts}
    # More repetitions than settle a shape change nothing.
    short = Program(
        tuple(
            PartRuns(r.name, r.parts, min(r.times, _SETTLED), r.start, r.carry)
            for r in program.runs
        )
    )
    watch = _Shapes(by_name)
    values = run_program(short, reads, {spec.name: spec for spec in inputs}, watch.call)
    for spec in outputs:
        if spec.name not in values:
            raise ProgramError(f"no part puts out {spec.name!r}, which the bundle must")
        _meet(spec, values[spec.name], {}, "the bundle's output")


def _require_names(program: Program, parts: Sequence[Part], inputs: Iterable[TensorSpec]) -> None:
    _require_once([part.name for part in parts], "part")
    _require_once([run.name for run in program.runs], "run")
    _require_once(
        [spec.name for spec in inputs] + [spec.name for part in parts for spec in part.outputs],
        "tensor",
    )
    known, used = {part.name for part in parts}, {n for run in program.runs for n in run.parts}
    if used != known:
        raise ProgramError(
            f"the program must run every part, and no other: it runs {sorted(used)}, the parts "
            f"are {sorted(known)}"
        )


def _require_once(names: Sequence[str], what: str) -> None:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ProgramError(f"each {what} needs a name of its own, these are there twice: {twice}")


def _require_run(run: PartRuns, parts: Sequence[Part]) -> None:
    if not 1 <= run.times <= MOST_TIMES:
        raise ProgramError(f"run {run.name!r} must repeat 1 to {MOST_TIMES} times, got {run.times}")
    _require_once(run.parts, f"part of run {run.name!r}")
    inputs = {spec.name for part in parts for spec in part.inputs}
    outputs = {spec.name for part in parts for spec in part.outputs}
    if unknown := sorted(set(run.start) - inputs):
        raise ProgramError(f"run {run.name!r} starts {unknown}, no inputs of its parts {run.parts}")
    if run.carry and run.times == 1:
        raise ProgramError(f"run {run.name!r} runs once and carries {dict(run.carry)} nowhere")
    if unknown := sorted(set(run.carry) - outputs):
        raise ProgramError(f"run {run.name!r} carries {unknown}, no outputs of its parts")
    if unknown := sorted(set(run.carry.values()) - inputs):
        raise ProgramError(f"run {run.name!r} carries into {unknown}, no inputs of its parts")
    _require_once(list(run.carry.values()), f"carried input of run {run.name!r}")


class _Shapes:
    """Runs parts on the specifications of their tensors."""

    def __init__(self, parts: Mapping[str, Part]) -> None:
        self._parts = parts
        # Run and part -> its inputs' shapes of each repetition.
        self._seen: dict[tuple[str, str], list[tuple[tuple[int | str, ...], ...]]] = {}

    def call(
        self, run: PartRuns, name: str, inputs: dict[str, TensorSpec]
    ) -> dict[str, TensorSpec]:
        """Return what a part makes of its inputs."""
        part = self._parts[name]
        sizes: dict[str, int | str] = {}
        for spec in part.inputs:
            _meet(spec, inputs[spec.name], sizes, f"part {name!r} of run {run.name!r}")
        seen = self._seen.setdefault((run.name, name), [])
        seen.append(tuple(inputs[spec.name].shape for spec in part.inputs))
        if len(seen) == _SETTLED and seen[-1] != seen[-2]:
            raise ProgramError(
                f"what part {name!r} of run {run.name!r} reads must keep its shapes from the "
                f"second repetition on, got {seen[-2]}, then {seen[-1]}"
            )
        return {
            spec.name: TensorSpec(
                spec.name, spec.dtype, tuple(_resolved(size, sizes) for size in spec.shape)
            )
            for spec in part.outputs
        }


def _meet(spec: TensorSpec, value: TensorSpec, sizes: dict[str, int | str], where: str) -> None:
    """Refuse a value that is not what `spec` says; note what its named sizes are."""
    fits = spec.dtype == value.dtype and len(spec.shape) == len(value.shape)
    for stated, size in zip(spec.shape, value.shape, strict=False):
        if isinstance(stated, str):
            fits = fits and sizes.setdefault(stated, size) == size
        else:
            # A named size may turn out to be this one, which only running tells.
            fits = fits and (isinstance(size, str) or stated == size)
    if not fits:
        raise ProgramError(
            f"{where} takes {spec.name!r} as {spec.dtype} {list(spec.shape)}, it would get "
            f"{value.name!r}, {value.dtype} {list(value.shape)}"
        )


def _resolved(size: int | str, sizes: Mapping[str, int | str]) -> int | str:
    """Return a size in terms of what the inputs' sizes turned out to be."""
    if isinstance(size, int):
        return size
    if size in sizes:
        return sizes[size]
    name, plus, more = size.partition("+")
    base = sizes.get(name)
    if not plus or not more.isdigit() or base is None:
        return size
    if isinstance(base, int):
        return base + int(more)
    stem, _, offset = base.partition("+")
    return f"{stem}+{int(offset or 0) + int(more)}"
