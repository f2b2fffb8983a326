"""Predicted latency on a target: a roofline over a policy's products. numpy only."""
