"""A node's key: what is on disk, who may read it, and what its signatures are worth."""

import base64
import hashlib
import os
import shutil
import stat
import subprocess
import threading

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import given
from hypothesis import strategies as st

from photon.errors import MembershipError, SignatureError
from photon.membership.keys import NodeKey, canonical_pem, fingerprint_of, verify

BROKEN = b"-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END OPENSSH PRIVATE KEY-----\n"


def pem_of(private):
    return (
        private.public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        .decode()
    )


def openssh_of(private):
    return private.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )


def locked(openssh):
    """The same file, saying that it is encrypted: OpenSSH's PROTOCOL.key, by hand."""
    begin, *body, end = openssh.splitlines()
    text = lambda part: len(part).to_bytes(4, "big") + part  # noqa: E731
    plain = b"openssh-key-v1\0" + text(b"none") + text(b"none") + text(b"")
    sealed = b"openssh-key-v1\0" + text(b"aes256-ctr") + text(b"bcrypt")
    sealed += text(text(b"s" * 16) + (16).to_bytes(4, "big"))
    raw = base64.b64decode(b"".join(body))
    assert raw.startswith(plain)
    return b"\n".join([begin, base64.b64encode(raw.replace(plain, sealed, 1)), end, b""])


def test_a_key_on_disk_is_the_key(tmp_path):
    path = tmp_path / "node" / "node.key"
    made = NodeKey.create(path)
    loaded = NodeKey.load(path)
    assert (loaded.public_pem, loaded.fingerprint) == (made.public_pem, made.fingerprint)
    verify(made.public_pem, b"data", loaded.sign(b"data"))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert os.listdir(path.parent) == ["node.key"]


def test_it_is_private_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        NodeKey.create(tmp_path / "node.key")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "node.key").stat().st_mode) == 0o600


def test_its_file_is_openssh_and_its_public_half_pem(tmp_path):
    key = NodeKey.create(tmp_path / "node.key")
    private = serialization.load_ssh_private_key((tmp_path / "node.key").read_bytes(), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert private.curve.name == "secp384r1"
    public = serialization.load_pem_public_key(key.public_pem.encode())
    assert public == private.public_key()


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="OpenSSH is not installed")
def test_openssh_reads_it_too(tmp_path):
    key = NodeKey.create(tmp_path / "node.key")
    said = subprocess.run(
        ["ssh-keygen", "-y", "-f", tmp_path / "node.key"], capture_output=True, text=True
    )
    public = serialization.load_ssh_public_key(said.stdout.encode())
    assert public == serialization.load_pem_public_key(key.public_pem.encode()), said.stderr


def test_the_fingerprint_is_that_of_the_der_form(keys):
    lines = keys[0].public_pem.splitlines()
    der = base64.b64decode("".join(lines[1:-1]))
    assert keys[0].fingerprint == "sha256:" + hashlib.sha256(der).hexdigest()
    assert len({key.fingerprint for key in keys}) == len(keys)


def test_a_key_is_never_replaced(tmp_path):
    path = tmp_path / "node.key"
    NodeKey.create(path)
    before = path.read_bytes()
    with pytest.raises(MembershipError, match=r"there is a key at .* already") as caught:
        NodeKey.create(path)
    assert "rotation" in str(caught.value)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["node.key"]


def test_of_two_that_make_a_key_at_once_one_does(tmp_path):
    path, made, refused = tmp_path / "node.key", [], []
    together = threading.Barrier(8)

    def make():
        together.wait()
        try:
            made.append(NodeKey.create(path))
        except MembershipError as error:
            refused.append(error)

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(made), len(refused)) == (1, 7)
    assert NodeKey.load(path).fingerprint == made[0].fingerprint
    assert os.listdir(tmp_path) == ["node.key"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o620])
def test_a_key_that_others_may_read_is_refused(tmp_path, mode):
    path = tmp_path / "node.key"
    NodeKey.create(path)
    path.chmod(mode)
    with pytest.raises(MembershipError, match=f"mode {mode:04o}") as caught:
        NodeKey.load(path)
    assert f"chmod 600 {path}" in str(caught.value)
    path.chmod(0o600)
    NodeKey.load(path)


def test_other_files_are_no_keys(tmp_path):
    path = tmp_path / "node.key"
    with pytest.raises(MembershipError, match="no key at") as caught:
        NodeKey.load(path)
    assert "--invite" in str(caught.value)
    others = {
        "no OpenSSH private key": b"",
        "no OpenSSH": BROKEN,
        "without a passphrase": locked(openssh_of(ec.generate_private_key(ec.SECP384R1()))),
        "curve P-384": openssh_of(ec.generate_private_key(ec.SECP256R1())),
        "P-384": openssh_of(ed25519.Ed25519PrivateKey.generate()),
    }
    for message, data in others.items():
        path.write_bytes(data)
        path.chmod(0o600)
        with pytest.raises(MembershipError, match=message):
            NodeKey.load(path)
    with pytest.raises(MembershipError, match="can't read"):
        NodeKey.load(tmp_path)


def test_no_room_for_a_key_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MembershipError, match="can't write the key"):
        NodeKey.create(tmp_path / "file" / "node.key")


def test_public_keys_of_other_kinds_are_refused(keys):
    others = [
        pem_of(ec.generate_private_key(ec.SECP256R1())),
        pem_of(ed25519.Ed25519PrivateKey.generate()),
        pem_of(rsa.generate_private_key(65537, 2048)),
        keys[0].public_pem.replace("M", "N", 1),
        keys[0].public_pem[:100],
        "",
        "x" * 1_000_000,
        "\ud800",
    ]
    for pem in others:
        with pytest.raises(MembershipError, match="public key"):
            fingerprint_of(pem)


def test_one_key_has_one_form(keys):
    pem = keys[0].public_pem
    for other in (pem.replace("\n", "\r\n"), "words before\n" + pem + "\nwords after", pem.strip()):
        assert canonical_pem(other) == pem


@given(data=st.binary(max_size=200), place=st.integers(0, 10_000))
def test_a_signature_holds_for_these_bytes_only(keys, data, place):
    signature = keys[0].sign(data)
    verify(keys[0].public_pem, data, signature)
    with pytest.raises(SignatureError):
        verify(keys[1].public_pem, data, signature)
    with pytest.raises(SignatureError):
        verify(keys[0].public_pem, data + b"x", signature)
    raw = bytearray(base64.b64decode(signature))
    raw[place % len(raw)] ^= 1 << (place % 8)
    with pytest.raises(SignatureError):
        verify(keys[0].public_pem, data, base64.b64encode(raw).decode())


@given(
    signature=st.one_of(
        st.text(max_size=300),
        st.binary(max_size=120).map(lambda raw: base64.b64encode(raw).decode()),
    )
)
def test_anything_else_is_no_signature(keys, signature):
    with pytest.raises(SignatureError, match="is not that of key sha256:"):
        verify(keys[0].public_pem, b"data", signature)
