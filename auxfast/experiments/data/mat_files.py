"""MATLAB's files, up to its format 7, read with SciPy, which runs nothing that such a file holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from auxfast.experiments.data.extras import import_extra
from auxfast.experiments.data.files import DatasetError


def read_mat(path: Path, *names: str, squeeze: bool = False) -> tuple[np.ndarray, ...]:
    """The variables of these names in a file; with `squeeze`, without axes of length 1, in their elements too.

    Raises:
        DatasetError: the file is no MATLAB file, is damaged, or lacks one of them.
        MissingExtraError: SciPy is not installed.
    """
    loadmat = import_extra("scipy.io", "scipy").loadmat
    try:
        content = loadmat(str(path), appendmat=False, variable_names=names, squeeze_me=squeeze)
    except Exception as error:  # what is raised depends on the byte that is wrong: TypeError, zlib.error and more
        raise DatasetError(f"{path}: {str(error) or type(error).__name__}, expected a whole MATLAB file") from error
    missing = [name for name in names if name not in content]
    if missing:
        raise DatasetError(f"{path}: no variable {missing[0]}, expected {' and '.join(names)}")
    return tuple(np.asarray(content[name]) for name in names)
