"""Serving compositions: an OpenAI-compatible server on transformers, and the vLLM plugin."""
