"""Measuring: quality, speed and memory of methods. Each command is a module with
`configure(parser)` and `run(args) -> exit code`."""
