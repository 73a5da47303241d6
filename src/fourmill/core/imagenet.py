"""Mean and standard deviation of ImageNet's colours, in 0..1: what most networks were trained with."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
