"""LIBERO: suites, official initial states, OpenVLA's evaluation. In an environment of its own."""
