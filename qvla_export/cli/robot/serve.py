"""`qvla serve`: actions over HTTP, websocket and ZMQ."""

from pathlib import Path
from typing import TYPE_CHECKING

from qvla_export.cli.options import PresetOption, ThreadsOption, UnnormKeyOption, WeightsOption
from qvla_export.cli.robot.serve_options import (
    ActionFieldsOption,
    AllowHostOption,
    CameraAliasOption,
    DeadlineOption,
    DefaultInstructionOption,
    Gr00tPortOption,
    HostOption,
    MaxBodyOption,
    MaxRateOption,
    McapOption,
    PortOption,
    RecordImagesOption,
    ReplyOption,
    ServedPolicyArgument,
    StateFieldsOption,
    StrictCompatOption,
    TlsCertOption,
    TlsClientCaOption,
    TlsKeyOption,
    TokenFileOption,
    WarmupOption,
)
from qvla_export.shared.errors import QvlaError

if TYPE_CHECKING:
    from jetson.serving.security import TlsFiles


def serve(
    policy: ServedPolicyArgument,
    host: HostOption = "127.0.0.1",
    port: PortOption = 8000,
    reply: ReplyOption = "auto",
    strict_compat: StrictCompatOption = False,
    camera_alias: CameraAliasOption = None,
    state_fields: StateFieldsOption = None,
    action_fields: ActionFieldsOption = None,
    instruction: DefaultInstructionOption = None,
    gr00t_port: Gr00tPortOption = None,
    token_file: TokenFileOption = None,
    tls_cert: TlsCertOption = None,
    tls_key: TlsKeyOption = None,
    tls_client_ca: TlsClientCaOption = None,
    allow_host: AllowHostOption = None,
    max_rate_hz: MaxRateOption = 1000.0,
    max_body_mb: MaxBodyOption = 32,
    warmup: WarmupOption = 3,
    deadline_ms: DeadlineOption = None,
    record: McapOption = None,
    record_images: RecordImagesOption = "png",
    threads: ThreadsOption = None,
    weights: WeightsOption = "tuned",
    unnorm_key: UnnormKeyOption = None,
    preset: PresetOption = None,
) -> None:
    """Serve actions as OpenVLA and OpenVLA-OFT (POST /act), openpi (websocket), GR00T (ZMQ) do.

    Only this machine can connect unless a token or client certificates keep others out. At / a
    browser shows what the robot sees and does (password: the token); Prometheus reads /metrics.
    """
    from jetson.server_settings import ServerSettings
    from jetson.serving.field_names import FieldNames
    from jetson.serving.security import read_token
    from qvla_export.pipeline.policy_source import PolicySource
    from qvla_export.pipeline.robot.serve import serve_policy

    settings = ServerSettings(
        host=host,
        port=port,
        reply=reply,  # type: ignore[arg-type]  # checked there
        strict_compat=strict_compat,
        field_names=FieldNames.parse(camera_alias, state_fields, action_fields),
        instruction=instruction,
        gr00t_port=gr00t_port,
        token=read_token(token_file),
        tls=tls_files(tls_cert, tls_key, tls_client_ca),
        allowed_hosts=tuple(name.lower() for name in allow_host or ()),
        max_rate_hz=max_rate_hz,
        max_body_bytes=max_body_mb << 20,
        warmup=warmup,
        deadline_ms=deadline_ms,
        record=record,
        record_images=record_images,
    )
    serve_policy(PolicySource(policy, unnorm_key, preset, threads, weights), settings)


def tls_files(
    certificate: Path | None, key: Path | None, client_ca: Path | None
) -> "TlsFiles | None":
    """Return the files of encryption; None where there are none."""
    from jetson.serving.security import TlsFiles

    if certificate is None and key is None and client_ca is None:
        return None
    if certificate is None or key is None:
        raise QvlaError("TLS needs both --tls-cert and --tls-key")
    return TlsFiles(certificate, key, client_ca)
