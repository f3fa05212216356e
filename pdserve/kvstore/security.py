"""From settings to what sockets need: TLS between hosts, tokens for the cluster's own workers."""

import time
from dataclasses import dataclass, fields
from pathlib import Path

from pdserve.config import StoreConfig
from pdserve.kvstore.capability import ALL_OPERATIONS, mint, read_key
from pdserve.wire.tls import TlsContext, member_context

WORKER_TOKEN_VALID_S = 7 * 24 * 3600.0
"""A worker makes a new one whenever it connects; a connection that is older is refused, and the
worker connects again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """Files in PEM format, all three or none, and the key that signs tokens."""

    tls_authority: Path | None = None
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    key_file: Path | None = None

    def ssl_context(self, *, server_side: bool) -> TlsContext | None:
        """None: plain TCP. Raises ConfigError when a file is of no use."""
        if self.tls_authority is None or self.tls_certificate is None or self.tls_key is None:
            return None
        return member_context(
            certificate=self.tls_certificate,
            key=self.tls_key,
            authority=self.tls_authority,
            server_side=server_side,
        )

    def cluster_key(self) -> bytes | None:
        """None: no tokens are asked for. Raises ConfigError when the file is of no use."""
        return None if self.key_file is None else read_key(self.key_file)

    def worker_token(self) -> str:
        """For a process of the cluster itself: everything, of every tenant. "" without a key."""
        key = self.cluster_key()
        if key is None:
            return ""
        return mint(
            key,
            operations=ALL_OPERATIONS,
            tenant="",
            valid_s=WORKER_TOKEN_VALID_S,
            now_s=time.time(),
        )


CREDENTIALS = tuple(field.name for field in fields(Credentials))
"""Options of the node's command line, and settings of the store, that name files."""


def credentials_of(settings: StoreConfig) -> Credentials:
    return Credentials(
        **{
            name: None if path is None else Path(path).expanduser()
            for name in CREDENTIALS
            for path in [getattr(settings, name)]
        }
    )
