"""Text files: one document each."""

from __future__ import annotations

from collections.abc import Iterator

from ...configs.errors import UsageError
from .compressed import open_input
from .documents import Document


def read_text_file(path: str, *, skip_undecodable: bool = False) -> Iterator[Document]:
    """The document that a text file is, with its line ends as they are; none when the file is empty.

    The text is UTF-8. Raises UsageError when it is not, unless ``skip_undecodable`` leaves such files out.
    """
    with open_input(path) as file:
        data = file.read()
    try:
        # utf-8-sig drops the byte order mark that some editors write and no model should learn.
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if skip_undecodable:
            return
        raise UsageError(
            f"{path} is not UTF-8 text (byte {error.start}); convert it to UTF-8 or leave it out"
        ) from error
    if text:
        yield Document(text, path)
