"""Every test is checked for what it leaves behind."""

from hypothesis import HealthCheck, settings

pytest_plugins = ["kvstrata.testing.leaks"]

# The machine decides how long an example takes; no test asserts on time.
settings.register_profile("kvstrata", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("kvstrata")
