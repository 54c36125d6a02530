"""Distributed tensors: the parts that ranks hold, and the communication between ranks."""
