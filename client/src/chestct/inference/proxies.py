"""Proxies of the environment: which one a connection takes, and that loopback takes none.

gRPC reads `grpc_proxy`, `https_proxy` and `http_proxy` in this order, in lower case, and
`no_grpc_proxy` or `no_proxy` for the hosts to reach directly. urllib and requests read
`http_proxy` or `https_proxy`, by the scheme of the address, and `no_proxy`, in either case.
tritonclient's HTTP clients read none of them.
"""

from __future__ import annotations

import ipaddress
import os
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

if TYPE_CHECKING:
    pass

__all__ = ["Proxy", "grpc_proxy", "is_loopback", "url_proxy", "without_credentials"]

GRPC_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")
GRPC_EXCEPTIONS = ("no_grpc_proxy", "no_proxy")


class Proxy(NamedTuple):
    """A proxy that applies to an address.

    Attributes:
        variable: The environment variable that names it.
        address: Its value without credentials.
        host: The host that is reached through it.
    """

    variable: str
    address: str
    host: str

    def __str__(self) -> str:
        return (
            f"{self.variable}={self.address} sends this connection to a proxy: check the variable, "
            f"or add {self.host} to no_proxy"
        )


def is_loopback(host: str) -> bool:
    """Whether a host is this machine's loopback: localhost, 127.0.0.0/8 or ::1."""
    if host.lower().rstrip(".") == "localhost":
        return True
    address = _ip_address(host)
    return address is not None and address.is_loopback


def grpc_proxy(host: str) -> Proxy | None:
    """The proxy that gRPC takes to `host` by the rules of its core; None for a direct connection.

    The rules are those of `http_proxy_mapper.cc`; only proxies with the scheme http are taken.
    """
    variable = next((name for name in GRPC_VARIABLES if name in os.environ), None)
    if variable is None or not os.environ[variable] or is_loopback(host):
        return None  # a variable that is set and empty asks for a direct connection
    value = os.environ[variable]
    exceptions = next((os.environ[name] for name in GRPC_EXCEPTIONS if name in os.environ), "")
    entries = [entry.strip() for entry in exceptions.split(",") if entry.strip()]
    if not value.lower().startswith("http:") or any(_covers(entry, host) for entry in entries):
        return None
    return Proxy(variable, without_credentials(value), host)


def url_proxy(url: str) -> Proxy | None:
    """The proxy that urllib and requests take to an http:// or https:// address, if any."""
    from urllib.request import getproxies_environment, proxy_bypass

    parts = urlsplit(url)
    host, variable = parts.hostname or "", f"{parts.scheme}_proxy"
    value = getproxies_environment().get(parts.scheme)
    if not value or is_loopback(host) or proxy_bypass(parts.netloc.split("@")[-1]):
        return None
    if not os.environ.get(variable):
        variable = variable.upper()
    return Proxy(variable, without_credentials(value), host)


def without_credentials(address: str) -> str:
    """An address without the user and the password in it."""
    scheme, separator, rest = address.rpartition("://")
    authority, slash, path = rest.partition("/")
    return f"{scheme}{separator}{authority.rpartition('@')[2]}{slash}{path}"


def _covers(entry: str, host: str) -> bool:
    """Whether an entry of `no_proxy` is a suffix of the host, or a network that holds it."""
    address = _ip_address(host)
    if address is not None and "/" in entry:
        try:
            return address in ipaddress.ip_network(entry, strict=False)
        except ValueError:
            return False
    return host.lower().endswith(entry.lower())


def _ip_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return None
