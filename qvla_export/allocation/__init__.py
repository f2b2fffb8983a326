"""Sensitivities and a budget -> a width for every channel. numpy only."""
