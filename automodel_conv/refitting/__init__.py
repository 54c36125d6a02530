"""Refits: what the ranks of a trainer and of an engine hold, the transfers between them, and their execution."""
