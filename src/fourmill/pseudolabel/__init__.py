"""Images to pseudo-labels: depth, normals, classes, boxes, and CLIP features. No Dagster, no Ray; one network a file."""
