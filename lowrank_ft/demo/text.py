"""The demo's text: the topics of Python's ``help()``, English prose that every Python installation has.

The embedded model was trained on the standard library's source code, without these, so they are text of another kind.
"""

from pydoc_data.topics import topics

from lowrank_ft.errors import DataError


def prose() -> tuple[list[str], list[str]]:
    """Documents to fine-tune on, and every tenth one held out.

    Raises:
        DataError: this Python was built without its help topics.
    """
    documents = [topics[name] for name in sorted(topics)]
    if sum(map(len, documents)) < 200_000:
        raise DataError("this Python has no help topics (pydoc_data); run the demo with a complete installation")
    held_out = documents[::10]
    return [d for i, d in enumerate(documents) if i % 10], held_out
