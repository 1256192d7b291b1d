"""The base of all errors: a message that names the thing, the rule and the remedy."""


class SparseFXError(Exception):
    """Base of all errors that SparseFX raises on purpose.

    Subclasses set `message`, a format string; its fields are the keyword arguments of the
    constructor and stay readable on the instance (`error.fields["name"]`).
    """

    message = "{detail}"

    def __init__(self, **fields: object) -> None:
        self.fields = fields
        super().__init__(self.message.format(**fields))
