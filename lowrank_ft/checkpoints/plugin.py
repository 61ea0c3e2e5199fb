"""The file that makes a compact checkpoint load without this package.

``lowrank_plugin.py`` is the text of ``lowrank_ft.nn.lowrank_linear``, that of ``lowrank_ft.nn.factored_experts`` and those of
``lowrank_ft.checkpoints.second`` and ``loader``: the very code that the package runs, so the two cannot drift apart.
``config.json`` names it under ``auto_map``, and transformers runs it when the user says ``trust_remote_code=True``.
"""

import inspect
import re

from lowrank_ft.checkpoints import loader, second
from lowrank_ft.nn import factored_experts, lowrank_linear

PLUGIN_FILE = "lowrank_plugin.py"
AUTO_MAP = {"AutoConfig": f"{PLUGIN_FILE.removesuffix('.py')}.{loader.LowRankAutoConfig.__name__}"}

_HEADER = '''"""Loads this low-rank checkpoint where the package lowrank-ft is not installed.

    AutoModel.from_pretrained(..., trust_remote_code=True)

Written by lowrank-ft from its own modules; it needs torch and transformers and touches no network and no other file.
"""

'''
_OWN_IMPORT = re.compile(r"^from lowrank_ft\.(nn\.\w+|checkpoints\.second) import [\w, ]+\n", re.MULTILINE)
_MODULE_DOCSTRING = re.compile(r'\A""".*?"""\n', re.DOTALL)


def plugin_source() -> str:
    """The text of ``lowrank_plugin.py``."""
    modules = (lowrank_linear, factored_experts, second, loader)
    texts = [_MODULE_DOCSTRING.sub("", inspect.getsource(module)) for module in modules]
    code = "\n\n\n".join(_OWN_IMPORT.sub("", text).strip() for text in texts)
    assert "from lowrank_ft" not in code, "the loader imports more of the package than the plugin brings along"
    return f"{_HEADER}{code}\n"
