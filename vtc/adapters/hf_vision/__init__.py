"""Image encoders of transformers on their own: CLIP, SigLIP, ViT, DeiT, DINO and their like."""

from .adapter import HfImageEncoder as HfImageEncoder
