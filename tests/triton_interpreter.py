"""Triton's interpreter, in half the time."""

from typing import Any


def hasten() -> None:
    """Prepare triton.language once for the functions of a module.

    The interpreter does so at each call of a function by a kernel, which takes longer than what most of them
    compute. The launch of a kernel prepares it too, and is left as it is.
    """
    from triton.runtime.interpreter import InterpretedFunction

    prepare_and_call, prepared = InterpretedFunction.__call__, set()

    def call(function: Any, *arguments: Any, **options: Any) -> Any:
        module = function.fn.__module__
        if module in prepared:
            return function.rewrite()(*arguments, **options)
        prepared.add(module)
        return prepare_and_call(function, *arguments, **options)

    InterpretedFunction.__call__ = call
