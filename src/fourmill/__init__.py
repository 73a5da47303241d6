"""From a list of image URLs and captions to a pretrained 4M model, every stage a Dagster asset."""

from fourmill.core.store import Store, register_opener


def _open_s3(root: str) -> Store:
    from fourmill.runtime.object_store import ObjectStore  # boto3 comes in with the first s3:// root only

    return ObjectStore(root)


# Here, since drivers, Ray's actors, training programs and sensors have nothing else in common, and core knows no boto3.
register_opener("s3", _open_s3)
