"""Allocators behind one interface; `names` chooses among them."""
