"""search: the best table for a model."""


def search(*args, **kwargs):
    """Not there yet."""
    raise NotImplementedError("search is being built")
