"""The paper's method and its baselines on prompts and completions, for any pair of Hugging Face models (issue 4)."""
