"""Test support: tiny models, a slow reference forward and a masking reference for generate."""
