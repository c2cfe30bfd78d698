"""The settings of pvec: one typed tree, and where each value comes from.

``Settings()`` is the defaults, whatever the environment says; ``resolve`` reads files, environment
and command line. The types of the sections are in ``pvec.settings.sections``.
"""

from pvec.settings.resolve import Resolved, load_dotenv, resolve
from pvec.settings.tree import Settings

__all__ = ["Resolved", "Settings", "load_dotenv", "resolve"]
