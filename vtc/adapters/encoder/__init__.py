"""Image encoders on their own: the plain vision transformers of timm."""

from .adapter import ImageEncoder as ImageEncoder
