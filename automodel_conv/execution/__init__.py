"""Executors, which run plans and schedules: loads, conversions in memory, and the writing of files."""
