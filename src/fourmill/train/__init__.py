"""4M: model, masking, loader, training, generation. No Dagster, no Ray."""
