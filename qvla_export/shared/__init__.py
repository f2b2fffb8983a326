"""The contract between host and robot: what two or more of the four packages use.

numpy, Pillow, safetensors and tokenizers only.
"""
