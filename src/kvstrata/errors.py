"""Every exception that kvstrata raises, in one tree.

    KVStrataError
    ├── ConfigError            a setting is wrong; fatal at start
    ├── PluginError            a tier, codec or policy of that name does not exist or cannot be imported
    ├── LayoutError            an arrangement of KV tensors that is not understood; refused at start
    ├── PoolError              the L1 pool cannot be created or mapped
    ├── FrameError             bytes that are not the frame that was asked for; becomes a miss
    ├── TierError              a backend failed; becomes a miss at the border in ``cache.io``
    │   ├── TierUnavailable    it cannot be reached, or did not answer within its deadline
    │   │   └── TierPartlyUnavailable    a part of it; the rest serves
    │   └── TierFull           it has no room and does not evict
    ├── ProtocolError          a message that breaks the protocol, or another protocol version
    ├── ServerUnavailable      no server answered within the deadline
    └── OperationError         an operator asked for what cannot be done; nothing was changed
        ├── NotFoundError      there is no such entry, tier, pin, job or model
        ├── ConflictError      it contradicts the state, or a bound
        └── BusyError          too much of the kind is going on

A miss is a value (``types.Miss``), never an exception.
"""

from __future__ import annotations


class KVStrataError(Exception):
    """Base of all exceptions of this package."""


class ConfigError(KVStrataError):
    """A setting has a wrong value, or is unknown. The message names key, value and what is allowed."""


class PluginError(KVStrataError):
    """No plug-in of that name. The message lists those that exist and the extra to install."""


class LayoutError(KVStrataError):
    """KV tensors lie in memory in a way that this version cannot copy safely."""


class PoolError(KVStrataError):
    """The L1 pool cannot be created (too little memory) or mapped (gone, or another host)."""


class FrameError(KVStrataError):
    """Bytes read from a tier are not the frame that was asked for.

    ``reason`` is one of the values of :class:`kvstrata.types.MissReason`.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class TierError(KVStrataError):
    """A backend failed."""


class TierUnavailable(TierError):
    """A backend cannot be reached or did not answer in time."""


class TierPartlyUnavailable(TierUnavailable):
    """What was asked of a backend did not reach one of its servers; the others serve, so it is not given up."""


class TierFull(TierError):
    """A backend refused a write for want of room, or takes none. It may be read none the less."""


class ProtocolError(KVStrataError):
    """A message breaks the protocol, or speaks another version of it."""


class ServerUnavailable(KVStrataError):
    """No kvstrata server answered within the deadline."""


class OperationError(KVStrataError):
    """An operator asked for what cannot be done. Nothing was changed."""


class NotFoundError(OperationError):
    """There is no such entry, tier, pin, job or model."""


class ConflictError(OperationError):
    """It contradicts the state that things are in, or would exceed a bound."""


class BusyError(OperationError):
    """As many of these are going on as are allowed; try again later."""
