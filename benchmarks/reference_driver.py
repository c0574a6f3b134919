"""Start of the reference quantizer on a machine without its device, in its own environment.

The tool moves the modules of multi-token prediction to "npu" whatever --device says. Here "npu" is the CPU; nothing
else of it is changed.
"""

import sys
from typing import Any

import torch


def on_cpu(method: Any) -> Any:
    """`method`, where "npu" means "cpu"."""

    def moved(self: Any, *given: Any, **named: Any) -> Any:
        return method(self, *["cpu" if value == "npu" else value for value in given], **named)

    return moved


def main() -> None:
    torch.set_num_threads(1)
    torch.nn.Module.to = on_cpu(torch.nn.Module.to)  # type: ignore[method-assign]
    torch.Tensor.to = on_cpu(torch.Tensor.to)  # type: ignore[method-assign]
    from msmodelslim.cli.__main__ import main as run  # type: ignore[import-not-found]

    sys.argv[0] = "msmodelslim"
    run()


if __name__ == "__main__":
    main()
