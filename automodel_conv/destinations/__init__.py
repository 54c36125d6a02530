"""The tensors that a load fills: parameters and buffers of a model, on their devices."""
