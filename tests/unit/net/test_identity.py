import datetime as dt
import os
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from yoke.core.errors import RemoteProtocolError, SettingError
from yoke.core.node import NodeId
from yoke.net.identity import (
    MAX_CERTIFICATE_BYTES,
    Identity,
    admission_server_context,
    certificate_id,
    client_context,
    joining_client_context,
    server_context,
    verify,
)


@pytest.fixture(scope="module")
def identity(tmp_path_factory):
    return Identity.load_or_create(tmp_path_factory.mktemp("state") / "node")


def test_identity_is_the_same_after_a_restart(identity):
    again = Identity.load_or_create(identity.pem_path.parent)
    assert (again.id, again.certificate_der) == (identity.id, identity.certificate_der)


def test_key_is_readable_by_its_owner_alone(identity):
    assert stat.S_IMODE(identity.pem_path.stat().st_mode) == 0o600
    assert stat.S_IMODE(identity.pem_path.parent.stat().st_mode) == 0o700
    assert os.listdir(identity.pem_path.parent) == [identity.pem_path.name], "no draft is left behind"


def test_two_starts_at_once_agree_on_one_key(tmp_path):
    with ThreadPoolExecutor(8) as threads:
        found = {threads.submit(Identity.load_or_create, tmp_path / "new") for _ in range(8)}
        assert len({future.result().id for future in found}) == 1


def test_certificate_names_the_key_and_is_no_authority(identity):
    assert certificate_id(identity.certificate_der) == identity.id
    certificate = x509.load_der_x509_certificate(identity.certificate_der)
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert not constraints.value.ca
    assert len(identity.certificate_der) < MAX_CERTIFICATE_BYTES / 2


def test_signature_is_known_by_id(identity):
    signature = identity.sign(b"words")
    assert verify(identity.id, signature, b"words")
    assert not verify(identity.id, signature, b"other words")
    assert not verify(NodeId("00" * 32), signature, b"words")
    assert not verify(NodeId("no id"), signature, b"words")
    assert not verify(identity.id, b"short", b"words")


def test_secret_key_is_not_printed(identity):
    assert "_key" not in repr(identity)


def forged(key, signer, *, ca=False):
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "x")])
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, dt.datetime(2020, 1, 1, tzinfo=dt.UTC), dt.datetime(2050, 1, 1, tzinfo=dt.UTC))
    builder = builder.add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    algorithm = None if isinstance(signer, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return builder.sign(signer, algorithm).public_bytes(serialization.Encoding.DER)


def test_certificates_that_are_no_nodes_are_refused():
    mine, other, elliptic = ed25519.Ed25519PrivateKey.generate(), ed25519.Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP256R1())
    for der in (forged(mine, mine, ca=True), forged(mine, other), forged(elliptic, elliptic), b"", bytes(MAX_CERTIFICATE_BYTES + 1)):
        with pytest.raises(RemoteProtocolError):
            certificate_id(der)
    assert certificate_id(forged(mine, mine)) == mine.public_key().public_bytes_raw().hex()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_certificates_give_only_protocol_errors(identity, data):
    damaged = bytearray(identity.certificate_der)
    place = data.draw(st.integers(0, len(damaged) - 1))
    damaged[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(RemoteProtocolError):
        certificate_id(bytes(damaged[: data.draw(st.integers(place + 1, len(damaged)))]))


def test_key_that_others_may_read_is_refused(tmp_path):
    identity = Identity.load_or_create(tmp_path / "node")
    identity.pem_path.chmod(0o644)
    with pytest.raises(SettingError, match="chmod 600"):
        Identity.load_or_create(tmp_path / "node")


@pytest.mark.parametrize("content", [b"", b"not a key", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"])
def test_broken_key_file_is_a_setting_error(tmp_path, content):
    path = tmp_path / "node.pem"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(SettingError, match="does not hold"):
        Identity.load_or_create(tmp_path)


def test_directory_that_cannot_be_made_is_a_setting_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SettingError, match="cannot keep"):
        Identity.load_or_create(tmp_path / "file" / "node")


def test_contexts_trust_exactly_the_members(identity, tmp_path):
    other = Identity.load_or_create(tmp_path)
    for make in (server_context, client_context):
        assert make(identity, [other.certificate_der]).cert_store_stats()["x509"] == 1
        assert make(identity, []).cert_store_stats()["x509"] == 0
    assert admission_server_context(identity).num_tickets == 0
    assert joining_client_context().cert_store_stats()["x509"] == 0
