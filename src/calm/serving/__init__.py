"""Serving a composed model: vLLM's plugin, and servers with the OpenAI interface."""
