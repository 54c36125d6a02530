"""Compile a checkpoint, a model and a layout to one plan."""
