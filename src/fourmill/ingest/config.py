"""Settings of the ingest room. Imports nothing heavy, so that definitions load in a blink."""

from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, model_validator

VERSION = "4"  # of what this room writes: raise it when the same list and settings give other bytes

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
    "waiting_mb",
    "opt_out",  # its entries are inputs of the shards that they match
}

WHERE_IT_LIES = {"list", "root", "class_names"}  # of a source: places, whose content the source's digest covers

_Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Wait = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class SourceConfig(BaseModel):
    """Where a dataset's pictures and captions come from: a list of URLs, a folder tree, or webdataset tars."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["list", "folder", "webdataset"] = Field(
        default="list", description="A list of URLs, or pictures at hand: a tree of class folders, or a folder of tars."
    )
    list: str = Field(
        default="",
        description="The list: a path, s3://... or https://...; TSV, CSV (either may be .gz or .zst) or Parquet.",
    )
    root: str = Field(
        default="",
        description="Folder of the pictures at hand, at the same place on every machine that works on shards; nothing "
        "outside it is ever read.",
    )
    format: Literal["auto", "tsv", "csv", "parquet"] = Field(
        default="auto",
        description="Of the list; auto goes by its ending. A TSV has no quotes, a CSV quotes as RFC 4180 says.",
    )
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] | None = Field(
        default=None, description="One ASCII character between columns; a tab in a TSV and a comma in a CSV if not set."
    )
    header: Literal["auto", "yes", "no"] = Field(
        default="auto",
        description="Whether the first row names the columns. auto: yes when a column is named here or the first row has "
        "a cell `url` or `image_url`, whatever its case. Without a header a row is URL and caption.",
    )
    url_column: str | None = Field(
        default=None, description="Name of the column with the URL; `url` or `image_url` if not set, whatever its case."
    )
    caption_column: str | None = Field(
        default=None, description="Name of the column with the caption; `caption` or `text` if not set."
    )
    captions: Literal["auto", "class", "txt", "json", "none"] = Field(
        default="auto",
        description="Captions of pictures at hand: class (the folder's class in the template), txt or json (the file "
        "beside the picture, json's `caption`), none. auto: class in a folder tree; txt, else json, in tars.",
    )
    caption_template: str = Field(
        default="a photo of a {name}", description="Caption of a picture in a class folder; {name} is the class's name."
    )
    class_names: str | None = Field(
        default=None,
        description="Path of a file with the classes' names: `n01440764 tench, Tinca tinca` a line, or JSON. Of several "
        "names the first counts. Without it a folder's own name is taken, underscores as spaces.",
    )
    val_fraction: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.002, description="Share of URLs, 0..1, that go to the validation split by their hash."
    )

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Self:
        here, other = ("list", "root") if self.kind == "list" else ("root", "list")
        if not getattr(self, here):
            raise ValueError(
                f"a source of kind {self.kind!r} needs `{here}`: the path of its {'list' if here == 'list' else 'folder'}"
            )
        if getattr(self, other):
            raise ValueError(f"a source of kind {self.kind!r} takes `{here}`, not `{other}`; leave `{other}` out")
        of_lists = ("format", "delimiter", "header", "url_column", "caption_column")
        of_images = ("captions", "caption_template", "class_names")
        for name in of_images if self.kind == "list" else of_lists:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"`{name}` has no meaning for a source of kind {self.kind!r}; leave it out")
        if self.header == "no" and (self.url_column or self.caption_column):
            raise ValueError("columns are named but header is 'no'; leave the names out, or set header to 'auto'")
        if self.delimiter and (not self.delimiter.isascii() or self.delimiter in '\r\n"'):
            raise ValueError(f"delimiter {self.delimiter!r} cannot part columns; take another ASCII character")
        if self.kind == "webdataset" and self.captions == "class":
            raise ValueError("tars have no class folders; set captions to 'txt', 'json', 'none' or 'auto'")
        if "{name}" not in self.caption_template:
            raise ValueError(f"caption_template {self.caption_template!r} has no {{name}}; put it where the class goes")
        return self

    @property
    def where(self) -> str:
        """The list or the root as it may be shown: without a URL's credentials and query."""
        return shown_place(self.list or self.root)


def shown_place(place: str) -> str:
    """A path or URL without user, password, query and fragment, which may be secrets."""
    if "://" not in place:
        return place
    parts = urlsplit(place)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


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
    waiting_mb: Annotated[int, Field(gt=0)] = Field(
        default=128, description="Images done before an earlier row of their shard, MB, at which no further row begins."
    )
    opt_out: str | None = Field(
        default=None,
        description="Path of a list of domains, URLs and sha256 that must not be in the data set, see `ingest/optout.py`.",
    )
    retries: Annotated[int, Field(ge=0, le=10)] = Field(
        default=2, description="Further attempts after a timeout, a broken connection, HTTP 429 or 5xx, for each URL."
    )
    retry_wait_s: _Wait = Field(
        default=0.5, description="Seconds before the first retry; doubled for each that follows, with jitter."
    )
    max_retry_wait_s: _Wait = Field(
        default=20.0,
        description="Longest wait before a retry, seconds. A host whose Retry-After asks for more is left alone for so "
        "long; its URLs meanwhile end with the status it gave, and a top-up may fetch them.",
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
        default=95, description="JPEG quality (chroma 4:2:0) of images that are encoded again."
    )
    min_side_px: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Shorter side that an original must have, pixels; 0 takes all. Others are `too_small`."
    )
    max_aspect: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = Field(
        default=None, description="Longer side over shorter side at most; unset takes all. Others are `too_elongated`."
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
