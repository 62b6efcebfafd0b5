"""Reads and writes data sets in other formats than ours. `kinds` has the table of them."""
