"""Estimators of the table behind one interface, by the names that `--method` takes."""
