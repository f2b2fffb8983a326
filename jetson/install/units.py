"""systemd units of a robot: first boot, clocks, serving, going back, optional pull.

A release on probation has one try: where its server ends by a fault or gives no sign of life, the
unit's last command goes back, and what systemd starts again is the release before. A proven one is
started again three times a minute, and left then, as `jetson.install.supervision` does it.

Written for systemd 249 (JetPack 6) and later: systemd.unit(5), systemd.service(5), systemd.exec(5).
"""

import subprocess
from dataclasses import dataclass
from pathlib import Path

from jetson.install.account import SERVING
from jetson.install.store import DEFAULT, StoreError
from qvla_export.shared.artifacts import write_bytes

# Homes are hidden from what serves: nothing that it needs may lie there.
_HOMES = (Path("/home"), Path("/root"), Path("/run/user"))
# The name under which systemd knows the server.
SERVE = "qvla-serve.service"

# What any of the units needs of the machine, and no more. The GPU's devices stay reachable:
# ProtectClock= would close them with systemd 249, and clocks are out of reach without capabilities.
# ProtectKernelTunables= shows another boot id in a container than commands see outside of a unit.
_HARDENING = """NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
ProtectControlGroups=yes
ProtectKernelModules=yes
ProtectKernelLogs=yes
ProtectHostname=yes
RestrictSUIDSGID=yes
RestrictRealtime=yes
LockPersonality=yes
RestrictNamespaces=yes
SystemCallArchitectures=native
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6"""
# What serves holds no right of root's; root's own units need some to check a release as another.
_SERVE_HARDENING = f"""{_HARDENING}
ProtectKernelTunables=yes
ProtectProc=invisible
RemoveIPC=yes
CapabilityBoundingSet=
SystemCallFilter=@system-service
SystemCallFilter=~@privileged
SystemCallErrorNumber=EPERM
UMask=0077"""


@dataclass(frozen=True)
class UnitSettings:
    """What the units of a robot say.

    Raises:
        StoreError: a word would end a line or a setting.
    """

    # What starts Python with `qvla` in it.
    python: Path
    store: Path = DEFAULT
    user: str = "qvla"
    port: int = 8000
    # Further words of `qvla serve`.
    serve_options: tuple[str, ...] = ()
    # nvpmodel's mode; None leaves it.
    power_mode: int | None = None

    def __post_init__(self) -> None:
        for word in (str(self.python), str(self.store), self.user, *self.serve_options):
            if not word or any(mark in word for mark in "\n\r%\"'\\ $;"):
                raise StoreError(
                    f"a unit takes words without blanks, quotes, % or $, got {word!r:.80}"
                )
        for path in (self.python, self.store):
            if any(path.is_relative_to(home) for home in _HOMES):
                raise StoreError(
                    f"the units hide homes from the server, and {path} lies in one; put it "
                    "elsewhere: a venv by python3 -m venv /opt/qvla, one file by "
                    "PEX_ROOT=/opt/qvla ./qvla-jp7.pex robot units ..."
                )

    @property
    def program(self) -> str:
        """Return the words that begin every command."""
        return f"{self.python} -m qvla_export"

    @property
    def token_words(self) -> str:
        """Return where a client of the server finds the token that it asks for."""
        options = self.serve_options
        for i, word in enumerate(options):
            if word == "--token-file" and i + 1 < len(options):
                return f" --token-file {options[i + 1]}"
            if word.startswith("--token-file="):
                return f" {word}"
        return ""


