"""What a Jetson is flashed with: an overlay on NVIDIA's BSP, and the commands that flash it."""
