"""Where vLLM and its configuration look for LMCache."""
