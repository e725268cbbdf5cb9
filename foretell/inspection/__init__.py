"""What a model is and what it costs, without loading its weights."""

from foretell.inspection.examine import Inspection, inspect_model
from foretell.inspection.report import as_dict

__all__ = ["Inspection", "as_dict", "inspect_model"]
