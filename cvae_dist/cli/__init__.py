"""The command line: one command for each verb, and ``run`` for a pipeline file.

Options come from flags, else from the environment (``CVAE_DIST_DIM_LATENT=8``), else from the YAML file that
``--config`` names, else from the defaults. A variable that no command knows is warned about. Results go to stdout, all
else to stderr. Exit codes: 0 done (also when there was nothing to do), 1 failed, 2 wrong usage, 124 out of time (the
same command goes on), 130 interrupted, 143 terminated. With ``--json`` the last line on stdout is one object, however
the command ended.

A command is made when it is asked for. ``--help`` needs neither torch nor Dask.
"""

from cvae_dist.cli import commands  # noqa: F401 - it adds the commands to app
from cvae_dist.cli.parser import app
from cvae_dist.cli.process import main

__all__ = ["app", "main"]
