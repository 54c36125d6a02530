"""Tests of the recipes, on small checkpoints with the names and formats of published ones."""
