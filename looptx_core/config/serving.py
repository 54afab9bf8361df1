"""How a model is served over HTTP."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from looptx_core.config.ranges import check_ranges
from looptx_core.errors import UsageError


@dataclass(frozen=True)
class ServeConfig:
    """Settings of a server, after merging."""

    host: str = "127.0.0.1"
    """The address to listen on; one that other machines reach needs a key."""
    port: int = 8000
    """The port to listen on; 0 takes a free one."""
    api_key: str | None = None
    """The key that clients have to send as a bearer token; absent: none is asked for."""
    max_batch: int = 16
    """Requests that run at once; the others wait."""
    max_queue: int = 128
    """Requests that may wait; one more is refused."""
    max_context: int | None = None
    """Tokens of a request, its prompt included; absent: the model's own context. A model with a
    memory has no longest one, and takes any number here."""
    request_timeout: float = 600.0
    """Seconds after which a request is ended."""
    drain_seconds: float = 30.0
    """Seconds that running requests get to finish when the server is told to end."""

    def __post_init__(self) -> None:
        check_ranges(self)
        key = self.api_key
        if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
            raise UsageError(
                "`api_key`: give a key of printable ASCII characters without spaces, as HTTP "
                "headers carry it"
            )
        if not self.host or self.host.strip() != self.host:
            raise UsageError(f"`host` {self.host!r}: give an address such as 127.0.0.1")
        if key is None and not self.is_local:
            raise UsageError(
                f"`host` {self.host}: other machines may reach it, so give an `api_key` as well, "
                "or leave `host` out"
            )

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches the address."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether a host, as an address or a name, is this machine's loopback."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
