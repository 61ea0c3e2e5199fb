"""The file that makes a compact checkpoint load without this package.

``lowrank_plugin.py`` is the text of ``lowrank_ft.nn.lowrank_linear`` followed by that of ``lowrank_ft.checkpoints.loader``: the
very code that the package runs, so the two cannot drift apart. ``config.json`` names it under ``auto_map``, and
transformers runs it when the user says ``trust_remote_code=True``.
"""

import inspect
import re

from lowrank_ft.checkpoints import loader
from lowrank_ft.nn import lowrank_linear

PLUGIN_FILE = "lowrank_plugin.py"
AUTO_MAP = {"AutoConfig": f"{PLUGIN_FILE.removesuffix('.py')}.{loader.LowRankAutoConfig.__name__}"}

_HEADER = '''"""Loads this low-rank checkpoint where the package lowrank-ft is not installed.

    AutoModel.from_pretrained(..., trust_remote_code=True)

Written by lowrank-ft from its own modules; it needs torch and transformers and touches no network and no other file.
"""

'''
_OWN_IMPORT = re.compile(r"^from lowrank_ft\.nn\.lowrank_linear import LowRankLinear, lowrank_layers\n", re.MULTILINE)
_MODULE_DOCSTRING = re.compile(r'\A""".*?"""\n', re.DOTALL)


def plugin_source() -> str:
    """The text of ``lowrank_plugin.py``."""
    layer = _MODULE_DOCSTRING.sub("", inspect.getsource(lowrank_linear)).strip()
    code, replaced = _OWN_IMPORT.subn("", _MODULE_DOCSTRING.sub("", inspect.getsource(loader)).strip())
    assert replaced == 1, "the loader no longer imports LowRankLinear the way that the plugin expects"
    return f"{_HEADER}{layer}\n\n\n{code}\n"
