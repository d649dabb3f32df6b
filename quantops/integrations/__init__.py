"""Callbacks for the trainers of other libraries, each imported where it is used: ``quantops.integrations.transformers``
and ``quantops.integrations.lightning``."""
