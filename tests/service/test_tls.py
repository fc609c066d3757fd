"""A broker behind TLS is believed only if its certificate is signed by the authority of the settings."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.service.broker_process import REDIS, broker_process, options
from tests.service.relay import claim_ids, submit
from tests.service.running import free_port
from tokenrelay.service.broker import connect
from tokenrelay.service.errors import BrokerUnavailable
from tokenrelay.service.keys import Keys
from tokenrelay.service.queue import Queue
from tokenrelay.service.settings import Settings

pytestmark = pytest.mark.skipif(
    not (REDIS and shutil.which("openssl")),
    reason="a redis-server with TLS (Debian: redis-server) or openssl is missing",
)


class Site(NamedTuple):
    url: str
    ca_file: str


def certify(folder: Path, name: str, *signer: str) -> None:
    """A key and a certificate for 127.0.0.1: self-signed without a signer."""
    subprocess.run(
        [
            *(
                "openssl",
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:P-256",
                "-nodes",
                "-days",
                "2",
            ),
            *("-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1", *signer),
            *("-keyout", f"{name}.key", "-out", f"{name}.crt"),
        ],
        cwd=folder,
        check=True,
        capture_output=True,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder, port = tmp_path_factory.mktemp("tls"), free_port()
    certify(folder, "authority")
    certify(folder, "broker", "-CA", "authority.crt", "-CAkey", "authority.key")
    certify(folder, "stranger")
    files = {"tls_cert_file": "broker.crt", "tls_key_file": "broker.key", "tls_ca_cert_file": "authority.crt"}
    served = options(port=0, tls_port=port, tls_auth_clients="no", **files)
    assert REDIS
    with broker_process(folder, *served, port=port, program=REDIS):
        yield Site(f"rediss://127.0.0.1:{port}", str(folder / "authority.crt"))


async def test_the_relay_speaks_tls(site: Site, keys: Keys) -> None:
    async with connect(site.url, ca_file=site.ca_file) as redis:
        queue = Queue(redis, keys, Settings())
        await submit(queue, "a")
        assert await claim_ids(queue) == ["a"]


@pytest.mark.parametrize("ca_file", ["", "stranger.crt"], ids=["the system's authorities", "another authority"])
async def test_a_certificate_of_somebody_else_is_refused(site: Site, keys: Keys, ca_file: str) -> None:
    trusted = ca_file and str(Path(site.ca_file).parent / ca_file)
    async with connect(site.url, ca_file=trusted) as redis:
        with pytest.raises(BrokerUnavailable) as refusal:
            await Queue(redis, keys, Settings()).num_waiting()
    assert "certificate verify failed" in str(refusal.value.__cause__)


async def test_it_is_not_spoken_to_in_plain_text(site: Site, keys: Keys) -> None:
    async with connect(site.url.replace("rediss", "redis")) as redis:
        with pytest.raises(BrokerUnavailable):
            await Queue(redis, keys, Settings()).num_waiting()
