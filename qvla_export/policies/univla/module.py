"""The UniVLA network: latent tokens decoded or given, then the action decoder.

Source: UniVLA `prismatic/extern/hf/modeling_prismatic.py`,
`OpenVLAForActionPrediction.predict_latent_action`. The output layer has the rows of the latent
tokens alone: another token, which upstream's decoder cannot be given, cannot win here.
"""

import torch
from torch import Tensor

from qvla_export.policies.prismatic.decoding import Decoded, TokenModule, TokenVocabulary
from qvla_export.policies.univla.action_decoder import ActionDecoder
from qvla_export.policies.univla.architecture import UniVlaArchitecture


class UniVlaModule(TokenModule):
    """Pixels and prompt to latent tokens, and these to a chunk of normalized actions."""

    arch: UniVlaArchitecture

    def __init__(self, arch: UniVlaArchitecture) -> None:
        vocabulary = TokenVocabulary(arch.first_latent_token, arch.codebook, arch.latent_tokens)
        super().__init__(arch, vocabulary, arch.sampling)
        width = int(arch.llama.hidden_size)
        self.action_decoder = ActionDecoder(width, arch.decoder, arch.horizon, arch.action_dim)

    def act(self, decoded: Decoded) -> Tensor:
        """Return the actions [B, horizon, dim] of latent tokens' states and the image's."""
        visual = self.pooled(self._from_first(decoded))
        latents = decoded.hidden[:, -self.arch.latent_tokens :]
        actions: Tensor = self.action_decoder(latents, visual)
        return actions

    def pooled(self, states: Tensor) -> Tensor:
        """Return one vector [B, width] of the states [B, N, D] of a sequence without padding.

        They are BOS's and those of all patches but the last: one off, as in upstream's training
        (`finetune_libero.py`, `action_decoder_forward`) and evaluation.
        """
        visual: Tensor = self.action_decoder.visual_pool(states[:, : self.arch.patches])
        return visual

    def _from_first(self, decoded: Decoded) -> Tensor:
        """Return states of as many positions as there are patches, from each row's first one."""
        missing = decoded.hidden.shape[1] - decoded.length
        index = missing[:, None] + torch.arange(self.arch.patches, device=missing.device)
        return decoded.hidden.gather(1, index[:, :, None].expand(-1, -1, decoded.hidden.shape[2]))
