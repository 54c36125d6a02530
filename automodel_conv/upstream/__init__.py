"""The interface to transformers and to torch's wrappers of models: models, rules and configs."""
