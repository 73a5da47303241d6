"""The downloader of images as it would be if each worker kept the limit per host for itself: what tests compare with."""

from typing import Any
from unittest.mock import patch

from fourmill.core.work import ShardWorker
from fourmill.runtime import host_limits, workers


def images(**arguments: Any) -> ShardWorker:
    """`workers.images` without the cluster's limits."""
    with patch.object(host_limits, "cluster_host_limits", lambda limit, concurrency: None):
        return workers.images(**arguments)
