"""Docstrings say "Example:", which Griffe takes for a remark; it knows "Examples:"."""

from typing import Any

from griffe import Docstring, Extension, Object


class ExampleSections(Extension):
    """Let examples of docstrings be shown as code."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Rename the section of one object's docstring."""
        if isinstance(obj.docstring, Docstring):
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
