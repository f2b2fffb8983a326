"""The steps of a run, one module each: read one artifact, write one, keep what is up to date.

Callable from a notebook or a service: no typer, no printing, progress by callback.
"""
