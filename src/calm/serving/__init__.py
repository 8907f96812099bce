"""Serving compositions: an OpenAI-compatible server on transformers, and the way to vLLM's."""
