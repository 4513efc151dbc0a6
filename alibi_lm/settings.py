"""The check behind every setting: what is wrong is said before any work starts."""


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless the condition holds.

    Messages have one form: `setting = value`, what is wrong with it or what is allowed, what to do.
    """
    if not condition:
        raise ValueError(message)


__all__ = ["require"]
