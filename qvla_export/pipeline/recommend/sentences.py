"""A recommendation in sentences: what was chosen and what it saves, or what to try."""

from collections.abc import Iterator, Sequence

from qvla_export.pipeline.recommend.bounds import Bound
from qvla_export.pipeline.recommend.next_commands import with_settings
from qvla_export.pipeline.recommend.open_loop import GroupError
from qvla_export.pipeline.recommend.recommendation import Candidate, Recommendation, exceeded
from qvla_export.shared.action_space import ActionSpace, Group

# Of a bound: a recommended setting below it has room for fewer bits.
_ROOM = 0.5
_FLIPS = 0.01
_MORE_BITS = ("w4", "w6", "w8")
_FEWER_BITS = ("w6", "w4", "w3", "w2.5", "w2")


def choice_sentences(
    chosen: Candidate | None, candidates: Sequence[Candidate], bounds: Sequence[Bound], command: str
) -> tuple[str, ...]:
    """Return what to take and why, or why nothing can be recommended and what to try.

    Args:
        chosen: see `choose`.
        candidates: all of them.
        bounds: of every group.
        command: the `qvla deploy` command that this came from; empty where there was none.
    """
    if chosen is not None:
        return tuple(_chosen(chosen, candidates, bounds, command))
    missing = [bound for bound in bounds if bound.value is None]
    if missing:
        groups = " and ".join(bound.group for bound in missing)
        return (
            f"Nothing is recommended: there is no bound for {groups}, as {missing[0].source}.",
            "A default bound needs demonstrated actions; a stated one does not: "
            "--tolerance-mm, --tolerance-deg, --tolerance-gripper.",
        )
    quantized = [c for c in candidates if not c.is_float]
    if not quantized:
        return ("Nothing is recommended: only float was asked for; name others with --settings.",)
    return tuple(_none_fits(quantized, bounds, command))


def doubts(
    space: ActionSpace,
    strange: Sequence[Group],
    bounds: Sequence[Bound],
    chosen: Candidate | None,
) -> tuple[str, ...]:
    """Return what a reader should doubt.

    Args:
        space: of the action.
        strange: groups in which the float policy is worse than a constant.
        bounds: of every group.
        chosen: the recommended candidate, if there is one.
    """
    sentences = []
    defaulted = {bound.group for bound in bounds if bound.quantile == "median"}
    for group in strange:
        if group in defaulted:
            sentences.append(
                f"In {group} the float policy is farther from the demonstrations than a constant: "
                "the recording may use another frame, unit or sign than the policy, or the policy "
                "was trained on something else. Its bound is worth as little; state one."
            )
    flips = 0.0 if chosen is None else chosen.error.groups.get("gripper")
    share = getattr(flips, "flips", None) or 0.0
    if chosen is not None and share > _FLIPS:
        sentences.append(
            f"In {100 * share:.1f} % of the steps {chosen.setting} moves the gripper by a quarter "
            "of its range or more against the float policy: try it on grasps."
        )
    if space.names_source.startswith("assumed"):
        sentences.append(f"Names of the action's numbers are {space.names_source}.")
    return tuple(sentences)


