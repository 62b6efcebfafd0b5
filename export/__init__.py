"""Exports graphs, engines and serving repositories. The graphs' definitions are in `ldmseg_fast.backends`."""
