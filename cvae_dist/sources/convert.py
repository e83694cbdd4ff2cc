"""The line of Python that makes a ``.npy`` file of another format."""

import os

from cvae_dist.store import Location
from cvae_dist.store.foreign import zarr_conversion, zarr_kind

_IMAGE = "PIL.Image", "numpy.asarray(PIL.Image.open({path}))"
# Suffix: the module that reads a file, and the expression that gives its array.
_READERS = {
    ".csv": ("pandas", "pandas.read_csv({path})"),
    ".tsv": ("pandas", "pandas.read_csv({path}, sep='\\t')"),
    ".parquet": ("pandas", "pandas.read_parquet({path})"),
    ".feather": ("pandas", "pandas.read_feather({path})"),
    ".npz": ("", "next(iter(numpy.load({path}).values()))"),
    ".nc": ("xarray", "next(iter(xarray.open_dataset({path}).values()))"),
    ".h5": ("h5py", "next(iter(h5py.File({path}).values()))[:]"),
    ".hdf5": ("h5py", "next(iter(h5py.File({path}).values()))[:]"),
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif"), _IMAGE),
}


def how_to_convert(path: str) -> str:
    """Return the line of Python that makes a ``.npy`` file of what lies at a local path, or else what to mend."""
    if (kind := zarr_kind(Location.of(path))) is not None:
        return f"convert it with Python: {zarr_conversion(path, kind)}"
    folder = os.path.isdir(path)
    suffix = next(filter(_READERS.__contains__, map(_suffix, _files(path) if folder else [path])), None)
    if suffix is None:
        return "mend the path, or convert the data: numpy.save('rows.npy', rows) writes an array (n, ...) of numbers"
    module, array = _READERS[suffix]
    if folder:
        paths = f"sorted(pathlib.Path({path!r}).rglob('*{suffix}'))"
        join = "stack" if module == _IMAGE[0] else "concatenate"
        rows = f"numpy.{join}([{array.format(path='path')} for path in {paths}])"
    else:
        rows = array.format(path=repr(path)) + ("[None]" if module == _IMAGE[0] else "")
    modules = ", ".join(filter(None, ["numpy", module, "pathlib" if folder else ""]))
    target = os.path.splitext(path.rstrip("/"))[0] + ".npy"
    return f"convert it with Python: import {modules}; numpy.save({target!r}, {rows})"


def _files(folder: str) -> "list[str]":
    return [name for _, _, names in os.walk(folder) for name in names]


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()
