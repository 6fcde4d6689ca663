"""Where vLLM looks for types of the protocol."""
