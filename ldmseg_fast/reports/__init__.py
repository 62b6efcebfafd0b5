"""Makes pages and pictures for people: curves of a run, errors of an evaluation, overlays."""
