"""The Hugging Face layout of checkpoints: reading, writing, converting and verifying."""
