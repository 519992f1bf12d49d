"""What is wrong with single examples, apart from what is wrong with a request."""


class BadExampleError(ValueError):
    """One trajectory cannot be used. The message names its file; a run may skip it and go on with the others."""
