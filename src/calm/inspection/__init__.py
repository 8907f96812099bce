"""A look inside a composition: what its connections did with one prompt, as numbers, as a page and as pictures."""

from calm.inspection.measure import ConnectionUse, Inspection, NextTokens, Without, inspect_prompt, inspect_tokens

__all__ = ["ConnectionUse", "Inspection", "NextTokens", "Without", "inspect_prompt", "inspect_tokens"]
