"""Weights -> integer codes: plans, scales, rounding, compensation, packed storage. numpy only."""
