"""Help panel *Judge*: success, latency, sizes and rules of what was deployed."""
