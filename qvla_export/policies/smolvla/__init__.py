"""SmolVLA in LeRobot's layout: SmolVLM2's first blocks, and an expert that integrates a flow."""
