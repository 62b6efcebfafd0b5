"""The commands of `ldmseg`, a file each: `add_arguments(parser)` and `run(args)`."""
