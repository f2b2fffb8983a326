"""The OpenVLA network on `transformers` modules: greedy decoding, and one pass over known tokens.

Source: openvla `modeling_prismatic.py`, `OpenVLAForActionPrediction.predict_action`. The output
layer has the rows of the action tokens alone: a token outside, which upstream would clip to the
nearest bin, cannot win here.
"""

from torch import Tensor

from qvla_export.policies.openvla.architecture import OpenVlaArchitecture
from qvla_export.policies.prismatic.decoding import TokenModule, TokenVocabulary


class OpenVlaModule(TokenModule):
    """Pixels and prompt to the tokens of one action."""

    arch: OpenVlaArchitecture
    # Centre of each action token's bin.  float32 [action tokens]
    token_centers: Tensor

    def __init__(self, arch: OpenVlaArchitecture, token_centers: Tensor) -> None:
        first, tokens = arch.first_action_token, arch.action_tokens
        super().__init__(arch, TokenVocabulary(first, tokens, arch.action_dim))
        # On device "meta" where the weights are: parts are traced there.
        table = token_centers.to(self.projector.fc1.weight.device)
        self.register_buffer("token_centers", table, persistent=False)
