"""What every text must be, wherever it comes from."""


def is_whole(text: str) -> bool:
    """Whether no character of `text` is half a pair of surrogates, which no file holds."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
