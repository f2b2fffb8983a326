"""What would not run on a robot does not get into its runtime."""

import hashlib
import importlib.util
import random
import struct
from pathlib import Path

import pytest
from command_runs import qvla
from native_files import AARCH64, ARM, X86_64, made_python, made_wheel, native_file

from engines.targets import CPU
from qvla_export.pipeline.runtime.elf import DamagedFile, read_native_file
from qvla_export.pipeline.runtime.robot_runtime import (
    OwnPython,
    RuntimeRequest,
    build_runtime,
    notes_on,
)
from qvla_export.pipeline.runtime.robots import JETPACKS
from qvla_export.pipeline.runtime.scan import RefusedWheel, Scan, scan_python, scan_wheel
from qvla_export.pipeline.runtime.wheels import read_lock, require_locked

JETPACK_6, JETPACK_7 = JETPACKS["6"], JETPACKS["7"]
FITTING = native_file("GLIBC_2.17", "GLIBC_2.35", "GLIBCXX_3.4.9", "GLIBC_PRIVATE")


def test_a_wheel_says_what_it_needs(tmp_path: Path) -> None:
    wheel = made_wheel(tmp_path, {"thing/__init__.py": b"", "thing/a.so": FITTING, "b": FITTING})
    scan = scan_wheel(wheel, JETPACK_6)
    # 2.9 is older than 2.35, and 3.4.9 than 3.4.30: numbers, not texts.
    assert scan == Scan(2, {"GLIBC": (2, 35), "GLIBCXX": (3, 4, 9)})
    assert scan_wheel(made_wheel(tmp_path, {"thing/__init__.py": b"x"}), JETPACK_6) == Scan(0, {})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (native_file(machine=X86_64), "is for x86-64; JetPack 6 is aarch64"),
        (native_file(machine=ARM, wide=False), "is for arm, 32 bits"),
        (native_file(machine=AARCH64, wide=False), "is for aarch64, 32 bits"),
        (native_file(machine=4711), "is for machine 4711"),
        (native_file("GLIBC_2.17", "GLIBC_2.36"), r"needs GLIBC_2\.36; JetPack 6 has 2\.35"),
        (native_file("GLIBCXX_3.4.31"), r"needs GLIBCXX_3\.4\.31; JetPack 6 has 3\.4\.30"),
        (native_file("CXXABI_1.3.14"), r"needs CXXABI_1\.3\.14"),
        (FITTING[:15], "cut off"),
        (FITTING[:-30], "cut off"),
    ],
)
def test_what_would_not_run_is_refused_by_its_name(
    tmp_path: Path, data: bytes, message: str
) -> None:
    # Whatever the wheel's name and the file's say.
    wheel = made_wheel(tmp_path, {"a/fine.so": FITTING, "a/data.txt": data})
    with pytest.raises(RefusedWheel, match=rf"a/data\.txt of thing-.*{message}"):
        scan_wheel(wheel, JETPACK_6)


def test_a_newer_jetpack_takes_more(tmp_path: Path) -> None:
    wheel = made_wheel(tmp_path, {"a.so": native_file("GLIBC_2.39", "GLIBCXX_3.4.33")})
    assert scan_wheel(wheel, JETPACK_7).needs["GLIBC"] == (2, 39)
    with pytest.raises(RefusedWheel, match=r"GLIBC_2\.39"):
        scan_wheel(wheel, JETPACK_6)


