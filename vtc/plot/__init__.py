"""`vtc plot`: results and sessions as static pictures. Needs matplotlib, the extra `plot`."""
