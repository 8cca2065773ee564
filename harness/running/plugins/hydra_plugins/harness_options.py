"""Has Hydra look for options in the user's own directories too: what ``harness.plan --fit`` and searches wrote."""

from __future__ import annotations

import contextlib

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

from harness.basics.errors import UserError
from harness.config import compose
from harness.config.own import own_options, tuned_options


class OwnOptions(SearchPathPlugin):
    """Adds :func:`~harness.config.own.own_options` behind ``conf/``, and what searches left in ``results_dir``."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Called by Hydra whenever it composes."""
        found = [tuned_options(compose.results_dir)]
        with contextlib.suppress(UserError):  # nobody's home
            found.append(own_options())
        for own in found:
            if own.is_dir():
                search_path.append(provider="harness", path=f"file://{own.resolve()}")
