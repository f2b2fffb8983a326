"""ALOHA in simulation: gym-aloha, for policies of two arms."""
