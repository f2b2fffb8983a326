"""Certificates for tests of encryption, made with the command openssl."""

import shutil
import subprocess
from pathlib import Path

import pytest


def write_certificates(folder: Path) -> Path:
    """Write them into a folder, and return it."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl command to make certificates with")
    (folder / "extensions").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    for name in ("ca", "other"):
        key = ("-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN={name}")
        openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *key)
    for name, signer in (("server", "ca"), ("client", "ca"), ("stranger", "other")):
        key = ("-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        openssl("req", "-newkey", "rsa:2048", "-nodes", *key)
        signed = ("-CA", f"{signer}.pem", "-CAkey", f"{signer}.key", "-CAcreateserial")
        out = ("-in", f"{name}.csr", "-out", f"{name}.pem", "-extfile", "extensions")
        openssl("x509", "-req", "-days", "2", *signed, *out)
    return folder
