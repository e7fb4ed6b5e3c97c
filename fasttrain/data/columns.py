"""What a set holds of each sample beside its shards: one verified array a thing, as `labels.npy`."""

import numpy as np

from fasttrain.data.arrays import REMEDY
from fasttrain.data.files import ShardFiles
from fasttrain.errors import UserError
from fasttrain.files import digest


def read_column(files: ShardFiles, name: str, wanted: str, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    """An array of a set.

    Args:
        files: of the set.
        name: the array's file.
        wanted: xxh3 of the file.
        dtype, shape: what it must hold.

    Raises:
        UserError: missing, damaged, or another array.
    """
    told = f"{files.place}/{name}"
    while True:
        try:
            path = files.path(name)
        except FileNotFoundError:
            raise UserError(f"{told}: missing; {REMEDY}") from None
        if digest(path) == wanted:
            break
        if not files.renew(name):
            raise UserError(f"{told}: its content is not what was prepared (xxh3 differs); {REMEDY}")
    try:
        column = np.load(path, allow_pickle=False)
    except ValueError as error:  # no array, or a pickle that calls itself one
        raise UserError(f"{told}: cannot be read: {error}; {REMEDY}") from None
    if column.dtype != dtype or column.shape != shape:
        raise UserError(f"{told}: holds {column.dtype} {column.shape} where the index says {np.dtype(dtype)} {shape}; {REMEDY}")
    return column
