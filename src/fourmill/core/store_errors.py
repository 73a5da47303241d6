"""What can be wrong with a store. OSErrors, not ValueErrors: code that forgives a bad file must not forgive these."""


class StoreError(OSError):
    """A store that cannot be used, said with the next step."""


class StoreFullError(StoreError):
    """No room for a file; says which, and how much it needs. Nothing of the file is left behind."""
