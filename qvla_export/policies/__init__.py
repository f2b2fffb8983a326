"""Policy families: load a published checkpoint, expose its layers and a differentiable action."""
