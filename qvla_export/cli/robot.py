"""Commands that run on the robot: serve."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qvla_export.cli.opening import PolicySource
from qvla_export.cli.options import PresetOption, ThreadsOption, UnnormKeyOption, WeightsOption
from qvla_export.errors import QvlaError

if TYPE_CHECKING:
    from jetson.security import TlsFiles


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
    gr00t_port: Annotated[
        int | None, typer.Option(help="TCP port of GR00T's ZMQ protocol; its clients expect 5555.")
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(help="File with the token every client must send; or QVLA_TOKEN."),
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate chain, PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key, PEM.")] = None,
    tls_client_ca: Annotated[
        Path | None,
        typer.Option(help="Who signs clients' certificates, PEM; clients without one are refused."),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="Name that clients may call this machine by; repeat."),
    ] = None,
    max_rate_hz: Annotated[
        float, typer.Option(help="Requests a second of one client address; 0: no limit.")
    ] = 1000.0,
    max_body_mb: Annotated[int, typer.Option(help="Longest request body, MB.")] = 32,
    warmup: Annotated[int, typer.Option(help="Actions before the port opens.")] = 3,
    deadline_ms: Annotated[
        float | None, typer.Option(help="Slower actions count as missed at /metrics and /.")
    ] = None,
    record: Annotated[
        Path | None, typer.Option(help="MCAP file to write every observation and action to.")
    ] = None,
    record_images: Annotated[
        Literal["png", "jpeg"], typer.Option(help="png: what the policy saw, exactly.")
    ] = "png",
    threads: ThreadsOption = None,
    weights: WeightsOption = "packed",
    unnorm_key: UnnormKeyOption = None,
    preset: PresetOption = None,
) -> None:
    """Serve actions as OpenVLA and OpenVLA-OFT (POST /act), openpi (websocket), GR00T (ZMQ) do.

    Only this machine can connect unless a token or client certificates keep others out. A browser
    shows what the robot sees and does at /; a token is the password there. Prometheus reads
    /metrics.
    """
    from jetson.security import read_token
    from jetson.server import serve as run_server
    from jetson.settings import ServerSettings

    settings = ServerSettings(
        host=host,
        port=port,
        reply=reply,  # type: ignore[arg-type]  # checked there
        strict_compat=strict_compat,
        gr00t_port=gr00t_port,
        token=read_token(token_file),
        tls=_tls(tls_cert, tls_key, tls_client_ca),
        allowed_hosts=tuple(name.lower() for name in allow_host or ()),
        max_rate_hz=max_rate_hz,
        max_body_bytes=max_body_mb << 20,
        warmup=warmup,
        deadline_ms=deadline_ms,
        record=record,
        record_images=record_images,
    )
    run_server(PolicySource(policy, unnorm_key, preset, threads, weights)(), settings)


def _tls(certificate: Path | None, key: Path | None, client_ca: Path | None) -> "TlsFiles | None":
    from jetson.security import TlsFiles

    if certificate is None and key is None and client_ca is None:
        return None
    if certificate is None or key is None:
        raise QvlaError("TLS needs both --tls-cert and --tls-key")
    return TlsFiles(certificate, key, client_ca)
