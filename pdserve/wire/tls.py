"""TLS between hosts of one cluster: both sides show a certificate of the cluster's own authority.

Names in certificates are not compared, because peers are found by address: whoever holds a
certificate of this authority is a member. So the authority must sign for this cluster alone.
"""

import ssl
from pathlib import Path

from pdserve.errors import ConfigError

TlsContext = ssl.SSLContext
"""For those who carry one and do nothing with it."""


def member_context(
    *, certificate: Path, key: Path, authority: Path, server_side: bool
) -> ssl.SSLContext:
    """For ``Listener`` (``server_side``) or for those who connect to one. Files in PEM format.

    Raises:
        ConfigError: a file cannot be read, or key and certificate do not belong together.
    """
    protocol = ssl.PROTOCOL_TLS_SERVER if server_side else ssl.PROTOCOL_TLS_CLIENT
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_cert_chain(certificate, key)
        context.load_verify_locations(authority)
    except OSError as error:
        raise ConfigError(
            f"TLS cannot use certificate {certificate}, key {key} and authority {authority}: "
            f"{error.strerror or error}"
        ) from error
    return context


CERT_REQUIRED = int(ssl.CERT_REQUIRED)


def check_served(certificate: str, key: str, client_authority: str | None) -> None:
    """Whether a server for the public can use these PEM files.

    Raises:
        OSError: a file cannot be read, or key and certificate do not belong together.
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=client_authority)
    context.load_cert_chain(certificate, key)


def public_context() -> ssl.SSLContext:
    """For who connects to such a server by its name. ``SSL_CERT_FILE`` in the environment names an
    authority of one's own."""
    return ssl.create_default_context()
