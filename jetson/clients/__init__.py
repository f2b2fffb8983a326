"""Clients of the action server: HTTP and the other protocols, load, and what times them."""
