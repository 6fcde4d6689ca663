"""Every test is checked for what it leaves behind."""

from hypothesis import settings

pytest_plugins = ["kvstrata.testing.leaks"]

# The machine decides how long an example takes; no test asserts on time.
settings.register_profile("kvstrata", deadline=None)
settings.load_profile("kvstrata")
