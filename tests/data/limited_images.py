"""The downloader of images in an actor that may write no long files: a full disk, without the rights to make one."""

import resource
from typing import Any

from fourmill.core.work import ShardWorker
from fourmill.runtime import workers


def images(longest_file: int, **arguments: Any) -> ShardWorker:
    """`workers.images` after setting the actor's limit, bytes; -1 takes it away."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (longest_file, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    return workers.images(**arguments)
