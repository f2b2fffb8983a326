"""What recordings of any format say is to be done, as a text."""

import re
from typing import Any

from qvla_export.shared.errors import ArtifactError

# Bytes as Python prints them: what a conversion leaves that took str() of them.
_PRINTED_BYTES = re.compile(r"b(['\"]).*\1", re.DOTALL)


def text_of(value: Any, place: str) -> str:
    """Return an instruction that is a text, or UTF-8 bytes; empty where it is null.

    Zeros that fill up a field of fixed length are no part of it.

    Raises:
        ArtifactError: it is neither, or bytes as Python prints them.
    """
    if isinstance(value, bytes | memoryview):
        try:
            value = bytes(value).decode()
        except UnicodeDecodeError as error:
            raise ArtifactError(f"{place}: an instruction is no UTF-8 text: {error}") from None
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ArtifactError(f"{place}: an instruction is a text, got {type(value).__name__}")
    text = value.rstrip("\0")
    if _PRINTED_BYTES.fullmatch(text.strip()):
        raise ArtifactError(
            f"{place}: the instruction is {text:.60}, bytes as Python prints them, which nobody "
            "tells a robot; write the texts anew with .decode(), or say it with --instruction TEXT"
        )
    return text
