"""baleen: an inference engine and server for the DeepSeek-V3.2 family, built around DeepSeek Sparse Attention.

`LLM` runs the engine offline, `SamplingParams` says how to sample. Importing baleen imports no torch: the names load
when used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from baleen.llm import LLM
    from baleen.messages import SamplingParams

__all__ = ["LLM", "SamplingParams", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from baleen.llm import LLM

        return LLM
    if name == "SamplingParams":
        from baleen.messages import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'baleen' has no attribute {name!r}")
