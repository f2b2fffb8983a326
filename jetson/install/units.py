"""systemd units of a robot: first boot, clocks, serving, going back, optional pull.

Written for systemd 249 (JetPack 6) and later: systemd.unit(5), systemd.service(5), systemd.exec(5).
"""

import subprocess
from dataclasses import dataclass
from pathlib import Path

from jetson.install.store import DEFAULT, StoreError
from qvla_export.shared.artifacts import write_bytes

# What a server of actions needs of the machine, and no more.
_HARDENING = """NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
ProtectControlGroups=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectKernelLogs=yes
ProtectClock=yes
ProtectHostname=yes
RestrictSUIDSGID=yes
RestrictRealtime=no
LockPersonality=yes
RestrictNamespaces=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6
CapabilityBoundingSet=
UMask=0077"""


@dataclass(frozen=True)
class UnitSettings:
    """What the units of a robot say.

    Raises:
        StoreError: a word would end a line or a setting.
    """

    program: Path
    store: Path = DEFAULT
    user: str = "qvla"
    port: int = 8000
    # Further words of `qvla serve`.
    serve_options: tuple[str, ...] = ()
    # nvpmodel's mode; None leaves it.
    power_mode: int | None = None

    def __post_init__(self) -> None:
        for word in (str(self.program), str(self.store), self.user, *self.serve_options):
            if not word or any(mark in word for mark in "\n\r%\"'\\ $;"):
                raise StoreError(
                    f"a unit takes words without blanks, quotes, % or $, got {word!r:.80}"
                )


def unit_files(settings: UnitSettings) -> dict[str, str]:
    """Return the units by file name."""
    robot = f"{settings.program} robot"
    store = f"--store {settings.store}"
    files = {
        "qvla-serve.service": _serve(settings, robot, store),
        "qvla-rollback.service": _oneshot(
            "Go back to the release before the one that failed",
            (
                "-systemctl reset-failed qvla-serve.service",
                # The release that is left may be running still.
                f"{robot} rollback --unproven --reason service-failed --restart-unit "
                f"qvla-serve.service {store}",
                "systemctl start --no-block qvla-serve.service",
            ),
        ),
        "qvla-probation.service": _oneshot(
            "Measure the release that serves and prove it",
            (f"{robot} prove --url http://127.0.0.1:{settings.port} --unless-proven {store}",),
            unit="After=qvla-serve.service\nOnFailure=qvla-rollback.service\n",
        ),
        "qvla-first-boot.service": _first_boot(settings, robot, store),
        "qvla-renew.service": _oneshot(
            "Build and check what serves again if this machine has changed",
            (f"{robot} verify --if-changed {store}",),
            unit=f"ConditionPathExists={settings.store}/state.json\n"
            "After=qvla-first-boot.service\n",
        ),
        "qvla-clocks.service": _oneshot(
            "Hold the clocks of the machine",
            ("-/usr/bin/jetson_clocks",),
            unit="After=nvpmodel.service\nConditionPathExists=/usr/bin/jetson_clocks\n"
            "Before=qvla-serve.service\n",
            install=True,
        ),
        "qvla-update.service": _oneshot(
            "Fetch and check a newer release, and let it serve on probation",
            (f"{robot} update --restart-unit qvla-serve.service {store}",),
            unit="Wants=network-online.target\nAfter=network-online.target\n",
        ),
        "qvla-update.timer": (
            "[Unit]\nDescription=Look for newer releases\n\n"
            "[Timer]\nOnBootSec=10min\nOnUnitActiveSec=1h\nRandomizedDelaySec=30min\n\n"
            "[Install]\nWantedBy=timers.target\n"
        ),
    }
    return {name: f"# Written by qvla robot units.\n{text}" for name, text in files.items()}


def write_units(folder: Path, settings: UnitSettings) -> list[Path]:
    """Write the units into a folder, /etc/systemd/system or the overlay of an image."""
    paths = []
    for name, text in unit_files(settings).items():
        paths.append(folder / name)
        write_bytes(paths[-1], text.encode())
    return paths


def restart(unit: str | None) -> None:
    """Restart a unit that runs, after another release was made `current`; None restarts none.

    Raises:
        StoreError: systemd refused.
    """
    words = ["systemctl", "try-restart", str(unit)]
    if unit is not None and subprocess.run(words, check=False).returncode != 0:
        raise StoreError(
            f"another release is current, but {' '.join(words)} failed; see journalctl"
        )


def _serve(settings: UnitSettings, robot: str, store: str) -> str:
    words = " ".join(
        [
            f"{settings.program} serve {settings.store}/current/bundle --port {settings.port}",
            *settings.serve_options,
        ]
    )
    return f"""[Unit]
Description=Actions of a QVLA policy
After=network.target qvla-first-boot.service qvla-renew.service
Wants=qvla-renew.service qvla-probation.service
ConditionPathExists={settings.store}/state.json
OnFailure=qvla-rollback.service
StartLimitIntervalSec=60
StartLimitBurst=3

[Service]
Type=notify
NotifyAccess=main
User={settings.user}
# A release whose probation a restart of the machine ended is left before anything serves.
ExecStartPre=+{robot} rollback --rebooted {store}
ExecStart={words}
TimeoutStartSec=300
WatchdogSec=5
TimeoutStopSec=15
Restart=on-failure
RestartSec=200ms
StateDirectory=qvla-serve
Environment=XDG_STATE_HOME=/var/lib/qvla-serve
{_HARDENING}

[Install]
WantedBy=multi-user.target
"""


def _first_boot(settings: UnitSettings, robot: str, store: str) -> str:
    stamp = f"{settings.store}/first-boot-done"
    commands = [
        # Images are cloned: every robot is somebody of its own.
        "/bin/sh -c 'test -s /etc/machine-id || systemd-machine-id-setup'",
        "/bin/sh -c 'ls /etc/ssh/ssh_host_*_key >/dev/null 2>&1 || ssh-keygen -A'",
    ]
    if settings.power_mode is not None:
        commands.append(f"-/usr/sbin/nvpmodel -m {settings.power_mode}")
    commands += [
        f"{robot} verify {store}",
        f"{robot} activate {store}",
        f"/bin/touch {stamp}",
    ]
    return _oneshot(
        "Make this machine a robot of its own and build its engines",
        tuple(commands),
        unit=f"ConditionPathExists=!{stamp}\nBefore=qvla-serve.service ssh.service\n",
        install=True,
    )


def _oneshot(
    description: str, commands: tuple[str, ...], unit: str = "", install: bool = False
) -> str:
    lines = "".join(f"ExecStart={command}\n" for command in commands)
    wanted = "\n[Install]\nWantedBy=multi-user.target\n" if install else ""
    return (
        f"[Unit]\nDescription={description}\n{unit}\n"
        f"[Service]\nType=oneshot\n{lines}TimeoutStartSec=4h\n{wanted}"
    )
