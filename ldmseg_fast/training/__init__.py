"""Parts of the training engine: state shards, faults, liveness, logs, validation, estimates."""
