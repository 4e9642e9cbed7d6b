"""Foreign text in messages, logs and captions."""


def quoted(text: object, limit: int = 100) -> str:
    """Text from elsewhere in single quotes, for one line of a message or a report.

    What does not print (control codes, line breaks, escapes of a terminal, bidirectional marks) is escaped, and what
    exceeds `limit` characters is cut in the middle, with the number of characters in all.
    """
    text = text if isinstance(text, str) else str(text)
    if len(text) > limit:
        half = limit // 2
        return f"{_escaped(text[:half])}...{_escaped(text[-half:])} ({len(text)} characters)"
    return _escaped(text)


def _escaped(text: str) -> str:
    return "'" + "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text) + "'"
