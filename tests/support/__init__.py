"""Test support: kernels in the interpreter, videos, processors. Models and oracles: vtc.testing."""
