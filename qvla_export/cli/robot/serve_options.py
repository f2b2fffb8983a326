"""What `qvla serve` is told."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from qvla_export.cli.options import A_FILE, A_POLICY

ServedPolicyArgument = Annotated[
    str,
    typer.Argument(help="Bundle folder (robot) or checkpoint (host).", callback=A_POLICY.require),
]
HostOption = Annotated[str, typer.Option(help="Address to listen on.")]
PortOption = Annotated[int, typer.Option(help="TCP port; OFT clients expect 8777.")]
ReplyOption = Annotated[
    str, typer.Option(help="auto, action (OpenVLA: the first) or chunk (OFT: all).")
]
StrictCompatOption = Annotated[
    bool, typer.Option("--strict-compat", help='Failures as HTTP 200 "error", as upstream.')
]
Gr00tPortOption = Annotated[
    int | None, typer.Option(help="TCP port of GR00T's ZMQ protocol; its clients expect 5555.")
]
TokenFileOption = Annotated[
    Path | None,
    typer.Option(
        help="File with the token every client must send; or QVLA_TOKEN.", callback=A_FILE.require
    ),
]
TlsCertOption = Annotated[
    Path | None, typer.Option(help="Certificate chain, PEM.", callback=A_FILE.require)
]
TlsKeyOption = Annotated[Path | None, typer.Option(help="Its key, PEM.", callback=A_FILE.require)]
TlsClientCaOption = Annotated[
    Path | None,
    typer.Option(
        help="Who signs clients' certificates, PEM; clients without one are refused.",
        callback=A_FILE.require,
    ),
]
AllowHostOption = Annotated[
    list[str] | None,
    typer.Option(help="Name that clients may call this machine by; repeat."),
]
MaxRateOption = Annotated[
    float, typer.Option(help="Requests a second of one client address; 0: no limit.")
]
MaxBodyOption = Annotated[int, typer.Option(help="Longest request body, MB.")]
CameraAliasOption = Annotated[
    list[str] | None,
    typer.Option(
        help="CAMERA=FIELD: what clients call the policy's camera, as full_image=cam_high; repeat."
    ),
]
StateFieldsOption = Annotated[
    str | None,
    typer.Option(
        help="Clients' fields that make up the state, in this order: joint_position,"
        "gripper_position."
    ),
]
ActionFieldsOption = Annotated[
    str | None,
    typer.Option(help="What GR00T's clients call the pieces of an action: single_arm=5,gripper=1."),
]
DefaultInstructionOption = Annotated[
    str | None, typer.Option(help="What to do where a client does not say (openpi's ALOHA).")
]
WarmupOption = Annotated[int, typer.Option(help="Actions before the port opens.")]
DeadlineOption = Annotated[
    float | None, typer.Option(help="Slower actions count as missed at /metrics and /.")
]
McapOption = Annotated[
    Path | None, typer.Option(help="MCAP file to write every observation and action to.")
]
RecordImagesOption = Annotated[
    Literal["png", "jpeg"], typer.Option(help="png: what the policy saw, exactly.")
]
