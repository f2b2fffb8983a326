"""A policy and a training of it that take a second; a process that is killed uses them too."""

from calibration.training.train import TrainingConfig
from qvla_export.policies.prismatic.new_checkpoint import NetworkSize

SIZE = NetworkSize(
    image_size=28,
    patch_size=14,
    vision_dim=64,
    vision_depth=2,
    hidden_dim=64,
    mlp_dim=64,
    depth=1,
    heads=2,
    vocab_size=300,
)
CONFIG = TrainingConfig(
    seed=1, steps=12, batch_size=8, warmup_steps=4, save_every_steps=3, precision="fp32"
)