def recommendation_lines(result: Recommendation) -> Iterator[str]:
    """Yield what a terminal is told: errors, bounds, the choice and the commands that follow."""
    yield "open loop on held-out observations, median (and nine in ten): error against the"
    yield "demonstrations; distance from the float policy"
    rows = [
        ("float policy", result.float_error),
        *((c.setting, c.error) for c in result.candidates),
    ]
    groups = result.space.present()
    table = [["", *(f"{group}, {result.space.unit(group)[0]}" for group in groups)]]
    table += [[name, *(error_text(error.groups[g]) for g in groups)] for name, error in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        yield "  " + "  ".join(t.ljust(w) for t, w in zip(row, widths, strict=True)).rstrip()
    yield "recommendation"
    for text in (*(bound.text for bound in result.bounds), *result.sentences):
        yield f"  {text}"
    for text in result.warnings:
        yield f"  doubt: {text}"
    for place, heading in (("here", "next, here"), ("robot", f"then, on the {result.target}")):
        commands = [command for command in result.commands if command.where == place]
        yield from [heading] * bool(commands)
        yield from (f"  {command.line}  # {command.purpose}" for command in commands)


def error_text(error: GroupError) -> str:
    """Return a group's figures: median and nine in ten, against demonstrations where there are."""
    shift = f"{error.shift.median:.2g} ({error.shift.p90:.2g})"
    if error.error is None:
        return shift
    return f"{error.error.median:.3g} ({error.error.p90:.3g}); {shift}"


def _chosen(
    chosen: Candidate, candidates: Sequence[Candidate], bounds: Sequence[Bound], command: str
) -> Iterator[str]:
    added = ", ".join(_added(bound, chosen) for bound in bounds)
    yield f"Take {chosen.setting}: the smallest setting under every bound. It adds {added}."
    plain = next((c for c in candidates if c.is_float), None)
    saving = _memory(chosen, plain) + _time(chosen, plain)
    yield saving + "."
    room = all(b.value is not None and b.added(chosen.error) <= _ROOM * b.value for b in bounds)
    sizes = [c.bundle_bytes for c in candidates if not c.is_float]
    fewer = _next_setting(chosen.setting, _FEWER_BITS)
    if room and chosen.bundle_bytes == min(sizes) and fewer is not None:
        yield f"It uses less than half of every bound: fewer bits may do{_try(command, fewer)}."


def _none_fits(
    quantized: Sequence[Candidate], bounds: Sequence[Bound], command: str
) -> Iterator[str]:
    def excess(candidate: Candidate) -> float:
        return max(_times(bound, candidate) for bound in bounds)

    nearest = min(quantized, key=excess)
    over = ", ".join(_added(bound, nearest) for bound in exceeded(nearest, bounds))
    yield f"No setting stays under the bounds. The nearest is {nearest.setting}, which adds {over}."
    names = {c.setting for c in quantized}
    more = next((name for name in reversed(_MORE_BITS) if name not in names), None)
    if more is not None:
        yield f"More bits may do{_try(command, more)}."
    else:
        yield "Serve float, or draw more observations with --count."
    yield (
        "Where that is more than your robot needs, state what it does need: --tolerance-mm, "
        "--tolerance-deg, --tolerance-gripper."
    )


def _added(bound: Bound, candidate: Candidate) -> str:
    amount = bound.added(candidate.error)
    share = f" ({100 * amount / bound.value:.0f} % of the bound)" if bound.value else ""
    return f"{amount:.2g} {bound.unit} to {bound.group}{share}"


def _times(bound: Bound, candidate: Candidate) -> float:
    amount = bound.added(candidate.error)
    if bound.value:
        return amount / bound.value
    return 0.0 if amount == 0 else float("inf")


def _memory(chosen: Candidate, plain: Candidate | None) -> str:
    size = chosen.bundle_bytes / 1e6
    if plain is None:
        return f"Its graphs and weights take {size:.2f} MB"
    other = plain.bundle_bytes / 1e6
    saved = 100 * (1 - size / other)
    return (
        f"Its graphs and weights take {size:.2f} MB instead of float's {other:.2f} "
        f"({saved:.0f} % less)"
    )


def _time(chosen: Candidate, plain: Candidate | None) -> str:
    time = chosen.time
    if time is None:
        return "; its time on the target was neither measured nor predicted"
    own, other = f"{time.ms:.2f} ms", None if plain is None else plain.time
    if other is not None:
        own += f" instead of {other.ms:.2f}"
    if time.measured:
        text = f"; an action takes {own}, measured {time.where}"
        if other is None or time.ms <= other.ms:
            return text
        return (
            f"{text}, slower than float: qvla tune looks for a form of its weights that is not; "
            "settings with rounded inputs (w8a8, w4a8) are faster on a CPU"
        )
    spread = f"[{time.low_ms:.0f}, {time.high_ms:.0f}]"
    return f"; an action is predicted to take {own} {spread} {time.where}"


def _next_setting(name: str, ladder: Sequence[str]) -> str | None:
    """Return the planned setting with the next fewer bits than a planned one."""
    try:
        bits = float(name.removeprefix("w"))
    except ValueError:
        return None
    return next((other for other in ladder if float(other[1:]) < bits), None)


def _try(command: str, setting: str) -> str:
    line = with_settings(command, ("float", setting))
    return f": {line}" if line is not None else f", such as {setting}"
