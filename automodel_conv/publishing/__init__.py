"""The files that turn a directory into a checkpoint: weights, and the files that accompany them."""
