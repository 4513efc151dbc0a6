"""Train short, test long: compare position schemes for language models by honest extrapolation curves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alibi_lm.load import load_run as load_run

__version__ = "0.1.0"
__all__ = ["__version__", "load_run"]


def __getattr__(name: str) -> Any:
    """Import `load_run` only when it is asked for, so that `import alibi_lm` stays light."""
    if name == "load_run":
        from alibi_lm.load import load_run

        return load_run
    raise AttributeError(f"module 'alibi_lm' has no attribute {name!r}")
