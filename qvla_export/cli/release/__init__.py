"""Commands of releases and their keys."""
