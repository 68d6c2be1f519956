"""The exceptions a user is meant to read."""


class UserError(ValueError):
    """Bad input from outside: a config key, a flag, a checkpoint, a shard.

    The message is one line that names the key or the file and says how to mend it. Entry points print it
    without a traceback and exit with status 2; anything else that escapes is a bug in this project.
    """


class TransientError(UserError):
    """No input is to blame: a disk, a network or a GPU failed that may be back at the next try. Training exits with
    status 1, as after any crash, and launchers try it again.
    """


class ProcessLost(TransientError):
    """A process of ours was killed, as a rule by a system that ran out of memory."""
