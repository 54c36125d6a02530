"""Adapters (LoRA): read them, match them to a base model, and convert them between their forms."""
