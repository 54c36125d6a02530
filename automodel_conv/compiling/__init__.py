"""Compile a checkpoint, a model and a layout into one plan."""
