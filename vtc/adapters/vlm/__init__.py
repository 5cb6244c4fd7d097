"""Hugging Face vision-language models: from the vision tower to the KV cache."""

from .adapter import HfDecoder as HfDecoder
