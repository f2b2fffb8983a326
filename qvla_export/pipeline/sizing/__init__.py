"""What a policy's size asks of this machine: how it is held, and what its deployment takes."""
