"""Serves a model as a web page and an HTTP API: `ldmseg app`. Only `server` and what it imports need gradio."""
