"""Adapters: one file per kind of model family. They find tokens, build contexts, apply plans."""
