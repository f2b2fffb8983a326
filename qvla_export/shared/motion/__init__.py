"""How a robot's state follows its commands: what a delayed policy needs to know of it."""