def unit_files(settings: UnitSettings) -> dict[str, str]:
    """Return the units by file name."""
    robot = f"{settings.program} robot"
    store = f"--store {settings.store}"
    files = {
        SERVE: _serve(settings, robot, store),
        "qvla-rollback.service": _oneshot(
            "Go back to the release before the one that fails again and again",
            (
                f"{robot} rollback --reason service-failed {store}",
                f"systemctl reset-failed {SERVE}",
                # It may have failed because the machine is another one by now.
                "systemctl stop qvla-renew.service",
                f"systemctl start --no-block {SERVE}",
            ),
            # From systemd 254 on it is called at every failure, those that a restart answers too:
            # what comes of the restart decides.
            service=f"ExecCondition=/bin/sh -c 'while systemctl show -p SubState {SERVE} "
            "| grep -q auto-restart; do sleep 0.1; done; "
            f"exec systemctl is-failed --quiet {SERVE}'\n{_sandbox(settings)}",
        ),
        "qvla-probation.service": _oneshot(
            "Measure the release that serves, and prove it or leave it",
            (
                f"{robot} prove --url http://127.0.0.1:{settings.port} --unless-proven"
                f" --or-rollback --restart-unit {SERVE}{settings.token_words} {store}",
            ),
            # Another release that is started is measured from its beginning.
            unit=f"After={SERVE}\nPartOf={SERVE}\n",
            service=f"{_sandbox(settings)}",
        ),
        "qvla-first-boot.service": _first_boot(settings, robot, store),
        "qvla-renew.service": _oneshot(
            "Leave what a restart ended; build and check anew if machine or runtime changed",
            (
                _serving_folder(settings),
                f"{robot} rollback --rebooted {store}",
                # Beside the code, where only root writes: outside of the sandbox.
                f"-+{settings.python} -m jetson.install.bytecode",
                f"{robot} verify --if-changed {store}",
            ),
            unit=f"ConditionPathExists={settings.store}/state.json\n"
            "After=qvla-first-boot.service\n",
            # Once a boot: a switch does not wait for it.
            service=f"RemainAfterExit=yes\n{_sandbox(settings)}",
        ),
        "qvla-clocks.service": _oneshot(
            "Hold the clocks of the machine",
            ("-/usr/bin/jetson_clocks",),
            unit="After=nvpmodel.service qvla-first-boot.service\n"
            f"ConditionPathExists=/usr/bin/jetson_clocks\nBefore={SERVE}\n",
            install=True,
        ),
        "qvla-update.service": _oneshot(
            "Fetch and check a newer release, and let it serve on probation",
            (f"{robot} update --restart-unit {SERVE} {store}",),
            unit="Wants=network-online.target\nAfter=network-online.target\n",
            service=_sandbox(settings),
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
    """Let a unit serve what is `current` now; None restarts none.

    A unit that somebody stopped stays so; one that waited for its first release is started. What
    the release before has failed does not count against the next one.

    Raises:
        StoreError: systemd refused.
    """
    if unit is None:
        return
    # Refused where the unit was never loaded: it has no failures to forget.
    subprocess.run(["systemctl", "reset-failed", unit], capture_output=True, check=False)
    words = ["systemctl", "start" if _waits(unit) else "try-restart", unit]
    if subprocess.run(words, check=False).returncode != 0:
        raise StoreError(
            f"another release is current, but {' '.join(words)} failed; see journalctl"
        )


def _waits(unit: str) -> bool:
    """Return whether systemd looked for a release, when it was to start a unit, and saw none."""
    names = ("ConditionResult", "ConditionTimestampMonotonic")
    words = ["systemctl", "show", unit, *(f"--property={name}" for name in names)]
    said = subprocess.run(words, capture_output=True, text=True, check=False).stdout.split()
    values = dict(line.split("=", 1) for line in said if "=" in line)
    return values.get(names[0]) == "no" and values.get(names[1], "0") != "0"


def _serve(settings: UnitSettings, robot: str, store: str) -> str:
    words = " ".join(
        [
            f"{settings.program} serve {settings.store}/current/bundle --port {settings.port}",
            *settings.serve_options,
        ]
    )
    leave = (
        f"{robot} rollback --unproven --reason service-$$SERVICE_RESULT --restart-unit {SERVE}"
        f" {store}"
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
ExecStart={words}
# An unproven release has one try: what is started next is the one before. (Its failures are
# forgotten with it, its result too: hence Restart=always.)
ExecStopPost=-+/bin/sh -c 'test $$SERVICE_RESULT = success || exec {leave}'
TimeoutStartSec=300
WatchdogSec=4
# Nothing comes of asking a server to end that hangs.
WatchdogSignal=SIGKILL
TimeoutStopSec=15
LimitCORE=0
Restart=always
RestartSec=200ms
Environment=XDG_STATE_HOME={settings.store}/{SERVING}
{_SERVE_HARDENING}

[Install]
WantedBy=multi-user.target
"""


def _first_boot(settings: UnitSettings, robot: str, store: str) -> str:
    stamp, user = f"{settings.store}/first-boot-done", settings.user
    lines = (f"u {user} -", f"m {user} video", f"m {user} render")
    account = " ".join(f'"{line}"' for line in lines)
    commands = [
        # Images are cloned: every robot is somebody of its own.
        "/bin/sh -c 'test -s /etc/machine-id || systemd-machine-id-setup'",
        "/bin/sh -c 'ls /etc/ssh/ssh_host_*_key >/dev/null 2>&1 || ssh-keygen -A'",
        f"/bin/sh -c 'exec systemd-sysusers --inline {account}'",
        _serving_folder(settings),
    ]
    if settings.power_mode is not None:
        commands.append(f"-/usr/sbin/nvpmodel -m {settings.power_mode}")
    # The check that follows measures times; a change of the power mode has let go of the clocks.
    commands.append("-/usr/bin/jetson_clocks")
    flashed = f'/bin/sh -c \'test -z "$$(ls {settings.store}/releases 2>/dev/null)" ||'
    commands += [
        # A robot may be flashed without a release; it gets one later.
        f"{flashed} exec {robot} verify {store}'",
        f"{flashed} exec {robot} activate {store}'",
        f"/bin/touch {stamp}",
    ]
    return _oneshot(
        "Make this machine a robot of its own and build its engines",
        tuple(commands),
        unit=f"ConditionPathExists=!{stamp}\nBefore={SERVE} ssh.service\n",
        install=True,
    )


def _serving_folder(settings: UnitSettings) -> str:
    """Return what makes the folder of the account that serves; see `jetson.install.account`."""
    return f"/usr/bin/install -d -m 0700 -o {settings.user} {settings.store}/{SERVING}"


def _sandbox(settings: UnitSettings) -> str:
    """Return what root's units are held to that change nothing but the store."""
    return f"{_HARDENING}\nReadWritePaths={settings.store}\n"


def _oneshot(
    description: str,
    commands: tuple[str, ...],
    unit: str = "",
    service: str = "",
    install: bool = False,
) -> str:
    lines = "".join(f"ExecStart={command}\n" for command in commands)
    wanted = "\n[Install]\nWantedBy=multi-user.target\n" if install else ""
    return (
        f"[Unit]\nDescription={description}\n{unit}\n"
        f"[Service]\nType=oneshot\n{service}{lines}TimeoutStartSec=4h\n{wanted}"
    )
