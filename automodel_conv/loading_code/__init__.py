"""Somebody's loading code: run it without data, fill what it fills, and run it for what it computes."""
