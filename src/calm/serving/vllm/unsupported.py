"""Stands for the model beside another version of vLLM: refuses when it is imported, and imports nothing of vLLM's."""

from calm.serving.vllm import checks

checks.check_version()
