"""A language model by itself as a `Policy`: its logits of every next token are the action."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from qvla_export.policies.backbone import Backbone

if TYPE_CHECKING:
    from qvla_export.policies.backbones.text_policy import TextPolicy


@dataclass(frozen=True)
class TextBackbone(Backbone):
    """A Llama in a GGUF file."""

    reads: ClassVar[Literal["picture", "text"]] = "text"
    camera: ClassVar[str] = "blank"
    output: ClassVar[str] = "logits of every next token, without their mean"

    def load(self) -> "TextPolicy":
        """Return the language model as a policy."""
        from qvla_export.policies.backbones.text_policy import text_policy

        return text_policy(self.file.path(), self.camera, self.size, self.digest)
