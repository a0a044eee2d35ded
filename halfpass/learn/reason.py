"""What an error of other code says, fit for the one line of ours."""


def reason(error: BaseException) -> str:
    """The error's class and its text on one line, at most 200 characters of it."""
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
