"""``python -m kvstrata.operator``: run the operator."""

from __future__ import annotations

import argparse
import sys

import msgspec

from kvstrata.logs import configure_logging
from kvstrata.operator.options import Options

EXAMPLE = (
    "Example: python -m kvstrata.operator --namespace inference --image registry.example.net/vllm:0.32.0"
)


def main() -> None:
    """Read the arguments and work until told to end."""
    parser = argparse.ArgumentParser(
        prog="python -m kvstrata.operator",
        description="Run vLLM for each Model of a namespace.",
        epilog=EXAMPLE,
    )
    parser.add_argument("--namespace", required=True, help="where the Models are, and their objects")
    defaults = Options(namespace="")
    texts = {
        "group": "API group of Model",
        "remote_url": "URL of the shared tier for Models that name none; $(REDIS_PASSWORD) is from the Secret",
        "redis_secret": "Secret with the password",
        "redis_secret_key": "its key",
        "redis_tls_secret": "Secret with ca.crt for Redis",
        "image": "vLLM with the connector, for Models that name none",
        "shared_memory": "size of a pod's /dev/shm",
        "run_as_user": "user of the models' pods",
        "resync_seconds": "how often Models are looked at although nothing has changed",
    }
    for field, text in texts.items():
        default = getattr(defaults, field)
        flag = "--" + field.replace("_", "-")
        parser.add_argument(flag, default=default, type=type(default), help=f"{text} (default: {default!r})")
    parser.add_argument("--liveness-port", type=int, help="port of /healthz")
    arguments = vars(parser.parse_args())
    liveness_port = arguments.pop("liveness_port")
    try:
        from kvstrata.operator.run import run  # noqa: PLC0415  the extra "operator" may be missing
    except ImportError as error:
        sys.exit(f"the operator wants kopf ({error}): pip install 'kvstrata[operator]'")
    configure_logging("INFO")
    run(msgspec.convert(arguments, Options), liveness_port)


if __name__ == "__main__":
    main()
