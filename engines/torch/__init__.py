"""A bundle's graphs in torch; imported when opened by name."""
