"""The command `vtc`, and what commands share: loading a model, tables of methods, the demo."""
