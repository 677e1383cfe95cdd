"""Weight files: the model alone, in safetensors, readable without this library."""

from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from separata_shared.files import atomic_write


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """State of ``model`` on the host, whole even if sharded; every process calls it.

    A tensor with several names, such as a tied embedding, appears under its first name.
    """
    named = (*model.named_parameters(), *model.named_buffers())  # each tensor once
    state = model.state_dict()
    return {name: _whole(state[name]) for name, _ in named if name in state}


def _whole(tensor: Tensor) -> Tensor:
    if hasattr(tensor, "full_tensor"):  # a DTensor of FSDP2
        tensor = tensor.full_tensor()
    return tensor.detach().cpu().contiguous()


def save_weights(path: Path | str, state: dict[str, Tensor]) -> None:
    """Write a state atomically.

    Raises:
        OSError: It cannot be written; nothing is left behind.
    """
    with atomic_write(path) as temporary:
        try:
            save_file(state, temporary)
        except SafetensorError as error:
            raise OSError(f"{path}: could not be written ({error})") from None


def read_weights(path: Path | str) -> dict[str, Tensor]:
    """Read a weight file.

    Raises:
        ValueError: It is missing, truncated or something else.
    """
    try:
        return load_file(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from None


def load_weights(model: nn.Module, path: Path | str) -> None:
    """Copy a weight file into ``model``, which stays as it was if the two do not fit.

    Args:
        model: Model of the same architecture.
        path: File that ``fit`` or ``save_weights`` wrote.

    Raises:
        ValueError: A tensor is missing, unknown, of another shape or not finite; the message
            names it.
    """
    state = read_weights(path)
    own = model.state_dict()
    for name in state:
        if name not in own:
            raise ValueError(f"{path}: unknown tensor {name}; the file is of another model")
        if state[name].shape != own[name].shape:
            raise ValueError(
                f"{path}: {name} has shape {tuple(state[name].shape)}, "
                f"the model needs {tuple(own[name].shape)}"
            )
        if not state[name].isfinite().all():
            raise ValueError(f"{path}: {name} holds NaN or infinite numbers")
    present = {_identity(own[name]) for name in state}
    for name, tensor in own.items():
        if _identity(tensor) not in present:
            raise ValueError(f"{path}: lacks {name}; the file is of another model")
    model.load_state_dict(state, strict=False)


def average_weights(paths: Sequence[Path | str]) -> dict[str, Tensor]:
    """Mean of weight files, computed in float64 and returned in the files' types.

    Tensors that are not floating-point are taken from the last file.

    Raises:
        ValueError: There is no file, or the files are of different models.
    """
    if not paths:
        raise ValueError("average_weights: no weight files given")
    first = read_weights(paths[0])
    sums = {name: tensor.double() for name, tensor in first.items()}
    last = first
    for path in paths[1:]:
        last = read_weights(path)
        for name in sorted(first.keys() | last.keys()):
            if name not in first or name not in last or first[name].shape != last[name].shape:
                raise ValueError(f"{path}: {name} does not match {paths[0]}")
        for name, total in sums.items():
            total += last[name]
    return {
        name: (sums[name] / len(paths)).to(tensor.dtype) if tensor.is_floating_point() else tensor
        for name, tensor in last.items()
    }


def _identity(tensor: Tensor) -> tuple[object, ...]:
    # Names that share memory and layout are one tensor.
    if tensor.numel() == 0 or tensor.device.type == "meta":
        return (id(tensor),)
    return (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
