"""Quantization methods: one file each, and ``table`` lists them."""
