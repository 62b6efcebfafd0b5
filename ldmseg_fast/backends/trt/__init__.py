"""TensorRT and TensorRT-RTX: their API in one place, engines and their passports."""
