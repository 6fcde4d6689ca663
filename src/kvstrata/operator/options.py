"""What the operator is told when it starts."""

from __future__ import annotations

from msgspec import Struct

VERSION = "v1alpha1"
PLURAL = "models"
DEFAULT_GROUP = "kvstrata.dev"
PASSWORD = "$(REDIS_PASSWORD)"  # noqa: S105 - what stands for it in URLs; Kubernetes fills it in
REDIS_TLS_DIRECTORY = "/etc/kvstrata/redis-tls"


class Options(Struct, frozen=True, kw_only=True):
    """Options of the whole operator, the same for all Models."""

    namespace: str
    group: str = DEFAULT_GROUP
    remote_url: str = ""
    """Of the shared tier, for Models that name none. ``$(REDIS_PASSWORD)`` in it is filled in from the Secret."""
    redis_secret: str = ""
    """Secret with the password, and the key in it."""
    redis_secret_key: str = "redis-password"  # noqa: S105 - the name of a key
    redis_tls_secret: str = ""
    """Secret whose ``ca.crt`` clients of Redis need, mounted at ``REDIS_TLS_DIRECTORY``."""
    image: str = ""
    """vLLM with the connector, for Models that name none."""
    shared_memory: str = "2Gi"
    run_as_user: int = 10001
    resync_seconds: float = 30.0
    """How often every Model is looked at although nothing has changed."""

    @property
    def api_version(self) -> str:
        return f"{self.group}/{VERSION}"

    @property
    def default_remote_url(self) -> str:
        """The bundled Redis without a password, unless ``remote_url`` says otherwise."""
        return self.remote_url or f"redis://lmcache-redis.{self.namespace}.svc.cluster.local:6379"
