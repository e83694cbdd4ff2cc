"""The command line: one function per command, each a thin wrapper of the verb of the same name.

Options come from flags, else from the environment (``CVAE_DIST_DIM_LATENT=8``), else from the YAML file
named by ``--config``, else from the defaults. Results go to stdout, everything else to stderr. Exit codes:
0 done (also when there was nothing to do), 1 failed, 2 wrong usage, 130 interrupted, 143 terminated.

Commands import their verbs inside, so that ``--help`` needs neither torch nor Dask.
"""

from cvae_dist.cli import commands, plot_commands  # noqa: F401 - they add themselves to app
from cvae_dist.cli.parser import app
from cvae_dist.cli.process import main

__all__ = ["app", "main"]
