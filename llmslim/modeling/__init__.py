"""The structures and the model classes that load them; plain torch and transformers."""

from llmslim.plugins import STRUCTURES as _STRUCTURES

plug_in = _STRUCTURES.plug_in
"""Where `structured` looks for what has no file here; a checkpoint's copy has no such thing."""
