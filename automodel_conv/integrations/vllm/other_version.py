"""The class that other versions of vLLM than the supported ones call: it refuses each load.

It needs little of vLLM, so that load formats of any version work beside this package.
"""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportUntypedBaseClass=false

from __future__ import annotations

from typing import Any

import vllm
from vllm.model_executor.model_loader import BaseModelLoader

from automodel_conv.errors import UnsupportedError, message


class ModelLoader(BaseModelLoader):
    """Refuses each load.

    Raises:
        UnsupportedError: always.
    """

    def __new__(cls, load_config: Any) -> ModelLoader:  # __init__ would not run: the methods of loaders are missing
        raise UnsupportedError(
            message(
                "the load format automodel_conv does not know this version of vLLM",
                expected="vllm 0.33",
                found=f"vllm {vllm.__version__}",
                do="use --load-format auto, or another version of vLLM or of automodel-conv",
            )
        )
