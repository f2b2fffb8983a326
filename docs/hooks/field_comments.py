"""Takes the comment above a dataclass's field for what the library's reference says of it."""

import ast
from typing import Any

from griffe import Attribute, Docstring, Extension, ObjectNode


class FieldComments(Extension):
    """Gives an attribute without a docstring the comment lines that stand above it."""

    def on_attribute_instance(
        self, *, node: ast.AST | ObjectNode, attr: Attribute, **_: Any
    ) -> None:
        """Read the comment off the source; private and commentless attributes stay as they are."""
        if attr.docstring or not isinstance(node, ast.AnnAssign) or attr.name.startswith("_"):
            return
        lines = attr.lines_collection[attr.filepath]
        comment: list[str] = []
        for line in reversed(lines[: node.lineno - 1]):
            if not line.strip().startswith("#"):
                break
            comment.insert(0, line.strip().removeprefix("#").strip())
        if comment:
            attr.docstring = Docstring(" ".join(comment), parent=attr)
