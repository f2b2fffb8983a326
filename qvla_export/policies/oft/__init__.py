"""OpenVLA-OFT: its checkpoint, network, parts and a new small one."""
