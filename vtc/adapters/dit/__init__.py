"""Diffusion transformers: DiT, PixArt, Latte, SD3, Flux and Wan of diffusers, and the original."""

from .adapter import DiffusionTransformer as DiffusionTransformer
