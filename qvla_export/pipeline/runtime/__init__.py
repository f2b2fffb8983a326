"""The step that makes the one file that a robot needs beside a release: QVLA and what it needs."""
