"""What transformers and torch say of models, rules and configs."""
