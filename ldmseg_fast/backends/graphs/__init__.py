"""Backends that run exported graphs: what a graph is, its manifest, batches, lanes and the loop, whatever runs it."""
