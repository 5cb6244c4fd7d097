"""Adapters, one folder per kind of model: they find tokens, build contexts and apply plans."""
