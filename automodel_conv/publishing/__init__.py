"""What a directory needs to be a checkpoint: which files to write, and what lies beside the weights."""
