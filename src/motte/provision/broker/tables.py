"""The tables of a broker's database. Times are seconds of UTC since 1970, or milliseconds where the name says so."""

from __future__ import annotations

from typing import Final

from sqlalchemy import (
    DDL,
    BigInteger,
    Boolean,
    Column,
    Index,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    event,
)

SCHEMA: Final = 1
"""Version of the tables; another one is refused."""
metadata: Final = MetaData()

settings = Table(
    "settings",
    metadata,
    Column("name", String, primary_key=True),
    Column("value", Text, nullable=False),
)
"""``schema``, ``era``, ``key``, ``certificate``, ``wrapping`` (parameters) and ``wrapping_check``: nothing secret."""

secrets = Table(
    "secrets",
    metadata,
    Column("name", String, primary_key=True),
    Column("wrapped", LargeBinary, nullable=False),
)
"""Every secret but the bundles': wrapped, its name being the context."""

policies = Table(
    "policies",
    metadata,
    Column("name", String, primary_key=True),
    Column("text", Text, nullable=False),
    Column("anchors", Text, nullable=False),
    Column("owners", Text, nullable=False),
)

models = Table(
    "models",
    metadata,
    Column("name", String, primary_key=True),
    Column("signer", LargeBinary, nullable=False),
    Column("policy", String, nullable=False),
    Column("min_release", BigInteger, nullable=False),
    Column("lease_s", BigInteger, nullable=False),
    Column("revoked", Boolean, nullable=False),
)

bundles = Table(
    "bundles",
    metadata,
    Column("bundle_id", LargeBinary, primary_key=True),
    Column("release", BigInteger, primary_key=True),
    Column("model", String, nullable=False),
    Column("header", Text, nullable=False),
    Column("header_digest", LargeBinary, nullable=False),
    Column("wrapped_kek", LargeBinary, nullable=False),
    Column("configurations", Text, nullable=False),
    Column("revoked", Boolean, nullable=False),
    UniqueConstraint("model", "release"),
)
"""One release of one model, its key-encryption key wrapped."""

nonces = Table(
    "nonces",
    metadata,
    Column("nonce", LargeBinary, primary_key=True),
    Column("bundle_id", LargeBinary, nullable=False),
    Column("release", BigInteger, nullable=False),
    Column("header_digest", LargeBinary, nullable=False),
    Column("run", LargeBinary),
    Column("checkpoint", BigInteger),
    Column("issued_at_ms", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("used", Boolean, nullable=False),
    Column("replay_logged", Boolean, nullable=False),
    Index("nonces_by_expiry", "expires_at"),
)

leases = Table(
    "leases",
    metadata,
    Column("id", LargeBinary, primary_key=True),
    Column("bundle_id", LargeBinary, nullable=False),
    Column("release", BigInteger, nullable=False),
    Column("public_key", LargeBinary, nullable=False),
    Column("run", LargeBinary),
    Column("expires_at", BigInteger, nullable=False),
    Column("ended", Boolean, nullable=False),
    Index("leases_by_expiry", "expires_at"),
)

runs = Table(
    "runs",
    metadata,
    Column("run", LargeBinary, primary_key=True),
    Column("model", String, nullable=False),
    Column("budget", BigInteger, nullable=False),
    Column("charged", BigInteger, nullable=False),
    Column("checkpoint", BigInteger, nullable=False),
    Column("wrapped_root", LargeBinary, nullable=False),
    Column("held", Boolean, nullable=False),
)
"""A training run: what it may release, what was charged, its newest committed checkpoint."""

audit = Table(
    "audit",
    metadata,
    Column("idx", BigInteger, primary_key=True, autoincrement=False),
    Column("entry", Text, nullable=False),
    Column("head", LargeBinary, nullable=False),
    Column("signed_head", Text, nullable=False),
)

# Against mistakes of ours, not against somebody who can write the file: the chain and the clients' heads are for them.
for verb in ("UPDATE", "DELETE"):
    event.listen(
        audit,
        "after_create",
        DDL(  # type: ignore[no-untyped-call]
            f"CREATE TRIGGER audit_no_{verb.lower()} BEFORE {verb} ON audit "
            "BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END"
        ),
    )
