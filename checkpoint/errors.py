"""What can go wrong with checkpoints, as one tree.

CheckpointError
├── StoreError              the store did not do what it was asked
│   ├── StoreUnavailable    it cannot be reached just now: trying again may help
│   │   └── StoreRefused    it says no (missing bucket, no permission, disk full): a person has to mend it
│   ├── AlreadyExists       put_new found the key taken
│   └── NotFound            there is no such key, or it holds fewer bytes than were asked for
├── FormatError             bytes or state that the format does not speak
│   ├── Corrupt             what was read is not what was written
│   ├── Misuse              what was asked for cannot be: ask for something else
│   └── Unsupported         written by a version, or in a type, that this reader does not know
├── Incomplete              chunks do not cover a tensor exactly once
├── Mismatch                a checkpoint of another model
├── Torn                    a tensor changed while it was being captured
├── NoCheckpoint            there is nothing to restore
│   └── NoSuchStep          there is none of the step that was named
├── Conflict                two different manifests claim one step
├── KeeperLost              the process that kept this host's snapshots is gone
├── KeeperBusy              it serves others, who asked for something else of it
├── ArenaFull               a snapshot does not fit into the arena
├── PeerLost                a host that keeps fragments for others cannot be reached
└── Unrecoverable           more of a parity group is lost than its parity makes up for

A message says what, which key or tensor, and what to do. Errors carry text only, never what they speak of.
"""


class CheckpointError(Exception):
    """Whatever the checkpoint engine raises on purpose."""


class StoreError(CheckpointError):
    """The store did not do what it was asked."""


class StoreUnavailable(StoreError):
    """The store cannot be reached; the request may or may not have been carried out."""


class StoreRefused(StoreUnavailable):
    """The store cannot be used as it is; asking again is of no use."""


class AlreadyExists(StoreError):
    """The key is taken; its value was left as it was."""


class NotFound(StoreError):
    """The key, or some of the bytes asked for, is not there."""


class FormatError(CheckpointError):
    """Bytes or state that the checkpoint format does not speak."""


class Corrupt(FormatError):
    """What was read is not what was written."""


class Unsupported(FormatError):
    """Written by a version, or made of a type, that this code does not know."""


class Misuse(FormatError):
    """What was asked for cannot be, or is not there: a layout, a size, a name, a pattern of names."""


class Incomplete(CheckpointError):
    """Chunks do not cover a tensor exactly once."""


class Mismatch(CheckpointError):
    """The checkpoint belongs to another model."""


class Torn(CheckpointError):
    """A tensor changed while it was being captured."""


class NoCheckpoint(CheckpointError):
    """There is no checkpoint to restore."""


class NoSuchStep(NoCheckpoint):
    """There is no checkpoint of the step that was named."""


class Conflict(CheckpointError):
    """Two different checkpoints claim the same step."""


class KeeperLost(CheckpointError):
    """The keeper of this host's snapshots is gone."""


class KeeperBusy(CheckpointError):
    """The keeper of this host serves other processes, with other settings."""


class ArenaFull(CheckpointError):
    """The snapshot does not fit into the arena."""


class PeerLost(CheckpointError):
    """A peer, or the fragment it was to keep, is gone."""


class Unrecoverable(CheckpointError):
    """Too few fragments are left to rebuild from."""
