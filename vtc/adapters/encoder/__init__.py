"""Image encoders on their own: the plain vision transformers of timm and open_clip."""

from .adapter import ImageEncoder as ImageEncoder
