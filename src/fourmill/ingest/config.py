"""Settings of the ingest room. Imports nothing heavy, so that definitions load in a blink."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

VERSION = "1"  # of what this room writes: raise it when the same list and settings give other bytes

NO_EFFECT_ON_CONTENT = {  # how downloads are paced, not what an image becomes
    "concurrency",
    "per_host",
    "lookups",
    "connect_timeout_s",
    "first_byte_timeout_s",
    "total_timeout_s",
    "retries",
    "retry_wait_s",
    "max_retry_wait_s",
    "ca_file",
}

_Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Wait = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class SourceConfig(BaseModel):
    """The list that a dataset is made of."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    list: str = Field(min_length=1, description="Path of the list: a TSV without a header, `URL<TAB>caption` a row.")
    val_fraction: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.002, description="Share of URLs, 0..1, that go to the validation split by their hash."
    )


class IngestConfig(BaseModel):
    """How the images of a list are downloaded and what they become."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    concurrency: Annotated[int, Field(gt=0)] = Field(default=64, description="Downloads in flight at once, a worker.")
    per_host: Annotated[int, Field(gt=0)] = Field(
        default=8,
        description="Requests to one host at once: over all workers of the cluster, or of a worker by itself.",
    )
    lookups: Annotated[int, Field(gt=0)] = Field(
        default=64, description="Host names resolved at once, a worker; each takes a thread."
    )
    connect_timeout_s: _Seconds = Field(
        default=10.0, description="Seconds to resolve a host, and again to connect to it, TLS included."
    )
    first_byte_timeout_s: _Seconds = Field(
        default=30.0,
        description="Seconds to wait for a response's first byte, and for the next one at any later point.",
    )
    total_timeout_s: _Seconds = Field(
        default=60.0,
        description="Seconds for one attempt in all: connections, redirects, every byte. Waiting for a turn is not counted.",
    )
    retries: Annotated[int, Field(ge=0, le=10)] = Field(
        default=2, description="Further attempts after a timeout, a broken connection, HTTP 429 or 5xx, for each URL."
    )
    retry_wait_s: _Wait = Field(
        default=0.5, description="Seconds before the first retry; doubled for each that follows, with jitter."
    )
    max_retry_wait_s: _Wait = Field(
        default=20.0, description="Longest wait before a retry, seconds, whatever a server's Retry-After asks."
    )
    max_redirects: Annotated[int, Field(ge=0, le=20)] = Field(default=5, description="Redirects followed for one URL.")
    max_bytes: Annotated[int, Field(gt=0)] = Field(
        default=20 * 1024**2, description="Longest response body, bytes; longer ones are dropped."
    )
    max_pixels: Annotated[int, Field(gt=0)] = Field(
        default=50_000_000, description="Largest image, width times height as stored; checked before it is decoded."
    )
    max_side_px: Annotated[int, Field(gt=0)] = Field(
        default=768, description="Longer side of a stored image, pixels; larger ones are reduced, none enlarged."
    )
    jpeg_quality: Annotated[int, Field(ge=1, le=100)] = Field(
        default=95, description="JPEG quality (4:4:4) of images that are encoded again."
    )
    allow_hosts: tuple[str, ...] = Field(
        default=(),
        description="Host names that may lie at private or loopback addresses and at any port: your own mirrors, tests.",
    )
    allow_ports: tuple[Annotated[int, Field(gt=0, lt=65536)], ...] = Field(
        default=(80, 443), description="Ports that URLs and redirects may name, for hosts that are not allowed by name."
    )
    ca_file: str | None = Field(
        default=None,
        min_length=1,
        description="PEM file of authorities to trust beside the system's, for mirrors with a private one.",
    )
    respect_robots_tag: bool = Field(
        default=True, description="Leave out images whose X-Robots-Tag says noai, noimageai, noindex or noimageindex."
    )
    user_agent: str = Field(
        default="fourmill/0.1 (image dataset builder)",
        min_length=1,
        description="User-Agent header, so that hosts see who asks.",
    )
