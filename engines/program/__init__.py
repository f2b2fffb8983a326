"""How engines run a bundle's program: tensors stay in the runtime, parts are counted and timed."""
