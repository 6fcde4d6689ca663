"""Where inference engines look for LMCache."""
