"""Tokenizers for every modality, their training, and labels to tokens. No Dagster, no Ray."""
