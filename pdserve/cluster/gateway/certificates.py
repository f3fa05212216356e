"""The gateway's certificate, for HTTP and gRPC alike."""

from pathlib import Path

import grpc

from pdserve.config import GatewayConfig
from pdserve.errors import ConfigError
from pdserve.wire.tls import check_served


def certificate_of(config: GatewayConfig) -> tuple[bytes, bytes, bytes | None]:
    """Key, certificate chain, and the authority of clients where they must show one; PEM.

    Raises:
        ConfigError: a file cannot be read, or key and certificate do not belong together.
    """
    assert config.tls_certificate is not None, "without TLS nobody asks"
    assert config.tls_key is not None, "the configuration says so"
    try:
        authority = config.tls_client_authority
        check_served(config.tls_certificate, config.tls_key, authority)
        return (
            Path(config.tls_key).read_bytes(),
            Path(config.tls_certificate).read_bytes(),
            None if authority is None else Path(authority).read_bytes(),
        )
    except OSError as error:  # ssl's own errors too
        raise ConfigError(
            f"gateway: TLS cannot use tls_certificate {config.tls_certificate}, tls_key "
            f"{config.tls_key} and tls_client_authority {config.tls_client_authority}: "
            f"{error.strerror or error}"
        ) from error


def grpc_credentials(config: GatewayConfig) -> grpc.ServerCredentials | None:
    """None: without TLS."""
    if config.tls_certificate is None:
        return None
    key, chain, authority = certificate_of(config)
    return grpc.ssl_server_credentials(
        [(key, chain)], root_certificates=authority, require_client_auth=authority is not None
    )
