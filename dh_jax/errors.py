"""Errors a user can mend: one line that names the value, the limit and the cure."""


class UserError(Exception):
    """Root of every error that the command line prints as one line with exit code 2."""


class ConfigError(UserError, ValueError):
    """A configuration asks for something impossible or unknown."""


class DataError(UserError, ValueError):
    """A document, file or store cannot be read as what it claims to be."""


class StateError(UserError, ValueError):
    """A saved state (loader, checkpoint, store) does not belong to what is being restored."""
