"""TensorRT's progress, handed to a callback; and a build that Ctrl-C ends."""

from collections.abc import Callable
from typing import Any

# Called with (phase, steps done, steps in all).
OnPhase = Callable[[str, int, int], None]


class Progress:
    """Attaches to a builder's configuration where the module can report progress."""

    def __init__(self, api: Any, on_phase: OnPhase | None) -> None:
        """Make the monitor; without `on_phase` it only lets Ctrl-C end a build."""
        self.interrupted = False
        self._steps: dict[str, int] = {}
        self._on_phase = on_phase
        base = getattr(api, "IProgressMonitor", None)
        self.monitor: Any = None if base is None else _monitor_class(base)(self)

    def attach(self, config: Any) -> None:
        """Let a builder's configuration report here."""
        if self.monitor is not None:
            config.progress_monitor = self.monitor

    def require_uninterrupted(self) -> None:
        """Raise KeyboardInterrupt if the user ended the build."""
        if self.interrupted:
            raise KeyboardInterrupt

    def start(self, phase: str, steps: int) -> None:
        """Begin a phase."""
        self._steps[phase] = steps
        self._report(phase, 0)

    def step(self, phase: str, step: int) -> bool:
        """Note a step; False asks the builder to stop."""
        self._report(phase, step + 1)
        return not self.interrupted

    def finish(self, phase: str) -> None:
        """End a phase."""
        self._report(phase, self._steps.get(phase, 1))
        self._steps.pop(phase, None)

    def _report(self, phase: str, done: int) -> None:
        if self._on_phase is not None:
            self._on_phase(phase, done, self._steps.get(phase, 1))


def _monitor_class(base: Any) -> Any:
    class Monitor(base):  # type: ignore[misc]  # the module is known at run time only
        """Called by native code, which an exception must not cross."""

        def __init__(self, progress: Progress) -> None:
            base.__init__(self)
            self._progress = progress

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            """Begin a phase."""
            try:
                self._progress.start(phase_name, num_steps)
            except KeyboardInterrupt:
                self._progress.interrupted = True

        def step_complete(self, phase_name: str, step: int) -> bool:
            """Note a step; False stops the build."""
            try:
                return self._progress.step(phase_name, step)
            except KeyboardInterrupt:
                self._progress.interrupted = True
                return False

        def phase_finish(self, phase_name: str) -> None:
            """End a phase."""
            try:
                self._progress.finish(phase_name)
            except KeyboardInterrupt:
                self._progress.interrupted = True

    return Monitor
