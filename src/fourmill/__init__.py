"""From a list of image URLs and captions to a pretrained 4M model, every stage a Dagster asset."""
