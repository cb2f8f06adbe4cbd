"""What a person did that cannot work, said in one sentence. Knows nothing of the rest of the package."""


class InputError(ValueError):
    """Bad input: the message names the value, the place and the way out. `run` exits with code 2 on it."""
