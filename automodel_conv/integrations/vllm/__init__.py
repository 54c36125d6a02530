"""Integration with vLLM: a load format that fills vLLM's models by plans traced from their own ``load_weights``.

vLLM finds ``register`` by the entry point of this package in the group ``vllm.general_plugins``, in every process that
it starts. Users state ``--load-format automodel_conv``.
"""

from __future__ import annotations

LOAD_FORMAT = "automodel_conv"
"""Name of the load format."""

_VERSIONS = ("0.33.",)


def register() -> None:
    """Register the load format "automodel_conv" with vLLM in this process.

    vLLM calls this when it loads its plugins. With a version of vLLM that is not supported, the format refuses each
    load, and other load formats work.

    Raises:
        ImportError: vLLM is not installed.

    Example:
        >>> from contextlib import suppress
        >>> with suppress(ImportError):  # raised if vLLM is not installed
        ...     register()
    """
    from vllm import __version__  # pyright: ignore
    from vllm.model_executor.model_loader import register_model_loader  # pyright: ignore[reportMissingImports]

    if __version__.startswith(_VERSIONS):
        from automodel_conv.integrations.vllm.loader import ModelLoader
    else:
        from automodel_conv.integrations.vllm.other_version import ModelLoader
    register_model_loader(LOAD_FORMAT)(ModelLoader)
