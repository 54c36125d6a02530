"""Everything that is asked of transformers and torch: models, rules and configs."""
