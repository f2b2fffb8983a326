"""Sensitivity estimators behind one interface; `names` chooses among them."""
