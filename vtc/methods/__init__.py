"""Methods, one file each. A file here is registered by being here."""
