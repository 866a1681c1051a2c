"""Say what is wrong with the installed torch and torchvision, if anything; exit code 2 then."""

import sys


def find_fault() -> str | None:
    """One line on what is missing or does not fit together, with the way out; None where all is well."""
    reinstall = "python -m pip install --force-reinstall -r requirements.txt"
    try:
        import torch
    except ImportError as error:
        return f"torch cannot be imported ({error}); run: {reinstall}"
    try:
        import torchvision
        from torchvision.ops import nms  # noqa: F401  the operator that a mixed pair lacks
    except (ImportError, RuntimeError, OSError) as error:
        return (
            f"torchvision does not fit torch {torch.__version__} ({str(error).splitlines()[0]}): they must come from "
            "the same release and the same build (both for the CPU or both for CUDA, from one package index); run: "
            f"{reinstall}"
        )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, {device}")
    return None


if __name__ == "__main__":
    fault = find_fault()
    if fault is not None:
        print(f"error: {fault}", file=sys.stderr)
        sys.exit(2)
