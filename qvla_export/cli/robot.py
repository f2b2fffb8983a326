"""Commands that run on the robot: serve."""

from typing import Annotated

import typer

from qvla_export.cli.opening import PolicySource
from qvla_export.cli.options import PresetOption, ThreadsOption, UnnormKeyOption, WeightsOption


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(serve)


def serve(
    policy: Annotated[str, typer.Argument(help="Bundle folder (robot) or checkpoint (host).")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="TCP port; OFT clients expect 8777.")] = 8000,
    reply: Annotated[
        str, typer.Option(help="auto, action (OpenVLA: the first) or chunk (OFT: all).")
    ] = "auto",
    strict_compat: Annotated[
        bool, typer.Option("--strict-compat", help='Failures as HTTP 200 "error", as upstream.')
    ] = False,
    allow_remote: Annotated[
        bool, typer.Option("--allow-remote", help="Permit a non-loopback host; no authentication.")
    ] = False,
    max_body_mb: Annotated[int, typer.Option(help="Longest request body, MB.")] = 32,
    warmup: Annotated[int, typer.Option(help="Actions before the port opens.")] = 3,
    threads: ThreadsOption = None,
    weights: WeightsOption = "packed",
    unnorm_key: UnnormKeyOption = None,
    preset: PresetOption = None,
) -> None:
    """Serve actions over POST /act as OpenVLA and OpenVLA-OFT do (json-numpy)."""
    from jetson.server import serve as run_server
    from jetson.settings import ServerSettings

    settings = ServerSettings(
        host=host,
        port=port,
        reply=reply,  # type: ignore[arg-type]  # checked there
        strict_compat=strict_compat,
        allow_remote=allow_remote,
        max_body_bytes=max_body_mb << 20,
        warmup=warmup,
    )
    run_server(PolicySource(policy, unnorm_key, preset, threads, weights)(), settings)
