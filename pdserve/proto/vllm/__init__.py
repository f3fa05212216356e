"""Wire-compatible with vLLM's engine service."""
