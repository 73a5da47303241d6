"""Embedded colour profiles to sRGB, by Little CMS through Pillow."""

import io
import logging
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

from fourmill.ingest.pixels import Pixels

_LOG = logging.getLogger(__name__)


@lru_cache(maxsize=32)  # the same few profiles are in millions of files
def foreign_profile(profile: bytes) -> bytes:
    """The embedded colour profile, empty when there is none, it is broken, or it is sRGB anyway."""
    if not profile:
        return b""
    try:
        described = ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(profile)))
    except Exception as error:
        _LOG.debug("unreadable colour profile taken as none: %s", error)
        return b""
    return b"" if "srgb" in described.lower() else profile


def to_srgb(rgb: Pixels, profile: bytes) -> Pixels:
    """RGB (H, W, 3) of a profile to sRGB; as it is when the profile does not fit."""
    return np.asarray(image_to_srgb(Image.fromarray(rgb), profile))


def image_to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """A picture of a profile to RGB in sRGB; by Pillow's plain conversion when the profile does not fit."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        made = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError) as error:  # a grey profile in a colour picture, and the like
        _LOG.debug("colour profile does not fit %s and is passed over: %s", image.mode, error)
        made = None
    return made if made is not None else image.convert("RGB")
