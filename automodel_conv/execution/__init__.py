"""Executors: they run plans and schedules, and move the bytes between files, host memory and devices."""
