"""The published Hugging Face layout of LLaDA checkpoints."""
