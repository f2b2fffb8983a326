"""Targets; engines that run a bundle; verification of one engine against another."""
