"""kvstrata's own remote server, ``kvstrata remote``: a small network store that speaks ``lm://``."""
