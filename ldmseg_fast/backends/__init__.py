"""What runs the networks; every backend has the same calls, see `backend.Backend`."""
