"""A private channel between two proved sites over any stream of bytes: TLS 1.3, both keys shown.

The side that answers shows a self-signed certificate of its site key, and TLS proves that it has
that key; the side that dials accepts nothing but the key it wants. It then proves its own key
inside the channel: it signs the other's fresh nonce together with both keys. The signature is
worth nothing to anyone else, since it names for whom it was made.

Whatever carries the bytes, a relaying site included, can neither read nor alter them unnoticed.
"""

from __future__ import annotations

import os
import secrets
import ssl
from datetime import UTC, datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from gridcloud.errors import GridcloudError
from gridcloud.grid.identity import Identity, is_weak, short
from gridcloud.grid.links import LinkDown
from gridcloud.grid.transport import ByteStream

_ALPN = "gridcloud-tls/2"
_LABEL = b"gridcloud-tls/2 client proof"
_NONCE_BYTES = 32
_KEY_BYTES = 32
_SIGNATURE_BYTES = 64
_WELCOME = b"\x01"
_CHUNK = 64 * 1024


class TlsIdentity:
    """A site's TLS contexts. The key is handed to them in memory and touches no disk."""

    def __init__(self, identity: Identity) -> None:
        self.identity = identity
        self.server = _context(ssl.PROTOCOL_TLS_SERVER)
        self.server.num_tickets = 0
        self.client = _context(ssl.PROTOCOL_TLS_CLIENT)
        self.client.check_hostname = False
        # There is no authority to ask: `dial_over` demands the one key that is wanted.
        self.client.verify_mode = ssl.CERT_NONE
        _load(self.server, identity)


class TlsChannel:
    """TLS over a stream. One task may read and one may write at the same time."""

    def __init__(self, raw: ByteStream, context: ssl.SSLContext, *, server_side: bool) -> None:
        self._raw = raw
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server_side)

    async def handshake(self) -> None:
        """Agree on keys; raises `LinkDown`."""
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                await self._flush()
                await self._fill()
            except ssl.SSLError as error:
                raise LinkDown(f"the handshake failed ({error.reason or 'TLS'})") from error
            else:
                break
        await self._flush()
        if self._tls.selected_alpn_protocol() != _ALPN:
            raise LinkDown("the other end speaks another protocol")

    def peer_key(self) -> str:
        """Return the Ed25519 key that the other end's certificate proves; raises `LinkDown`."""
        shown = self._tls.getpeercert(binary_form=True)
        try:
            key = x509.load_der_x509_certificate(shown or b"").public_key()
        except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion) as error:
            raise LinkDown("the other end shows a malformed certificate") from error
        if not isinstance(key, Ed25519PublicKey):
            raise LinkDown("the other end shows a key that is not Ed25519")
        return key.public_bytes_raw().hex()

    async def read(self) -> bytes:
        """Return what came next, at most 64 KiB; raises `LinkDown` at the end."""
        while True:
            try:
                if data := self._tls.read(_CHUNK):
                    return data
                raise LinkDown("the other end closed it")
            except ssl.SSLWantReadError:
                await self._fill()
            except ssl.SSLError as error:
                raise LinkDown(f"it broke ({error.reason or 'TLS'})") from error

    async def read_exactly(self, size: int) -> bytes:
        """Return that many bytes; only for the first words, before `read`. Raises `LinkDown`."""
        found = b""
        while len(found) < size:
            try:
                data = self._tls.read(size - len(found))
            except ssl.SSLWantReadError:
                await self._fill()
                continue
            except ssl.SSLError as error:
                raise LinkDown(f"it broke ({error.reason or 'TLS'})") from error
            if not data:
                raise LinkDown("the other end closed it")
            found += data
        return found

    async def write(self, data: bytes) -> None:
        """Send; waits while the other end is slow. Raises `LinkDown`."""
        try:
            self._tls.write(data)
        except ssl.SSLError as error:
            raise LinkDown(f"it broke ({error.reason or 'TLS'})") from error
        await self._flush()

    def close(self) -> None:
        """Let go of the stream beneath. Idempotent."""
        self._raw.close()

    async def _fill(self) -> None:
        try:
            data = await self._raw.read(_CHUNK)
        except (GridcloudError, OSError) as error:
            raise LinkDown(str(error)) from error
        if not data:
            raise LinkDown("the other end closed it")
        self._incoming.write(data)

    async def _flush(self) -> None:
        if not self._outgoing.pending:
            return
        try:
            await self._raw.write(self._outgoing.read())
        except (GridcloudError, OSError) as error:
            raise LinkDown(str(error)) from error


async def dial_over(raw: ByteStream, mine: TlsIdentity, key: str) -> TlsChannel:
    """Return a channel to the site with that key, and prove to it who this is.

    Raises `LinkDown` if another answers, or if it turns this site away.
    """
    channel = TlsChannel(raw, mine.client, server_side=False)
    await channel.handshake()
    if channel.peer_key() != key:
        raise LinkDown(f"another site answers there ({short(channel.peer_key())})")
    nonce = await channel.read_exactly(_NONCE_BYTES)
    own = bytes.fromhex(mine.identity.key)
    await channel.write(own + mine.identity.sign(_proof(bytes.fromhex(key), own, nonce)))
    if await channel.read_exactly(1) != _WELCOME:
        raise LinkDown("it turned this site away")
    return channel


async def answer_over(raw: ByteStream, mine: TlsIdentity) -> tuple[TlsChannel, str]:
    """Return a channel to whoever dialled, and its proved key; raises `LinkDown`."""
    channel = TlsChannel(raw, mine.server, server_side=True)
    await channel.handshake()
    nonce = secrets.token_bytes(_NONCE_BYTES)
    await channel.write(nonce)
    shown = await channel.read_exactly(_KEY_BYTES + _SIGNATURE_BYTES)
    theirs, signature = shown[:_KEY_BYTES], shown[_KEY_BYTES:]
    own = bytes.fromhex(mine.identity.key)
    try:
        Ed25519PublicKey.from_public_bytes(theirs).verify(signature, _proof(own, theirs, nonce))
    except (InvalidSignature, ValueError) as error:
        raise LinkDown("it did not prove its key") from error
    if is_weak(theirs.hex()):
        raise LinkDown("it shows a key with which anybody can sign")
    if theirs == own:
        raise LinkDown("it shows this site's own key")
    await channel.write(_WELCOME)
    return channel, theirs.hex()


def _proof(server: bytes, client: bytes, nonce: bytes) -> bytes:
    return b"\0".join((_LABEL, server + client + nonce))


def _context(protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols([_ALPN])
    return context


def _load(context: ssl.SSLContext, identity: Identity) -> None:
    """Give a context the site's key and certificate: it takes them from a file only."""
    private = Ed25519PrivateKey.from_private_bytes(identity.secret_bytes)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "gridcloud")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(1)
        .not_valid_before(datetime(2000, 1, 1, tzinfo=UTC))  # the key is all that counts
        .not_valid_after(datetime(9999, 12, 31, tzinfo=UTC))
        .sign(private, None)
    )
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    descriptor = os.memfd_create("certificate", os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(pem + certificate.public_bytes(Encoding.PEM))
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
