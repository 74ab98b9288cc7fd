"""Every verb of the command line, in the order in which its help lists them."""

from __future__ import annotations

from typing import Final

from motte.cli import (
    accelerator,
    attest,
    audit,
    bench,
    broker,
    compare,
    doctor,
    enclave,
    inspect,
    keys,
    plan,
    privacy,
    recipients,
    report_page,
    run,
    seal,
    seal_data,
    train,
    unseal,
    version,
    zoo,
)

GROUPS: Final = {
    "accelerator": accelerator.app,
    "attest": attest.app,
    "audit": audit.app,
    "bench": bench.app,
    "broker": broker.app,
    "enclave": enclave.app,
    "keys": keys.app,
    "recipients": recipients.app,
    "zoo": zoo.app,
}
VERBS: Final = (
    plan.plan,
    seal.seal,
    run.run,
    train.train,
    train.train_log,
    train.train_weights,
    seal_data.seal_data,
    privacy.privacy,
    compare.compare,
    report_page.report,
    inspect.inspect,
    unseal.unseal,
    doctor.doctor,
    version.version,
)
