"""The line of Python that makes ``.npy`` files of another format."""

import os
from collections.abc import Mapping

_IMAGE = "PIL.Image", "numpy.asarray(PIL.Image.open({path}))"
# Suffix: the module that reads a file, and the expression that gives its array.
_READERS = {
    ".feather": ("pandas", "pandas.read_feather({path})"),
    ".xlsx": ("pandas", "pandas.read_excel({path})"),
    ".json": ("pandas", "pandas.read_json({path})"),
    ".jsonl": ("pandas", "pandas.read_json({path}, lines=True)"),
    ".pt": ("torch", "torch.load({path}, weights_only=True).numpy()"),
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp"), _IMAGE),
}


def how_to_convert(url: str, kinds: Mapping[str, tuple[int, str]]) -> str:
    """Return the line of Python that makes a ``.npy`` file of what lies at ``url``, or else what to mend.

    ``kinds`` holds, for every suffix that is there, how many files have it, and the first one's path.
    """
    suffix = next(filter(_READERS.__contains__, kinds), None)
    if suffix is None:
        return "mend the path, or convert the data: numpy.save('rows.npy', rows) writes an array (n, ...) of numbers"
    module, array = _READERS[suffix]
    many = not url.lower().endswith(suffix)
    if many:
        paths = f"sorted(pathlib.Path({url!r}).rglob('*{suffix}'))"
        join = "stack" if module == _IMAGE[0] else "concatenate"
        rows = f"numpy.{join}([{array.format(path='path')} for path in {paths}])"
    else:
        rows = array.format(path=repr(url)) + ("[None]" if module == _IMAGE[0] else "")
    modules = ", ".join(filter(None, ["numpy", module, "pathlib" if many else ""]))
    target = os.path.splitext(url.rstrip("/"))[0] + ".npy"
    return f"convert it with Python: import {modules}; numpy.save({target!r}, {rows})"
