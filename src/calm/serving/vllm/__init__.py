"""The vLLM plugin: vLLM loads a composition as it loads any model (docs/vllm.md)."""
