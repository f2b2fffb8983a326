"""OpenVLA: two vision towers and a Llama that decodes an action token by token."""
