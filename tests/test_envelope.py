import pytest

from hivegrpo.protocol import hivegrpo_pb2 as pb
from hivegrpo.protocol.envelope import digest_of, open_run, open_signed, parse, run_id_of, sign, sign_payload
from hivegrpo.protocol.errors import FrameError, SignatureError
from hivegrpo.protocol.identity import Identity

RUN = "ab" * 32
READY = pb.Ready(version=3, state_root=bytes(32))


@pytest.fixture
def alice() -> Identity:
    return Identity.generate()


@pytest.fixture
def mallory() -> Identity:
    return Identity.generate()


def test_what_was_signed_is_opened(alice: Identity) -> None:
    signed = sign(alice, RUN, READY)
    opened = open_signed(signed.SerializeToString(), RUN, pb.Ready, signer=alice.peer_id)
    assert opened.message == READY
    assert opened.signer == alice.peer_id
    assert opened.digest == digest_of(signed.payload)


def test_signing_twice_gives_the_same_bytes(alice: Identity) -> None:
    manifest = pb.VersionManifest(metrics=dict.fromkeys("qwertyuiop", 1.0))
    again = pb.VersionManifest(metrics=dict.fromkeys("poiuytrewq", 1.0))
    assert sign(alice, RUN, manifest).SerializeToString() == sign(alice, RUN, again).SerializeToString()


def test_a_signature_serves_for_no_other_run(alice: Identity) -> None:
    with pytest.raises(SignatureError):
        open_signed(sign(alice, RUN, READY), "cd" * 32, pb.Ready)


def test_a_signature_serves_for_no_other_type(alice: Identity) -> None:
    signed = sign(alice, RUN, READY)
    with pytest.raises(SignatureError, match="expected a signed Heartbeat, got 'Ready'"):
        open_signed(signed, RUN, pb.Heartbeat)
    signed.type = "Heartbeat"
    with pytest.raises(SignatureError, match="not signed by"):
        open_signed(signed, RUN, pb.Heartbeat)


def test_parts_do_not_run_into_each_other(alice: Identity) -> None:
    # "Seal" for run "ed..." and "Sealed" for run "...", with payloads to match, would be the same bytes if joined bare.
    signed = sign_payload(alice, "ed", "Seal", b"")
    signed.type = "Sealed"
    with pytest.raises(SignatureError, match="not signed by"):
        open_signed(signed, "", pb.Sealed)


def test_only_the_named_signer_will_do(alice: Identity, mallory: Identity) -> None:
    with pytest.raises(SignatureError, match="is signed by"):
        open_signed(sign(mallory, RUN, READY), RUN, pb.Ready, signer=alice.peer_id)
    forged = sign(mallory, RUN, READY)
    forged.signer = alice.peer_id
    with pytest.raises(SignatureError, match="not signed by"):
        open_signed(forged, RUN, pb.Ready, signer=alice.peer_id)


def test_every_bit_of_payload_and_signature_counts(alice: Identity) -> None:
    for field in ("payload", "signature"):
        whole = getattr(sign(alice, RUN, READY), field)
        for position in range(len(whole)):
            tampered = sign(alice, RUN, READY)
            changed = bytearray(whole)
            changed[position] ^= 1
            setattr(tampered, field, bytes(changed))
            with pytest.raises(SignatureError):
                open_signed(tampered, RUN, pb.Ready)


def test_signed_bytes_that_do_not_parse_are_refused(alice: Identity) -> None:
    with pytest.raises(FrameError, match="not a Ready"):
        open_signed(sign_payload(alice, RUN, "Ready", b"\xff"), RUN, pb.Ready)
    with pytest.raises(FrameError, match="not a Signed"):
        open_signed(b"\xff", RUN, pb.Ready)
    with pytest.raises(FrameError, match="not a Lease"):
        parse(pb.Lease, b"\x0a")


def test_a_run_manifest_is_its_coordinators(alice: Identity, mallory: Identity) -> None:
    manifest = pb.RunManifest(protocol="hivegrpo/1", coordinator=alice.peer_id, nonce=bytes(16))
    payload = manifest.SerializeToString(deterministic=True)
    signed = sign(alice, run_id_of(payload), manifest)
    assert open_run(signed, alice.peer_id).message == manifest
    with pytest.raises(SignatureError):
        open_run(signed, mallory.peer_id)
    with pytest.raises(SignatureError):
        open_run(sign(alice, RUN, manifest), alice.peer_id)
    with pytest.raises(SignatureError, match="another coordinator"):
        open_run(sign(mallory, run_id_of(payload), manifest), mallory.peer_id)
