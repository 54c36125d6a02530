"""Where a load puts tensors: parameters and buffers of a model, and devices."""
