"""How two ends of a connection prove to each other that both know a token, which itself never travels.

Each answers the other's random challenge (HMAC-SHA256). What follows is neither encrypted nor signed: it is
as safe as the network that the training's own collectives trust.
"""

import hashlib
import hmac
import secrets
import socket

from checkpoint.errors import KeeperLost, PeerLost
from checkpoint.keeper.messages import receive, send

_CHALLENGE_BYTES = 32
_MAX_HELLO_BYTES = 1024
_PURPOSE = "holdfast-peers-1"


def new_token() -> str:
    """Return a token that nobody can guess."""
    return secrets.token_hex(_CHALLENGE_BYTES)


def admit(channel: socket.socket, token: str) -> None:
    """Let a caller in who knows the token, and prove that this end does. Raises KeeperLost for others."""
    own = secrets.token_hex(_CHALLENGE_BYTES)
    send(channel, {"speaks": _PURPOSE, "challenge": own})
    said = receive(channel, _MAX_HELLO_BYTES)
    theirs, proof = str(said.get("challenge", "")), str(said.get("proof", ""))
    if not hmac.compare_digest(proof.encode(), _proof(token, "caller", own, theirs).encode()):
        raise KeeperLost("a caller did not know the token of this keeper: it was turned away")
    send(channel, {"proof": _proof(token, "keeper", own, theirs)})


def introduce(channel: socket.socket, token: str) -> None:
    """Prove to a keeper that this end knows its token, and have it prove the same. Raises PeerLost."""
    try:
        said = receive(channel, _MAX_HELLO_BYTES)
        theirs, own = str(said.get("challenge", "")), secrets.token_hex(_CHALLENGE_BYTES)
        if said.get("speaks") != _PURPOSE:
            raise PeerLost("what listens there is no keeper of this version: use one version on all hosts")
        send(channel, {"challenge": own, "proof": _proof(token, "caller", theirs, own)})
        proof = str(receive(channel, _MAX_HELLO_BYTES).get("proof", ""))
    except (KeeperLost, ValueError) as error:
        raise PeerLost(f"it does not take this token, or has ended: {error}") from error
    if not hmac.compare_digest(proof.encode(), _proof(token, "keeper", theirs, own).encode()):
        raise PeerLost("what listens there does not know the keeper's token")


def _proof(token: str, role: str, first: str, second: str) -> str:
    said = f"{_PURPOSE}\0{role}\0{first}\0{second}"
    return hmac.new(token.encode(), said.encode(), hashlib.sha256).hexdigest()
