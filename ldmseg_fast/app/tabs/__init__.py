"""Holds the tabs of the page, a file each, and what they share."""
