"""Holds the commands of `ldmseg`, a file each.

Each has `add_arguments(parser)` and `run(args)`, which returns the exit code and raises what is wrong.
"""
