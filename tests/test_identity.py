"""Keys, peer ids and signatures."""

import stat
from pathlib import Path

import base58
import pytest

from hivegrpo.protocol.errors import ConfigError, SignatureError
from hivegrpo.protocol.identity import PEER_ID_PREFIX, Identity, public_key_of, verify

# RFC 8032, section 7.1, test 1
SECRET = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
PUBLIC = bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
EMPTY_SIGNED = bytes.fromhex(
    "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155"
    "5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b"
)
KEY_FILE = b"\x08\x01\x12\x40" + SECRET + PUBLIC


def test_the_key_file_is_what_p2pd_reads() -> None:
    identity = Identity.from_bytes(KEY_FILE)
    assert identity.to_bytes() == KEY_FILE
    assert base58.b58decode(identity.peer_id) == b"\x00\x24\x08\x01\x12\x20" + PUBLIC
    assert identity.peer_id.startswith("12D3KooW")


def test_signatures_are_those_of_rfc_8032() -> None:
    identity = Identity.from_bytes(KEY_FILE)
    assert identity.sign(b"") == EMPTY_SIGNED
    verify(identity.peer_id, EMPTY_SIGNED, b"")


def test_a_signature_verifies_for_its_data_and_signer_only() -> None:
    one, other = Identity.generate(), Identity.generate()
    signature = one.sign(b"data")
    verify(one.peer_id, signature, b"data")
    for peer_id, proof, data in [
        (other.peer_id, signature, b"data"),
        (one.peer_id, signature, b"date"),
        (one.peer_id, other.sign(b"data"), b"data"),
        (one.peer_id, signature[:-1], b"data"),
        (one.peer_id, b"", b"data"),
    ]:
        with pytest.raises(SignatureError):
            verify(peer_id, proof, data)


def test_a_new_key_file_is_private_and_is_found_again(tmp_path: Path) -> None:
    path = tmp_path / "peer" / "identity.key"
    first = Identity.load_or_create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [item.name for item in path.parent.iterdir()] == ["identity.key"]
    assert Identity.load_or_create(path).peer_id == first.peer_id


@pytest.mark.parametrize(
    "content",
    [
        b"",
        KEY_FILE[:-1],
        KEY_FILE + b"\0",
        b"\x08\x00" + KEY_FILE[2:],
        KEY_FILE[:-1] + b"\0",
        SECRET + PUBLIC,
    ],
    ids=["empty", "short", "long", "rsa", "halves differ", "bare"],
)
def test_a_damaged_key_file_is_refused_and_kept(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "identity.key"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"identity\.key is not a key file") as caught:
        Identity.load_or_create(path)
    assert caught.value.hint
    assert path.read_bytes() == content


def test_a_key_file_that_cannot_be_read_or_written_is_the_users_matter(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        Identity.load_or_create(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="cannot be"):
        Identity.load_or_create(tmp_path / "file" / "identity.key")


GOOD = Identity.from_bytes(KEY_FILE).peer_id


@pytest.mark.parametrize(
    "peer_id",
    [
        "",
        GOOD[:-1],
        GOOD + "1",
        GOOD[:-1] + " ",
        GOOD[:-1] + "0",
        GOOD[:-1] + "é",
        "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N",
        base58.b58encode(b"\x00\x24\x08\x02\x12\x20" + PUBLIC).decode(),
        base58.b58encode(PEER_ID_PREFIX + PUBLIC[:-1]).decode(),
    ],
    ids=["empty", "short", "long", "space", "zero", "letter", "sha256", "secp256k1", "short key"],
)
def test_only_the_one_form_of_a_peer_id_is_taken(peer_id: str) -> None:
    assert public_key_of(GOOD).public_bytes_raw() == PUBLIC
    with pytest.raises(SignatureError):
        public_key_of(peer_id)
