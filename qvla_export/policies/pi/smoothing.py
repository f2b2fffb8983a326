"""Where pi0 and pi0.5 can be smoothed: inputs whose factors something linear can take over.

Gemma's norms multiply by 1 + weight, pi0.5's by numbers of the time: neither can take a factor, nor
can values that heads share.
"""

from collections.abc import Iterator

from qvla_export.policies.pi.architecture import PiArchitecture
from qvla_export.policies.smoothing import Migration


def find_migrations(arch: PiArchitecture) -> tuple[Migration, ...]:
    """Return SigLIP's norms into attention and MLP, its value rows and all up projections."""
    return (*_tower(arch), *_stacks(arch))


def _tower(arch: PiArchitecture) -> Iterator[Migration]:
    for index in range(int(arch.siglip.num_hidden_layers)):
        name = f"vision_tower.encoder.layers.{index}"
        projections = tuple(f"{name}.self_attn.{part}_proj" for part in "qkv")
        yield Migration(f"{name}.layer_norm1", projections)
        yield Migration(f"{name}.layer_norm2", (f"{name}.mlp.fc1",))
        yield Migration(projections[2], (f"{name}.self_attn.out_proj",))


def _stacks(arch: PiArchitecture) -> Iterator[Migration]:
    # The language model's last block has no MLP.
    for stack, depth in (
        ("language_model", arch.language.depth - 1),
        ("action_expert", arch.expert.depth),
    ):
        for index in range(depth):
            mlp = f"{stack}.layers.{index}.mlp"
            yield Migration(f"{mlp}.up_proj", (f"{mlp}.down_proj",))
