"""Tables of texts: for a terminal, for a notebook."""