def test_what_must_be_compiled_and_what_is_damaged_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "thing-1.0.tar.gz"
    source.write_bytes(b"")
    with pytest.raises(RefusedWheel, match="is no wheel: it would have to be compiled"):
        scan_wheel(source, JETPACK_6)
    wheel = made_wheel(tmp_path, {"a.so": FITTING * 40})
    data = wheel.read_bytes()
    for damaged in (data[: len(data) // 2], data[:60] + bytes(30) + data[90:], b"no archive"):
        wheel.write_bytes(damaged)
        with pytest.raises(RefusedWheel, match="is damaged"):
            scan_wheel(wheel, JETPACK_6)


def test_damaged_native_files_are_read_or_refused() -> None:
    """2,000 files with changed bytes: an answer or a refusal by name, never anything else."""
    rng = random.Random(0)
    refused = 0
    for _ in range(2000):
        data = bytearray(FITTING)
        for _ in range(rng.randint(1, 6)):
            data[rng.randrange(4, len(data))] = rng.randrange(256)
        try:
            read_native_file(bytes(data[: rng.choice([len(data), rng.randrange(4, len(data))])]))
        except DamagedFile:
            refused += 1
    assert 500 < refused < 2000
    endless = bytearray(FITTING)
    count = endless.index(struct.pack("<QQ", 0x6FFFFFFF, 1))
    endless[count + 8 : count + 16] = struct.pack("<Q", 1 << 60)
    with pytest.raises(DamagedFile):
        read_native_file(bytes(endless))


def test_a_lock_names_every_wheel_by_its_digest(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    wheel = made_wheel(wheels, {"a.py": b""}, "Some_Thing-1.0-py3-none-any")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    lock = tmp_path / "lock"
    lock.write_text(f"# made by hand\nsome-thing[extra]==1.0 \\\n    --hash=sha256:{digest}\n")
    assert read_lock(lock) == {"some-thing": "1.0"}
    require_locked([wheel], lock)
    with lock.open("a") as file:
        file.write(f"other==2.0 --hash=sha256:{'1' * 64}\n")
    with pytest.raises(RefusedWheel, match=r"names \['other'\], whose wheels are missing"):
        require_locked([wheel], lock)
    wheel.write_bytes(wheel.read_bytes() + b"more")
    with pytest.raises(RefusedWheel, match="no such digest"):
        require_locked([wheel], lock)
    for line in ("thing>=1.0", "thing==1.0", "-e ."):
        lock.write_text(line)
        with pytest.raises(RefusedWheel, match="must be name==version with --hash=sha256"):
            read_lock(lock)


def test_a_python_of_ones_own_decides_the_wheels(tmp_path: Path) -> None:
    files = {"python/bin/python3.13": FITTING, "python/lib/libpython3.13.so": FITTING}
    path = made_python(tmp_path, files)
    assert scan_python(path, JETPACK_6) == (Scan(2, {"GLIBC": (2, 35), "GLIBCXX": (3, 4, 9)}), 13)
    assert JETPACK_6.with_python(13).to_pex()["compatible_tags"][0] == (
        "cp313-cp313-manylinux_2_35_aarch64"
    )
    path = made_python(tmp_path, {"python/bin/python3.13": native_file(machine=X86_64)})
    with pytest.raises(RefusedWheel, match="is for x86-64"):
        scan_python(path, JETPACK_6)
    two = made_python(tmp_path, {"a/bin/python3.12": FITTING, "b/bin/python3.13": FITTING})
    with pytest.raises(RefusedWheel, match=r"one program bin/python3\.N, found \[12, 13\]"):
        scan_python(two, JETPACK_6)
    two.write_bytes(b"no archive")
    with pytest.raises(RefusedWheel, match="is no tar archive"):
        scan_python(two, JETPACK_6)


def test_what_a_runtime_cannot_run_is_said() -> None:
    old, new = {"onnxruntime": "1.23.2"}, {"onnxruntime": CPU.runtime_versions.removeprefix(">=")}
    (said, device) = notes_on(JETPACK_6, old)
    assert "Python 3.10 has 1.23.2 at most; give a newer Python with --python" in said
    assert notes_on(JETPACK_7, new) == (device,) and "cuda-bindings or pycuda" in device
    assert notes_on(JETPACK_7, {**new, "cuda-bindings": "12.9.10"}) == ()


def test_a_wrong_digest_of_ones_own_python_stops_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = made_python(tmp_path, {"python/bin/python3.13": FITTING})
    monkeypatch.setattr("qvla_export.pipeline.runtime.robot_runtime.require_tools", lambda: None)
    own = OwnPython(path, "0" * 64)
    with pytest.raises(RefusedWheel, match=r"has SHA-256 [0-9a-f]{64}, not 0{64}"):
        build_runtime(RuntimeRequest(JETPACK_6, tmp_path / "out.pex", own_python=own))
    alone = qvla("runtime", "build", "--jetpack", "6", "--output", "x.pex", "--python", path)
    assert "--python and --python-sha256 go together" in alone.error


def test_what_cannot_be_built_is_said_before_anything_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("runtime", "build", "--jetpack", "7", "--output")
    assert "a runtime's name ends with .pex, got 'x.json'" in qvla(*words, "x.json").error
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "pex" else find(n))
    missing = qvla(*words, tmp_path / "folder" / "x.pex").error
    assert "needs" in missing and "pip install 'qvla[runtime]'" in missing
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("qvla_export.pipeline.runtime.robot_runtime.require_tools", lambda: None)
    elsewhere = qvla(*words, tmp_path / "x.pex", "--source", tmp_path).error
    assert "is no checkout of QVLA: it has no pyproject.toml" in elsewhere
    assert list(tmp_path.iterdir()) == []
