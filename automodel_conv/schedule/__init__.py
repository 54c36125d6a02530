"""Schedules: which bytes are read, moved and written together (pure: integers in, integers out)."""
