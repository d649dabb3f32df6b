"""``make gpu``: everything that a GPU is needed for, in order, within minutes."""
