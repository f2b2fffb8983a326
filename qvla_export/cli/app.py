"""The command's tree: which commands there are, in which panel of the help, most used first."""

from collections.abc import Callable
from typing import Annotated, Any

import typer

from qvla_export.cli.bench.allocation import allocation
from qvla_export.cli.bench.engines import engines
from qvla_export.cli.bench.gpu import gpu
from qvla_export.cli.bench.rates import rates
from qvla_export.cli.bench.server import server
from qvla_export.cli.bench.size import size
from qvla_export.cli.bench.weights import weights
from qvla_export.cli.deploy.build import build
from qvla_export.cli.deploy.calibrate import calibrate
from qvla_export.cli.deploy.deploy import deploy
from qvla_export.cli.deploy.export import export
from qvla_export.cli.deploy.plan import plan
from qvla_export.cli.deploy.push import push
from qvla_export.cli.deploy.report import report
from qvla_export.cli.deploy.sensitivities import sensitivities
from qvla_export.cli.deploy.verify import verify
from qvla_export.cli.judge.check import check
from qvla_export.cli.judge.compare_latency import compare_latency
from qvla_export.cli.judge.evaluate import evaluate
from qvla_export.cli.judge.predict import predict
from qvla_export.cli.judge.profile import profile
from qvla_export.cli.judge.sizes import sizes
from qvla_export.cli.judge.tune import tune
from qvla_export.cli.release import flashing, key_ring, releases, runtimes
from qvla_export.cli.research.activations import activations
from qvla_export.cli.research.baseline import baseline
from qvla_export.cli.research.compare import compare
from qvla_export.cli.research.demonstrations import demonstrations
from qvla_export.cli.research.estimators import estimators
from qvla_export.cli.research.moments import moments
from qvla_export.cli.research.quantizers import quantizers
from qvla_export.cli.research.round import round_command
from qvla_export.cli.research.smooth import smooth
from qvla_export.cli.research.train import train
from qvla_export.cli.robot import board_profile, keep_serving, store
from qvla_export.cli.robot.doctor import doctor
from qvla_export.cli.robot.load import load
from qvla_export.cli.robot.replay import replay
from qvla_export.cli.robot.run import run
from qvla_export.cli.robot.serve import serve
from qvla_export.cli.robot.soak import soak

Command = Callable[..., Any]


def name_of(command: Command) -> str:
    """Return a command's name: that of its module."""
    return command.__module__.rpartition(".")[2].replace("_", "-")


# Title of a panel -> its commands, most used first.
PANELS: dict[str, tuple[Command, ...]] = {
    "Deploy": (deploy, calibrate, sensitivities, plan, export, build, verify, report, push),
    "Judge": (evaluate, profile, compare_latency, tune, sizes, check, predict),
    "Robot": (serve, run, replay, load, doctor, soak),
    "Research": (
        *(compare, estimators, quantizers, baseline, smooth, moments),
        *(round_command, activations, train, demonstrations),
    ),
}
BENCH: tuple[Command, ...] = (engines, allocation, weights, server, size, rates, gpu)

# Title of a panel, name of a group and what it is for -> its commands by name.
GROUPS: dict[tuple[str, str, str], dict[str, Command]] = {
    ("Research", "bench", "Time what is only timed."): {name_of(c): c for c in BENCH},
    ("Deploy", "release", "Sign bundles and hand them out."): {
        "create": releases.create,
        "sign": releases.sign,
        "publish": releases.publish,
        "verify": releases.verify,
        "inspect": releases.inspect,
        "diff": releases.diff,
    },
    ("Deploy", "keys", "Say who may sign releases."): {
        "new": key_ring.new,
        "delegate": key_ring.delegate,
        "rotate": key_ring.rotate,
        "revoke": key_ring.revoke,
    },
    ("Deploy", "runtime", "Make the one file that a robot runs releases with."): {
        "build": runtimes.build
    },
    ("Deploy", "flash", "Flash Jetsons with a release on them."): {
        "prepare": flashing.prepare,
        "run": flashing.run,
        "undo": flashing.undo,
    },
    ("Robot", "robot", "Install, check, switch and take back releases."): {
        "install": store.install,
        "build": store.build,
        "verify": store.verify,
        "activate": store.activate,
        "prove": keep_serving.prove,
        "rollback": store.rollback,
        "list": store.list_releases,
        "gc": store.gc,
        "status": store.status,
        "profile": board_profile.profile,
        "update": keep_serving.update,
        "supervise": keep_serving.supervise,
        "units": keep_serving.units,
    },
}


def _print_version(is_asked_for: bool) -> None:
    if is_asked_for:
        from importlib.metadata import version

        typer.echo(f"qvla {version('qvla')}")
        raise typer.Exit


def qvla(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Quantize a robot policy by what each weight channel does to the action, and serve it."""


def _new_app() -> typer.Typer:
    return typer.Typer(
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


app = _new_app()
app.callback()(qvla)
for _panel, _commands in PANELS.items():
    for _command in _commands:
        app.command(name_of(_command), rich_help_panel=_panel)(_command)

for (_panel, _name, _help), _inner in GROUPS.items():
    _group = _new_app()
    for _inner_name, _command in _inner.items():
        _group.command(_inner_name)(_command)
    app.add_typer(_group, name=_name, rich_help_panel=_panel, help=_help)
