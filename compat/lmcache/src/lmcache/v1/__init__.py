"""Where programs look for LMCache's engine."""
